"""Checks of shapes and options while a loss is traced; masked entries are replaced and floats as_float32 here."""

import math
from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.types import TokenStats


def as_float32(x: ArrayLike) -> Float[Array, "..."]:
    """x as a float array of at least 32 bits; float64 stays float64."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(action_mask: ArrayLike) -> Bool[Array, "..."]:
    """A mask of booleans or of zeros and ones as booleans."""
    return jnp.asarray(action_mask) != 0


def masked(x: ArrayLike, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """x, as_float32, with zeros off the mask.

    Selecting on the *inputs* of a formula keeps infinities and NaNs of masked positions out of its gradient as well
    as out of its value; multiplying by the mask, or selecting on the result, would not.
    """
    return jnp.where(mask, as_float32(x), 0)


def logratios(policy: TokenStats, reference: TokenStats | None, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Per-token log pi - log pi_ref in nats, 0 off the mask; the reference is a constant, None means zeros."""
    logp = masked(policy.logp, mask)
    return logp if reference is None else logp - masked(jax.lax.stop_gradient(reference.logp), mask)


def check_sequence(name: str, x: ArrayLike | None, length: int) -> None:
    """Raises ValueError unless x is one array of shape [length]."""
    if x is None:
        raise ValueError(f"{name} is missing (None); expected an array of shape ({length},) like action_mask.")
    if jnp.shape(x) != (length,):
        raise ValueError(f"{name} has shape {jnp.shape(x)} but action_mask has shape ({length},); give both the same.")


def same_shape(**arrays: ArrayLike) -> None:
    """Raises ValueError, naming both, unless two arrays have one shape."""
    (one, x), (other, y) = arrays.items()
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(f"{one} has shape {jnp.shape(x)} but {other} has shape {jnp.shape(y)}; give both the same.")


def sequence_length(action_mask: ArrayLike) -> int:
    """T of an action mask [T]; raises ValueError for any other number of axes."""
    shape = jnp.shape(action_mask)
    if len(shape) != 1:
        raise ValueError(f"action_mask has shape {shape} but expected is one sequence [T]; use jax.vmap for batches.")
    return shape[0]


def check_choice(name: str, found: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless the option is one of those known."""
    if found not in known:
        raise ValueError(f"{name} is {found!r} but must be one of {', '.join(map(repr, known))}.")


def check_positive(name: str, x: ArrayLike) -> None:
    """Raises ValueError for a number that is not positive and finite; arrays and traced values pass unread."""
    if isinstance(x, Real) and not (x > 0 and math.isfinite(x)):
        raise ValueError(f"{name} is {x} but must be a positive finite number.")


def check_not_negative(name: str, x: ArrayLike) -> None:
    """Raises ValueError for a number that is negative or not finite; arrays and traced values pass unread."""
    if isinstance(x, Real) and not 0 <= x < math.inf:
        raise ValueError(f"{name} is {x} but must be finite and not negative.")


def check_discount(gamma: ArrayLike) -> None:
    """Raises ValueError for a discount outside (0, 1]; arrays and traced values pass unread."""
    if isinstance(gamma, Real) and not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma} but a discount must lie in (0, 1].")
