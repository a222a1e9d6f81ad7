"""Opacus worker: ghost clipping or a non-private step. Started by `privacy` in its own virtual environment.

Opacus does not support tied parameters, so the head is a copy of the embedding. It supports `torch.nn.RMSNorm`, which
replaces the transformers norm layers.
"""

import sys

import torch
import transformers
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from benchmarks import serving


def main(model: str, length: str, units: str, mode: str) -> None:
    """Warm up and serve steps.

    Args:
        model: a Hugging Face directory.
        length: tokens per sequence.
        units: sequences per step.
        mode: `plain` or `ghost`.
    """
    length, units = int(length), int(units)
    module = untied(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).train()
    tokens = torch.randint(module.config.vocab_size, (units, length), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].reshape(-1)
    optimizer, criterion = torch.optim.AdamW(module.parameters(), lr=1e-6), torch.nn.CrossEntropyLoss()
    if mode == "ghost":
        module = GradSampleModuleFastGradientClipping(module, max_grad_norm=1.0, strict=False)
        optimizer = DPOptimizerFastGradientClipping(
            optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=units
        )
        private_criterion = DPLossFastGradientClipping(module, optimizer, criterion)

    def step() -> None:
        logits = module(input_ids=tokens, use_cache=False).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        if mode == "ghost":
            loss = private_criterion(flat, targets, shape=logits.shape)
        else:
            loss = criterion(flat, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    serving.serve(step, parameters=sum(parameter.numel() for parameter in module.parameters()))


def untied(module):
    """Untie the head from the embedding and replace the norms with `torch.nn.RMSNorm`, in place."""
    module.config.tie_word_embeddings = False
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
