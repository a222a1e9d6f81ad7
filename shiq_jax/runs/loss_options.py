"""Command-line options of the losses, generated from the options that the losses declare."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import tyro

from shiq_jax.objectives import OBJECTIVES, Objective, check_options

LABEL_LOSSES = tuple(name for name, objective in OBJECTIVES.items() if "labels" in objective.needs)
PAIR_LOSSES = tuple(name for name, objective in OBJECTIVES.items() if objective.unit == "pair")
REWARD_LOSSES = tuple(
    name for name, objective in OBJECTIVES.items() if "rewards" in objective.needs and objective.unit != "pair"
)


def optional_arg(metavar: str, default: str) -> Any:
    """Annotation of an option whose default is None: `metavar` and `default` as the help shows them."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


class LossOptions:
    """Base class of the loss options of a command; an option that was not set is None.

    Subclasses are dataclasses made by `make_loss_options`. Raises ValueError for options that the loss does not have
    and for values that it rejects.
    """

    objectives: ClassVar[Mapping[str, Objective]]
    name: str

    def __post_init__(self):
        names = tuple(self.objectives[self.name].options)
        for name in self.overrides():
            if name not in names:
                raise ValueError(
                    f"{name} is not an option of the loss {self.name}, which takes {_enumerate(names) or 'none'}"
                )
        if self.overrides():
            check_options(self.build())

    def overrides(self) -> dict[str, Any]:
        """The options that were set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}
        return {name: value for name, value in values.items() if value is not None}

    def build(self) -> Objective:
        """The objective with these options."""
        return self.objectives[self.name].configure(**self.overrides())

    @property
    def q_guidance(self) -> float:
        """Coefficient of the Q heads added to the logits; 0 if the loss trains the policy."""
        return self.build().q_guidance

    def settings(self) -> dict[str, Any]:
        """Name of the loss and the values of all its options, defaults included, as JSON values."""
        defaults = {name: option.default for name, option in self.objectives[self.name].options.items()}
        return {"name": self.name} | defaults | self.overrides()


def objective_from_settings(settings: Mapping[str, Any]) -> Objective:
    """The objective of a run from `LossOptions.settings`, as stored in config.json."""
    objective = OBJECTIVES[settings.get("name", "sft")]
    # Older runs also recorded options of other losses.
    options = {name: settings[name] for name in objective.options if settings.get(name) is not None}
    return objective.configure(**options)


def make_loss_options(class_name: str, doc: str, objectives: Mapping[str, Objective]) -> type[LossOptions]:
    """Make a dataclass with the options of several objectives, for tyro.

    Args:
      class_name, doc: name and docstring of the class.
      objectives: name -> objective; the first is the default. With a single objective there is no `name` option.
    """
    losses = tuple(objectives)
    fields: list[tuple] = []
    if len(losses) > 1:
        name_arg = tyro.conf.arg(help="Name of the loss; docs/losses.md has the formulas.")
        fields.append(("name", Annotated[Literal[losses], name_arg], dataclasses.field(default=losses[0])))
    for option in dict.fromkeys(option for objective in objectives.values() for option in objective.options):
        fields.append((option, _annotation(option, objectives), dataclasses.field(default=None)))
    attributes = {"__doc__": doc, "__module__": __name__, "objectives": objectives}
    if len(losses) == 1:
        attributes["name"] = losses[0]
    return dataclasses.make_dataclass(class_name, fields, bases=(LossOptions,), namespace=attributes, frozen=True)


def _annotation(name: str, objectives: Mapping[str, Objective]) -> Any:
    """Type and help of an option."""
    options = {loss: each.options[name] for loss, each in objectives.items() if name in each.options}
    kinds = {option.kind for option in options.values()}
    if all(get_origin(kind) is Literal for kind in kinds):
        # Losses may accept different values of one option; each checks its own.
        kinds = {Literal[tuple(dict.fromkeys(value for kind in kinds for value in get_args(kind)))]}
    if len(kinds) != 1:
        raise ValueError(f"option {name!r} has different types in {_enumerate(tuple(options))}: rename one of them")
    defaults = _merge({loss: "none" if each.default is None else str(each.default) for loss, each in options.items()})

    def default_hint(value: str) -> str:
        # A command may set its own default.
        return f"(default: {defaults if value == 'None' else value})"

    arg = tyro.conf.arg(help=_help(options, objectives), help_behavior_hint=default_hint)
    return Annotated[kinds.pop() | None, arg, tyro.conf.DisallowNone]


def _help(options: Mapping[str, Any], losses: Iterable[str]) -> str:
    """Help of an option: the losses that have it and their descriptions; the first description is the default."""
    texts = [option.text for option in options.values() if option.text]
    first = texts[0] if texts else "see docs/losses.md"
    text = _merge({loss: (option.text or first).rstrip(".") for loss, option in options.items()}, first.rstrip("."))
    text = text[0].upper() + text[1:]
    others = tuple(loss for loss in losses if loss not in options)
    if not others:
        return f"{text}."
    owners = f"all but {_enumerate(others)}" if len(others) < len(options) else ", ".join(options)
    return f"{owners}: {text[0].lower()}{text[1:]}."


def _merge(values: Mapping[str, str], common: str | None = None) -> str:
    """The most common value, or `common`, followed by the losses with another value."""
    common = Counter(values.values()).most_common(1)[0][0] if common is None else common
    exceptions: dict[str, list[str]] = {}
    for loss, value in values.items():
        if value != common:
            exceptions.setdefault(value, []).append(loss)
    return "; ".join([common, *(f"{', '.join(losses)}: {value}" for value, losses in exceptions.items())])


def _enumerate(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _select(names: Iterable[str]) -> dict[str, Objective]:
    return {name: OBJECTIVES[name] for name in names}


RewardLoss = make_loss_options(
    "RewardLoss", "Loss on scored answers; an option of another loss is an error.", _select(REWARD_LOSSES)
)
PairLoss = make_loss_options(
    "PairLoss", "Loss on preference pairs; an option of another loss is an error.", _select(PAIR_LOSSES)
)
LabelLoss = make_loss_options("LabelLoss", "Loss on answers labeled desirable or undesirable.", _select(LABEL_LOSSES))
SftLoss = make_loss_options("SftLoss", "Maximum likelihood; no options.", _select(["sft"]))
