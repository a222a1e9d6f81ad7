"""Rows of the Berkeley Function Calling Leaderboard (Patil et al. 2025): single-turn Python calls with checkable
answers.

A row is a plain dict:

    id, category      the leaderboard's own
    prompt            messages: a short system message with the functions and the answer's form, then the question
    functions         descriptions of the functions on offer
    answers           what the official checker accepts: per call, per parameter, the list of accepted values
    target            one accepted answer as text, without the parameters that may be left out
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
    """All rows of some categories, in the leaderboard's order.

    Args:
      directory: holds the unpacked package `bfcl_eval`, as `shiq_jax.tasks.fetch.bfcl` returns it.
      categories: out of `CATEGORIES`.

    Raises UserError when a file is missing or malformed, or a question has no ground truth under its id.
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
                    f"{root / name} asks {entry['id']}, for which possible_answer/{name} has no ground truth: "
                    "remove the directory and fetch it again"
                )
            rows.append(_row(category, entry, truths[entry["id"]]))
    return rows


def split_held_out(
    rows: Sequence[Mapping[str, Any]], *, seed: int, held_out: float = 0.2
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Training and held-out rows that share neither a question nor a function name, each in a random order.

    Rows are connected when their questions agree (up to case and white space) or when a function on offer has the same
    name; whole connected components go to one side. Components are taken in random order for the held-out side as long
    as they fit, so its size is `round(held_out * len(rows))`, or a little less. In the leaderboard one component holds
    43% of the rows, so it is on the training side for every smaller share.

    Args:
      rows: as `load` returns them.
      seed: of the choice and of both orders.
      held_out: share of the rows, in (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be a share strictly between 0 and 1")
    random = np.random.default_rng(seed)
    components = _components(rows)
    wanted, chosen = round(held_out * len(rows)), set()
    for number in random.permutation(len(components)):
        if len(chosen) + len(components[number]) <= wanted:
            chosen.update(components[number])
    order = random.permutation(len(rows))
    return [rows[i] for i in order if i not in chosen], [rows[i] for i in order if i in chosen]


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
            f"{file} cannot be read ({error.strerror}): expected the leaderboard's data; run `python -m "
            "shiq_jax.tasks.fetch`"
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
    described = {function["name"]: function["parameters"] for function in functions}
    calls = []
    for answer in answers:
        ((name, accepted),) = answer.items()
        required = described[name].get("required", ())
        arguments = {}
        for parameter, values in accepted.items():
            # An empty string among the accepted values is the ground truth's mark for "may be left out".
            if "" in values and parameter not in required:
                continue
            kind = described[name]["properties"].get(parameter, {})
            arguments[parameter] = _first(next((value for value in values if value != ""), ""), kind)
        calls.append(call_text(name, arguments))
    return f"[{', '.join(calls)}]"


def _first(value: Any, kind: Mapping[str, Any]) -> Any:
    """The first accepted value; inside dictionaries the ground truth lists the accepted values of every key."""
    if isinstance(value, Mapping) and kind.get("type") == "dict":
        chosen = {}
        for key, options in value.items():
            if isinstance(options, list) and "" not in options:
                chosen[key] = options[0]
        return chosen
    if isinstance(value, list) and kind.get("items", {}).get("type") == "dict":
        return [_first(item, kind["items"]) for item in value]
    return value


def _components(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of rows by connected component, in the order of their first row."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        question = " ".join(message["content"] for message in row["prompt"] if message["role"] != "system")
        marks = [("question", " ".join(question.lower().split()))]
        marks += [("function", function["name"]) for function in row["functions"]]
        for mark in marks:
            parent[root(index)] = root(first_with.setdefault(mark, index))
    components: dict[int, list[int]] = {}
    for index in range(len(rows)):
        components.setdefault(root(index), []).append(index)
    return sorted(components.values())
