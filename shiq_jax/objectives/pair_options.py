"""Options that losses on pairs share: what becomes of the log-ratios before a loss reads them, of its value after."""

import math
from functools import partial
from numbers import Real
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from shiq_jax.objectives.lift import SharedOptions
from shiq_jax.objectives.loss_inputs import LossInputs
from shiq_jax.objectives.options import Option, described, kind_of
from shiq_jax.objectives.preference import DIVERGENCES, divergence_score
from shiq_jax.objectives.validation import check_choice, check_not_negative, masked
from shiq_jax.objectives.weighting import length_desensitised, wpo_weight

LOGRATIOS = frozenset({"chosen_logratio", "rejected_logratio"})


class PairOptions(NamedTuple):
    """Options of losses on pairs; the defaults change nothing.

    Sources: RPO (arXiv 2404.19733), LD-DPO (2409.06411), WPO (2406.11827), f-DPO (2309.16240), in this order.

    Fields:
      rpo_alpha: weight, at least 0, of the chosen completion's negative log-likelihood per action, which is added to
        the loss.
      ld_alpha: weight, from 0 to 1, of actions beyond the length of the shorter completion.
      use_weighting: multiply the loss, its likelihood too, by how likely the policy is to write both completions.
      f_divergence: the divergence that keeps the policy near the reference.
      f_alpha: alpha of the divergence alpha_divergence, and of no other.
    """

    rpo_alpha: ArrayLike | None = None
    ld_alpha: ArrayLike | None = None
    use_weighting: bool = False
    f_divergence: Literal[DIVERGENCES] = "reverse_kl"
    f_alpha: float | None = None


def options_of(reads: frozenset[str], coupled: bool, *, differential: bool, supervised: bool) -> dict[str, Option]:
    """The options that make sense for a loss that reads these inputs.

    Late actions may count for less where a loss contrasts log-ratios and nothing else: averages have their own answer
    to unlike lengths, and rewards are owed to all actions. Another divergence holds for the difference of two scores
    only, in which an unknown function of the prompt cancels. A loss that sorts its batch has no weight for a pair.

    Args:
      reads, coupled: as in `Shared`.
      differential: whether the loss reads the log-ratios as their difference alone.
      supervised: whether the chosen completion's likelihood is a term of the loss.
    """
    contrasts = reads == LOGRATIOS
    makes_sense = {
        "rpo_alpha": not supervised,
        "ld_alpha": contrasts,
        "use_weighting": not coupled,
        "f_divergence": contrasts and differential,
        "f_alpha": contrasts and differential,
    }
    texts, kinds = described(PairOptions), PairOptions.__annotations__
    return {
        name: Option(kind_of(kinds[name]), default, texts[name])
        for name, default in PairOptions._field_defaults.items()
        if makes_sense[name]
    }


def chosen_options(reading: LossInputs) -> PairOptions:
    """The options of a pair; raises ValueError for numbers out of range and options that do not go together."""
    given = {name: reading.options[name] for name in PairOptions._fields if name in reading.options}
    options = PairOptions(**given)
    rpo_alpha, ld_alpha, _, f_divergence, f_alpha = options
    check_choice("f_divergence", f_divergence, DIVERGENCES)
    check_not_negative("rpo_alpha", rpo_alpha)
    if isinstance(ld_alpha, Real) and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha is {ld_alpha} but must lie in [0, 1].")
    if (f_divergence == "alpha_divergence") != (f_alpha is not None):
        raise ValueError(
            f"f_alpha is {f_alpha} with f_divergence={f_divergence!r}; give f_alpha with "
            "f_divergence='alpha_divergence' and with no other."
        )
    if f_alpha is not None and not math.isfinite(f_alpha):
        raise ValueError(f"f_alpha is {f_alpha} but must be a finite number.")
    return options


def total_over_actions(values: Array, reading: LossInputs) -> Array:
    """Sums [2] over the actions of either completion, those beyond the shorter one's length times `ld_alpha`."""
    ld_alpha, mask = reading["pair_options"].ld_alpha, reading.mask
    if ld_alpha is None:
        return jnp.sum(values, axis=-1)
    late = partial(length_desensitised, shared=jnp.min(jnp.sum(mask, axis=-1)), alpha=ld_alpha)
    return jax.vmap(late)(values, mask)


def score(logratio: Array, reading: LossInputs) -> Array:
    """What losses read as a log-ratio: its score under another divergence, or the log-ratio."""
    options = reading["pair_options"]
    if options.f_divergence == "reverse_kl":
        return logratio
    more = {} if options.f_alpha is None else {"alpha": options.f_alpha}
    return divergence_score(logratio, kind=options.f_divergence, **more)


def finished(value: Array, reading: LossInputs) -> tuple[Array, dict[str, Array]]:
    """The value of a pair's loss with its likelihood and its weight, and these two as metrics where they are used."""
    options, example, metrics = reading["pair_options"], reading.example, {}
    if options.rpo_alpha is not None:
        chosen = masked(example.policy.logp[0], reading.mask[0])
        metrics["nll/chosen"] = -jnp.sum(chosen) / jnp.maximum(jnp.sum(reading.mask[0]), 1)
        value = value + options.rpo_alpha * metrics["nll/chosen"]
    if options.use_weighting:
        metrics["weight/pair"] = jnp.prod(jax.vmap(wpo_weight)(example.policy, reading.mask))
        value = value * metrics["weight/pair"]
    return value, metrics


def shared(*, differential: bool = False, supervised: bool = False) -> SharedOptions:
    """The shared options of losses of one kind; see `options_of`."""
    options = partial(options_of, differential=differential, supervised=supervised)
    return SharedOptions(options, finished, {"lse2": "use_weighting"})
