"""`lift` turns a plain loss function into an `Objective`."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.options import Option, options_from_signature
from shiq_jax.objectives.types import Couple, Example, LossOut, Objective

BETA = 0.1
"""Default of `beta` for objectives; the plain losses have no default."""


def empty_metrics(inputs: LossInputs) -> dict[str, Array]:
    """No metrics."""
    return {}


class SharedOptions(NamedTuple):
    """Options shared by all losses of a view.

    Fields:
      available: (names of the inputs of the loss, whether it couples examples) -> options that apply to the loss.
      apply: (value of the loss, LossInputs) -> (value with the options applied, their metrics).
      optional_stats: statistic of the policy -> option that requires it; see `Objective`.
    """

    available: Callable[[frozenset[str], bool], dict[str, Option]]
    apply: Callable[[Array, LossInputs], tuple[Array, dict[str, Array]]]
    optional_stats: Mapping[str, str] = MappingProxyType({})


class ExampleView(NamedTuple):
    """How a plain loss is applied to an example.

    Fields:
      unit: unit of the objective.
      inputs: inputs available to the loss, by parameter name.
      valid: LossInputs -> bool, a scalar or [K]: which values of the loss are averaged.
      mask_invalid: replace other values and metrics with 0; unnecessary for losses that are masked sums.
      per_sequence: the loss takes one sequence and is mapped over K; otherwise it takes the whole example.
      token_mean: average over actions; otherwise over valid values.
      metrics: LossInputs -> name -> scalar or [K], sums over the terms that the weight counts.
      pair_description: what the two sequences of an example are, for error messages; None for any number of them.
      shared_options: options shared by the losses.
    """

    unit: str
    inputs: Mapping[str, LossInput]
    valid: Callable[[LossInputs], Bool[Array, "..."]]
    mask_invalid: bool = True
    per_sequence: bool = False
    token_mean: bool = False
    metrics: Callable[[LossInputs], Mapping[str, Array]] = empty_metrics
    pair_description: str | None = None
    shared_options: SharedOptions | None = None


def lift(
    loss: Callable[..., Any], view: ExampleView, *, couple: Couple | None = None, has_aux: bool = False,
    metrics: Callable[[LossInputs], Mapping[str, Array]] | None = None,
    input_names: Mapping[str, str] = MappingProxyType({}), defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Objective:  # fmt: skip
    """Make the objective of a plain loss.

    Parameters named like an input of the view are computed from the example. All other parameters must be keyword-only
    and become options of the objective. The Example fields and heads that the objective needs follow from its inputs.

    Args:
      loss: returns a scalar, or [K] if the view passes the whole example and averages over its sequences.
      view: how the loss is applied: `SEQUENCES`, `ACTIONS`, `LABELLED`, `ANSWERS`, `GROUPS`, `PAIRS`, `DIFFERENCES` or
        `SUPERVISED`.
      couple: coupling of the examples of a batch; see `Objective`.
      has_aux: whether the loss returns (value, metrics) instead of the value.
      metrics: replaces the metrics of the view.
      input_names: parameter -> input, for parameters named differently.
      defaults: option -> default, overriding the signature; `beta` defaults to `BETA`.

    Raises:
      ValueError: a positional parameter names no input of the view, or an option has no default.
    """
    name = loss.__name__.removesuffix("_loss")
    parameters = inspect.signature(loss).parameters.values()
    names = {parameter.name: input_names.get(parameter.name, parameter.name) for parameter in parameters}
    names = {parameter: input_name for parameter, input_name in names.items() if input_name in view.inputs}
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and parameter.name not in names:
            raise ValueError(
                f"parameter {parameter.name!r} of {loss.__name__} names no input; inputs are {', '.join(view.inputs)}."
            )
    loss_options = options_from_signature(loss, exclude=names, defaults={"beta": BETA, **defaults})
    shared_options, optional_stats = {}, {}
    if view.shared_options:
        shared_options = view.shared_options.available(frozenset(names.values()), couple is not None)
        optional_stats = {
            stat: option for stat, option in view.shared_options.optional_stats.items() if option in shared_options
        }
    used = [view.inputs[input_name] for input_name in names.values()]
    needs = frozenset(field for loss_input in used for field in loss_input.needs)
    heads = {head: kind for loss_input in used for head, kind in loss_input.heads.items()}
    all_options = loss_options | shared_options

    def objective(example: Example, **options: Any) -> LossOut:
        options = {name: option.default for name, option in all_options.items()} | options
        inputs = read_inputs(example, view, name=name, needs=needs, options=options)
        kwargs = {name: value for name, value in options.items() if name not in shared_options}

        def evaluate(arguments: dict[str, Any]) -> Any:
            return loss(**arguments, **kwargs)

        arguments = {parameter: inputs[input_name] for parameter, input_name in names.items()}
        value = (jax.vmap(evaluate) if view.per_sequence else evaluate)(arguments)
        value, reported = value if has_aux else (value, (metrics or view.metrics)(inputs))
        if view.shared_options:
            value, option_metrics = view.shared_options.apply(value, inputs)
            reported = reported | option_metrics
        return _reduce(value, reported, view, inputs)

    objective.__name__, objective.__doc__ = name, loss.__doc__
    return Objective(
        objective, needs - {"policy", "values"}, view.unit, couple, heads=MappingProxyType(heads),
        target_heads=tuple(head for loss_input in used for head in loss_input.target_heads),
        trains_policy="policy" in needs, optional_stats=MappingProxyType(optional_stats),
        declared_options=MappingProxyType(all_options),
    )  # fmt: skip


def read_inputs(example: Example, view: ExampleView, **kwargs: Any) -> LossInputs:
    """The inputs of a view; raises ValueError for missing fields and a wrong number of sequences."""
    inputs = LossInputs(example, view.inputs, **kwargs)
    if view.pair_description and inputs.mask.shape[0] != 2:
        raise ValueError(
            f"action_mask has shape {inputs.mask.shape} but {inputs.name} takes {view.pair_description} [2, T]; pass "
            "exactly two sequences."
        )
    return inputs


def _reduce(value: Array, metrics: Mapping[str, Array], view: ExampleView, inputs: LossInputs) -> LossOut:
    """Sum the valid values and metrics of an example."""
    valid = view.valid(inputs)
    weight = jnp.sum(inputs.mask if view.token_mean else valid).astype(value.dtype)
    if view.mask_invalid:
        value, count = jnp.where(valid, value, 0), valid.astype(value.dtype)
        metrics = {name: metric * count for name, metric in metrics.items()}
    return LossOut(jnp.sum(value), weight, {name: jnp.sum(metric) for name, metric in metrics.items()})
