"""Generate `bfcl_verdicts.jsonl`: verdicts of the official BFCL evaluation on many answers.

    python tests/goldens/make_bfcl_verdicts.py

Run it in a separate environment with bfcl-eval==2026.3.23 and its dependencies; the tests only read the file. Every
answer is judged by `eval_runner._evaluate_single_ast_entry` with the handler of a registered model that answers in
text. Questions and ground truth come from the loaders of bfcl-eval.

Each line is `{"id", "source", "text", "valid"}`. Answers with source "sampled" come from a small language model and are
kept; all others are derived from the ground truth. `valid` is null if the evaluation raises an exception.
"""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("BFCL_PROJECT_ROOT", tempfile.mkdtemp())

from bfcl_eval.constants.enums import Language, ReturnFormat  # noqa: E402
from bfcl_eval.eval_checker.eval_runner import _evaluate_single_ast_entry, get_handler  # noqa: E402
from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry  # noqa: E402

FILE = Path(__file__).parent / "bfcl_verdicts.jsonl"
MODEL = "google/gemma-3-1b-it"
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
QUESTIONS_PER_CATEGORY = 8

Calls = list[tuple[str, dict[str, Any]]]

# Argument values written as Python expressions, some of which the official evaluation executes.
EXPRESSIONS = (
    "2 * 5", "-(3)", "-7", "+7", "10 ** 1", "9 ** 0.5", "100 // 7", "'a' + 'b'", "'ab' * 2", "[1] + [2]",
    "1 + unknown", "abs(-3) + 2", "len('ab') - 1", "abs(-3)", "name", "items[0]", "{}", "()", "(1, 2)",
    "{1, 2}", "...", "None", "True", "f'{1}'", "lambda: 1", "inner(a=1)", "b'x'", "1j", "1 + 1j", "not True",
    "1 < 2", "[x for x in 'ab']", "1e400", "2 * (3 + 2)", "21 // 2", "10 % 11", "20 / 2", "abs(-9) + 1",
    "len('123456789') + 1", "9 + True", "5 << 1",
)  # fmt: skip


def format_calls(calls: Calls) -> str:
    """Format calls as the BFCL prompt requests."""
    formatted = (f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls)
    return f"[{', '.join(formatted)}]"


def accepted_calls(ground_truth: list[dict], rng: random.Random) -> Calls:
    """Draw one accepted value per parameter; omit each optional parameter with probability one half."""
    calls = []
    for call in ground_truth:
        ((name, parameters),) = call.items()
        args = {}
        for key, values in parameters.items():
            # The empty string marks an optional parameter.
            candidates = [value for value in values if value != ""]
            if candidates and not ("" in values and rng.random() < 0.5):
                args[key] = first_accepted(rng.choice(candidates))
        calls.append((name, args))
    return calls


def first_accepted(value: Any) -> Any:
    """Replace each list of accepted dictionary values in the ground truth by its first entry."""
    if isinstance(value, dict):
        return {key: first_accepted(values[0]) for key, values in value.items() if isinstance(values, list) and values}
    return [first_accepted(item) for item in value] if isinstance(value, list) else value


def different_value(value: Any) -> Any:
    """Return a different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + " x"
    return value + value[:1] if isinstance(value, list) and value else [0]


def answers(ground_truth: list[dict], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of accepted and modified answers to one question."""
    calls = accepted_calls(ground_truth, rng)
    text = format_calls(calls)
    yield "accepted", text
    yield "accepted again", format_calls(accepted_calls(ground_truth, rng))
    yield "reversed calls", format_calls(calls[::-1])
    yield "reversed parameters", format_calls([(name, dict(reversed(args.items()))) for name, args in calls])
    yield "duplicate call", format_calls([*calls, calls[0]])
    yield "missing call", format_calls(calls[1:])
    yield "wrong name", format_calls([(name + "_of", args) for name, args in calls])
    yield "dots as underscores", format_calls([(name.replace(".", "_"), args) for name, args in calls])
    yield "extra parameter", format_calls([(name, args | {"no_such_parameter": 1}) for name, args in calls])
    transforms = {
        "uppercase": lambda value: value.upper() if type(value) is str else value,
        "other punctuation": lambda value: value.replace(" ", "-").replace(",", ".") if type(value) is str else value,
        "integers as floats": lambda value: float(value) if type(value) is int else value,
        "lists as tuples": lambda value: tuple(value) if type(value) is list else value,
    }
    for source, transform in transforms.items():
        changed = [(name, {key: transform(value) for key, value in args.items()}) for name, args in calls]
        yield source, format_calls(changed)
    index = rng.randrange(len(calls))
    name, args = calls[index]
    if args:
        key = rng.choice(list(args))
        variants = {
            "wrong value": args | {key: different_value(args[key])},
            "value as string": args | {key: str(args[key])},
            "missing parameter": {other: value for other, value in args.items() if other != key},
        }
        for source, changed in variants.items():
            yield source, format_calls([*calls[:index], (name, changed), *calls[index + 1 :]])
    yield from malformed(text, rng)


def malformed(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield three of the unusual or invalid formats."""
    formats = {
        "code fence": f"```{text}```",
        "code fence with language": f"```python\n{text}\n```",
        "no brackets": text[1:-1],
        "quoted": f"'{text}'",
        "leading prose": f"Sure: {text}",
        "trailing prose": f"{text} is the call.",
        "truncated": text[: len(text) // 2],
        "missing bracket": text[:-1],
        "line break": text.replace(", ", ",\n "),
        "semicolons": text.replace("), ", "); "),
        "positional argument": text.replace("(", "(1, ", 1),
        "name without call": text.split("(")[0] + "]",
        "empty": "",
        "empty list": "[]",
        "prose": "I cannot answer that.",
        "JSON": json.dumps([{"name": "f", "arguments": {}}]),
        "nested list": f"[{text}]",
    }
    for source in rng.sample(list(formats), 3):
        yield source, formats[source]


def expression_answers(ground_truth: list[dict], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield answers whose first argument is one of EXPRESSIONS."""
    (name, args), *_ = accepted_calls(ground_truth, rng)
    for expression in EXPRESSIONS if args else ():
        key = next(iter(args))
        rest = "".join(f", {other}={value!r}" for other, value in args.items() if other != key)
        yield f"expression {expression}", f"[{name}({key}={expression}{rest})]"


def main() -> None:
    """Judge the sampled answers of the existing file and newly derived ones, and rewrite the file."""
    questions, ground_truths, categories = {}, {}, {}
    for category in CATEGORIES:
        for entry in load_dataset_entry(category):
            questions[entry["id"]], categories[entry["id"]] = entry, category
        ground_truths |= {entry["id"]: entry["ground_truth"] for entry in load_ground_truth_entry(category)}
    handler = get_handler(MODEL)

    def evaluate(line: dict[str, Any]) -> dict[str, Any]:
        try:
            valid = _evaluate_single_ast_entry(
                handler, line["id"], line["text"], ground_truths[line["id"]], questions[line["id"]], MODEL,
                categories[line["id"]], language=Language.PYTHON, return_format=ReturnFormat.PYTHON,
            )["valid"]  # fmt: skip
        except Exception:
            valid = None
        return {name: line[name] for name in ("id", "source", "text")} | {"valid": valid}

    existing = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in existing if line["source"] == "sampled"]
    rng = random.Random(0)
    for category in CATEGORIES:
        ids = [question_id for question_id in questions if categories[question_id] == category]
        for question_id in rng.sample(ids, QUESTIONS_PER_CATEGORY):
            for source, text in answers(ground_truths[question_id], rng):
                lines.append({"id": question_id, "source": source, "text": text})
    for question_id in ("simple_python_0", "multiple_3"):
        for source, text in expression_answers(ground_truths[question_id], rng):
            lines.append({"id": question_id, "source": source, "text": text})
    verdicts = [evaluate(line) for line in lines]
    FILE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts), encoding="utf-8")
    print({value: sum(line["valid"] is value for line in verdicts) for value in (True, False, None)})


if __name__ == "__main__":
    main()
