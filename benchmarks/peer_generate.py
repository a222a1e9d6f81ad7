"""transformers sampling worker: `generate` on one batch. Started by `throughput` in its own virtual environment."""

import itertools
import json
import sys
from pathlib import Path

import torch
import transformers

from benchmarks import serving


def main(model: str, prompts: str, samples: str, max_tokens: str, stop: str) -> None:
    """Warm up and serve steps; arguments as for `ours_sampling`."""
    prompt_tokens, stop = json.loads(Path(prompts).read_text()), int(stop)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    width = max(map(len, prompt_tokens))
    tokens = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompt_tokens])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompt_tokens])
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=int(samples),
        max_new_tokens=int(max_tokens), eos_token_id=stop, pad_token_id=stop,
    )  # fmt: skip
    seeds = itertools.count()

    @torch.inference_mode()
    def step() -> dict:
        torch.manual_seed(next(seeds))
        completions = decoder.generate(tokens, attention_mask=mask, generation_config=settings)[:, width:]
        is_stop = (completions == stop).int()
        lengths = torch.where(is_stop.any(1), is_stop.argmax(1) + 1, completions.shape[1])
        return {"tokens": int(lengths.sum())}

    step()
    serving.serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
