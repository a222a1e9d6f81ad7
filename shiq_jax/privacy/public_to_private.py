"""Schedule from public to private data: mixing weights, switch criteria and optimizer reset; arXiv 2402.18752."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Reset = Literal["none", "momentum", "squares", "count"]
# Rule -> function of (step, number of steps, public share) that gives the weight of the public gradient.
MIXING_RULES: dict[str, Callable[[int, int, float], float]] = {
    # Public steps first, then private ones.
    "switch": lambda step, steps, share: float(step < share * steps),
    # More public weight in later steps, where noise hurts most (arXiv 2112.00193).
    "cosine": lambda step, steps, share: 1 - math.cos(math.pi * step / (2 * steps)),
    # Constant weight, equal to the public share of the data.
    "sample": lambda step, steps, share: share,
}


def mixing_weight(rule: str, step: int, steps: int, share: float) -> float:
    """Compute alpha_t of `alpha_t g_public + (1 - alpha_t) g_private`; reads no private data.

    Args:
        rule: a key of `MIXING_RULES`.
        step: step number, from 0.
        steps: number of steps of the whole run, public and private.
        share: for "switch" the fraction of steps that are public, for "sample" the weight itself.

    Raises:
        ValueError: the rule is unknown, or the share lies outside [0, 1].
    """
    if rule not in MIXING_RULES:
        raise ValueError(f"mixing rule {rule!r} is unknown; the rules are {', '.join(MIXING_RULES)}")
    if not 0 <= share <= 1:
        raise ValueError(f"the share of public data must lie in [0, 1], not {share}")
    return MIXING_RULES[rule](step, steps, share)


def has_plateaued(losses: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether public held-out losses fell by less than `tolerance` over the last `window` evaluations."""
    return len(losses) > window and losses[-1 - window] - losses[-1] < tolerance


def noise_is_affordable(slowdowns: Sequence[float], max_slowdown: float = 2.0) -> bool:
    """Whether the latest slowdown of a private step by noise, see `Improvement`, is at most `max_slowdown`."""
    return bool(slowdowns) and slowdowns[-1] <= max_slowdown


def adam_state(opt_state: optax.OptState) -> optax.ScaleByAdamState:
    """Find the Adam state in the state of an optax chain; ValueError unless there is exactly one."""
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(node)]
    if len(states) != 1:
        raise ValueError(f"the optimizer has {len(states)} Adam states, but exactly one is needed: use adam or adamw")
    return states[0]


def reset_optimizer(opt_state: optax.OptState, reset: Reset = "momentum") -> optax.OptState:
    """Reset a part of Adam's state for the private phase.

    The default drops the momentum, which points along public gradients, and keeps the second moments and the step
    count, which set the step size. The other options serve for comparison.

    Args:
        opt_state: state of an optimizer with exactly one Adam; its other states are unchanged.
        reset: part that is set to 0: none, the first moment, the second moment ("squares") or the step count.
    """
    field = {"momentum": "mu", "squares": "nu", "count": "count"}.get(reset)
    adam_state(opt_state)
    if field is None:
        return opt_state

    def reset_adam(node):
        if not _is_adam(node):
            return node
        return node._replace(**{field: jax.tree.map(jnp.zeros_like, getattr(node, field))})

    return jax.tree.map(reset_adam, opt_state, is_leaf=_is_adam)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
