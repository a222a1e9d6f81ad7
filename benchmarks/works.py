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

from shiq_jax.data.chat import encode_prompt, load_tokenizer
from shiq_jax.tasks import bfcl, fetch


class Work(NamedTuple):
    """One row's work.

    Attributes:
        name: of the row.
        groups: of a step.
        answers: of a group.
        steps: unlike ones; where all are of one length, one is as good as many.
        tried: groups and answers of the step on which a peer's settings are tried, where a whole one takes minutes.
        at_once: pairs that a peer computes at once, each tried; more of the longer ones do not fit 24 GB.
    """

    name: str
    groups: int
    answers: int
    steps: int
    tried: tuple[int, int]
    at_once: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return self.groups * self.answers // 2

    @property
    def trial(self) -> Work:
        """The smaller work on which settings are tried."""
        groups, answers = self.tried
        return self._replace(groups=groups, answers=answers, steps=1)


WORKS = {
    work.name: work
    for work in (
        Work("pairs", 2, 2, steps=1, tried=(2, 2), at_once=(2, 1)),
        Work("bfcl_pairs", 8, 2, steps=3, tried=(2, 2), at_once=(2, 1)),
        Work("bfcl_groups_k8", 4, 8, steps=2, tried=(1, 4), at_once=(1,)),
        Work("groups_k16_long", 1, 16, steps=1, tried=(1, 2), at_once=(1,)),
    )
}


def write(work: Work, path: Path, seed: int = 0, tiny: bool = False) -> None:
    """The work's steps as JSON: a list of steps, each a list of groups.

    tiny: as many groups and answers, but short ones of bytes, for a tiny model.
    """
    if tiny:
        makers = {"pairs": _fixed(16, 8, (0, 256)), "groups_k16_long": _fixed(64, 4, (0, 256))}
    else:
        makers = {"pairs": _fixed(64, 192), "groups_k16_long": _fixed(1600, 50)}
    groups = makers.get(work.name, _short if tiny else _bfcl)(work, np.random.default_rng(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [list(itertools.islice(groups, work.groups)) for _ in range(work.steps)]
    path.write_text(json.dumps(chosen))


def _fixed(prompt: int, answer: int, ids: tuple[int, int] = (100, 40_000)):
    def make(work: Work, random: np.random.Generator) -> Iterator[dict]:
        draw = lambda length: random.integers(*ids, length).tolist()  # noqa: E731
        while True:
            yield {"prompt": draw(prompt), "answers": [draw(answer) for _ in range(work.answers)]}

    return make


def _short(work: Work, random: np.random.Generator) -> Iterator[dict]:
    """Prompts of 16 to 31 tokens and answers of 4 to 7, all of them bytes."""
    draw = lambda least: random.integers(0, 256, random.integers(least, 2 * least)).tolist()  # noqa: E731
    while True:
        yield {"prompt": draw(16), "answers": [draw(4) for _ in range(work.answers)]}


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
