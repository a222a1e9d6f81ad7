"""Sum of clipped per-unit gradients, computed by one of several equivalent methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiq_jax.models.ghost_norms import BUDGET, PRECOMPUTED, NormTracker
from shiq_jax.privacy.clip_rules import ClipRule, Groupwise
from shiq_jax.privacy.coverage import coverage

Losses = Callable[[Any, Any, NormTracker | None], Float[Array, " units"]]
METHODS = ("auto", "vmap", "scan", "ghost", "bk", "group")
# Tokens per unit, by backend, from which a single unit saturates the device, so that "scan" loses no throughput.
LONG_UNIT = {"cpu": 128, "default": 1024}


def clipped_sum(
    losses: Losses,
    params: Any,
    batch: Any,
    *,
    clip: ClipRule | Groupwise,
    mask: Bool[Array, " units"] | None = None,
    accumulator: Any = None,
    margin: float = 0.0,
    method: str = "auto",
    microbatch: int = 1,
    shards: int = 1,
) -> tuple[Any, Float[Array, " units"], Float[Array, " units"]]:
    """Compute sum_i mask_i clip(|g_i|) g_i over the units of a batch, g_i being the gradient of unit i's loss.

    Formal guarantee: adding a unit, or setting its mask to False, moves the sum by at most `clip.sensitivity` in L2
    norm (up to rounding), for any content of the unit. A unit with a non-finite gradient contributes 0. The guarantee
    requires that loss i depends only on unit i, `params` and constants, which is not checked.

    Args:
        losses: (params, batch, tracker) -> one loss per unit. Every operation that owns a parameter must report to the
            tracker, as the operations of `Model.tracking(tracker, tokens)` do; with None it is an ordinary function.
        params: pytree of floats; the sum has its structure, in float32 or wider.
        batch: pytree of arrays with a leading axis of units.
        clip: clip rule; `Groupwise` requires the method "group" or "auto".
        mask: True for units that count; all by default. The content of masked units does not affect the sum.
        accumulator: running sum to which this sum is added, a pytree like the result; None for zero. "ghost" and
            "group" accumulate in place, without a second gradient-sized buffer, if `losses.adding_to(accumulator)`
            exists: the same losses, whose gradient is then `accumulator` plus the original one; see
            `models.accumulation`.
        margin: "ghost", "bk" and "group" scale all gradients by 1 - margin, because they round norms and sum in
            different passes. Use the `finfo(...).eps` of the compute dtype if it is narrower than float32.
        method: "vmap": materialize the gradients of all units; the reference, for any losses. "scan": materialize
            the gradients of `microbatch` units at a time, for any losses. "ghost": norms in one backward pass, the sum
            in a second; no per-unit gradient is materialized. "bk": book-keeping, one backward pass for the norms,
            which stores activations and cotangents, and the sum from these (Bu et al., 2023, arXiv 2210.00038).
            "group": one backward pass in which every operation clips its own gradient. "auto": "group" for
            `Groupwise`; "scan" for long units; for short ones "vmap" if the gradients of all units are small, as with
            adapters, else "ghost" if the losses use their tracker.
        microbatch: units per shard at a time, for "scan"; must divide the units of a shard.
        shards: for "vmap" and "scan", equal parts of the batch that are processed in parallel; set it to the number of
            devices along the axis of units.

    Returns:
        The sum, including `accumulator`; the norms and the losses of the units, which are private: do not release them.

    Raises:
        ValueError: at trace time, for an empty batch, arrays with different numbers of units, an unknown method, a rule
            that the method does not implement, or parameters that "ghost", "bk" or "group" would miscount.
    """
    units = _count_units(batch, mask)
    mask = jnp.ones(units, bool) if mask is None else mask
    method = _resolve_method(method, clip, losses, params, batch)
    if method in _TRACKED_METHODS:
        _check_coverage(method, clip, losses, params, batch)
        in_place = (
            accumulator is not None
            and method != "bk"
            and hasattr(losses, "adding_to")
            and _accumulates_in_own_dtype(params)
        )
        losses = losses.adding_to(accumulator) if in_place else losses
        total, norms, values = _TRACKED_METHODS[method](losses, params, batch, clip, mask, 1 - margin)
        return total if in_place else _add_to(accumulator, total), norms, values
    if units % shards or (units // shards) % microbatch:
        raise ValueError(
            f"microbatch is {microbatch}, which does not divide {units} units in {shards} shards: choose a divisor"
        )
    size = units // shards if method == "vmap" else microbatch
    return _materialized(losses, params, batch, clip, mask, size, shards, accumulator)


def _count_units(batch, mask) -> int:
    leaves = jax.tree_util.tree_leaves_with_path({"batch": batch} if mask is None else {"batch": batch, "mask": mask})
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    sizes = {shape[:1] for shape in shapes.values()}
    if sizes in ({()}, {(0,)}) or not shapes:
        raise ValueError("batch has no units: give arrays with a leading axis of at least one unit")
    if len(sizes) > 1 or () in sizes:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the arrays of batch and mask must have one leading axis of units, but have shapes {found}")
    return sizes.pop()[0]


def per_example(loss: Callable[[Any, Any], Float[Array, ""]]) -> Losses:
    """Convert a loss of one unit, `(params, unit) -> scalar`, to losses of a batch for the methods vmap and scan."""

    def losses(params, batch, tracker=None):
        if tracker is not None:
            raise ValueError("a per-example loss uses no norm tracker: choose the method vmap or scan")
        return jax.vmap(loss, (None, 0))(params, batch)

    return losses


def _resolve_method(method: str, clip, losses: Losses, params, batch) -> str:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; the methods are {', '.join(METHODS)}")
    if isinstance(clip, Groupwise) != (method == "group") and method != "auto":
        raise ValueError(f"method {method!r} does not implement the rule {type(clip).__name__}: choose the method auto")
    if method != "auto":
        return method
    if isinstance(clip, Groupwise):
        return "group"
    unit_length = max((leaf.shape[1] for leaf in jax.tree.leaves(batch) if leaf.ndim > 1), default=1)
    if unit_length >= LONG_UNIT.get(jax.default_backend(), LONG_UNIT["default"]):
        return "scan"
    units = len(jax.tree.leaves(batch)[0])
    if units * sum(leaf.size for leaf in jax.tree.leaves(params)) <= BUDGET:
        return "vmap"
    try:
        return "scan" if coverage(losses, params, batch).uncovered else "ghost"
    except ValueError:
        return "scan"


def _check_coverage(method: str, clip, losses: Losses, params, batch) -> None:
    covered = coverage(losses, params, batch)
    if covered.uncovered:
        alternative = "choose another rule" if method == "group" else "choose the method scan"
        raise ValueError(
            f"method {method!r} would miscount {covered.uncovered[0]}: pass the tracker to every operation that owns a "
            f"parameter and use each parameter once, or {alternative}"
        )
    if method == "group" and covered.groups > clip.groups:
        raise ValueError(
            f"the rule is for {clip.groups} groups, but these losses have {covered.groups}, so the clipped gradient "
            "would exceed the sensitivity: count the groups with count_groups"
        )


def _materialized(losses, params, batch, clip, mask, size, shards, accumulator):
    """Materialize the gradients of `size` units per shard at a time; shards are summed separately until the end."""
    in_place = accumulator is not None and shards == 1

    def unit_loss(params, unit):
        return losses(params, jax.tree.map(lambda leaf: leaf[None], unit), None)[0]

    def clip_and_sum(units, mask):
        values, grads = jax.vmap(jax.value_and_grad(unit_loss), (None, 0))(params, units)
        norms = jnp.sqrt(sum(_squared_norms(leaf) for leaf in jax.tree.leaves(grads)))
        factors = _masked_factors(clip, norms, mask)
        return jax.tree.map(lambda leaf: _weighted_sum(factors, leaf), grads), norms, values

    def step(total, microbatch):
        sums, norms, values = jax.vmap(clip_and_sum)(*microbatch)
        return jax.tree.map(jnp.add, total, sums), (norms, values)

    # Units keep their order within a shard, so that each stays on the device that holds the shard.
    microbatches = jax.tree.map(
        lambda leaf: leaf.reshape(shards, -1, size, *leaf.shape[1:]).swapaxes(0, 1), (batch, mask)
    )
    if in_place:
        init = jax.tree.map(lambda leaf: leaf[None], accumulator)
    else:
        init = jax.tree.map(lambda leaf: jnp.zeros((shards, *leaf.shape), _accumulation_dtype(leaf)), params)
    if len(mask) == size * shards:
        total, per_unit = step(init, jax.tree.map(lambda leaf: leaf[0], microbatches))
    else:
        total, per_unit = jax.lax.scan(step, init, microbatches)
        per_unit = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), per_unit)
    norms, values = (leaf.reshape(-1) for leaf in per_unit)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), total)
    return total if in_place else _add_to(accumulator, total), norms, values


def _ghost(losses, params, batch, clip, mask, scale):
    """Pull back once for the norms, where XLA removes the unused parameter gradients, and once for the sum."""
    values, pullback = jax.vjp(
        lambda params, squares: losses(params, batch, NormTracker(squares)), params, _zeros_like_mask(mask)
    )
    norms = jnp.sqrt(jnp.maximum(pullback(jnp.ones_like(values))[1], 0))
    factors = scale * _masked_factors(clip, norms, mask)
    return _as_accumulated(pullback(factors.astype(values.dtype))[0]), norms, values


def _bookkeeping(losses, params, batch, clip, mask, scale):
    """Linearize the gradients in the clip factors, so that everything independent of the factors is computed once."""

    def tracked_losses(params, factors):
        return losses(params, batch, NormTracker(factors, rule=PRECOMPUTED))

    def gradients(factors):
        values, pullback = jax.vjp(tracked_losses, params, factors)
        grads, squares = pullback(jnp.ones_like(values))
        return grads, (squares, values)

    _, weighted_sum, (squares, values) = jax.linearize(gradients, jnp.ones(len(mask), jnp.float32), has_aux=True)
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    return _as_accumulated(weighted_sum(scale * _masked_factors(clip, norms, mask))), norms, values


def _groupwise(losses, params, batch, clip, mask, scale):
    """Clip inside each operation; units that are masked or have a non-finite loss get a zero cotangent."""

    def rule(norms):
        return scale * clip.group_rule(norms)

    def tracked_losses(params, squares):
        values = losses(params, batch, NormTracker(squares, rule=rule))
        return values, values

    _, pullback, values = jax.vjp(tracked_losses, params, _zeros_like_mask(mask), has_aux=True)
    grads, squares = pullback(jnp.where(mask & jnp.isfinite(values), 1, 0).astype(values.dtype))
    return _as_accumulated(grads), jnp.sqrt(jnp.maximum(squares, 0)), values


_TRACKED_METHODS = {"ghost": _ghost, "bk": _bookkeeping, "group": _groupwise}


def _add_to(accumulator, total):
    return total if accumulator is None else jax.tree.map(jnp.add, accumulator, total)


def _accumulates_in_own_dtype(params):
    return all(leaf.dtype == _accumulation_dtype(leaf) for leaf in jax.tree.leaves(params))


def _masked_factors(clip, norms, mask):
    return jnp.where(jnp.isfinite(norms) & mask, clip(norms), 0)


def _weighted_sum(factors, grads):
    """Sum over units; gradients with factor 0 are selected away, because 0 times a non-finite number is NaN."""
    factors = factors.reshape(-1, *(1,) * (grads.ndim - 1))
    return jnp.sum(jnp.where(factors > 0, factors * grads.astype(_accumulation_dtype(grads)), 0), axis=0)


def _squared_norms(leaf):
    return jnp.sum(jnp.square(leaf.astype(_accumulation_dtype(leaf))), axis=tuple(range(1, leaf.ndim)))


def _as_accumulated(grads):
    return jax.tree.map(lambda leaf: leaf.astype(_accumulation_dtype(leaf)), grads)


def _zeros_like_mask(mask):
    return jnp.zeros(len(mask), jnp.float32)


def _accumulation_dtype(leaf):
    """Float32, or the dtype of the leaf if it is wider."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
