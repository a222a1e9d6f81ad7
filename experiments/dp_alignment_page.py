"""The page and the figure of `experiments.dp_alignment`, out of the numbers that were kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = {"dpo": "DPO", "shiq": "ShiQ"}
_COLORS = {"dpo": "tab:blue", "shiq": "tab:green"}
# At which the loss on held-out pairs is given for every policy, also those that another loss made.
BETA = 0.1


class Estimate(NamedTuple):
    """A mean over questions and its standard error."""

    mean: float
    error: float

    @property
    def decided(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.mean) > 2 * self.error


class Results:
    """The kept numbers: of the study, the reference, and the arms that are there.

    Raises KeyError for an arm that is not there.
    """

    def __init__(self, out: Path):
        kept = out / "dp_alignment"
        self.study, self.reference, self.rates = (
            _read(kept / f"{name}.json") for name in ("study", "reference", "rates")
        )
        self.settings = self.study["settings"]
        self.arms: dict[tuple[str, Any], list[dict]] = {}
        for file in sorted(kept.glob("*-*.json")):
            found = _read(file)
            if found["settings"] == self.settings:
                self.arms.setdefault((found["method"], found["privacy"]), []).append(found)

    @property
    def wanted(self) -> list[tuple[str, Any]]:
        """All arms in the order of the page."""
        kinds = ["open", "clipped", *sorted(self.settings["epsilons"], reverse=True)]
        return [(method, kind) for method in NAMES for kind in kinds]

    def values(self, arm: tuple[str, Any] | None, name: str) -> np.ndarray:
        """A statistic by question, the mean over samples and repetitions; None is the reference."""
        runs = [self.reference] if arm is None else self.arms[arm]
        return np.mean([self._of(run, name) for run in runs], axis=0)

    def _of(self, run: Mapping, name: str) -> np.ndarray:
        margin = _margin(run) - _margin(self.reference)
        found = {
            "margin": lambda: margin,
            "preferred": lambda: (np.sign(margin) + 1) / 2,
            "loss": lambda: np.logaddexp(0, -BETA * margin),
            "right": lambda: np.asarray(run["chosen"]) - np.asarray(self.reference["chosen"]),
            "greedy": lambda: np.asarray(run["greedy"]),
            "sampled": lambda: np.mean(run["sampled"], axis=1),
            "kl": lambda: np.mean(run["logratio"], axis=1),
        }[name]
        return found()

    def mean(self, arm: tuple[str, Any] | None, name: str) -> Estimate:
        """Of one policy."""
        return estimate(self.values(arm, name))

    def gain(self, arm: tuple[str, Any], name: str) -> Estimate:
        """Over the reference, on the same questions."""
        return estimate(self.values(arm, name) - self.values(None, name))


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and standard error."""
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))


def noise_of(run: Mapping) -> tuple[float, float]:
    """The noise of one step's mean gradient: per coordinate, and the norm that it has over all coordinates."""
    accounts = run["accounts"]
    each = accounts["noise_multiplier"] / accounts["expected_batch"]
    return each, each * math.sqrt(run["parameters"])


def write(out: Path) -> None:
    """`dp_alignment.md` and `dp_alignment.png`."""
    results = Results(out)
    draw(results, out / "dp_alignment.png")
    (out / "dp_alignment.md").write_text(render(results))


def draw(results: Results, path: Path) -> None:
    """Margin, loss and reward against epsilon, with the reference as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [*sorted(results.settings["epsilons"]), "clipped", "open"]
    words = {"clipped": "clipped,\nno noise", "open": "not\nprivate"}
    labels = [words.get(kind) or f"{kind:g}" for kind in kinds]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    shown = (
        ("margin", "margin of held-out pairs, nats"),
        ("preferred", "held-out preference accuracy"),
        ("sampled", "mean reward of fresh answers"),
    )
    for panel, (name, title) in zip(panels, shown, strict=True):
        panel.axhline(results.mean(None, name).mean, color="0.4", linestyle="--", linewidth=1, label="reference")
        for place, method in enumerate(NAMES):
            numbered = [(number, (method, kind)) for number, kind in enumerate(kinds)]
            there = [(number, results.mean(arm, name)) for number, arm in numbered if arm in results.arms]
            if there:
                panel.errorbar(
                    [number + 0.12 * (place - 0.5) for number, _ in there], [found.mean for _, found in there],
                    [2 * found.error for _, found in there], color=_COLORS[method], marker="o", label=NAMES[method],
                    markersize=5, linewidth=1.2, capsize=2,
                )  # fmt: skip
        panel.set_xticks(range(len(kinds)), labels, fontsize=8)
        panel.set_xlim(-0.4, len(kinds) - 0.6)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("epsilon of the run", fontsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(results: Results) -> str:
    """The page."""
    settings, sizes = results.settings, results.settings["sizes"]
    missing = [_named(arm) for arm in results.wanted if arm not in results.arms]
    unfinished = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    rows = "\n".join(_row(results, arm) for arm in results.wanted if arm in results.arms)
    sentences = (*verdict(results), *reward_sentences(results), *signal_sentences(results))
    said = "\n".join(f"- {line}" for line in sentences)
    greedy, sampled = (results.mean(None, name) for name in ("greedy", "sampled"))
    start = f"{greedy.mean:.3f} ± {greedy.error:.3f} | {sampled.mean:.3f} ± {sampled.error:.3f}"
    return f"""# Private preference tuning: utility against epsilon

    python -m experiments.dp_alignment

DPO and ShiQ tune LoRA adapters of SmolLM2-135M-Instruct on {sizes["units"]} private questions of the Berkeley Function
Calling Leaderboard (simple_python), each with a right and a wrong answer. What is protected is the question with both
answers, at delta {settings["delta"]:g}, below 1 / {sizes["units"]}.
{unfinished}
{said}

![Utility against epsilon](dp_alignment.png)

*Points are means over {len(results.reference["greedy"])} held-out questions with two standard errors; the dashed line
is the reference.*

| policy | margin, nats | preferred | DPO loss | right answer, nats | greedy reward | sampled reward | KL, nats |
|---|---|---|---|---|---|---|---|
| reference | 0 | 0.5 | {math.log(2):.4f} | 0 | {start} | 0 |
{rows}

± is one standard error over questions, of one run: how much another draw of the noise would change is not in it. Of
the held-out pairs ({len(results.reference["chosen"])}): **margin**, how much more the log-odds of the right over the
wrong answer are than the reference's; **preferred**, the share of pairs in which they are more (the reference, which
ties with itself, has half); **DPO loss** at beta {BETA:g}; **right answer**, the gain in its log-probability. Of fresh
answers: the reward of greedy ones and the mean of two sampled ones at temperature 1, and the log-ratio of the latter to
the reference.

{_plan(results)}

{_method(results)}
Arms whose numbers are
in [dp_alignment/](dp_alignment) are not run again. {_cost(results)}
"""


def _plan(results: Results) -> str:
    """What noise costs by the probability of sampling, and which plan all arms have."""
    settings, sizes = results.settings, results.settings["sizes"]
    plans = "\n".join(
        f"| {plan['epsilon']:g} | {plan['share']:g} | {plan['steps']} | {plan['noise_multiplier']:.2f} "
        f"| {plan['noise']:.4f} | {plan['computed']} |"
        for plan in results.study["plans"]
    )
    return f"""## Which plan

For the same number of gradients of units, {settings["steps"]} for each of the {sizes["units"]} units, the noise in the
mean over all steps (standard deviation per coordinate, where a unit's gradient has norm 1 at most) by the probability
with which a unit is in a batch. Full batches have the least noise, and none of the padding that a batch of random size
needs; with them the number of steps does not matter to it. All arms take full batches.

| epsilon | probability | steps | noise multiplier | noise per coordinate | units computed, with padding |
|---|---|---|---|---|---|
{plans}

The norm of the noise grows with the root of the number of parameters; rank {settings["rank"]} on
{" and ".join(settings["targets"])} keeps that low."""


def _method(results: Results) -> str:
    """How reference, data, updates and learning rates were made."""
    settings, sizes = results.settings, results.settings["sizes"]
    rates = "\n".join(_tried(results, method) for method in NAMES)
    return f"""## What was done

- The warm start, two passes over {sizes["demonstrations"]} public demonstrations, makes the reference. It answers the
  other questions {sizes["samples"]} times each. A pair is its first right and its first wrong answer; where it has no
  right one ({1 - results.reference["right_answers_sampled"]:.0%} of the private questions), an accepted answer takes
  its place; questions without a wrong answer are left out.
- DPO (beta 0.1) learns from the pair; ShiQ (beta 0.5, the k-th action weighed by 1/k) from the same two answers, with
  their rewards less the mean of the two, which knows of no other question. So both protect the same thing.
- {settings["steps"]} full-batch updates of AdamW at a constant rate; units are clipped by AUTO-S. *Clipped, no noise*
  is private to nobody and tells what clipping costs from what noise costs.
- The learning rate is one for all arms of a method: that with the least loss of the method's own on
  {sizes["tuning"] - sizes["tuning_learned"]} public questions after learning, without privacy, from
  {sizes["tuning_learned"]} other public ones. No private question had a part in it.

| method | loss by rate | chosen |
|---|---|---|
{rates}

The rates are chosen without noise; a rate chosen under noise might do better in the noisiest arms{_at_the_end(results)}."""


def verdict(results: Results) -> list[str]:
    """What is left of the margin that is learned without privacy, method by method."""
    lines = []
    for method, name in NAMES.items():
        if (method, "open") not in results.arms:
            continue
        most = results.mean((method, "open"), "margin")
        line = f"**{name}** without privacy moves the margin of held-out pairs by {_signed(most)} nats"
        if not most.decided:
            lines.append(f"{line}, which is within two standard errors of nothing.")
            continue
        parts = []
        for kind in ("clipped", *sorted(results.settings["epsilons"], reverse=True)):
            if (method, kind) in results.arms:
                found = results.mean((method, kind), "margin")
                word = f"{found.mean / most.mean:.0%} of it" if found.decided else "nothing that two errors could tell"
                parts.append(f"{_kind(kind)} {_signed(found)} ({word})")
        lines.append(f"{line}; {'; '.join(parts)}." if parts else f"{line}.")
    return lines


def reward_sentences(results: Results) -> list[str]:
    """Which policies differ from the reference in reward."""
    lines = []
    for name, what in (("greedy", "greedy answers"), ("sampled", "sampled answers")):
        gains = {arm: results.gain(arm, name) for arm in results.wanted if arm in results.arms}
        for word, sign in (("more", 1), ("fewer", -1)):
            arms = [_named(arm) for arm, found in gains.items() if found.decided and found.mean * sign > 0]
            if arms:
                listed = ", ".join(arms)
                lines.append(f"Of {what}, {word} are right than of the reference's beyond two errors: {listed}.")
        if gains and not any(found.decided for found in gains.values()):
            lines.append(f"Of {what}, no policy has more or fewer right than the reference beyond two standard errors.")
    return lines


def signal_sentences(results: Results) -> list[str]:
    """How large the noise is beside the gradient, in the first step."""
    lines = []
    for method, name in NAMES.items():
        private = {kind: results.arms[of, kind][0] for of, kind in results.arms if of == method and _is_private(kind)}
        if (method, "clipped") not in results.arms or not private:
            continue
        signal = results.arms[method, "clipped"][0]["updates"]["grad_norm"][0]
        parts = []
        for kind, run in sorted(private.items(), reverse=True):
            each, whole = noise_of(run)
            parts.append(
                f"at epsilon {kind:g} the noise has norm {whole:.2f}, {whole / signal:.1f} times as long, and along "
                f"the gradient's own direction a standard deviation of {each:.4f}, {each / signal:.0%} of it"
            )
        lines.append(
            f"{name}: the mean of the clipped gradients has norm {signal:.3f} in the first step; {'; '.join(parts)} "
            f"({next(iter(private.values()))['parameters']:,} coordinates)."
        )
    return lines


def _row(results: Results, arm: tuple[str, Any]) -> str:
    margin, right, greedy, sampled, kl = (
        results.mean(arm, name) for name in ("margin", "right", "greedy", "sampled", "kl")
    )
    preferred, loss = results.mean(arm, "preferred"), results.mean(arm, "loss")
    cells = [_signed(margin), f"{preferred.mean:.2f} ± {preferred.error:.2f}", f"{loss.mean:.4f} ± {loss.error:.4f}"]
    cells += [_signed(right), *(f"{each.mean:.3f} ± {each.error:.3f}" for each in (greedy, sampled)), _signed(kl)]
    return f"| {NAMES[arm[0]]}, {_kind(arm[1])} | {' | '.join(cells)} |"


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.3f} ± {found.error:.3f}"


def _tried(results: Results, method: str) -> str:
    found = results.rates[method]
    losses = "; ".join(f"{float(rate):g}: {loss:.4f}" for rate, loss in found["losses"].items())
    return f"| {NAMES[method]} | {losses} | {found['rate']:g} |"


def _at_the_end(results: Results) -> str:
    """Which methods might have done better at a rate that was not tried."""
    found = {method: (results.rates[method], sorted(map(float, results.rates[method]["losses"]))) for method in NAMES}
    names = [NAMES[method] for method, (its, rates) in found.items() if its["rate"] in (rates[0], rates[-1])]
    return f"; for {' and '.join(names)} it lies at the end of what was tried" if names else ""


def _is_private(kind: str | float) -> bool:
    return not isinstance(kind, str)


def _named(arm: tuple[str, Any]) -> str:
    return f"{NAMES[arm[0]]} {_kind(arm[1])}"


def _kind(kind: str | float) -> str:
    if isinstance(kind, str):
        return {"open": "not private", "clipped": "clipped, no noise"}[kind]
    return f"epsilon {kind:g}"


def _cost(results: Results) -> str:
    seconds = [run["seconds"] + run["measuring_seconds"] for runs in results.arms.values() for run in runs]
    machine = results.study["machine"]
    if not seconds:
        return ""
    return (
        f"An arm took {np.mean(seconds) / 60:.0f} minutes on {machine['cpu_cores']} shared CPU cores "
        f"({machine['device']}, jax {machine['jax']}, {results.study['date']})."
    )


def _margin(run: Mapping) -> np.ndarray:
    return np.asarray(run["chosen"]) - np.asarray(run["rejected"])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
