"""The architecture: who may import whom, what a file may weigh, and that public names explain themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shiq_jax

ROOT = Path(shiq_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES = 400
FLOORS = (
    {"objectives", "sharding"},
    {"models", "privacy", "replay", "data"},
    {"training", "rollout", "federated"},
    {"runs", "tasks"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {
    ("training", "rollout"),
    ("federated", "training"),
    ("privacy", "models"),
    ("data", "replay"),
    ("runs", "tasks"),
}
# UserErrors, progress and stop requests stand under the whole house, but the losses do not lean even on those.
GROUND = {"errors", "progress", "stopping"}
OF_OBJECTIVES = {"jax", "numpy", "chex", "jaxtyping"}


def package_of(file: Path) -> tuple[str, ...]:
    return ("shiq_jax", *file.relative_to(ROOT).parent.parts)


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(source: str, package: tuple[str, ...] = ("shiq_jax",)) -> Iterator[str]:
    """Absolute names of everything that a source imports, wherever in it; `package` resolves relative imports."""
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


def foreign(names: Iterator[str]) -> set[str]:
    """Top-level packages that are neither ours nor in the standard library."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"shiq_jax"}


def rooms(names: Iterator[str]) -> set[str]:
    """The rooms of ours among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("shiq_jax.")}


def forbidden(importer: str, found: set[str]) -> set[str]:
    """Those of the imported rooms that a room may not know."""

    def allowed(other: str) -> bool:
        if importer == other:
            return True
        if importer in {"", *GROUND}:
            return False
        if other in GROUND:
            return importer != "objectives"
        return FLOOR.get(other, len(FLOORS)) < FLOOR[importer] or (importer, other) in EXCEPTIONS

    return {other for other in found if not allowed(other)}


def undocumented(source: str) -> list[str]:
    """Public functions and classes of a module, and public methods of such classes, that lack a docstring."""

    def missing(body, prefix=""):
        for node in body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if not named or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from missing(node.body, f"{prefix}{node.name}.")

    return list(missing(ast.parse(source).body))


def test_every_room_has_a_floor():
    found = {room_of(file) for file in FILES} - {"", *GROUND}
    assert found <= set(FLOOR)
    assert {"objectives", "sharding", "models", "replay", "data", "rollout", "training", "runs", "tasks"} <= found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    names = set(imported(file.read_text(), package_of(file)))
    assert forbidden(room_of(file), rooms(names)) == set()
    assert foreign(names).isdisjoint({"train", "eval", "tests", "benchmarks", "experiments"})


@pytest.mark.parametrize("file", sorted((ROOT / "objectives").glob("*.py")), ids=lambda file: file.name)
def test_losses_need_little(file):
    names = set(imported(file.read_text(), package_of(file)))
    assert foreign(names) <= OF_OBJECTIVES
    assert rooms(names) <= {"objectives"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_one_idea_that_explains_itself(file):
    source = file.read_text()
    assert source.count("\n") <= LINES
    assert undocumented(source) == []
    assert ast.get_docstring(ast.parse(source)) or not source.strip()


def test_losses_import_where_little_is_installed():
    absent = ("transformers", "flax", "optax", "pyarrow", "orbax", "datasets", "safetensors", "torch", "rich", "tyro")
    program = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
try:
    import flax
except ImportError:
    pass
else:
    raise SystemExit("nothing is blocked")
import shiq_jax
ours = sorted(name for name in sys.modules if name.startswith("shiq_jax."))
assert "jax" not in sys.modules and not ours, ours
import shiq_jax.objectives
ours = {{name.split(".")[1] for name in sys.modules if name.startswith("shiq_jax.")}}
assert ours == {{"objectives"}}, ours
print(sorted(shiq_jax.objectives.OBJECTIVES))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'shiq'" in done.stdout


@pytest.mark.parametrize(
    ("importer", "source", "found"),
    [
        ("objectives", "import shiq_jax.sharding", {"sharding"}),
        ("objectives", "from shiq_jax.errors import UserError", {"errors"}),
        ("sharding", "from shiq_jax.errors import UserError", set()),
        ("models", "from shiq_jax.progress import track", set()),
        ("objectives", "from shiq_jax.progress import track", {"progress"}),
        ("errors", "from shiq_jax.progress import track", {"progress"}),
        ("models", "def late():\n    from shiq_jax.replay import Record", {"replay"}),
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
def test_a_wrong_import_is_seen(importer, source, found):
    package = ("shiq_jax", importer) if importer not in {"", *GROUND} else ("shiq_jax",)
    assert forbidden(importer, rooms(imported(source, package))) == found


def test_a_missing_docstring_is_seen():
    methods = 'class D:\n    "D"\n    def e(self): pass\n    def _f(self): pass\n'
    source = 'def _a(): pass\ndef b(): "b"\ndef c(): pass\n' + methods
    assert undocumented(source) == ["c", "D.e"]
    assert foreign(imported("import json, jax.numpy as jnp\nfrom optax import adam")) == {"jax", "optax"}
