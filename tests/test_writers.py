"""Architecture rule: only `shiq_jax.sharding.hosts` fetches sharded arrays and decides which process writes files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shiq_jax

ROOT = Path(shiq_jax.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT / "sharding"]
FETCH_CALLS = {"device_get", "process_allgather", "process_index", "process_count", "sync_global_devices"}
WRITE_CALLS = {
    "chmod", "copy2", "copyfile", "copytree", "hardlink_to", "link", "makedirs", "mkdir", "mkdtemp", "mkstemp", "move",
    "rename", "rmdir", "rmtree", "save_file", "save_pretrained", "savefig", "symlink", "symlink_to", "touch",
    "truncate", "unlink", "write_bytes", "write_table", "write_text", "NamedTemporaryFile", "TemporaryDirectory",
}  # fmt: skip
WRITE_MODE = r"[wxa][bt+]*|r[bt]*\+[bt]*"
# Modules in which every process writes, and why.
WRITES_ON_EVERY_PROCESS = {
    "replay/locks.py": "each process holds its own lock",
    "runs/compilation_cache.py": "each host has its own cache",
    "tasks/fetch.py": "each host has its own cache",
    "tasks/gguf.py": "converts a fetched file inside the cache",
}


def name_of(node: ast.AST) -> str | None:
    return getattr(node, "attr", getattr(node, "id", None))


def writes(call: ast.Call) -> bool:
    """Whether a call modifies files, judged by its name and arguments."""
    name, owner = name_of(call.func), name_of(getattr(call.func, "value", None))
    if name == "open":
        flags = {name_of(node) for node in ast.walk(call)}
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = {str(node.value) for node in arguments if isinstance(node, ast.Constant)}
        return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}) or any(re.fullmatch(WRITE_MODE, mode) for mode in modes)
    if name == "replace":
        # `os.replace` and `Path.replace`, but not `str.replace` or `dataclasses.replace`.
        return owner == "os" or (len(call.args) == 1 and not call.keywords and owner != "dataclasses")
    return name in WRITE_CALLS or (name in ("save", "savez") and owner == "np")


def unguarded_writes(source: str) -> list[str]:
    """Calls that write outside functions decorated with `hosts.on_writer`."""

    def visit(node: ast.AST) -> Iterator[str]:
        decorators = getattr(node, "decorator_list", ())
        if any(name_of(part) == "on_writer" for decorator in decorators for part in ast.walk(decorator)):
            return
        if isinstance(node, ast.Call) and writes(node):
            yield f"line {node.lineno}: {name_of(node.func)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return list(visit(ast.parse(source)))


def fetches(source: str) -> set[str]:
    """Names of FETCH_CALLS that a source imports or uses, other than as attributes of `hosts`."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {name_of(node) for node in nodes if name_of(getattr(node, "value", None)) != "hosts"}
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return FETCH_CALLS & (used | imported)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_fetches_and_writes_through_hosts(file):
    source = file.read_text()
    assert fetches(source) == set()
    writes_on_every_process = str(file.relative_to(ROOT)) in WRITES_ON_EVERY_PROCESS
    assert bool(unguarded_writes(source)) == writes_on_every_process, unguarded_writes(source)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.mkdir()", 1),
        ("hosts.on_writer(path.mkdir)(exist_ok=True)", 0),
        ("@hosts.on_writer\ndef write(path):\n    with open(path, 'wb') as file:\n        file.write(b'')", 0),
        ("@hosts.on_writer(wait=False)\ndef write(path):\n    path.unlink()", 0),
        ("class A:\n    @on_writer\n    def f(self):\n        a.touch()\n    def g(self):\n        a.touch()", 1),
        ("def write(path):\n    open(path, mode='a')\n    path.open('w')\n    path.open('rb')\n    open(path)", 2),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)\nos.open(path, os.O_RDONLY)", 1),
        ("file.replace(path)\n'a'.replace('a', 'b')\ndataclasses.replace(a, b=1)\nfield.replace(default=1)", 1),
        ("shutil.rmtree(path)\nfigure.savefig(path)\ntokenizer.save_pretrained(path)\nnp.save(path, a)", 4),
        ("checkpoints.save(state)", 0),
    ],
)  # fmt: skip
def test_unguarded_writes_are_detected(source, count):
    assert len(unguarded_writes(source)) == count


def test_fetches_are_detected():
    assert fetches("import jax\njax.device_get(x)") == {"device_get"}
    assert fetches("from jax import process_index as index") == {"process_index"}
    assert fetches("hosts.gather(x)\nhosts.process_count()") == set()
