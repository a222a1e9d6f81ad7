"""The one way from a plain loss to an objective."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.options import Option, declared
from shiq_jax.objectives.types import Couple, Example, LossOut, Objective

BETA = 0.1
"""The default of `beta` in objectives; the plain losses have none."""


def no_metrics(reading: LossInputs) -> dict[str, Array]:
    """Nothing to report beside the loss."""
    return {}


class SharedOptions(NamedTuple):
    """Options that all losses of a view share.

    Fields:
      options: (names of the inputs that the loss reads, whether it couples examples) -> the options that make sense.
      finish: (value of the loss, reading) -> (its final value, metrics).
      extra: further statistics of the policy, with the names of the options that ask for them; see `Objective`.
    """

    options: Callable[[frozenset[str], bool], dict[str, Option]]
    finish: Callable[[Array, LossInputs], tuple[Array, dict[str, Array]]]
    extra: Mapping[str, str] = MappingProxyType({})


class ExampleView(NamedTuple):
    """How a plain loss is applied to an example.

    Fields:
      unit: the objective's unit.
      inputs: what the loss may read, by the names of its parameters.
      real: Reading -> bool, a scalar or [K]: which values of the loss count.
      guard: whether values and metrics that do not count are replaced by 0; losses of masked sums are 0 by themselves.
      each: whether the loss takes one sequence and is mapped over K; otherwise it takes the whole example.
      per_action: whether the mean over a batch runs over actions; otherwise over what is real.
      metrics: Reading -> name -> scalar or [K], sums over what the weight counts; read where the loss is real.
      two_sequences: what the two sequences of an example are, for the error message; None for any number of them.
      shared: options that its losses share.
    """

    unit: str
    inputs: Mapping[str, LossInput]
    real: Callable[[LossInputs], Bool[Array, "..."]]
    guard: bool = True
    each: bool = False
    per_action: bool = False
    metrics: Callable[[LossInputs], Mapping[str, Array]] = no_metrics
    two_sequences: str | None = None
    shared: SharedOptions | None = None


def lift(
    loss: Callable[..., Any], view: ExampleView, *, couple: Couple | None = None, has_aux: bool = False,
    metrics: Callable[[LossInputs], Mapping[str, Array]] | None = None,
    reads: Mapping[str, str] = MappingProxyType({}), defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Objective:  # fmt: skip
    """The objective of a plain loss.

    Parameters of the loss that are named like an input of the view are read from the example. All others must be
    keyword-only and are the options of the objective. What the example must hold and which heads there are follows
    from the inputs.

    Args:
      loss: returns a scalar, or [K] where the view takes the whole example and has values for its sequences.
      view: how it is applied: `SEQUENCES`, `ACTIONS`, `GROUPS`, `PAIRS` or one of their kin.
      couple: lets examples know of each other; see `Objective`.
      has_aux: whether the loss returns (value, metrics) instead of the value.
      metrics: replaces the metrics of the view.
      reads: parameter -> input, where the names differ.
      defaults: replace, or supply, defaults of the signature; that of `beta` is `BETA`.

    Raises:
      ValueError: a positional parameter names no input of the view, or an option has no default.
    """
    name = loss.__name__.removesuffix("_loss")
    parameters = inspect.signature(loss).parameters.values()
    inputs = {each.name: reads.get(each.name, each.name) for each in parameters}
    inputs = {parameter: read for parameter, read in inputs.items() if read in view.inputs}
    for each in parameters:
        if each.kind is not inspect.Parameter.KEYWORD_ONLY and each.name not in inputs:
            raise ValueError(f"{each.name!r} of {loss.__name__} is no input; known are {', '.join(view.inputs)}.")
    options = declared(loss, without=inputs, defaults={"beta": BETA, **defaults})
    shared, extra = {}, {}
    if view.shared:
        shared = view.shared.options(frozenset(inputs.values()), couple is not None)
        extra = {statistic: option for statistic, option in view.shared.extra.items() if option in shared}
    read = [view.inputs[each] for each in inputs.values()]
    needs = frozenset(field for each in read for field in each.needs)
    heads = {head: kind for each in read for head, kind in each.heads.items()}

    def objective(example: Example, **given: Any) -> LossOut:
        chosen = {option: each.default for option, each in (options | shared).items()} | given
        reading = read_example(example, view, name=name, needs=needs, options=chosen)
        own = {option: value for option, value in chosen.items() if option not in shared}
        function = jax.vmap(lambda read: loss(**read, **own)) if view.each else lambda read: loss(**read, **own)
        value = function({parameter: reading[each] for parameter, each in inputs.items()})
        value, found = value if has_aux else (value, (metrics or view.metrics)(reading))
        if view.shared:
            value, more = view.shared.finish(value, reading)
            found = found | more
        return _summed(value, found, view, reading)

    objective.__name__, objective.__doc__ = name, loss.__doc__
    return Objective(
        objective, needs - {"policy", "values"}, view.unit, couple,
        heads=MappingProxyType(heads), target_heads=tuple(head for each in read for head in each.target_heads),
        policy="policy" in needs, extra=MappingProxyType(extra), declared=MappingProxyType(options | shared),
    )  # fmt: skip


def read_example(example: Example, view: ExampleView, **about: Any) -> LossInputs:
    """The inputs of a view; raises ValueError for fields that are missing and the wrong number of sequences."""
    reading = LossInputs(example, view.inputs, **about)
    if view.two_sequences and reading.mask.shape[0] != 2:
        raise ValueError(
            f"action_mask has shape {reading.mask.shape} but {reading.name} takes {view.two_sequences} [2, T]; give two "
            "sequences."
        )
    return reading


def _summed(value: Array, metrics: Mapping[str, Array], view: ExampleView, reading: LossInputs) -> LossOut:
    """Sums over what is real of an example."""
    real = view.real(reading)
    weight = jnp.sum(reading.mask if view.per_action else real).astype(value.dtype)
    if view.guard:
        value, count = jnp.where(real, value, 0), real.astype(value.dtype)
        metrics = {name: each * count for name, each in metrics.items()}
    return LossOut(jnp.sum(value), weight, {name: jnp.sum(each) for name, each in metrics.items()})
