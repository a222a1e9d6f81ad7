"""LoRA (arXiv 2106.09685): a frozen kernel W acts as W + alpha / rank * A B with trainable A and B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

# Checkpoint names of the linear layers of a decoder layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Parameter names of A [*inputs, rank] and B [rank, *outputs], next to `kernel`.
A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA configuration, the same for every layer.

    targets: linear layers with an adapter, a subset of `TARGETS`. Raises ValueError for a rank below 1, a non-positive
    or non-finite alpha, or unknown or empty targets.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"the rank of LoRA must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of LoRA must be positive and finite, not {self.alpha}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown:
            raise ValueError(f"unknown LoRA target {', '.join(unknown)!r}; the targets are {', '.join(TARGETS)}")
        if not self.targets:
            raise ValueError(f"LoRA needs at least one target; the targets are {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of A B."""
        return self.alpha / self.rank


def is_adapter(path: Sequence[str]) -> bool:
    """Whether a parameter path belongs to an adapter; `init_state(..., trainable=is_adapter)` trains adapters only."""
    return path[-1] in (A, B)


def only_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """Select the adapters from a nested dict of parameters."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(dict(params)).items() if is_adapter(path)})


def without_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the adapters from a nested dict of parameters."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(dict(params)).items() if not is_adapter(path)})


@jax.jit
def merge_adapters(
    kernel: Float[Array, "layers *inputs_and_outputs"],
    a: Float[Array, "layers *inputs rank"],
    b: Float[Array, "layers rank *outputs"],
    scale: float,
) -> Float[Array, "layers *inputs_and_outputs"]:
    """W + scale * A B for every layer, computed in float32 or wider."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    layers, rank = len(a), a.shape[-1]
    product = jnp.matmul(
        a.reshape(layers, -1, rank).astype(wide), b.reshape(layers, rank, -1).astype(wide), precision="highest"
    )
    return (kernel.astype(wide) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
