"""The largest functions of this repository: `python -m tests.tools.shape`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PLACES = ("shiq_jax", "benchmarks", "experiments", "tests", "docs/examples", "train.py", "eval.py")
LINES, PARAMETERS = 80, 10


class Function(NamedTuple):
    """A function and its size.

    Attributes:
        place: file and line of its definition.
        name: with the classes and functions around it.
        lines: from `def` to its last line, docstring included, decorators not.
        parameters: all of them, `self`, `*args` and `**kwargs` included.
        kernel: a Pallas kernel (named `*_kernel` in a module that imports Pallas): its parameters are the blocks that
            it reads and writes, one each, which cannot be grouped.
    """

    place: str
    name: str
    lines: int
    parameters: int
    kernel: bool

    @property
    def too_large(self) -> bool:
        """Whether it has more lines or parameters than allowed; Pallas kernels may."""
        return not self.kernel and (self.lines > LINES or self.parameters > PARAMETERS)

    def __str__(self) -> str:
        return f"{self.place} {self.name}: {self.lines} lines, {self.parameters} parameters"


def files(root: Path = ROOT) -> list[Path]:
    """All Python files of the repository."""
    found = (root / place for place in PLACES)
    return sorted(file for place in found for file in (place.rglob("*.py") if place.is_dir() else [place]))


def functions(source: str, place: str) -> Iterator[Function]:
    """All functions of a module, methods and nested ones included; lambdas are not functions here."""

    tree = ast.parse(source)
    pallas = any("jax.experimental.pallas" in name for node in ast.walk(tree) for name in _imported(node))

    def inside(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield _measured(child, name.rstrip("."), place, pallas)
            yield from inside(child, name)

    return inside(tree, "")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _measured(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, place: str, pallas: bool) -> Function:
    given = node.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    lines = node.end_lineno - node.lineno + 1
    return Function(f"{place}:{node.lineno}", name, lines, len(parameters), pallas and name.endswith("_kernel"))


def all_functions(root: Path = ROOT) -> list[Function]:
    """Every function of the repository."""
    return [each for file in files(root) for each in functions(file.read_text(), str(file.relative_to(root)))]


def table(title: str, found: Iterable[Function]) -> str:
    """Functions under a title, one a line."""
    return "\n".join([title, *(f"  {each}" for each in found)])


def main() -> None:
    """Print the ten longest functions and the ten with most parameters."""
    found = all_functions()
    print(table("longest functions", sorted(found, key=lambda each: -each.lines)[:10]))
    print(table("most parameters", sorted(found, key=lambda each: -each.parameters)[:10]))


if __name__ == "__main__":
    main()
