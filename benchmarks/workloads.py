"""Training workloads: steps of prompts with completions, as token ids in a JSON file.

A group is `{"prompt": [...], "answers": [[...], ...]}` with the better completions first. This library trains on the
groups; a peer trains on the pairs of consecutive completions, each with its own copy of the prompt.
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


class Workload(NamedTuple):
    """A training workload.

    Attributes:
        name: name of the benchmark row.
        groups: groups per step.
        answers: completions per group.
        steps: distinct steps; one suffices if all sequences have the same length.
        trial_size: groups and completions of the smaller step on which peer settings are compared.
        microbatch_sizes: pairs per forward pass of a peer; larger ones do not fit 24 GB.
    """

    name: str
    groups: int
    answers: int
    steps: int
    trial_size: tuple[int, int]
    microbatch_sizes: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Pairs per step."""
        return self.groups * self.answers // 2

    @property
    def trial(self) -> Workload:
        """The smaller workload on which peer settings are compared."""
        groups, answers = self.trial_size
        return self._replace(groups=groups, answers=answers, steps=1)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("pairs", 2, 2, steps=1, trial_size=(2, 2), microbatch_sizes=(2, 1)),
        Workload("bfcl_pairs", 8, 2, steps=3, trial_size=(2, 2), microbatch_sizes=(2, 1)),
        Workload("bfcl_groups_k8", 4, 8, steps=2, trial_size=(1, 4), microbatch_sizes=(1,)),
        Workload("groups_k16_long", 1, 16, steps=1, trial_size=(1, 2), microbatch_sizes=(1,)),
    )
}


def write(workload: Workload, path: Path, seed: int = 0, tiny: bool = False) -> None:
    """Write the steps as JSON: a list of steps, each a list of groups.

    Args:
        workload: sizes of the steps.
        path: output file.
        seed: random seed.
        tiny: write short byte sequences for a tiny model.
    """
    if tiny:
        generators = {"pairs": _fixed_length(16, 8, (0, 256)), "groups_k16_long": _fixed_length(64, 4, (0, 256))}
    else:
        generators = {"pairs": _fixed_length(64, 192), "groups_k16_long": _fixed_length(1600, 50)}
    generate = generators.get(workload.name, _short_groups if tiny else _bfcl_groups)
    groups = generate(workload, np.random.default_rng(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [list(itertools.islice(groups, workload.groups)) for _ in range(workload.steps)]
    path.write_text(json.dumps(steps))


def _fixed_length(prompt: int, answer: int, ids: tuple[int, int] = (100, 40_000)):
    def generate(workload: Workload, rng: np.random.Generator) -> Iterator[dict]:
        random_tokens = lambda length: rng.integers(*ids, length).tolist()  # noqa: E731
        while True:
            yield {"prompt": random_tokens(prompt), "answers": [random_tokens(answer) for _ in range(workload.answers)]}

    return generate


def _short_groups(workload: Workload, rng: np.random.Generator) -> Iterator[dict]:
    """Groups with prompts of 16 to 31 bytes and completions of 4 to 7 bytes."""
    random_tokens = lambda minimum: rng.integers(0, 256, rng.integers(minimum, 2 * minimum)).tolist()  # noqa: E731
    while True:
        yield {"prompt": random_tokens(16), "answers": [random_tokens(4) for _ in range(workload.answers)]}


def _bfcl_groups(workload: Workload, rng: np.random.Generator) -> Iterator[dict]:
    """Leaderboard questions in random order: the accepted answer first, then accepted answers of other questions."""
    tokenizer = load_tokenizer(fetch.smollm2())
    rows = bfcl.load(fetch.bfcl(), bfcl.CATEGORIES)
    answers = [
        tokenizer(row["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for row in rows
    ]
    for number in rng.permutation(len(rows)):
        negatives = rng.choice(len(rows), workload.answers - 1, replace=False)
        yield {
            "prompt": encode_prompt(tokenizer, rows[number]["prompt"], rows[number].get("tools")),
            "answers": [answers[number], *(answers[negative] for negative in negatives)],
        }
