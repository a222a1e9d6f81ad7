"""The options of losses, as the command line shows them, and the objectives that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from shiq_jax.objectives import OBJECTIVES, Objective
from shiq_jax.objectives.pair_options import PairOptions, check_options
from shiq_jax.objectives.preference import DIVERGENCES
from shiq_jax.objectives.residuals import check_axes

LABEL_LOSSES = tuple(name for name, objective in OBJECTIVES.items() if "labels" in objective.needs)
PAIR_LOSSES = tuple(name for name, objective in OBJECTIVES.items() if objective.unit == "pair")
REWARD_LOSSES = tuple(
    name for name, objective in OBJECTIVES.items() if "rewards" in objective.needs and objective.unit != "pair"
)


def given_as(metavar: str, otherwise: str) -> Any:
    """How the help shows an option that may be left out: the name of its value, and what holds without one."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


@dataclass(frozen=True)
class SftLoss:
    """Maximum likelihood, which has no options."""

    def configured(self) -> Objective:
        """The objective."""
        return OBJECTIVES["sft"]


@dataclass(frozen=True)
class RewardLoss:
    """Options of a loss on scored answers; those that belong to other losses are refused."""

    name: Literal[REWARD_LOSSES] = "shiq"
    """Which loss; docs/losses.md has their formulas."""
    beta: float = 0.1
    """Temperature of the KL regularisation: rewards are divided by it, or what Q-heads add to the logits."""
    gamma: Annotated[float | None, given_as("GAMMA", "the loss's own")] = None
    """shiq, pcl, ilql, cql, mc_returns: discount per action."""
    normalisation: Literal["sum_t", "mean_t"] = "sum_t"
    """shiq: whether squared residuals of a sequence are summed or averaged."""
    position_weight: Literal["none", "inv_position"] = "none"
    """shiq: weight of the k-th action's squared residual, 1 or 1/k."""
    horizon: Literal["multi", "one", "trajectory", "n_step"] = "multi"
    """shiq: how far a residual looks, to the end, one action, from the first action only, or n actions."""
    n: Annotated[int | None, given_as("ACTIONS", "none")] = None
    """shiq, pcl: how many, with the horizon n_step."""
    value: Literal["lse_shift", "lse"] = "lse_shift"
    """shiq: the value of a state relative to the reference's, or not."""
    gradient: Literal["full", "semi"] = "full"
    """shiq, oreo: whether what follows an action is differentiated; semi is unbiased where users answer at random."""
    value_beta: Annotated[float | None, given_as("BETA", "the loss's own")] = None
    """a_star_po: temperature of the prompt's value."""
    tau: Annotated[float | None, given_as("TAU", "the loss's own")] = None
    """ilql: the expectile in (0, 1) that values are of the actions'."""
    alpha: Annotated[float | None, given_as("ALPHA", "the loss's own")] = None
    """ilql, cql, mc_returns: weight of the cross-entropy that keeps Q low where no data are."""
    polyak: Annotated[float | None, given_as("RATE", "the loss's own")] = None
    """ilql, cql: how much of the way to the heads their slow copies go in one update."""

    def __post_init__(self):
        _positive(self.beta)
        _refuse_others(self.name, self._given())
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")
        if self.value_beta is not None and not 0 < self.value_beta < math.inf:
            raise ValueError(f"value_beta must be positive and finite, not {self.value_beta}")
        if self.tau is not None and not 0 < self.tau < 1:
            raise ValueError(f"tau must lie in (0, 1), not {self.tau}")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and not negative, not {self.alpha}")
        if self.polyak is not None and not (OBJECTIVES[self.name].slow and 0 < self.polyak <= 1):
            raise ValueError(f"polyak lies in (0, 1] and belongs to losses with slow copies, not {self.name}")
        paths = ("n_step" if self.n else "multi") if self.name == "pcl" else self.horizon
        check_axes(paths, self.n, self.value, None, self.gradient, self.beta, self.gamma or 1.0)

    @property
    def steering(self) -> float:
        """What Q-heads are multiplied with before they are added to the logits: the policy is then pi exp(Q / beta)."""
        return steering(self.name, self.beta)

    def configured(self) -> Objective:
        """The objective with these options."""
        objective, given = OBJECTIVES[self.name], self._given()
        if "beta" in objective.options:
            given["beta"] = self.beta
        if self.polyak is not None:
            objective = objective._replace(polyak=self.polyak)
        return objective.configure(**given)

    def _given(self) -> dict[str, Any]:
        return _changed(self, "name", "beta", "polyak")


@dataclass(frozen=True)
class PairLoss:
    """Options of a loss on pairs; those that belong to other losses are refused."""

    name: Literal[PAIR_LOSSES] = "dpo"
    """Which loss; docs/losses.md has their formulas."""
    beta: float = 0.1
    """Temperature of the KL regularisation, or what scales the contrast of a loss without reference."""
    label_smoothing: Annotated[float | None, given_as("EPS", "the loss's own")] = None
    """Probability that a preference is the wrong way round."""
    penalty: Annotated[float | None, given_as("LAMBDA", "the loss's own")] = None
    """dpop: what it costs that the chosen answer becomes less likely."""
    shift: Annotated[float | None, given_as("DELTA", "the loss's own")] = None
    """bco: the reward between good and bad answers."""
    tau: Annotated[float | None, given_as("TAU", "the loss's own")] = None
    """discopop: how sharply its two parts are blended."""
    alpha: Annotated[float | None, given_as("ALPHA", "the loss's own")] = None
    """cpo: weight of the chosen answer's likelihood."""
    margin: Annotated[float | None, given_as("GAMMA", "the loss's own")] = None
    """simpo: how far the chosen answer should lead."""
    rpo_alpha: Annotated[float | None, given_as("ALPHA", "none")] = None
    """all but cpo and orpo, which have such a term: weight of the chosen answer's negative log-likelihood per token."""
    ld_alpha: Annotated[float | None, given_as("ALPHA", "1")] = None
    """losses of summed log-ratios alone: what a token beyond the shorter answer's length counts, from 0 to 1."""
    use_weighting: bool = False
    """all but aot and aot_unpaired: weighs pairs by how likely the policy is to write both answers."""
    f_divergence: Literal[DIVERGENCES] = "reverse_kl"
    """dpo, robust, hinge, exo, discopop: the divergence that keeps the policy near the reference."""
    f_alpha: Annotated[float | None, given_as("ALPHA", "none")] = None
    """Which one, of the family alpha_divergence."""

    def __post_init__(self):
        _positive(self.beta)
        _refuse_others(self.name, self._given())
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")
        if self.name == "exo" and self.label_smoothing == 0:
            raise ValueError("label_smoothing must be positive with the loss exo")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be positive and finite, not {self.tau}")
        check_options(PairOptions(*(getattr(self, option) for option in PairOptions._fields)))

    def configured(self) -> Objective:
        """The objective with these options."""
        return OBJECTIVES[self.name].configure(**self._given())

    def _given(self) -> dict[str, Any]:
        return {"beta": self.beta} | _changed(self, "name", "beta")


@dataclass(frozen=True)
class LabelLoss:
    """Options of a loss on single answers that are good or bad."""

    name: Literal[LABEL_LOSSES] = "kto"
    """Which loss; docs/losses.md has their formulas."""
    beta: float = 0.1
    """Temperature of the KL regularisation."""
    desirable_weight: float = 1.0
    """Weight of the loss of good answers."""
    undesirable_weight: float = 1.0
    """Weight of the loss of bad answers; where one kind is rarer, give it more."""

    def __post_init__(self):
        _positive(self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")

    def configured(self) -> Objective:
        """The objective with these options."""
        options = dataclasses.asdict(self)
        return OBJECTIVES[options.pop("name")].configure(**options)


def steering(loss: str, beta: float) -> float:
    """What the Q-heads of a loss are multiplied with before they are added to the logits; 0 where the policy learns."""
    return 0.0 if OBJECTIVES[loss].policy else 1 / beta


def _changed(options: RewardLoss | PairLoss, *apart: str) -> dict[str, Any]:
    """What is not as it is by default, but for some."""
    fields = (field for field in dataclasses.fields(options) if field.name not in apart)
    return {field.name: value for field in fields if (value := getattr(options, field.name)) != field.default}


def _refuse_others(loss: str, given: Iterable[str]) -> None:
    known = OBJECTIVES[loss].options
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is no option of the loss {loss}, which takes {_list(known)}")


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _positive(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
