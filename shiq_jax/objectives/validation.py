"""Trace-time checks of shapes and options, and conversions of masks and floats shared by all losses."""

import math
from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.types import TokenStats


def as_float32(x: ArrayLike) -> Float[Array, "..."]:
    """Cast to at least 32-bit floats; float64 stays float64."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(action_mask: ArrayLike) -> Bool[Array, "..."]:
    """Cast a mask of booleans or of zeros and ones to booleans."""
    return jnp.asarray(action_mask) != 0


def masked(x: ArrayLike, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Return `as_float32(x)` where the mask is True and 0 elsewhere.

    Masking the *inputs* of a formula keeps infinities and NaNs at masked positions out of its gradient as well as its
    value; multiplying by the mask, or masking the result, does not.
    """
    return jnp.where(mask, as_float32(x), 0)


def logratios(policy: TokenStats, reference: TokenStats | None, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Per-token log pi - log pi_ref in nats, 0 where masked.

    The reference gets no gradient; None means that its log-probabilities are 0.
    """
    logp = masked(policy.logp, mask)
    return logp if reference is None else logp - masked(jax.lax.stop_gradient(reference.logp), mask)


def check_sequence(name: str, x: ArrayLike | None, length: int) -> None:
    """Raise ValueError unless x is an array of shape [length]."""
    if x is None:
        raise ValueError(f"{name} is missing (None); expected an array of shape ({length},) like action_mask.")
    if jnp.shape(x) != (length,):
        raise ValueError(f"{name} has shape {jnp.shape(x)} but action_mask has shape ({length},); they must match.")


def check_same_shape(**arrays: ArrayLike) -> None:
    """Raise ValueError unless the two named arrays have the same shape."""
    (name, x), (other_name, y) = arrays.items()
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(f"{name} has shape {jnp.shape(x)} but {other_name} has shape {jnp.shape(y)}; they must match.")


def sequence_length(action_mask: ArrayLike) -> int:
    """Return T of an action mask [T]; raise ValueError unless it has one axis."""
    shape = jnp.shape(action_mask)
    if len(shape) != 1:
        raise ValueError(f"action_mask has shape {shape} but one sequence [T] is expected; use jax.vmap for batches.")
    return shape[0]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(map(repr, choices))}.")


def check_positive(name: str, x: ArrayLike) -> None:
    """Raise ValueError unless a Python number is positive and finite; arrays and traced values are not checked."""
    if isinstance(x, Real) and not (x > 0 and math.isfinite(x)):
        raise ValueError(f"{name} is {x} but must be a positive finite number.")


def check_nonnegative(name: str, x: ArrayLike) -> None:
    """Raise ValueError unless a Python number is finite and at least 0; arrays and traced values are not checked."""
    if isinstance(x, Real) and not 0 <= x < math.inf:
        raise ValueError(f"{name} is {x} but must be finite and not negative.")


def check_discount(gamma: ArrayLike) -> None:
    """Raise ValueError unless a Python number lies in (0, 1]; arrays and traced values are not checked."""
    if isinstance(gamma, Real) and not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma} but a discount must lie in (0, 1].")
