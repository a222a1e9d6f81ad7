"""Low-rank adapters: a kernel W acts as W + alpha / rank * A B, of which A and B alone learn (arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

# The linear maps of a layer, as checkpoints call them.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What stands beside a kernel: A [*inputs, rank] and B [rank, *outputs].
A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear maps of every layer have an adapter, and of which size.

    rank: of A B. alpha: its scale, times the rank. targets: names out of `TARGETS`. Raises ValueError for a rank below
    1, an alpha that is no positive number, and names that there are not.
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
        if unknown or not self.targets:
            raise ValueError(f"LoRA has no target {', '.join(unknown)!r}; the targets are {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank


def is_adapter(path: Sequence[str]) -> bool:
    """Whether a parameter's path names a part of an adapter; `init_state(..., trainable=is_adapter)` trains those."""
    return path[-1] in (A, B)


def only_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters out of a nested dict of parameters."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(dict(params)).items() if is_adapter(path)})


def without_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict of parameters without its adapters."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(dict(params)).items() if not is_adapter(path)})


@jax.jit
def merged(
    kernel: Float[Array, "layers *inputs_and_outputs"],
    a: Float[Array, "layers *inputs rank"],
    b: Float[Array, "layers rank *outputs"],
    scale: float,
) -> Float[Array, "layers *inputs_and_outputs"]:
    """W + scale * A B of every layer, added up in float32 at least."""
    precise = jnp.promote_types(kernel.dtype, jnp.float32)
    layers, rank = len(a), a.shape[-1]
    product = jnp.matmul(
        a.reshape(layers, -1, rank).astype(precise), b.reshape(layers, rank, -1).astype(precise), precision="highest"
    )
    return (kernel.astype(precise) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
