"""Options that losses on pairs share: what becomes of the log-ratios before a loss reads them, of its value after."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from shiq_jax.objectives.inputs import as_mask, check_choice, masked
from shiq_jax.objectives.preference import DIVERGENCES, divergence_score
from shiq_jax.objectives.types import Example
from shiq_jax.objectives.weighting import wpo_weight

LOGRATIOS = ("chosen_logratio", "rejected_logratio")


class PairOptions(NamedTuple):
    """As they are by default, they change nothing.

    Fields:
      rpo_alpha: weight, at least 0, of the chosen completion's negative log-likelihood per action, which is added to
        the loss. Source: RPO (arXiv 2404.19733).
      ld_alpha: in [0, 1], what an action counts that lies beyond the length of the shorter completion; see
        `length_desensitised`. Source: LD-DPO (arXiv 2409.06411).
      use_weighting: whether the loss, the likelihood with it, is multiplied by the `wpo_weight` of both completions.
        Source: WPO (arXiv 2406.11827).
      f_divergence: the kind of `divergence_score` that is put in the place of log-ratios. Source: f-DPO (2309.16240).
      f_alpha: the alpha of "alpha_divergence", a number; None with every other.
    """

    rpo_alpha: ArrayLike | None = None
    ld_alpha: ArrayLike | None = None
    use_weighting: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float | None = None


def options_of(reads: Sequence[str], *, coupled: bool, differential: bool, supervised: bool) -> tuple[str, ...]:
    """Which of the options make sense for a loss that reads these sums; see `pairwise` for the others.

    Late actions may count for less where a loss contrasts log-ratios and nothing else: averages have their own answer
    to unlike lengths, and rewards are owed to all actions. Another divergence holds for the difference of two scores
    only, in which an unknown function of the prompt cancels. A loss that sorts its batch has no weight for a pair.
    """
    contrasts = tuple(reads) == LOGRATIOS
    makes_sense = {
        "rpo_alpha": not supervised,
        "ld_alpha": contrasts,
        "use_weighting": not coupled,
        "f_divergence": contrasts and differential,
        "f_alpha": contrasts and differential,
    }
    return tuple(option for option in PairOptions._fields if makes_sense[option])


def check_options(options: PairOptions) -> None:
    """Raises ValueError for numbers out of range and options that do not go together; traced values pass unread."""
    rpo_alpha, ld_alpha, _, f_divergence, f_alpha = options
    check_choice("f_divergence", f_divergence, DIVERGENCES)
    if isinstance(rpo_alpha, Real) and not 0 <= rpo_alpha < math.inf:
        raise ValueError(f"rpo_alpha is {rpo_alpha} but must be finite and not negative.")
    if isinstance(ld_alpha, Real) and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha is {ld_alpha} but must lie in [0, 1].")
    if (f_divergence == "alpha_divergence") != (f_alpha is not None):
        raise ValueError(
            f"f_alpha is {f_alpha} with f_divergence={f_divergence!r}; give f_alpha with "
            "f_divergence='alpha_divergence' and with no other."
        )
    if f_alpha is not None and not math.isfinite(f_alpha):
        raise ValueError(f"f_alpha is {f_alpha} but must be a finite number.")


def scores(sums: Mapping[str, Array], options: PairOptions) -> dict[str, Array]:
    """What the loss reads where it would read log-ratios, by their names."""
    kind, alpha = options.f_divergence, options.f_alpha
    if kind == "reverse_kl":
        return {}
    more = {} if alpha is None else {"alpha": alpha}
    return {name: divergence_score(sums[name], kind=kind, **more) for name in LOGRATIOS}


def finished(value: Array, example: Example, options: PairOptions) -> tuple[Array, dict[str, Array]]:
    """The value of a pair's loss with its likelihood and its weight, and these two as metrics where they are used."""
    metrics = {}
    mask = as_mask(example.action_mask)
    if options.rpo_alpha is not None:
        chosen = masked(example.policy.logp[0], mask[0])
        metrics["nll/chosen"] = -jnp.sum(chosen) / jnp.maximum(jnp.sum(mask[0]), 1)
        value = value + options.rpo_alpha * metrics["nll/chosen"]
    if options.use_weighting:
        metrics["weight/pair"] = jnp.prod(jax.vmap(wpo_weight)(example.policy, mask))
        value = value * metrics["weight/pair"]
    return value, metrics
