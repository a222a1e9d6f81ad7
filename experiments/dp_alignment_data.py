"""The data of `experiments.dp_alignment`: parts of the questions, and a right and a wrong answer to each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.errors import UserError
from shiq_jax.models import load_hf
from shiq_jax.runs.run_directory import write_jsonl
from shiq_jax.tasks import bfcl, fetch, rewards
from shiq_jax.training.evaluation import Evaluator

# Characters of a question with its function; a padded row is as long as the longest.
LONGEST = 800

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many questions for what.

    Attributes:
        units: of the private data, each a question with a right and a wrong answer.
        demonstrations: public, of the warm start.
        tuning: public, with a right and a wrong answer each, to choose learning rates on.
        tuning_learned: how many of them are learned from; the others are measured on.
        held_out: to measure on.
        samples: answers of the reference to each question, out of which pairs are made.
        max_tokens: longest answer.
    """

    units: int
    demonstrations: int
    tuning: int
    tuning_learned: int
    held_out: int
    samples: int
    max_tokens: int


def write_questions(root: Path, sizes: Sizes) -> None:
    """Questions of every part, as files: none is in two of them, and held-out ones share no function with others."""
    rows = bfcl.load(fetch.bfcl(), ("simple_python",))
    sides = bfcl.split_held_out(rows, seed=0, held_out=0.25)
    training, held_out = ([row for row in side if _length(row) <= LONGEST] for side in sides)
    # Not every question is answered wrong once, so that more are asked than are needed.
    shown, tried = sizes.demonstrations, sizes.demonstrations + sizes.tuning * 3 // 2
    parts = {
        "demonstrations": [row | {"completion": row["target"]} for row in training[:shown]],
        "tuning": training[shown:tried],
        "private": training[tried : tried + sizes.units * 3 // 2],
        "held_out": held_out[: sizes.held_out],
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        write_jsonl(root / f"{name}.jsonl", chosen)


def write_pairs(root: Path, reference: Path, sizes: Sizes) -> None:
    """Of every part but the demonstrations the pairs (`NAME.pairs.jsonl`) and their answers (`NAME.answers.jsonl`).

    The wrong answer is the first wrong one of the reference's samples, the right one its first right one, or an
    accepted answer where it has none. Each row names its question as its user, so that a question can be protected
    as a whole.

    Raises:
        UserError: fewer questions than wanted are answered wrong.
    """
    wanted = {"tuning": sizes.tuning, "private": sizes.units, "held_out": None}
    questions = {name: read(root / f"{name}.jsonl") for name in wanted}
    answers = _sampled(reference, [row for rows in questions.values() for row in rows], sizes)
    for name, rows in questions.items():
        found = [pair for row in rows if (pair := pair_of(row, answers[row["id"]]))]
        if wanted[name] is not None and len(found) < wanted[name]:
            raise UserError(f"{len(found)} questions of the part {name} give a pair, of {wanted[name]}: ask for fewer")
        write_pair_files(root, name, found[: wanted[name]])


def write_pair_files(root: Path, name: str, pairs: Sequence[Row]) -> None:
    """The same answers as DPO reads them and as ShiQ does."""
    write_jsonl(root / f"{name}.answers.jsonl", [answer for pair in pairs for answer in answers_of(pair)])
    write_jsonl(root / f"{name}.pairs.jsonl", pairs)


def pair_of(row: Row, answers: Sequence[tuple[str, float]]) -> dict[str, Any] | None:
    """Prompt, chosen and rejected out of a question and its scored answers; None where nothing is wrong."""
    right = [text for text, reward in answers if reward >= 1]
    wrong = [text for text, reward in answers if reward < 1 and text.strip()]
    if not wrong:
        return None
    chosen = right[0] if right else row["target"]
    return {
        "prompt": row["prompt"], "chosen": chosen, "rejected": wrong[0], "user_id": row["id"], "sampled": bool(right),
    }  # fmt: skip


def answers_of(pair: Row) -> list[dict[str, Any]]:
    """The two answers with their rewards, less the mean of the two: a baseline that knows of no other question."""
    shared = {"prompt": pair["prompt"], "user_id": pair["user_id"], "group_id": pair["user_id"]}
    scored = {"chosen": 0.5, "rejected": -0.5}
    return [shared | {"completion": pair[name], "reward": reward} for name, reward in scored.items()]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _length(row: Row) -> int:
    return sum(len(message["content"]) for message in row["prompt"])


def _sampled(reference: Path, rows: Sequence[Row], sizes: Sizes) -> dict[str, list[tuple[str, float]]]:
    """Answers of the reference with their rewards, by question."""
    model, params = load_hf(str(reference))
    tokenizer = load_tokenizer(str(reference))
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, reference), rows, rewards.resolve("bfcl"), sizes.max_tokens,
        sizes.samples, prompts_in_flight=32,
    )  # fmt: skip
    shown = evaluator.generations(evaluator(params, None, jax.random.key(0)))
    texts = [(row["completion"], row["reward"]) for row in shown]
    ends = sizes.samples * (1 + np.arange(len(rows)))
    return {row["id"]: texts[end - sizes.samples : end] for row, end in zip(rows, ends, strict=True)}
