"""The official AST checker of the Berkeley Function Calling Leaderboard as a reward: 1 for a correct answer, else 0.

Decoder and checker are the leaderboard's own code, read from its unpacked package (`shiq_jax.tasks.fetch.bfcl`). Their
modules ask for dozens of API clients that neither needs, so the decoder's functions are taken out of their file one by
one and the checker sees a stand-in for the table of models.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shiq_jax.errors import UserError
from shiq_jax.tasks import fetch

_DECODER = ("ast_parse", "resolve_ast_call", "resolve_ast_by_type", "default_decode_ast_prompting")
_MODELS = "bfcl_eval.constants.model_config"
_LARGEST_EXPONENT = 64
_LONGEST_EXPRESSION = 2000


class Official(NamedTuple):
    """The leaderboard's code: `decode(text) -> calls`, and `check(functions, calls, answers, category) -> result`."""

    decode: Callable[[str], list[dict]]
    check: Callable[[list, list, list, str], dict]


def bfcl_reward(row: Mapping[str, Any], completion: str) -> float:
    """1.0 when the official checker accepts the completion as an answer to the row, else 0.0.

    Args:
      row: of `shiq_jax.tasks.bfcl.load`: `functions`, `answers` and `category` are read.
      completion: text such as `[f(a=1), g(b="x")]`; what cannot be decoded scores 0.

    One departure from the leaderboard: its decoder evaluates arithmetic in arguments with Python's `eval`. Here that is
    arithmetic on constants only, so that no text of a model is ever executed; other expressions (calls such as
    `len('abc') + 1`, shifts, sums with True) are wrong, also where Python would find an accepted value.
    """
    for field in ("functions", "answers", "category"):
        if field not in row:
            raise UserError(
                f"the row {row.get('id', '?')!r} has no {field!r}: the reward 'bfcl' needs rows of the leaderboard, "
                "with functions, answers and category"
            )
    official = load_official()
    # Model output fails in ways that the official code does not expect; all of them count as wrong answers.
    try:
        calls = official.decode(completion)
        return float(bool(official.check(row["functions"], calls, row["answers"], row["category"])["valid"]))
    except Exception:
        return 0.0


@functools.lru_cache(maxsize=4)
def load_official(directory: str | Path | None = None) -> Official:
    """The leaderboard's decoder and checker out of its unpacked package (default: the fetched one).

    Raises UserError when the directory does not hold the package in the form known here.
    """
    root = Path(directory) if directory is not None else fetch.bfcl()
    utilities = root / "bfcl_eval" / "model_handler" / "utils.py"
    if not utilities.is_file():
        raise UserError(f"{root} does not hold the package bfcl_eval: run `python -m shiq_jax.tasks.fetch`")
    with _importing_from(root):
        try:
            enums = importlib.import_module("bfcl_eval.constants.enums")
            checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        except ImportError as error:
            raise UserError(
                f"the checker in {root} cannot be imported ({error}): fetch {fetch.BFCL_PACKAGE} again"
            ) from error
    decoder = _decoder(utilities, enums.ReturnFormat)

    def decode(text: str) -> list[dict]:
        with warnings.catch_warnings():
            # The text of a model is parsed as source; warnings about its escapes do not concern the user.
            warnings.simplefilter("ignore")
            return decoder(text)

    def check(functions: list, calls: list, answers: list, category: str) -> dict:
        return checker.ast_checker(functions, calls, answers, enums.Language.PYTHON, category, "any")

    return Official(decode, check)


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[None]:
    """Imports of `bfcl_eval` find the package under `root`, with the table of models replaced; undone on exit."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "bfcl_eval"]

    installed = {name: sys.modules.pop(name) for name in ours()}
    models = types.ModuleType(_MODELS)
    models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
    sys.path.insert(0, str(root))
    sys.modules[_MODELS] = models
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(installed)


def _decoder(file: Path, return_format: Any) -> Callable[[str], list[dict]]:
    """`default_decode_ast_prompting` of the leaderboard with the functions that it calls."""
    source = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    wanted = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in _DECODER]
    missing = set(_DECODER) - {node.name for node in wanted}
    if missing:
        raise UserError(
            f"{file} does not define {', '.join(sorted(missing))}: expected {fetch.BFCL_PACKAGE}; fetch it again"
        )
    # Names that newer Pythons dropped from `ast`; what they stood for is a Constant, which the decoder handles earlier.
    syntax = types.SimpleNamespace(**{"NameConstant": ast.Constant, "Ellipsis": ast.Constant, **vars(ast)})
    namespace = {"ast": syntax, "re": re, "ReturnFormat": return_format, "eval": constant_arithmetic}
    exec(compile(ast.Module(wanted, type_ignores=[]), str(file), "exec"), namespace)
    return namespace["default_decode_ast_prompting"]


def constant_arithmetic(expression: str) -> Any:
    """The value of arithmetic on number constants, or of a sum of string constants; ValueError for all else.

    It replaces `eval`, which the official decoder calls on a model's text. Powers are bounded, so that no text of a few
    characters costs gigabytes.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(expression)} characters is no argument")
    tree = ast.parse(expression, mode="eval")
    return _value(tree.body)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(_value(node.operand))
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not arithmetic on constants")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    left, right = _number(left), _number(right)
    if isinstance(node.op, ast.Pow):
        if abs(right) > _LARGEST_EXPONENT or abs(left) > 2.0**_LARGEST_EXPONENT:
            raise ValueError(f"{left} ** {right} is too large for an argument")
        return left**right
    operations = {
        ast.Add: lambda: left + right,
        ast.Sub: lambda: left - right,
        ast.Mult: lambda: left * right,
        ast.Div: lambda: left / right,
        ast.FloorDiv: lambda: left // right,
        ast.Mod: lambda: left % right,
    }
    if type(node.op) not in operations:
        raise ValueError(f"the operator {type(node.op).__name__} is not arithmetic on numbers")
    return operations[type(node.op)]()


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value
