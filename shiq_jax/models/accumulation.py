"""In-place gradient accumulation: backward passes add to running sums, so no second gradient pytree is allocated.

The layer parameters are routed through the carry of the scan over layers. The forward pass is unchanged. In the
backward pass the carry's cotangent starts as the running sums, and each layer adds its gradient to its own slice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

LAYERS = "layers"  # key of the scanned parameters
# Flat dict from path to parameter, or to the running sum of its gradients.
Leaves = dict[tuple[str, ...], jax.Array]


def accumulate_into(model, params: dict[str, Any], sums: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model and parameters whose gradients are added to `sums`.

    model: a `Model` adds the gradients of its layers in place, layer by layer; any other model adds whole arrays.
    """
    in_place = LAYERS in sums and hasattr(model, "accumulating")
    whole = {
        name: jax.tree.map(add_to_cotangent, subtree, sums[name])
        for name, subtree in params.items()
        if not (in_place and name == LAYERS)
    }
    return model.accumulating(sums[LAYERS]) if in_place else model, {**params, **whole}


def scan_layers(layer: Callable, x: Array, weights: dict[str, Any], sums: dict[str, Any] | None) -> tuple[Array, Any]:
    """`jax.lax.scan(layer, x, weights)` whose weight gradients are added to `sums`.

    weights: nested dict with leading axis layers. sums: nested dict with a subset of the same leaves; leaves without a
    sum get a zero gradient. None: an ordinary scan.
    """
    if sums is None:
        return jax.lax.scan(layer, x, weights)
    weights, sums = flatten_dict(weights), flatten_dict(dict(sums))

    def body(carry, scanned):
        x, stacked = carry
        index, layer_weights = scanned
        tracked, stacked = accumulate_layer({path: layer_weights[path] for path in sums}, stacked, index)
        x, out = layer(x, unflatten_dict(layer_weights | tracked))
        return (x, stacked), out

    num_layers = len(next(iter(weights.values())))
    carry = x, {path: weights[path] for path in sums}
    scanned = jnp.arange(num_layers), jax.lax.stop_gradient(weights)
    (x, stacked), out = jax.lax.scan(body, carry, scanned)
    return start_cotangent(x, stacked, sums), out


@jax.custom_vjp
def add_to_cotangent(weights: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Identity in `weights` whose VJP returns `total + cotangent`."""
    return weights


def _add_to_cotangent_forward(weights, total):
    return weights, total


add_to_cotangent.defvjp(_add_to_cotangent_forward, lambda total, cotangent: (total + cotangent, None))


@jax.custom_vjp
def accumulate_layer(weights: Leaves, stacked: Leaves, layer: Int[Array, ""]) -> tuple[Leaves, Leaves]:
    """Identity whose VJP adds the gradient of one layer's `weights` to slice `layer` of the cotangent of `stacked`."""
    return weights, stacked


def _accumulate_layer_forward(weights, stacked, layer):
    return (weights, stacked), layer


def _accumulate_layer_backward(layer, cotangents):
    layer_grads, stacked_grads = cotangents
    return None, jax.tree.map(lambda total, grad: total.at[layer].add(grad), stacked_grads, layer_grads), None


accumulate_layer.defvjp(_accumulate_layer_forward, _accumulate_layer_backward)


@jax.custom_vjp
def start_cotangent(x: Float[Array, "..."], stacked: Leaves, sums: Leaves) -> Float[Array, "..."]:
    """Identity in `x` whose VJP returns `sums` as the cotangent of `stacked`."""
    return x


def _start_cotangent_forward(x, stacked, sums):
    return x, sums


start_cotangent.defvjp(_start_cotangent_forward, lambda sums, cotangent: (cotangent, sums, None))
