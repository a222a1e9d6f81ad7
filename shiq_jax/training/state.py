"""Training state: parameters, optimizer state and step."""

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
    """Pytree of trainable and frozen parameters, Polyak-averaged targets, optimizer state and number of updates."""

    trainable: Params
    frozen: Params
    targets: Params
    opt_state: optax.OptState
    step: Int[Array, ""]

    def params(self) -> Params:
        """All parameters of the model, trainable and frozen."""
        return merge(self.trainable, self.frozen)


def partition(params: Params, keep: Callable[[Path], bool]) -> tuple[dict, dict]:
    """Split into two nested dicts: the leaves whose path satisfies `keep`, and the others."""
    leaves = flatten_dict(params)
    kept_paths = {path for path in leaves if keep(path)}
    return tuple(
        unflatten_dict({path: leaf for path, leaf in leaves.items() if (path in kept_paths) == kept})
        for kept in (True, False)
    )


def merge(overrides: Params, base: Params) -> dict:
    """Merge two nested dicts; leaves of `overrides` take precedence."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(overrides))


def polyak_average(targets: Params, params: Params, rate: float) -> Params:
    """(1 - rate) * target + rate * parameter, for every path in `targets`."""
    leaves = flatten_dict(params)
    averaged = unflatten_dict({path: leaves[path] for path in flatten_dict(targets)})
    return optax.incremental_update(averaged, targets, rate)


def init_state(
    model,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    trainable: Callable[[Path], bool] | None = None,
    targets: Callable[[Params], Params] | None = None,
) -> State:
    """State at step 0, with the optimizer state sharded like the parameters.

    The state takes ownership of `params`: the first update donates the arrays, so copy those that you need afterwards.
    Abstract parameters give an abstract state, for which a step can be compiled without its devices:
    `update.lower(init_state(model, model.abstract_params(), optimizer), batch).compile()`.

    Args:
        model: the model of the parameters.
        params: nested dict of arrays, or of `jax.ShapeDtypeStruct` (with shardings if there is a mesh).
        optimizer: any optax transformation.
        mesh: mesh of the parameters; by default `model.mesh`.
        trainable: path (tuple of names) -> whether the leaf is trained; by default all leaves are.
        targets: `params` -> subtrees with a Polyak-averaged copy; by default none.

    Raises:
        ValueError: `trainable` selects no parameter.
    """
    mesh = mesh if mesh is not None else model.mesh
    trained, frozen = partition(params, trainable or (lambda path: True))
    if not trained:
        raise ValueError("trainable selects no parameter, so there is nothing to train")
    target_params = dict(targets(params)) if targets else {}
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    shardings = None if mesh is None else _optimizer_shardings(optimizer, trained, replicated)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trained)):
        opt_state = jax.eval_shape(optimizer.init, trained)
        if mesh is not None:
            opt_state = jax.tree.map(_with_sharding, opt_state, shardings)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return State(trained, frozen, target_params, opt_state, step)
    # An array that appears twice in donated arguments cannot be donated.
    target_params = jax.tree.map(jnp.copy, target_params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    step = jnp.int32(0) if mesh is None else jax.device_put(jnp.int32(0), replicated)
    state = State(trained, frozen, target_params, opt_state, step)
    # Commit the arrays as jit commits its results; otherwise the second call of the update would compile again.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _optimizer_shardings(optimizer, trainable: Params, replicated: NamedSharding):
    abstract = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        # Factored moments are small and their shapes differ from the parameters'.
        lambda leaf, param: param.sharding if leaf.shape == param.shape else replicated,
        abstract,
        trainable,
        transform_non_params=lambda leaf: replicated,
    )
