"""List the largest functions of this repository: `python -m tests.tools.shape`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ("shiq_jax", "benchmarks", "experiments", "tests", "docs/examples", "train.py", "eval.py")
MAX_LINES, MAX_PARAMETERS = 80, 10


class Function(NamedTuple):
    """Size of a function.

    Attributes:
        location: file and line of the definition.
        name: qualified name within the module.
        lines: number of lines including the docstring, excluding decorators.
        parameters: number of parameters, including `self`, `*args` and `**kwargs`.
        kernel: whether it is a Pallas kernel: named `*_kernel` in a module that imports Pallas.
    """

    location: str
    name: str
    lines: int
    parameters: int
    kernel: bool

    @property
    def too_large(self) -> bool:
        """Whether it exceeds a limit. Pallas kernels are exempt, because each block is a parameter of its own."""
        return not self.kernel and (self.lines > MAX_LINES or self.parameters > MAX_PARAMETERS)

    def __str__(self) -> str:
        return f"{self.location} {self.name}: {self.lines} lines, {self.parameters} parameters"


def files(root: Path = ROOT) -> list[Path]:
    """All Python files of the repository."""
    paths = (root / source for source in SOURCES)
    return sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))


def functions(source: str, file: str) -> Iterator[Function]:
    """Yield the functions of a module, including methods and nested functions but not lambdas."""
    tree = ast.parse(source)
    pallas = any("jax.experimental.pallas" in name for node in ast.walk(tree) for name in _imported_names(node))

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield _measure(child, name.rstrip("."), file, pallas)
            yield from visit(child, name)

    return visit(tree, "")


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _measure(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, file: str, pallas: bool) -> Function:
    args = node.args
    parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    lines = node.end_lineno - node.lineno + 1
    return Function(f"{file}:{node.lineno}", name, lines, len(parameters), pallas and name.endswith("_kernel"))


def all_functions(root: Path = ROOT) -> list[Function]:
    """Every function of the repository."""
    return [function for file in files(root) for function in functions(file.read_text(), str(file.relative_to(root)))]


def format_list(title: str, functions: Iterable[Function]) -> str:
    """Format a title and one function per line."""
    return "\n".join([title, *(f"  {function}" for function in functions)])


def main() -> None:
    """Print the ten longest functions and the ten functions with the most parameters."""
    functions = all_functions()
    print(format_list("longest functions", sorted(functions, key=lambda function: -function.lines)[:10]))
    print(format_list("most parameters", sorted(functions, key=lambda function: -function.parameters)[:10]))


if __name__ == "__main__":
    main()
