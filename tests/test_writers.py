"""The architecture: sharded arrays are fetched and files are written through `shiq_jax.sharding.hosts`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shiq_jax

ROOT = Path(shiq_jax.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT / "sharding"]
FETCHES = {"device_get", "process_allgather", "process_index", "process_count", "sync_global_devices"}
WRITES = {
    "chmod", "copy2", "copyfile", "copytree", "hardlink_to", "link", "makedirs", "mkdir", "mkdtemp", "mkstemp", "move",
    "rename", "rmdir", "rmtree", "save_file", "save_pretrained", "savefig", "symlink", "symlink_to", "touch",
    "truncate", "unlink", "write_bytes", "write_table", "write_text", "NamedTemporaryFile", "TemporaryDirectory",
}  # fmt: skip
# Modes of `open` that write.
MODE = r"[wxa][bt+]*|r[bt]*\+[bt]*"
# What every process writes for itself.
OF_EACH_PROCESS = {
    "replay/locks.py": "a lock belongs to the process that holds it",
    "runs/compilation_cache.py": "each host has a cache of its own",
    "tasks/fetch.py": "each host has a cache of its own",
    "tasks/gguf.py": "converts what was fetched into the cache",
}


def name_of(node: ast.AST) -> str | None:
    return getattr(node, "attr", getattr(node, "id", None))


def writes(call: ast.Call) -> bool:
    """Whether a call changes what is on the disk, as far as its name and arguments tell."""
    name, owner = name_of(call.func), name_of(getattr(call.func, "value", None))
    if name == "open":
        flags = {name_of(node) for node in ast.walk(call)}
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = {str(node.value) for node in given if isinstance(node, ast.Constant)}
        return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}) or any(re.fullmatch(MODE, mode) for mode in modes)
    if name == "replace":
        # Of `os` or a path; text and dataclasses have a method of this name too.
        return owner == "os" or (len(call.args) == 1 and not call.keywords and owner != "dataclasses")
    return name in WRITES or (name in ("save", "savez") and owner == "np")


def unguarded(source: str) -> list[str]:
    """Calls that write outside of functions which `hosts.on_writer` decorates."""

    def visit(node: ast.AST) -> Iterator[str]:
        decorators = getattr(node, "decorator_list", ())
        if any(name_of(each) == "on_writer" for decorator in decorators for each in ast.walk(decorator)):
            return
        if isinstance(node, ast.Call) and writes(node):
            yield f"line {node.lineno}: {name_of(node.func)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return list(visit(ast.parse(source)))


def fetched(source: str) -> set[str]:
    """Forbidden names in a source, imported or used."""
    found = {name_of(node) for node in ast.walk(ast.parse(source))}
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return FETCHES & (found | {alias.name for node in imports for alias in node.names})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_hosts_fetches_and_says_who_writes(file):
    source = file.read_text()
    assert fetched(source) == set()
    assert bool(unguarded(source)) == (str(file.relative_to(ROOT)) in OF_EACH_PROCESS), unguarded(source)


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
        ("own.replace(path)\n'a'.replace('a', 'b')\ndataclasses.replace(a, b=1)\nfield.replace(default=1)", 1),
        ("shutil.rmtree(path)\nfigure.savefig(path)\ntokenizer.save_pretrained(path)\nnp.save(path, a)", 4),
        ("checkpoints.save(state)", 0),
    ],
)  # fmt: skip
def test_an_unguarded_write_is_seen(source, count):
    assert len(unguarded(source)) == count


def test_a_fetch_is_seen():
    assert fetched("import jax\njax.device_get(x)") == {"device_get"}
    assert fetched("from jax import process_index as index") == {"process_index"}
    assert fetched("hosts.gather(x)") == set()
