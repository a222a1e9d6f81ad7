"""transformers' `generate` with all sequences in one batch. Run by `throughput` in an environment of its own."""

import itertools
import json
import sys
from pathlib import Path

import torch
import transformers

from benchmarks import serving


def main(model: str, prompts: str, samples: str, max_tokens: str, stop: str) -> None:
    """Warms up and serves; arguments as `ours_sampling`."""
    asked, stop = json.loads(Path(prompts).read_text()), int(stop)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    width = max(map(len, asked))
    tokens = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=int(samples),
        max_new_tokens=int(max_tokens), eos_token_id=stop, pad_token_id=stop,
    )  # fmt: skip
    seeds = itertools.count()

    @torch.inference_mode()
    def one() -> dict:
        torch.manual_seed(next(seeds))
        found = network.generate(tokens, attention_mask=mask, generation_config=settings)[:, width:]
        ended = (found == stop).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, found.shape[1])
        return {"tokens": int(lengths.sum())}

    one()
    serving.serve(one)


if __name__ == "__main__":
    main(*sys.argv[1:])
