"""The sum over units of their clipped gradients, by several methods with one meaning."""

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
# Tokens of a unit from which one unit alone keeps a device busy, so that units may as well come one after the other.
LONG = {"cpu": 128, "otherwise": 1024}


def clipped_sum(
    losses: Losses,
    params: Any,
    batch: Any,
    *,
    clip: ClipRule | Groupwise,
    mask: Bool[Array, " units"] | None = None,
    onto: Any = None,
    margin: float = 0.0,
    method: str = "auto",
    microbatch: int = 1,
    lanes: int = 1,
) -> tuple[Any, Float[Array, " units"], Float[Array, " units"]]:
    """sum_i mask_i clip(|g_i|) g_i over the units of a batch, g_i the gradient of the i-th unit's loss.

    Formal guarantee: setting a unit's mask to False, or adding one, moves the sum by at most `clip.sensitivity` in L2
    norm (up to rounding), whatever the unit holds, numbers that are not finite included: such a unit contributes 0. It
    holds when the i-th loss depends on the i-th unit, `params` and constants alone, which is not checked.

    Args:
        losses: (params, batch, tracker) -> one loss per unit. Every operation that owns a parameter reports to the
            tracker, as those of `Model.tracking(tracker, tokens)` do; None makes it an ordinary function.
        params: pytree of floats; the sum has its structure, in float32 at least.
        batch: pytree of arrays with a leading axis of units.
        clip: the rule; `Groupwise` goes with the methods "group" and "auto" only.
        mask: which units count; all by default. What a unit that does not count holds changes nothing.
        onto: what the sum is added to, of its structure and dtypes; by default nothing is. With "ghost" and "group" no
            second array as large is held where the losses can go on from a sum: `losses.adding_to(onto)` are then the
            same losses with a gradient that is `onto` and what it would have been, see `models.accumulation`.
        margin: by how much "ghost", "bk" and "group" shorten all gradients further, whose norms and sum come of passes
            that round by themselves: what an arithmetic narrower than float32 may add, such as its `finfo(...).eps`.
        method: "vmap": the gradients of all units at once; the reference, for any losses. "scan": `microbatch` units at
            a time, for any losses. "ghost": norms in one backward pass, the sum in a second one, no gradient of a
            single unit. "bk": book-keeping, one backward pass for the norms, which keeps what every operation saw, and
            out of that the sum (Bu et al., 2023, arXiv 2210.00038). "group": one backward pass in which every operation
            clips its own. "auto": "group" for `Groupwise`; "scan" for long units; of short ones "vmap" where so few
            parameters learn that the gradients of all units are small, as with adapters; else "ghost", where the losses
            use their tracker.
        microbatch: units of a lane at a time, with "scan"; divides their number.
        lanes: equal parts of the units that go side by side, as many as there are devices along their axis.

    Returns:
        The sum, `onto` included; the units' norms and losses, which are private and nobody's to look at.

    Raises:
        ValueError: while tracing, for an unknown method, a rule that it does not implement, or parameters that
            "ghost", "bk" and "group" would miscount, which are named.
    """
    units = len(jax.tree.leaves(batch)[0])
    mask = jnp.ones(units, bool) if mask is None else mask
    method = _chosen(method, clip, losses, params, batch)
    if method in _BY_OPERATIONS:
        found = coverage(losses, params, batch)
        if found.missed:
            other = "another rule" if method == "group" else "the method scan"
            raise ValueError(
                f"method {method!r} would miscount {found.missed[0]}: give the tracker to every operation that owns a "
                f"parameter, each of which is used once, or take {other}"
            )
        if method == "group" and found.groups > clip.groups:
            raise ValueError(
                f"the rule is for {clip.groups} groups, but these losses have {found.groups}, whose clipped gradients "
                "are together longer than it says: count them with count_groups"
            )
        in_place = onto is not None and method != "bk" and hasattr(losses, "adding_to") and _all_precise(params)
        losses = losses.adding_to(onto) if in_place else losses
        total, *said = _BY_OPERATIONS[method](losses, params, batch, clip, mask, 1 - margin)
        return total if in_place else _added(onto, total), *said
    if units % lanes or (units // lanes) % microbatch:
        raise ValueError(f"microbatch is {microbatch}, which does not divide {units} units in {lanes} lanes")
    size = units // lanes if method == "vmap" else microbatch
    return _instantiated(losses, params, batch, clip, mask, size, lanes, onto)


def per_example(loss: Callable[[Any, Any], Float[Array, ""]]) -> Losses:
    """Losses of a batch from the loss of one unit, `(params, unit) -> scalar`; for the methods vmap and scan."""

    def losses(params, batch, tracker=None):
        if tracker is not None:
            raise ValueError("the loss of one unit uses no norm tracker: take the method vmap or scan")
        return jax.vmap(loss, (None, 0))(params, batch)

    return losses


def _chosen(method: str, clip, losses: Losses, params, batch) -> str:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; the methods are {', '.join(METHODS)}")
    if isinstance(clip, Groupwise) != (method == "group") and method != "auto":
        raise ValueError(f"method {method!r} does not implement the rule {type(clip).__name__}: take the method auto")
    if method != "auto":
        return method
    if isinstance(clip, Groupwise):
        return "group"
    longest = max((leaf.shape[1] for leaf in jax.tree.leaves(batch) if leaf.ndim > 1), default=1)
    if longest >= LONG.get(jax.default_backend(), LONG["otherwise"]):
        return "scan"
    units = len(jax.tree.leaves(batch)[0])
    if units * sum(leaf.size for leaf in jax.tree.leaves(params)) <= BUDGET:
        return "vmap"
    try:
        return "scan" if coverage(losses, params, batch).missed else "ghost"
    except ValueError:
        return "scan"


def _instantiated(losses, params, batch, clip, mask, size, lanes, onto):
    """Gradients of `size` units of every lane at a time, each as a whole; lanes are summed apart until the end."""
    in_place = onto is not None and lanes == 1

    def one(params, unit):
        return losses(params, jax.tree.map(lambda leaf: leaf[None], unit), None)[0]

    def clipped(units, real):
        values, grads = jax.vmap(jax.value_and_grad(one), (None, 0))(params, units)
        norms = jnp.sqrt(sum(_squares(leaf) for leaf in jax.tree.leaves(grads)))
        factors = _factors(clip, norms, real)
        return jax.tree.map(lambda leaf: _weighted(factors, leaf), grads), norms, values

    def add(total, piece):
        more, norms, values = jax.vmap(clipped)(*piece)
        return jax.tree.map(jnp.add, total, more), (norms, values)

    # Unit i of a lane stays on the device that holds the lane.
    pieces = jax.tree.map(lambda leaf: leaf.reshape(lanes, -1, size, *leaf.shape[1:]).swapaxes(0, 1), (batch, mask))
    if in_place:
        before = jax.tree.map(lambda leaf: leaf[None], onto)
    else:
        before = jax.tree.map(lambda leaf: jnp.zeros((lanes, *leaf.shape), _precise(leaf)), params)
    if len(mask) == size * lanes:
        total, said = add(before, jax.tree.map(lambda leaf: leaf[0], pieces))
    else:
        total, said = jax.lax.scan(add, before, pieces)
        said = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), said)
    norms, values = (leaf.reshape(-1) for leaf in said)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), total)
    return total if in_place else _added(onto, total), norms, values


def _ghost(losses, params, batch, clip, mask, share):
    """A pull for the norms, in which the compiler finds that no parameter's gradient is wanted; another for the sum."""
    zeros = _zeros(mask)
    values, pull = jax.vjp(lambda params, squares: losses(params, batch, NormTracker(squares)), params, zeros)
    norms = jnp.sqrt(jnp.maximum(pull(jnp.ones_like(values))[1], 0))
    factors = share * _factors(clip, norms, mask)
    return _as_float32(pull(factors.astype(values.dtype))[0]), norms, values


def _booked(losses, params, batch, clip, mask, share):
    """The gradients are linear in the factors, and all that does not depend on these is computed once and kept."""

    def of(params, factors):
        return losses(params, batch, NormTracker(factors, rule=PRECOMPUTED))

    def gradients(factors):
        values, pull = jax.vjp(of, params, factors)
        grads, squares = pull(jnp.ones_like(values))
        return grads, (squares, values)

    _, summed, (squares, values) = jax.linearize(gradients, jnp.ones(len(mask), jnp.float32), has_aux=True)
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    return _as_float32(summed(share * _factors(clip, norms, mask))), norms, values


def _group(losses, params, batch, clip, mask, share):
    """Each operation clips its own; a unit that does not count, or is not finite anywhere, is taken out beforehand."""

    def rule(norms):
        return share * clip.per_group(norms)

    def of(params, squares):
        values = losses(params, batch, NormTracker(squares, rule=rule))
        return values, values

    _, pull, values = jax.vjp(of, params, _zeros(mask), has_aux=True)
    grads, squares = pull(jnp.where(mask & jnp.isfinite(values), 1, 0).astype(values.dtype))
    return _as_float32(grads), jnp.sqrt(jnp.maximum(squares, 0)), values


_BY_OPERATIONS = {"ghost": _ghost, "bk": _booked, "group": _group}


def _added(onto, total):
    return total if onto is None else jax.tree.map(jnp.add, onto, total)


def _all_precise(params):
    return all(leaf.dtype == _precise(leaf) for leaf in jax.tree.leaves(params))


def _factors(clip, norms, real):
    return jnp.where(jnp.isfinite(norms) & real, clip(norms), 0)


def _weighted(factors, grads):
    """The sum over units; where the factor is 0 nothing is multiplied, for it might not be finite."""
    over = factors.reshape(-1, *(1,) * (grads.ndim - 1))
    return jnp.sum(jnp.where(over > 0, over * grads.astype(_precise(grads)), 0), axis=0)


def _squares(leaf):
    return jnp.sum(jnp.square(leaf.astype(_precise(leaf))), axis=tuple(range(1, leaf.ndim)))


def _as_float32(grads):
    return jax.tree.map(lambda leaf: leaf.astype(_precise(leaf)), grads)


def _zeros(mask):
    return jnp.zeros(len(mask), jnp.float32)


def _precise(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)
