"""Gradients that are added to sums where they arise: accumulating holds one array of gradients, not sum and summand.

The trick is a detour of the parameters through the carry of the scan over layers. Forward it does nothing; backward the
cotangent of a carry is itself a carry, which begins as the sums and to which each layer adds its own part in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

LAYERS = "layers"  # of the parameters, those that the scan goes over
# A flat dict of parameters, or of sums of their gradients, by path.
Leaves = dict[tuple[str, ...], jax.Array]


def continuing(model, params: dict[str, Any], before: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model and parameters of it whose gradients are added to `before`.

    model: a `Model` adds those of its layers in place, layer by layer; any other model adds whole arrays.
    """
    in_place = LAYERS in before and hasattr(model, "accumulating")
    rest = {
        name: jax.tree.map(begin, part, before[name])
        for name, part in params.items()
        if not (in_place and name == LAYERS)
    }
    return model.accumulating(before[LAYERS]) if in_place else model, {**params, **rest}


def scan(layer: Callable, x: Array, weights: dict[str, Any], sums: dict[str, Any] | None) -> tuple[Array, Any]:
    """`jax.lax.scan(layer, x, weights)`, in which the gradients of those weights that have sums are added to these.

    weights: nested dict, leading axis the layers. sums: some of its leaves, by the same names; the others then have no
    gradient. None: an ordinary scan.
    """
    if sums is None:
        return jax.lax.scan(layer, x, weights)
    weights, sums = flatten_dict(weights), flatten_dict(dict(sums))

    def body(carry, scanned):
        x, passing = carry
        number, weights = scanned
        own, passing = detour({path: weights[path] for path in sums}, passing, number)
        x, out = layer(x, unflatten_dict(weights | own))
        return (x, passing), out

    count = len(next(iter(weights.values())))
    carry, scanned = (x, {path: weights[path] for path in sums}), (jnp.arange(count), jax.lax.stop_gradient(weights))
    (x, passing), out = jax.lax.scan(body, carry, scanned)
    return end(x, passing, sums), out


@jax.custom_vjp
def begin(weights: Float[Array, "..."], before: Float[Array, "..."]) -> Float[Array, "..."]:
    """Identity in `weights` whose VJP returns `before + cotangent`."""
    return weights


def _begin(weights, before):
    return weights, before


begin.defvjp(_begin, lambda before, cotangent: (before + cotangent, None))


@jax.custom_vjp
def detour(weights: Leaves, passing: Leaves, layer: Int[Array, ""]) -> tuple[Leaves, Leaves]:
    """Identity whose VJP adds the gradient of one layer's `weights` to that layer of `passing`, not to `weights`."""
    return weights, passing


def _detour(weights, passing, layer):
    return (weights, passing), layer


def _return(layer, cotangents):
    own, whole = cotangents
    return None, jax.tree.map(lambda sums, part: sums.at[layer].add(part), whole, own), None


detour.defvjp(_detour, _return)


@jax.custom_vjp
def end(x: Float[Array, "..."], passing: Leaves, before: Leaves) -> Float[Array, "..."]:
    """Identity in `x`; the cotangent of `passing` starts as `before`."""
    return x


def _end(x, passing, before):
    return x, before


end.defvjp(_end, lambda before, cotangent: (cotangent, before, None))
