"""The official AST checker of the Berkeley Function Calling Leaderboard as a reward: 1 for a correct answer, else 0.

Decoder and checker are the leaderboard's own code, loaded from its unpacked package (`shiq_jax.tasks.fetch.bfcl`).
Their modules import dozens of API clients that neither needs. Therefore only the decoder's functions are compiled from
their file, and the checker is imported with a placeholder for the table of models.
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

_DECODER_FUNCTIONS = ("ast_parse", "resolve_ast_call", "resolve_ast_by_type", "default_decode_ast_prompting")
_MODEL_CONFIG_MODULE = "bfcl_eval.constants.model_config"
_MAX_EXPONENT = 64
_MAX_EXPRESSION_LENGTH = 2000


class Official(NamedTuple):
    """The leaderboard's `decode(text) -> calls` and `check(functions, calls, answers, category) -> result`."""

    decode: Callable[[str], list[dict]]
    check: Callable[[list, list, list, str], dict]


def bfcl_reward(row: Mapping[str, Any], completion: str) -> float:
    """1.0 if the official checker accepts the completion as an answer to the row, else 0.0.

    Differs from the leaderboard in one point: its decoder evaluates arithmetic in arguments with `eval`. Here only
    arithmetic on constants is evaluated, so that no model output is executed. Other expressions (calls such as
    `len('abc') + 1`, shifts, sums with True) count as wrong even if Python would compute an accepted value.

    Args:
        row: a row of `shiq_jax.tasks.bfcl.load`, with `functions`, `answers` and `category`.
        completion: text such as `[f(a=1), g(b="x")]`; text that cannot be decoded scores 0.
    """
    for field in ("functions", "answers", "category"):
        if field not in row:
            raise UserError(
                f"the row {row.get('id', '?')!r} has no {field!r}: the reward 'bfcl' needs leaderboard rows with "
                "functions, answers and category"
            )
    official = load_official()
    # Model output can make the official code raise any exception; all of them count as wrong answers.
    try:
        calls = official.decode(completion)
        return float(bool(official.check(row["functions"], calls, row["answers"], row["category"])["valid"]))
    except Exception:
        return 0.0


@functools.lru_cache(maxsize=4)
def load_official(directory: str | Path | None = None) -> Official:
    """Load the leaderboard's decoder and checker from its unpacked package (default: the fetched one).

    Raises:
        UserError: the directory does not contain the package, or an incompatible version of it.
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
            # Parsing model output as source can emit SyntaxWarnings about invalid escapes.
            warnings.simplefilter("ignore")
            return decoder(text)

    def check(functions: list, calls: list, answers: list, category: str) -> dict:
        return checker.ast_checker(functions, calls, answers, enums.Language.PYTHON, category, "any")

    return Official(decode, check)


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[None]:
    """Context in which `bfcl_eval` is imported from `root` with a placeholder model table; undone on exit."""

    def loaded_modules() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "bfcl_eval"]

    installed = {name: sys.modules.pop(name) for name in loaded_modules()}
    placeholder = types.ModuleType(_MODEL_CONFIG_MODULE)
    placeholder.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
    sys.path.insert(0, str(root))
    sys.modules[_MODEL_CONFIG_MODULE] = placeholder
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in loaded_modules():
            del sys.modules[name]
        sys.modules.update(installed)


def _decoder(file: Path, return_format: Any) -> Callable[[str], list[dict]]:
    """Compile the leaderboard's `default_decode_ast_prompting` and the functions that it calls."""
    source = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in _DECODER_FUNCTIONS]
    missing = set(_DECODER_FUNCTIONS) - {node.name for node in functions}
    if missing:
        raise UserError(
            f"{file} does not define {', '.join(sorted(missing))}: expected {fetch.BFCL_PACKAGE}; fetch it again"
        )
    # Newer Pythons removed these names from `ast`; the nodes are Constants, which the decoder handles first.
    ast_module = types.SimpleNamespace(**{"NameConstant": ast.Constant, "Ellipsis": ast.Constant, **vars(ast)})
    namespace = {"ast": ast_module, "re": re, "ReturnFormat": return_format, "eval": constant_arithmetic}
    exec(compile(ast.Module(functions, type_ignores=[]), str(file), "exec"), namespace)
    return namespace["default_decode_ast_prompting"]


def constant_arithmetic(expression: str) -> Any:
    """Evaluate arithmetic on number constants, or a concatenation of string constants.

    Replaces `eval`, which the official decoder calls on model output. Exponents are bounded, because a short expression
    could otherwise need gigabytes.

    Raises:
        ValueError: the expression is anything else.
    """
    if len(expression) > _MAX_EXPRESSION_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters, more than {_MAX_EXPRESSION_LENGTH}")
    tree = ast.parse(expression, mode="eval")
    return _evaluate(tree.body)


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _require_number(_evaluate(node.operand))
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not arithmetic on constants")
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    left, right = _require_number(left), _require_number(right)
    if isinstance(node.op, ast.Pow):
        if abs(right) > _MAX_EXPONENT or abs(left) > 2.0**_MAX_EXPONENT:
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


def _require_number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value
