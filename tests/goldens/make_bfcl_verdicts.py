"""Writes what the leaderboard's own evaluation says of many answers: `bfcl_verdicts.jsonl` beside this script.

    python tests/goldens/make_bfcl_verdicts.py

wants bfcl-eval==2026.3.23 with all its dependencies, in an environment of its own; the tests read the file and need
none of them. Every answer goes through `eval_runner._evaluate_single_ast_entry` with the handler of a registered model
that answers in text, and with questions and ground truth as the leaderboard's own functions load them.

A line is `{"id", "source", "text", "valid"}`. Lines of source "sampled", answers of a small language model, stay in the
file as they are; all others are written here out of the ground truth. `valid` is null where the evaluation itself stops
with an exception.
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

# What stands in the place of a value: the evaluation runs Python on some of these.
EXPRESSIONS = (
    "2 * 5", "-(3)", "-7", "+7", "10 ** 1", "9 ** 0.5", "100 // 7", "'a' + 'b'", "'ab' * 2", "[1] + [2]",
    "1 + unknown", "abs(-3) + 2", "len('ab') - 1", "abs(-3)", "name", "items[0]", "{}", "()", "(1, 2)",
    "{1, 2}", "...", "None", "True", "f'{1}'", "lambda: 1", "inner(a=1)", "b'x'", "1j", "1 + 1j", "not True",
    "1 < 2", "[x for x in 'ab']", "1e400", "2 * (3 + 2)", "21 // 2", "10 % 11", "20 / 2", "abs(-9) + 1",
    "len('123456789') + 1", "9 + True", "5 << 1",
)  # fmt: skip


def text_of(calls: Calls) -> str:
    """Calls as the leaderboard asks for them."""
    written = (f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls)
    return f"[{', '.join(written)}]"


def accepted(truth: list[dict], draw: random.Random) -> Calls:
    """Calls with one accepted value per parameter; what may be left out is, half the time."""
    calls = []
    for call in truth:
        ((name, parameters),) = call.items()
        given = {}
        for key, values in parameters.items():
            real = [value for value in values if value != ""]
            if real and not ("" in values and draw.random() < 0.5):
                given[key] = unwrapped(draw.choice(real))
        calls.append((name, given))
    return calls


def unwrapped(value: Any) -> Any:
    """Inside dictionaries the ground truth lists what it accepts for each key."""
    if isinstance(value, dict):
        return {key: unwrapped(options[0]) for key, options in value.items() if isinstance(options, list) and options}
    return [unwrapped(each) for each in value] if isinstance(value, list) else value


def other(value: Any) -> Any:
    """A value of the same type that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + " x"
    return value + value[:1] if isinstance(value, list) and value else [0]


def written(truth: list[dict], draw: random.Random) -> Iterator[tuple[str, str]]:
    """(what was done, answer) for one question."""
    calls = accepted(truth, draw)
    text = text_of(calls)
    yield "accepted", text
    yield "accepted again", text_of(accepted(truth, draw))
    yield "calls reversed", text_of(calls[::-1])
    yield "parameters reversed", text_of([(name, dict(reversed(given.items()))) for name, given in calls])
    yield "a call twice", text_of([*calls, calls[0]])
    yield "a call less", text_of(calls[1:])
    yield "another name", text_of([(name + "_of", given) for name, given in calls])
    yield "dots as underscores", text_of([(name.replace(".", "_"), given) for name, given in calls])
    yield "a parameter more", text_of([(name, given | {"no_such_parameter": 1}) for name, given in calls])
    rules = {
        "upper case": lambda value: value.upper() if type(value) is str else value,
        "other punctuation": lambda value: value.replace(" ", "-").replace(",", ".") if type(value) is str else value,
        "numbers as floats": lambda value: float(value) if type(value) is int else value,
        "lists as tuples": lambda value: tuple(value) if type(value) is list else value,
    }
    for what, rule in rules.items():
        yield what, text_of([(name, {key: rule(value) for key, value in given.items()}) for name, given in calls])
    place = draw.randrange(len(calls))
    name, given = calls[place]
    for key in [draw.choice(list(given))] if given else []:
        variants = {
            "another value": given | {key: other(given[key])},
            "value as text": given | {key: str(given[key])},
            "a parameter less": {each: value for each, value in given.items() if each != key},
        }
        for what, changed in variants.items():
            yield what, text_of([*calls[:place], (name, changed), *calls[place + 1 :]])
    yield from malformed(text, draw)


def malformed(text: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Three of many ways to spell an answer in another way."""
    forms = {
        "fenced": f"```{text}```",
        "fenced with a language": f"```python\n{text}\n```",
        "no brackets": text[1:-1],
        "quoted": f"'{text}'",
        "talk before": f"Sure: {text}",
        "talk behind": f"{text} is the call.",
        "cut": text[: len(text) // 2],
        "no end": text[:-1],
        "a line break": text.replace(", ", ",\n "),
        "semicolons": text.replace("), ", "); "),
        "positional": text.replace("(", "(1, ", 1),
        "a name without a call": text.split("(")[0] + "]",
        "nothing": "",
        "no calls": "[]",
        "prose": "I cannot answer that.",
        "json": json.dumps([{"name": "f", "arguments": {}}]),
        "nested": f"[{text}]",
    }
    for what in draw.sample(list(forms), 3):
        yield what, forms[what]


def expressions(truth: list[dict], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Answers with expressions in the place of the first value."""
    ((name, given), *rest) = accepted(truth, draw)
    for expression in EXPRESSIONS if given else ():
        key = next(iter(given))
        others = "".join(f", {each}={value!r}" for each, value in given.items() if each != key)
        yield f"expression {expression}", f"[{name}({key}={expression}{others})]"


def main() -> None:
    """Judges the sampled answers again, writes the others anew and judges them."""
    questions, truths, categories = {}, {}, {}
    for category in CATEGORIES:
        for entry in load_dataset_entry(category):
            questions[entry["id"]], categories[entry["id"]] = entry, category
        truths |= {entry["id"]: entry["ground_truth"] for entry in load_ground_truth_entry(category)}
    handler = get_handler(MODEL)

    def judged(line: dict[str, Any]) -> dict[str, Any]:
        try:
            found = _evaluate_single_ast_entry(
                handler, line["id"], line["text"], truths[line["id"]], questions[line["id"]], MODEL,
                categories[line["id"]], language=Language.PYTHON, return_format=ReturnFormat.PYTHON,
            )["valid"]  # fmt: skip
        except Exception:
            found = None
        return {name: line[name] for name in ("id", "source", "text")} | {"valid": found}

    kept = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in kept if line["source"] == "sampled"]
    draw = random.Random(0)
    for category in CATEGORIES:
        for identity in draw.sample(
            [each for each in questions if categories[each] == category], QUESTIONS_PER_CATEGORY
        ):
            answers = written(truths[identity], draw)
            lines += [{"id": identity, "source": what, "text": text} for what, text in answers]
    for identity in ("simple_python_0", "multiple_3"):
        answers = expressions(truths[identity], draw)
        lines += [{"id": identity, "source": what, "text": text} for what, text in answers]
    verdicts = [judged(line) for line in lines]
    FILE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts), encoding="utf-8")
    print({value: sum(line["valid"] is value for line in verdicts) for value in (True, False, None)})


if __name__ == "__main__":
    main()
