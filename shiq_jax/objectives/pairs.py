"""Objectives on pairs out of plain losses: the loss's own signature says what is read of the example."""

import inspect
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from shiq_jax.objectives.inputs import as_mask, logratios, masked
from shiq_jax.objectives.pair_options import PairOptions, check_options, finished, options_of, scores
from shiq_jax.objectives.types import Couple, Example, LossOut, Objective, TokenStats
from shiq_jax.objectives.weighting import length_desensitised

BETA = 0.1


def pairwise(
    loss: Callable[..., Array],
    couple: Couple | None = None,
    *,
    differential: bool = False,
    supervised: bool = False,
) -> Objective:
    """The objective on pairs of a loss on sums over completions; sequence 0 is the chosen, sequence 1 the rejected one.

    Args:
      loss: its positional parameters are named out of `{chosen,rejected}_{logratio,logp,length,return}`, sums over the
        actions of either completion in nats or units of reward, or their number, or `coupled`, what `couple` found for
        the pair; its keyword parameters become the objective's options, beta at 0.1 by default, and those of
        `PairOptions` that make sense for it.
      couple: lets pairs know of each other; see `Objective`.
      differential: whether it reads the log-ratios as their difference alone.
      supervised: whether the chosen completion's likelihood is a term of it.

    The objective's weight is 1 for a pair and 0 when either completion is empty. Its metrics per pair are
    `rewards/chosen` and `rewards/rejected`, beta times the log-ratios (log-probabilities where the loss reads no
    reference); `rewards/margins`, their difference; `rewards/accuracies`, how often it is positive; and `nll/chosen`,
    per action, and `weight/pair` with the options that use them.
    """
    parameters = inspect.signature(loss).parameters.values()
    reads = [each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    options = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    options = [each.replace(default=BETA) if each.name == "beta" else each for each in options]
    relative = couple is not None or any(name.endswith("logratio") for name in reads)
    shared = options_of(reads, coupled=couple is not None, differential=differential, supervised=supervised)
    name = loss.__name__.removesuffix("_loss")

    def objective(example: Example, **given: Any) -> LossOut:
        around = PairOptions(**{option: given.pop(option) for option in shared if option in given})
        check_options(around)
        sums = pair_sums(example, name, relative, around.ld_alpha)
        if "chosen_return" in reads:
            (rewards,) = fields(example, name, "rewards")
            sums["chosen_return"], sums["rejected_return"] = jnp.sum(masked(rewards, as_mask(example.action_mask)), -1)
        if "coupled" in reads:
            (sums["coupled"],) = fields(example, name, "coupled")
        read = sums | scores(sums, around)
        value = loss(*(read[each] for each in reads), **({"beta": BETA} | given))
        value, used = finished(value, example, around)
        real = (sums["chosen_length"] > 0) & (sums["rejected_length"] > 0)
        weight = real.astype(value.dtype)
        score, beta = "logratio" if relative else "logp", given.get("beta", BETA)
        metrics = reward_metrics(beta * sums[f"chosen_{score}"], beta * sums[f"rejected_{score}"]) | used
        return LossOut(jnp.where(real, value, 0), weight, {each: found * weight for each, found in metrics.items()})

    example = inspect.Parameter("example", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Example)
    defaults = PairOptions._field_defaults
    options += [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=defaults[each]) for each in shared]
    objective.__signature__ = inspect.Signature([example, *options], return_annotation=LossOut)
    objective.__name__, objective.__doc__ = name, loss.__doc__
    needs = {"references"} if relative else set()
    needs |= {"rewards"} if "chosen_return" in reads else set()
    extra = {"lse2": "use_weighting"} if "use_weighting" in shared else {}
    return Objective(objective, frozenset(needs), "pair", couple, extra=MappingProxyType(extra))


def pair_sums(
    example: Example, name: str, relative: bool = True, ld_alpha: ArrayLike | None = None
) -> dict[str, Array]:
    """Sums over the actions of either completion, by the names that `pairwise` gives them.

    ld_alpha: what actions beyond the shorter completion's length count, of those sums that are not lengths.
    """
    policy, action_mask = fields(example, name, "policy", "action_mask")
    if action_mask.shape[0] != 2:
        raise ValueError(
            f"action_mask has shape {action_mask.shape} but {name} takes pairs [2, T]; give two sequences."
        )
    mask = as_mask(action_mask)
    lengths = jnp.sum(mask, axis=-1)

    def total(values):
        if ld_alpha is None:
            return jnp.sum(values, axis=-1)
        late = partial(length_desensitised, shared=jnp.min(lengths), alpha=ld_alpha)
        return jax.vmap(late)(values, mask)

    sums = {"logp": total(masked(policy.logp, mask)), "length": lengths}
    if relative:
        sums["logratio"] = total(logratios(policy, reference_of(example, name), mask))
    return {
        f"{which}_{kind}": values[place]
        for kind, values in sums.items()
        for place, which in enumerate(("chosen", "rejected"))
    }


def reward_metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    """How the implicit rewards of a pair compare."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }


def fields(example: Example, objective: str, *names: str) -> list:
    """Fields of an example; raises ValueError naming the first that is None."""
    for name in names:
        if getattr(example, name) is None:
            raise ValueError(f"Example.{name} is None but objective {objective!r} needs it; give it.")
    return [getattr(example, name) for name in names]


def reference_of(example: Example, objective: str) -> TokenStats:
    """Statistics of the model that is called "reference"; raises ValueError when there is none."""
    (references,) = fields(example, objective, "references")
    if "reference" not in references:
        raise ValueError(
            f"objective {objective!r} needs statistics of the model named 'reference', but Example.references has "
            f"{', '.join(map(repr, references)) or 'none'}; annotate the data with it."
        )
    return references["reference"]
