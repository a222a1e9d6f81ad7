"""What is trained on: for each row of the table, steps of prompts with their answers, as token ids in a file.

A group is `{"prompt": [...], "answers": [[...], ...]}`, the better answers first. Ours takes groups as they are; a peer
takes the pairs of better and worse answer that a group holds, each with its prompt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shiq_jax.data import bfcl, fetch
from shiq_jax.data.chat import encode_prompt, load_tokenizer

STEPS = 6


class Work(NamedTuple):
    """One row's work: how many groups make a step, and how many pairs that is for a peer."""

    name: str
    groups: int
    answers: int

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return self.groups * self.answers // 2


WORKS = {
    work.name: work
    for work in (
        Work("pairs", 2, 2),
        Work("bfcl_pairs", 8, 2),
        Work("bfcl_groups_k8", 4, 8),
        Work("groups_k16_long", 1, 16),
    )
}


def write(work: Work, path: Path, steps: int = STEPS, seed: int = 0) -> None:
    """The work's steps as JSON: a list of steps, each a list of groups."""
    makers = {"pairs": _fixed(64, 192), "groups_k16_long": _fixed(1600, 50)}
    groups = makers.get(work.name, _bfcl)(work, np.random.default_rng(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [list(itertools.islice(groups, work.groups)) for _ in range(steps)]
    path.write_text(json.dumps(chosen))


def _fixed(prompt: int, answer: int):
    def make(work: Work, random: np.random.Generator) -> Iterator[dict]:
        draw = lambda length: random.integers(100, 40_000, length).tolist()  # noqa: E731
        while True:
            yield {"prompt": draw(prompt), "answers": [draw(answer) for _ in range(work.answers)]}

    return make


def _bfcl(work: Work, random: np.random.Generator) -> Iterator[dict]:
    """Questions of the leaderboard in random order; the first answer is the accepted one, the others are those that
    belong to other questions, so that lengths are real."""
    tokenizer = load_tokenizer(fetch.smollm2())
    rows = bfcl.load(fetch.bfcl(), bfcl.CATEGORIES)
    ends = [tokenizer(row["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    for number in random.permutation(len(rows)):
        others = random.choice(len(rows), work.answers - 1, replace=False)
        yield {
            "prompt": encode_prompt(tokenizer, rows[number]["prompt"], rows[number].get("tools")),
            "answers": [ends[number], *(ends[other] for other in others)],
        }
