"""Options shared by losses on pairs: transformations of the log-ratios, an added likelihood term, and pair weights."""

import math
from functools import partial
from numbers import Real
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from shiq_jax.objectives.lift import SharedOptions
from shiq_jax.objectives.loss_inputs import LossInputs
from shiq_jax.objectives.options import Option, docstring_entries, option_kind
from shiq_jax.objectives.preference import DIVERGENCES, divergence_score
from shiq_jax.objectives.validation import check_choice, check_nonnegative, masked
from shiq_jax.objectives.weighting import length_desensitised, wpo_weight

LOGRATIOS = frozenset({"chosen_logratio", "rejected_logratio"})


class PairOptions(NamedTuple):
    """Options of losses on pairs; the defaults change nothing.

    Sources: RPO (arXiv 2404.19733), LD-DPO (2409.06411), WPO (2406.11827), f-DPO (2309.16240), in this order.

    Fields:
      rpo_alpha: weight, at least 0, of the chosen completion's negative log-likelihood per action, which is added to
        the loss.
      ld_alpha: weight, from 0 to 1, of actions beyond the length of the shorter completion.
      use_weighting: multiply the loss, including the likelihood term, by the length-normalized probabilities of both
        completions under the policy.
      f_divergence: divergence that regularizes the policy towards the reference.
      f_alpha: alpha of alpha_divergence; not allowed with other divergences.
    """

    rpo_alpha: ArrayLike | None = None
    ld_alpha: ArrayLike | None = None
    use_weighting: bool = False
    f_divergence: Literal[DIVERGENCES] = "reverse_kl"
    f_alpha: float | None = None


def available_options(
    inputs: frozenset[str], coupled: bool, *, reads_difference: bool, supervised: bool
) -> dict[str, Option]:
    """Options that apply to a loss that reads these inputs.

    `ld_alpha` applies to losses of the log-ratios alone: losses of averages already normalize by length, and rewards
    count for all actions. An f-divergence requires a loss of the difference of two scores, in which the unknown
    normalizer of the prompt cancels. A loss that sorts the batch has no weight per pair.

    Args:
      inputs, coupled: as in `SharedOptions.available`.
      reads_difference: whether the loss depends on the log-ratios only through their difference.
      supervised: whether the loss includes the likelihood of the chosen completion.
    """
    logratios_only = inputs == LOGRATIOS
    applies = {
        "rpo_alpha": not supervised,
        "ld_alpha": logratios_only,
        "use_weighting": not coupled,
        "f_divergence": logratios_only and reads_difference,
        "f_alpha": logratios_only and reads_difference,
    }
    texts, annotations = docstring_entries(PairOptions), PairOptions.__annotations__
    return {
        name: Option(option_kind(annotations[name]), default, texts[name])
        for name, default in PairOptions._field_defaults.items()
        if applies[name]
    }


def read_pair_options(inputs: LossInputs) -> PairOptions:
    """The shared options of a loss; raises ValueError for values out of range and invalid combinations."""
    options = PairOptions(**{name: inputs.options[name] for name in PairOptions._fields if name in inputs.options})
    rpo_alpha, ld_alpha, _, f_divergence, f_alpha = options
    check_choice("f_divergence", f_divergence, DIVERGENCES)
    check_nonnegative("rpo_alpha", rpo_alpha)
    if isinstance(ld_alpha, Real) and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha is {ld_alpha} but must lie in [0, 1].")
    if (f_divergence == "alpha_divergence") != (f_alpha is not None):
        raise ValueError(
            f"f_alpha is {f_alpha} with f_divergence={f_divergence!r}; f_alpha is required by "
            "f_divergence='alpha_divergence' and not allowed otherwise."
        )
    if f_alpha is not None and not math.isfinite(f_alpha):
        raise ValueError(f"f_alpha is {f_alpha} but must be a finite number.")
    return options


def sum_over_actions(values: Array, inputs: LossInputs) -> Array:
    """Sums [2] over the actions of each completion; `ld_alpha` scales those beyond the length of the shorter one."""
    ld_alpha, mask = inputs["pair_options"].ld_alpha, inputs.mask
    if ld_alpha is None:
        return jnp.sum(values, axis=-1)
    weighted_sum = partial(length_desensitised, shared=jnp.min(jnp.sum(mask, axis=-1)), alpha=ld_alpha)
    return jax.vmap(weighted_sum)(values, mask)


def divergence_scores(logratio: Array, inputs: LossInputs) -> Array:
    """The log-ratio, or its score under another f-divergence."""
    options = inputs["pair_options"]
    if options.f_divergence == "reverse_kl":
        return logratio
    kwargs = {} if options.f_alpha is None else {"alpha": options.f_alpha}
    return divergence_score(logratio, kind=options.f_divergence, **kwargs)


def apply_pair_options(value: Array, inputs: LossInputs) -> tuple[Array, dict[str, Array]]:
    """Add the likelihood term to the loss of a pair, multiply it by the pair weight, and return both as metrics."""
    options, example, metrics = inputs["pair_options"], inputs.example, {}
    if options.rpo_alpha is not None:
        chosen_logp = masked(example.policy.logp[0], inputs.mask[0])
        metrics["nll/chosen"] = -jnp.sum(chosen_logp) / jnp.maximum(jnp.sum(inputs.mask[0]), 1)
        value = value + options.rpo_alpha * metrics["nll/chosen"]
    if options.use_weighting:
        metrics["weight/pair"] = jnp.prod(jax.vmap(wpo_weight)(example.policy, inputs.mask))
        value = value * metrics["weight/pair"]
    return value, metrics


def shared_pair_options(*, reads_difference: bool = False, supervised: bool = False) -> SharedOptions:
    """Shared options of a family of losses on pairs; arguments as in `available_options`."""
    available = partial(available_options, reads_difference=reads_difference, supervised=supervised)
    return SharedOptions(available, apply_pair_options, {"lse2": "use_weighting"})
