"""Gradients that are added to sums where they arise: accumulating holds one array of gradients, not sum and summand.

The trick is a detour of the parameters through the carry of the scan over layers. Forward it does nothing; backward the
cotangent of a carry is itself a carry, which begins as the sums and to which each layer adds its own part in place.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

LAYERS = "layers"  # of the parameters, those that the scan goes over
# A flat dict of parameters, or of sums of their gradients, by path.
Leaves = dict[tuple[str, ...], jax.Array]


def continuing(params: dict[str, Any], before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters whose gradients are added to `before`, and what of that `Model.hidden` is to be given as `sums`."""
    rest = {name: jax.tree.map(begin, part, before[name]) for name, part in params.items() if name != LAYERS}
    return {**params, **rest}, before.get(LAYERS)


@jax.custom_vjp
def begin(weights: Float[Array, "..."], before: Float[Array, "..."]) -> Float[Array, "..."]:
    """`weights`, whose gradient then is `before` and what it would have been."""
    return weights


def _begin(weights, before):
    return weights, before


begin.defvjp(_begin, lambda before, cotangent: (before + cotangent, None))


@jax.custom_vjp
def detour(weights: Leaves, passing: Leaves, layer: Int[Array, ""]) -> tuple[Leaves, Leaves]:
    """Both as they are; the gradient of one layer's `weights` goes to that layer of `passing`, and not to `weights`."""
    return weights, passing


def _detour(weights, passing, layer):
    return (weights, passing), layer


def _return(layer, cotangents):
    own, whole = cotangents
    return None, jax.tree.map(lambda sums, part: sums.at[layer].add(part), whole, own), None


detour.defvjp(_detour, _return)


@jax.custom_vjp
def end(x: Float[Array, "..."], passing: Leaves, before: Leaves) -> Float[Array, "..."]:
    """`x`; what `passing` received on its way is added to `before`."""
    return x


def _end(x, passing, before):
    return x, before


end.defvjp(_end, lambda before, cotangent: (cotangent, before, None))
