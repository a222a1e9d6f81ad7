"""What an update step carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

Params = Mapping[str, Any]
Path = tuple[str, ...]


class State(NamedTuple):
    """One pytree: trainable and frozen parameters, Polyak-averaged copies, optimizer state and the number of updates."""

    trainable: Params
    frozen: Params
    targets: Params
    opt_state: optax.OptState
    step: Int[Array, ""]

    def params(self) -> Params:
        """The whole model's parameters: `trainable` laid over `frozen`."""
        return merge(self.trainable, self.frozen)


def partition(params: Params, keep: Callable[[Path], bool]) -> tuple[dict, dict]:
    """Two nested dicts: the leaves whose path satisfies `keep`, and the others."""
    leaves = flatten_dict(params)
    kept = {path for path in leaves if keep(path)}
    return tuple(
        unflatten_dict({path: leaf for path, leaf in leaves.items() if (path in kept) == wanted})
        for wanted in (True, False)
    )


def merge(above: Params, below: Params) -> dict:
    """One nested dict with the leaves of both; `above` wins where both have one."""
    return unflatten_dict(flatten_dict(below) | flatten_dict(above))


def polyak_average(targets: Params, params: Params, rate: float) -> Params:
    """(1 - rate) * target + rate * parameter, for the parameters that have a target of the same name."""
    leaves = flatten_dict(params)
    followed = unflatten_dict({path: leaves[path] for path in flatten_dict(targets)})
    return optax.incremental_update(followed, targets, rate)


def init_state(
    model,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    trainable: Callable[[Path], bool] | None = None,
    targets: Callable[[Params], Params] | None = None,
) -> State:
    """State at step 0; the optimizer state is created in the shardings of the parameters that it belongs to.

    The state takes `params` over: the first update donates the arrays, so keep a copy (or the files) of what must
    outlive it. Abstract parameters give an abstract state, for which a step can be compiled without its devices:
    `update.lower(init_state(model, model.abstract_params(), optimizer), batch).compile()`.

    Args:
        model: the model that the parameters belong to; its mesh is used when `mesh` is not given.
        params: nested dict of arrays, or of `jax.ShapeDtypeStruct`, with shardings where there is a mesh.
        optimizer: any optax transformation.
        trainable: says of a path, a tuple of names, whether its leaf learns; everything by default.
        targets: makes the slow copies out of `params`; none by default.

    Raises:
        ValueError: `trainable` keeps nothing.
    """
    mesh = mesh if mesh is not None else model.mesh
    learns, rests = partition(params, trainable or (lambda path: True))
    if not learns:
        raise ValueError("trainable keeps no parameter: nothing would learn")
    slow = dict(targets(params)) if targets else {}
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    shardings = None if mesh is None else _optimizer_shardings(optimizer, learns, everywhere)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(learns)):
        opt_state = jax.eval_shape(optimizer.init, learns)
        if mesh is not None:
            opt_state = jax.tree.map(_placed, opt_state, shardings)
        return State(learns, rests, slow, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere))
    # A copy, because a buffer that stands twice in donated arguments cannot be donated.
    slow = jax.tree.map(jnp.copy, slow)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(learns)
    step = jnp.int32(0) if mesh is None else jax.device_put(jnp.int32(0), everywhere)
    state = State(learns, rests, slow, opt_state, step)
    # What jit returns is committed to its devices; a first state that were not would compile the update step twice.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _optimizer_shardings(optimizer, trainable: Params, everywhere: NamedSharding):
    abstract = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        # Factored moments have other shapes than their parameters, and are small.
        lambda leaf, param: param.sharding if leaf.shape == param.shape else everywhere,
        abstract,
        trainable,
        transform_non_params=lambda leaf: everywhere,
    )
