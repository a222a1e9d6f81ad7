"""First public data, then private: when to change over, with what memory, and what is mixed; arXiv 2402.18752."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Reset = Literal["none", "momentum", "squares", "count"]
# By name: step, steps in all, share of the data that is public -> weight of the public gradient.
MIXING: dict[str, Callable[[int, int, float], float]] = {
    # Public until the switch, then private.
    "switch": lambda step, steps, share: float(step < share * steps),
    # Private first, and the more public the later, when noise is most in the way (arXiv 2112.00193).
    "cosine": lambda step, steps, share: 1 - math.cos(math.pi * step / (2 * steps)),
    # As a sample of all data would.
    "sample": lambda step, steps, share: share,
    "only_public": lambda step, steps, share: 1.0,
    "only_private": lambda step, steps, share: 0.0,
}


def mixing_weight(rule: str, step: int, steps: int, share: float) -> float:
    """alpha_t in `alpha g_public + (1 - alpha) g_private`; a function of public numbers alone.

    Args:
        rule: a name of `MIXING`.
        step: from 0.
        steps: of the whole run, both phases.
        share: of steps before the switch, or of data that are public.

    Raises:
        ValueError: there is no such rule, or the share is no share.
    """
    if rule not in MIXING:
        raise ValueError(f"mixing rule {rule!r} is unknown; the rules are {', '.join(MIXING)}")
    if not 0 <= share <= 1:
        raise ValueError(f"a share of public data lies in [0, 1], not {share}")
    return MIXING[rule](step, steps, share)


def has_plateaued(losses: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether public held-out losses have fallen by less than `tolerance` over the last `window` of them."""
    return len(losses) > window and losses[-1 - window] - losses[-1] < tolerance


def noise_is_affordable(slowdowns: Sequence[float], most: float = 2.0) -> bool:
    """Whether noise would by now slow a private step by at most this factor, see `loss_improvement.Improvement`."""
    return bool(slowdowns) and slowdowns[-1] <= most


def adam_state(opt_state: optax.OptState) -> optax.ScaleByAdamState:
    """Adam's memory inside that of an optax chain; ValueError when there is none, or more than one."""
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(node)]
    if len(found) != 1:
        raise ValueError(f"the optimiser has {len(found)} memories of Adam; one is needed")
    return found[0]


def reset_optimizer(opt_state: optax.OptState, reset: Reset = "momentum") -> optax.OptState:
    """The optimiser's memory as the private phase begins with it.

    The momentum points where public gradients pointed and is forgotten; squares and count, by which steps are scaled,
    are kept. The other resets are there to be compared.

    Args:
        opt_state: of a chain with one Adam, which is left alone.
        reset: what becomes 0: nothing, the first moment, the second one, or the count of steps.
    """
    field = {"momentum": "mu", "squares": "nu", "count": "count"}.get(reset)
    adam_state(opt_state)
    if field is None:
        return opt_state

    def forget(node):
        if not _is_adam(node):
            return node
        return node._replace(**{field: jax.tree.map(jnp.zeros_like, getattr(node, field))})

    return jax.tree.map(forget, opt_state, is_leaf=_is_adam)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
