"""Single-turn Python tasks of the Berkeley Function Calling Leaderboard (Patil et al. 2025).

A row is a plain dict:

    id, category      as in the leaderboard
    prompt            messages: a system message with the functions and the answer format, then the question
    functions         descriptions of the available functions
    answers           ground truth of the official checker: per call and parameter, the list of accepted values
    target            one accepted answer as text, without optional parameters
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.errors import UserError

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")

_INSTRUCTION = (
    "Answer with function calls only, in the form [name(parameter=value, ...), ...], values written as in Python.\n"
    "Functions:\n{functions}"
)


def load(directory: str | Path, categories: Iterable[str] = CATEGORIES) -> list[dict[str, Any]]:
    """All rows of the given categories, in the leaderboard's order.

    Args:
        directory: directory of the unpacked package `bfcl_eval`, see `shiq_jax.tasks.fetch.bfcl`.
        categories: names from `CATEGORIES`.

    Raises:
        UserError: a file is missing or malformed, or a question has no ground truth.
    """
    root = Path(directory) / "bfcl_eval" / "data"
    rows = []
    for category in categories:
        if category not in CATEGORIES:
            raise UserError(f"the category {category!r} is unknown: expected one of {', '.join(CATEGORIES)}")
        name = f"BFCL_v4_{category}.json"
        truths = {
            entry["id"]: entry["ground_truth"] for entry in _entries(root / "possible_answer" / name, "ground_truth")
        }
        for entry in _entries(root / name, "question"):
            if entry["id"] not in truths:
                raise UserError(
                    f"{root / name} has the question {entry['id']}, but possible_answer/{name} has no ground truth for "
                    "it: remove the directory and fetch it again"
                )
            rows.append(_row(category, entry, truths[entry["id"]]))
    return rows


def split_held_out(
    rows: Sequence[Mapping[str, Any]], *, seed: int, held_out: float = 0.2
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Training and held-out rows that share neither a question nor a function name, each in random order.

    Rows are connected if their questions are equal (up to case and white space) or if they have a function of the same
    name. Connected components are never split: they are added to the held-out side in random order as long as they
    fit, so its size is `round(held_out * len(rows))` or slightly less. One component holds 43% of the leaderboard's
    rows, so it is on the training side for every smaller fraction.

    Args:
        rows: the result of `load`.
        seed: random seed of the split and of both orders.
        held_out: fraction of the rows, in (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be a fraction strictly between 0 and 1")
    rng = np.random.default_rng(seed)
    components = _components(rows)
    target_size, held_out_indices = round(held_out * len(rows)), set()
    for number in rng.permutation(len(components)):
        if len(held_out_indices) + len(components[number]) <= target_size:
            held_out_indices.update(components[number])
    order = rng.permutation(len(rows))
    train_rows = [rows[index] for index in order if index not in held_out_indices]
    return train_rows, [rows[index] for index in order if index in held_out_indices]


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Python source, strings in double quotes: `name(a=1, b="x")`."""
    return f"{name}({', '.join(f'{key}={literal(value)}' for key, value in arguments.items())})"


def literal(value: Any) -> str:
    """A JSON value as a Python literal, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return repr(value)


def _entries(file: Path, field: str) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): run `python -m shiq_jax.tasks.fetch` to fetch the leaderboard"
        ) from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number} is not JSON ({error.msg}): remove the directory and fetch it again"
            ) from error
        if not {"id", field} <= entry.keys():
            raise UserError(f"{file}, line {number} lacks 'id' or {field!r}: remove the directory and fetch it again")
        entries.append(entry)
    return entries


def _row(category: str, entry: Mapping[str, Any], answers: list[dict]) -> dict[str, Any]:
    functions = entry["function"]
    system = _INSTRUCTION.format(functions=json.dumps(functions, separators=(",", ":"), ensure_ascii=False))
    return {
        "id": entry["id"],
        "category": category,
        "prompt": [{"role": "system", "content": system}, *entry["question"][0]],
        "functions": functions,
        "answers": answers,
        "target": _target(functions, answers),
    }


def _target(functions: list[dict], answers: list[dict]) -> str:
    """Text of one accepted answer."""
    schemas = {function["name"]: function["parameters"] for function in functions}
    calls = []
    for answer in answers:
        ((name, accepted),) = answer.items()
        required = schemas[name].get("required", ())
        arguments = {}
        for parameter, values in accepted.items():
            # The ground truth marks optional parameters with an empty string among the accepted values.
            if "" in values and parameter not in required:
                continue
            schema = schemas[name]["properties"].get(parameter, {})
            arguments[parameter] = _first_accepted(next((value for value in values if value != ""), ""), schema)
        calls.append(call_text(name, arguments))
    return f"[{', '.join(calls)}]"


def _first_accepted(value: Any, schema: Mapping[str, Any]) -> Any:
    """Replace the lists of accepted values in the dictionaries of the ground truth by their first values."""
    if isinstance(value, Mapping) and schema.get("type") == "dict":
        return {key: options[0] for key, options in value.items() if isinstance(options, list) and "" not in options}
    if isinstance(value, list) and schema.get("items", {}).get("type") == "dict":
        return [_first_accepted(item, schema["items"]) for item in value]
    return value


def _components(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Row indices of each connected component, ordered by the first row."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_row_with: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        question = " ".join(message["content"] for message in row["prompt"] if message["role"] != "system")
        keys = [("question", " ".join(question.lower().split()))]
        keys += [("function", function["name"]) for function in row["functions"]]
        for key in keys:
            parent[root(index)] = root(first_row_with.setdefault(key, index))
    components: dict[int, list[int]] = {}
    for index in range(len(rows)):
        components.setdefault(root(index), []).append(index)
    return sorted(components.values())
