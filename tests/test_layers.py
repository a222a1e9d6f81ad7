"""Architecture rules: import layers, module size and docstrings."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import shiq_jax

ROOT = Path(shiq_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400
# From the lowest layer to the highest; a package may import only from the layers below its own.
LAYERS = (
    {"objectives", "sharding"},
    {"models", "privacy", "replay", "data"},
    {"training", "rollout", "federated"},
    {"runs", "tasks"},
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}
ALLOWED_WITHIN_LAYER = {
    ("training", "rollout"),
    ("federated", "training"),
    ("privacy", "models"),
    ("data", "replay"),
    ("runs", "tasks"),
}
# Modules that every package but `objectives` may import.
BASE = {"errors", "progress", "stopping"}
OBJECTIVES_DEPENDENCIES = {"jax", "numpy", "chex", "jaxtyping"}


def parent_package(file: Path) -> tuple[str, ...]:
    return ("shiq_jax", *file.relative_to(ROOT).parent.parts)


def top_level_name(file: Path) -> str:
    """Name of the subpackage or module directly under `shiq_jax` that holds the file; empty for `__init__.py`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported_names(source: str, package: tuple[str, ...] = ("shiq_jax",)) -> Iterator[str]:
    """Yield the absolute name of every import, local ones included; `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def third_party(names: Iterable[str]) -> set[str]:
    """Top-level packages outside `shiq_jax` and the standard library."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"shiq_jax"}


def subpackages(names: Iterable[str]) -> set[str]:
    """Names directly under `shiq_jax` among the imported names."""
    return {name.split(".")[1] for name in names if name.startswith("shiq_jax.")}


def forbidden(importer: str, imported: set[str]) -> set[str]:
    """Imported subpackages that `importer` may not depend on."""

    def allowed(target: str) -> bool:
        if importer == target:
            return True
        if importer in {"", *BASE}:
            return False
        if target in BASE:
            return importer != "objectives"
        return LAYER.get(target, len(LAYERS)) < LAYER[importer] or (importer, target) in ALLOWED_WITHIN_LAYER

    return {target for target in imported if not allowed(target)}


def undocumented(source: str) -> list[str]:
    """Public functions, classes and methods of a module that lack a docstring."""

    def missing(body, prefix=""):
        for node in body:
            definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if not definition or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from missing(node.body, f"{prefix}{node.name}.")

    return list(missing(ast.parse(source).body))


def test_every_package_has_a_layer():
    packages = {top_level_name(file) for file in FILES} - {"", *BASE}
    assert packages <= set(LAYER)
    assert {"objectives", "sharding", "models", "replay", "data", "rollout", "training", "runs", "tasks"} <= packages


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_respect_layers(file):
    names = set(imported_names(file.read_text(), parent_package(file)))
    assert forbidden(top_level_name(file), subpackages(names)) == set()
    assert third_party(names).isdisjoint({"train", "eval", "tests", "benchmarks", "experiments"})


@pytest.mark.parametrize("file", sorted((ROOT / "objectives").glob("*.py")), ids=lambda file: file.name)
def test_objectives_import_only_allowed_dependencies(file):
    names = set(imported_names(file.read_text(), parent_package(file)))
    assert third_party(names) <= OBJECTIVES_DEPENDENCIES
    assert subpackages(names) <= {"objectives"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_size_and_docstrings(file):
    source = file.read_text()
    assert source.count("\n") <= MAX_LINES
    assert undocumented(source) == []
    assert ast.get_docstring(ast.parse(source)) or not source.strip()


def test_objectives_import_without_optional_packages():
    blocked = ("transformers", "flax", "optax", "pyarrow", "orbax", "datasets", "safetensors", "torch", "rich", "tyro")
    program = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
try:
    import flax
except ImportError:
    pass
else:
    raise SystemExit("nothing is blocked")
import shiq_jax
loaded = sorted(name for name in sys.modules if name.startswith("shiq_jax."))
assert "jax" not in sys.modules and not loaded, loaded
import shiq_jax.objectives
loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("shiq_jax.")}}
assert loaded == {{"objectives"}}, loaded
print(sorted(shiq_jax.objectives.OBJECTIVES))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "'shiq'" in result.stdout


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        ("objectives", "import shiq_jax.sharding", {"sharding"}),
        ("objectives", "from shiq_jax.errors import UserError", {"errors"}),
        ("sharding", "from shiq_jax.errors import UserError", set()),
        ("models", "from shiq_jax.progress import track", set()),
        ("objectives", "from shiq_jax.progress import track", {"progress"}),
        ("errors", "from shiq_jax.progress import track", {"progress"}),
        ("models", "def lazy():\n    from shiq_jax.replay import Record", {"replay"}),
        ("replay", "from shiq_jax import data", {"data"}),
        ("replay", "from ..training import metrics", {"training"}),
        ("replay", "import importlib\nimportlib.import_module('shiq_jax.rollout.collect')", {"rollout"}),
        ("models", "from . import config\nfrom .cache import Cache", set()),
        ("data", "from shiq_jax.replay import Record", set()),
        ("rollout", "import shiq_jax.training.state as state", {"training"}),
        ("training", "import shiq_jax.runs.metrics as metrics", {"runs"}),
        ("tasks", "from shiq_jax.runs import options", {"runs"}),
        ("runs", "from shiq_jax.tasks import rewards", set()),
        ("rollout", "from shiq_jax.somewhere import thing", {"somewhere"}),
        ("training", "from shiq_jax.rollout.generate import Sampler\nimport shiq_jax.federated", {"federated"}),
        ("federated", "from shiq_jax.training import state", set()),
        ("privacy", "from shiq_jax.models import Model\nfrom shiq_jax.replay import pack", {"replay"}),
        ("", "import shiq_jax.objectives", {"objectives"}),
        ("errors", "import shiq_jax.objectives", {"objectives"}),
    ],
)
def test_forbidden_imports_are_detected(importer, source, expected):
    package = ("shiq_jax", importer) if importer not in {"", *BASE} else ("shiq_jax",)
    assert forbidden(importer, subpackages(imported_names(source, package))) == expected


def test_missing_docstrings_are_detected():
    methods = 'class D:\n    "D"\n    def e(self): pass\n    def _f(self): pass\n'
    source = 'def _a(): pass\ndef b(): "b"\ndef c(): pass\n' + methods
    assert undocumented(source) == ["c", "D.e"]


def test_third_party_imports_are_detected():
    assert third_party(imported_names("import json, jax.numpy as jnp\nfrom optax import adam")) == {"jax", "optax"}
