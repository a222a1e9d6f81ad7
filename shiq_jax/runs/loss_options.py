"""Options of losses on the command line, made from the options that the losses declare."""

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


def given_as(metavar: str, otherwise: str) -> Any:
    """How the help shows an option that may be left out: the name of its value, and what holds without one."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


class LossOptions:
    """A loss of a family and its options; None for an option that is not given.

    Subclasses are dataclasses made by `family`. ValueErrors name options that the loss does not take or refuses.
    """

    objectives: ClassVar[Mapping[str, Objective]]
    name: str

    def __post_init__(self):
        known = tuple(self.objectives[self.name].options)
        for name in self.given():
            if name not in known:
                raise ValueError(f"{name} is no option of the loss {self.name}, which takes {_list(known) or 'none'}")
        if self.given():
            check_options(self.configured())

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}
        return {name: value for name, value in values.items() if value is not None}

    def configured(self) -> Objective:
        """The objective with these options."""
        return self.objectives[self.name].configure(**self.given())

    @property
    def q_guidance(self) -> float:
        """What Q heads are multiplied with before they are added to the logits; 0 where the policy learns."""
        return self.configured().q_guidance

    def settings(self) -> dict[str, Any]:
        """The loss and the values of all its options, given or not, as JSON values."""
        defaults = {name: option.default for name, option in self.objectives[self.name].options.items()}
        return {"name": self.name} | defaults | self.given()


def recorded(settings: Mapping[str, Any]) -> Objective:
    """The objective of a run from its `LossOptions.settings`, as config.json holds them."""
    objective = OBJECTIVES[settings.get("name", "sft")]
    # Older runs also recorded options of other losses.
    known = {name: settings[name] for name in objective.options if settings.get(name) is not None}
    return objective.configure(**known)


def family(name: str, about: str, objectives: Mapping[str, Objective]) -> type[LossOptions]:
    """A dataclass with the options of all these objectives, for tyro.

    Args:
      name, about: name and docstring of the class.
      objectives: by name; the first is the default. A single one gets no option that names it.
    """
    losses = tuple(objectives)
    fields: list[tuple] = []
    if len(losses) > 1:
        about_name = tyro.conf.arg(help="Which loss; docs/losses.md has their formulas.")
        fields.append(("name", Annotated[Literal[losses], about_name], dataclasses.field(default=losses[0])))
    for option in dict.fromkeys(option for objective in objectives.values() for option in objective.options):
        fields.append((option, _annotation(option, objectives), dataclasses.field(default=None)))
    attributes = {"__doc__": about, "__module__": __name__, "objectives": objectives}
    if len(losses) == 1:
        attributes["name"] = losses[0]
    return dataclasses.make_dataclass(name, fields, bases=(LossOptions,), namespace=attributes, frozen=True)


def _annotation(name: str, objectives: Mapping[str, Objective]) -> Any:
    """The type of an option of a family with its help."""
    takers = {loss: each.options[name] for loss, each in objectives.items() if name in each.options}
    kinds = {option.kind for option in takers.values()}
    if all(get_origin(kind) is Literal for kind in kinds):
        # Losses may know different values of one option; each checks its own.
        kinds = {Literal[tuple(dict.fromkeys(value for kind in kinds for value in get_args(kind)))]}
    if len(kinds) != 1:
        raise ValueError(f"option {name!r} is of different types in {_list(tuple(takers))}; rename one of them.")
    defaults = _shared({loss: "none" if each.default is None else str(each.default) for loss, each in takers.items()})

    def hint(given: str) -> str:
        # A command may give an option for its user.
        return f"(default: {defaults if given == 'None' else given})"

    about = tyro.conf.arg(help=_help(takers, objectives), help_behavior_hint=hint)
    return Annotated[kinds.pop() | None, about, tyro.conf.DisallowNone]


def _help(takers: Mapping[str, Any], losses: Iterable[str]) -> str:
    """Which losses take an option, and what it does; a loss that does not say does what the first that does says."""
    texts = [option.text for option in takers.values() if option.text]
    first = texts[0] if texts else "see docs/losses.md"
    said = _shared({loss: (option.text or first).rstrip(".") for loss, option in takers.items()}, first.rstrip("."))
    said = said[0].upper() + said[1:]
    others = tuple(loss for loss in losses if loss not in takers)
    if not others:
        return f"{said}."
    whose = f"all but {_list(others)}" if len(others) < len(takers) else ", ".join(takers)
    return f"{whose}: {said[0].lower()}{said[1:]}."


def _shared(values: Mapping[str, str], usual: str | None = None) -> str:
    """What holds for most losses, or `usual`, and after it the losses for which something else does."""
    usual = Counter(values.values()).most_common(1)[0][0] if usual is None else usual
    others: dict[str, list[str]] = {}
    for loss, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(loss)
    return "; ".join([usual, *(f"{', '.join(losses)}: {value}" for value, losses in others.items())])


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _of(names: Iterable[str]) -> dict[str, Objective]:
    return {name: OBJECTIVES[name] for name in names}


RewardLoss = family(
    "RewardLoss",
    "Options of a loss on scored answers; those of other losses are refused.",
    _of(REWARD_LOSSES),
)
PairLoss = family("PairLoss", "Options of a loss on pairs; those of other losses are refused.", _of(PAIR_LOSSES))
LabelLoss = family("LabelLoss", "Options of a loss on single answers that are good or bad.", _of(LABEL_LOSSES))
SftLoss = family("SftLoss", "Maximum likelihood, which has no options.", _of(["sft"]))
