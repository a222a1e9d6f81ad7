"""Sampling worker of this library: several completions of each prompt in a file. Started by `throughput`."""

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
    """Warm up and serve steps, each of which samples completions of all prompts.

    Args:
        model: a Hugging Face directory.
        prompts: a JSON file of token ids.
        samples: completions per prompt.
        max_tokens: maximum completion length.
        stop: end-of-sequence token id.
    """
    prompt_tokens = json.loads(Path(prompts).read_text())
    decoder, params = load_hf(model)
    sampler = Sampler(
        decoder, Sampling(max_tokens=int(max_tokens)), (int(stop),),
        samples_per_prompt=int(samples), prompts_in_flight=len(prompt_tokens),
    )  # fmt: skip
    seeds = itertools.count()

    def step() -> dict:
        completions = sampler(params, prompt_tokens, jax.random.key(next(seeds)))
        return {"tokens": sum(len(completion["tokens"]) for group in completions for completion in group)}

    step()
    serving.serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
