"""Data of `experiments.dp_alignment`: question splits, and a correct and an incorrect answer to each question."""

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

# Maximum characters of a prompt, which limits the length of the padded rows.
MAX_CHARACTERS = 800

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of questions in each split, and sampling limits.

    Attributes:
        units: private questions, each with a correct and an incorrect answer.
        demonstrations: public questions for the warm start.
        tuning: public questions with both answers, for choosing learning rates.
        tuning_learned: how many of the tuning questions are trained on; the others are evaluated.
        held_out: evaluation questions.
        samples: answers sampled from the reference per question.
        max_tokens: maximum answer length.
    """

    units: int
    demonstrations: int
    tuning: int
    tuning_learned: int
    held_out: int
    samples: int
    max_tokens: int


def write_questions(root: Path, sizes: Sizes) -> None:
    """Write disjoint question splits; held-out questions share no function with the others."""
    rows = bfcl.load(fetch.bfcl(), ("simple_python",))
    splits = bfcl.split_held_out(rows, seed=0, held_out=0.25)
    training, held_out = ([row for row in split if _num_characters(row) <= MAX_CHARACTERS] for split in splits)
    # Some questions never get an incorrect answer, so 1.5 times as many are prepared.
    tuning_start = sizes.demonstrations
    private_start = tuning_start + sizes.tuning * 3 // 2
    parts = {
        "demonstrations": [row | {"completion": row["target"]} for row in training[:tuning_start]],
        "tuning": training[tuning_start:private_start],
        "private": training[private_start : private_start + sizes.units * 3 // 2],
        "held_out": held_out[: sizes.held_out],
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_jsonl(root / f"{name}.jsonl", part)


def write_pairs(root: Path, reference: Path, sizes: Sizes) -> None:
    """Write `NAME.pairs.jsonl` and `NAME.answers.jsonl` for every split except the demonstrations.

    The answers are the first correct and the first incorrect sample of the reference; an accepted answer replaces a
    missing correct one. The `user_id` of a row is its question, so that the whole question is the unit of privacy.

    Raises:
        UserError: too few questions have an incorrect answer.
    """
    counts = {"tuning": sizes.tuning, "private": sizes.units, "held_out": None}
    questions = {name: read_rows(root / f"{name}.jsonl") for name in counts}
    answers = _sample_answers(reference, [row for rows in questions.values() for row in rows], sizes)
    for name, rows in questions.items():
        pairs, count = [pair for row in rows if (pair := make_pair(row, answers[row["id"]]))], counts[name]
        if count is not None and len(pairs) < count:
            raise UserError(f"the {name} split has {len(pairs)} pairs, need {count}: request fewer")
        write_pair_files(root, name, pairs[:count])


def write_pair_files(root: Path, name: str, pairs: Sequence[Row]) -> None:
    """Write the same answers as preference pairs for DPO and as scored answers for ShiQ."""
    write_jsonl(root / f"{name}.answers.jsonl", [answer for pair in pairs for answer in answer_rows(pair)])
    write_jsonl(root / f"{name}.pairs.jsonl", pairs)


def make_pair(row: Row, answers: Sequence[tuple[str, float]]) -> dict[str, Any] | None:
    """A preference pair from a question and its scored answers; None without an incorrect answer."""
    correct = [text for text, reward in answers if reward >= 1]
    incorrect = [text for text, reward in answers if reward < 1 and text.strip()]
    if not incorrect:
        return None
    return {
        "prompt": row["prompt"],
        "chosen": correct[0] if correct else row["target"],
        "rejected": incorrect[0],
        "user_id": row["id"],
        "sampled": bool(correct),
    }


def answer_rows(pair: Row) -> list[dict[str, Any]]:
    """The two answers of a pair with rewards relative to their mean, so that no other question is used."""
    shared = {"prompt": pair["prompt"], "user_id": pair["user_id"], "group_id": pair["user_id"]}
    reward_by_answer = {"chosen": 0.5, "rejected": -0.5}
    return [shared | {"completion": pair[name], "reward": reward} for name, reward in reward_by_answer.items()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _num_characters(row: Row) -> int:
    return sum(len(message["content"]) for message in row["prompt"])


def _sample_answers(reference: Path, rows: Sequence[Row], sizes: Sizes) -> dict[str, list[tuple[str, float]]]:
    """Sampled answers of the reference with their rewards, by question id."""
    model, params = load_hf(str(reference))
    tokenizer = load_tokenizer(str(reference))
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, reference), rows, rewards.resolve("bfcl"), sizes.max_tokens,
        sizes.samples, prompts_in_flight=32,
    )  # fmt: skip
    samples = evaluator.generations(evaluator(params, None, jax.random.key(0)))
    answers = [(sample["completion"], sample["reward"]) for sample in samples]
    ends = sizes.samples * (1 + np.arange(len(rows)))
    return {row["id"]: answers[end - sizes.samples : end] for row, end in zip(rows, ends, strict=True)}
