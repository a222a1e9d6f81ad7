"""Our contestant in sampling: several answers to each prompt of a file. Run by `throughput`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import jax

from benchmarks import serving
from shiq_jax.models import load_hf
from shiq_jax.rollout.generate import Sampler
from shiq_jax.rollout.sampling import Sampling


def main(model: str, prompts: str, samples: str, max_tokens: str, stop: str) -> None:
    """Warms up and serves; a step draws `samples` answers of at most `max_tokens` to every prompt (token ids, JSON)."""
    asked = json.loads(Path(prompts).read_text())
    decoder, params = load_hf(model)
    sampler = Sampler(
        decoder, Sampling(max_tokens=int(max_tokens)), (int(stop),),
        samples_per_prompt=int(samples), prompts_in_flight=len(asked),
    )  # fmt: skip
    seeds = itertools.count()

    def one() -> dict:
        answers = sampler(params, asked, jax.random.key(next(seeds)))
        return {"tokens": sum(len(answer["tokens"]) for several in answers for answer in several)}

    one()
    serving.serve(one)


if __name__ == "__main__":
    main(*sys.argv[1:])
