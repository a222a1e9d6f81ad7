"""Opacus' ghost clipping, and the plain step beside it. Run by `privacy` in an environment of its own.

Opacus takes no tied parameters, so that the head is a copy of the table; and it has a sampler of norms for torch's own
RMSNorm, by which transformers' is replaced.
"""

import sys

import torch
import transformers
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from benchmarks import serving


def main(model: str, length: str, units: str, mode: str) -> None:
    """Warms up and serves.

    Args:
        model: a Hugging Face directory.
        length: tokens of a sequence.
        units: sequences of a step.
        mode: `plain` or `ghost`.
    """
    length, units = int(length), int(units)
    network = untied(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).train()
    tokens = torch.randint(network.config.vocab_size, (units, length), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].reshape(-1)
    optimizer, criterion = torch.optim.AdamW(network.parameters(), lr=1e-6), torch.nn.CrossEntropyLoss()
    if mode == "ghost":
        network = GradSampleModuleFastGradientClipping(network, max_grad_norm=1.0, strict=False)
        optimizer = DPOptimizerFastGradientClipping(
            optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=units
        )
        private = DPLossFastGradientClipping(network, optimizer, criterion)

    def one() -> None:
        logits = network(input_ids=tokens, use_cache=False).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        loss = private(flat, targets, shape=logits.shape) if mode == "ghost" else criterion(flat, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    one()
    serving.serve(one, parameters=sum(each.numel() for each in network.parameters()))


def untied(network):
    """The model with a head of its own and torch's norms."""
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return network


if __name__ == "__main__":
    main(*sys.argv[1:])
