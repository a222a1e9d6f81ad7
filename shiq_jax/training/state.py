"""What an update step carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

Params = Mapping[str, Any]
Path = tuple[str, ...]


class State(NamedTuple):
    """One pytree: what learns, what does not, slow copies, the optimiser's memory, the step and a random key."""

    trainable: Params
    frozen: Params
    targets: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Array

    def params(self) -> Params:
        """The whole model's parameters: `trainable` laid over `frozen`."""
        return merge(self.trainable, self.frozen)


def split(params: Params, keep: Callable[[Path], bool]) -> tuple[dict, dict]:
    """Two nested dicts: the leaves whose path satisfies `keep`, and the others."""

    def pick(tree, path, wanted):
        out = {}
        for name, child in tree.items():
            here = (*path, name)
            if isinstance(child, Mapping):
                if inner := pick(child, here, wanted):
                    out[name] = inner
            elif bool(keep(here)) == wanted:
                out[name] = child
        return out

    return pick(params, (), True), pick(params, (), False)


def merge(above: Params, below: Params) -> dict:
    """One nested dict with the leaves of both; `above` wins where both have one."""
    out = dict(below)
    for name, child in above.items():
        both = isinstance(child, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merge(child, out[name]) if both else child
    return out


def follow(slow: Params, fast: Params, rate: float) -> dict:
    """Slow copies a part `rate` of the way nearer to the leaves of the same names."""
    return {
        name: follow(leaf, fast[name], rate) if isinstance(leaf, Mapping) else leaf + rate * (fast[name] - leaf)
        for name, leaf in slow.items()
    }


def init_state(
    model,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    mesh: Mesh | None = None,
    trainable: Callable[[Path], bool] | None = None,
    targets: Callable[[Params], Params] | None = None,
) -> State:
    """State at step 0, the optimiser's memory born in the shardings of the parameters it belongs to.

    The state takes `params` over: the first update donates the arrays, so keep a copy (or the files) of what must
    outlive it.

    Args:
        model: the model that the parameters belong to; its mesh is used when `mesh` is not given.
        params: nested dict of arrays.
        optimizer: any optax transformation.
        key: random key of the run; step t draws with `fold_in(key, t)`.
        trainable: says of a path, a tuple of names, whether its leaf learns; everything by default.
        targets: makes the slow copies out of `params`; none by default.

    Raises:
        ValueError: `trainable` keeps nothing.
    """
    mesh = mesh if mesh is not None else model.mesh
    learns, rests = split(params, trainable or (lambda path: True))
    if not learns:
        raise ValueError("trainable keeps no parameter: nothing would learn")
    # A copy, because a buffer that stands twice in donated arguments cannot be donated.
    slow = jax.tree.map(jnp.copy, dict(targets(params))) if targets else {}
    opt_state = jax.jit(optimizer.init, out_shardings=_optimizer_shardings(optimizer, learns, mesh))(learns)
    # Copied as well: placing an array may share its memory, and the caller's key must outlive the donation.
    step, key = jnp.int32(0), jnp.copy(key)
    if mesh is not None:
        step, key = jax.device_put((step, key), NamedSharding(mesh, PartitionSpec()))
    state = State(learns, rests, slow, opt_state, step, key)
    # What jit returns is committed to its devices; a first state that were not would compile the update step twice.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _optimizer_shardings(optimizer, trainable: Params, mesh: Mesh | None):
    if mesh is None:
        return None
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(optimizer.init, trainable)
    return optax.tree.map_params(
        optimizer,
        # Factored moments have other shapes than their parameters, and are small.
        lambda leaf, param: param.sharding if leaf.shape == param.shape else everywhere,
        abstract,
        trainable,
        transform_non_params=lambda leaf: everywhere,
    )
