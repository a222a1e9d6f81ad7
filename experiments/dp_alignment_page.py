"""Page and figure of `experiments.dp_alignment`, rendered from its JSON results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = {"dpo": "DPO", "shiq": "ShiQ"}
COLORS = {"dpo": "tab:blue", "shiq": "tab:green"}
# Beta of the DPO loss reported for every policy.
BETA = 0.1


class Estimate(NamedTuple):
    """A mean over questions and its standard error."""

    mean: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the mean differs from 0 by more than two standard errors."""
        return abs(self.mean) > 2 * self.error


class Results:
    """Results of the study, the reference, and the finished arms; other arms raise KeyError."""

    def __init__(self, out: Path):
        directory = out / "dp_alignment"
        self.study, self.reference, self.rates = (
            _read_json(directory / f"{name}.json") for name in ("study", "reference", "rates")
        )
        self.settings = self.study["settings"]
        self.arms: dict[tuple[str, Any], list[dict]] = {}
        for file in sorted(directory.glob("*-*.json")):
            run = _read_json(file)
            if run["settings"] == self.settings:
                self.arms.setdefault((run["method"], run["privacy"]), []).append(run)

    @property
    def all_arms(self) -> list[tuple[str, Any]]:
        """All arms, finished or not, in the order of the page."""
        levels = ["open", "clipped", *sorted(self.settings["epsilons"], reverse=True)]
        return [(method, level) for method in NAMES for level in levels]

    def values(self, arm: tuple[str, Any] | None, name: str) -> np.ndarray:
        """A metric per question, averaged over samples and repetitions; `arm` None is the reference."""
        runs = [self.reference] if arm is None else self.arms[arm]
        return np.mean([self._metric(run, name) for run in runs], axis=0)

    def _metric(self, run: Mapping, name: str) -> np.ndarray:
        margin = _margin(run) - _margin(self.reference)
        metrics = {
            "margin": lambda: margin,
            "preferred": lambda: (np.sign(margin) + 1) / 2,
            "loss": lambda: np.logaddexp(0, -BETA * margin),
            "right": lambda: np.asarray(run["chosen"]) - np.asarray(self.reference["chosen"]),
            "greedy": lambda: np.asarray(run["greedy"]),
            "sampled": lambda: np.mean(run["sampled"], axis=1),
            "kl": lambda: np.mean(run["logratio"], axis=1),
        }
        return metrics[name]()

    def mean(self, arm: tuple[str, Any] | None, name: str) -> Estimate:
        """Mean of a metric of one policy."""
        return estimate(self.values(arm, name))

    def gain(self, arm: tuple[str, Any], name: str) -> Estimate:
        """Mean paired difference of a metric from the reference."""
        return estimate(self.values(arm, name) - self.values(None, name))


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and standard error."""
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))


def noise_scale(run: Mapping) -> tuple[float, float]:
    """Noise in the mean gradient of one step: standard deviation per coordinate, and expected norm."""
    accounts = run["accounts"]
    stddev = accounts["noise_multiplier"] / accounts["expected_batch"]
    return stddev, stddev * math.sqrt(run["parameters"])


def write(out: Path) -> None:
    """Write `dp_alignment.md` and `dp_alignment.png`."""
    results = Results(out)
    draw(results, out / "dp_alignment.png")
    (out / "dp_alignment.md").write_text(render(results))


def draw(results: Results, path: Path) -> None:
    """Plot margin, preference accuracy and reward against epsilon."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels = [*sorted(results.settings["epsilons"]), "clipped", "open"]
    names = {"clipped": "clipped,\nno noise", "open": "not\nprivate"}
    labels = [names.get(level) or f"{level:g}" for level in levels]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    metrics = (
        ("margin", "margin on held-out pairs, nats"),
        ("preferred", "held-out preference accuracy"),
        ("sampled", "mean reward of sampled answers"),
    )
    for panel, (name, title) in zip(panels, metrics, strict=True):
        panel.axhline(results.mean(None, name).mean, color="0.4", linestyle="--", linewidth=1, label="reference")
        for offset, method in zip((-0.06, 0.06), NAMES, strict=True):
            arms = [(x, (method, level)) for x, level in enumerate(levels)]
            points = [(x, results.mean(arm, name)) for x, arm in arms if arm in results.arms]
            if points:
                panel.errorbar(
                    [x + offset for x, _ in points], [estimate.mean for _, estimate in points],
                    [2 * estimate.error for _, estimate in points], color=COLORS[method], marker="o",
                    label=NAMES[method], markersize=5, linewidth=1.2, capsize=2,
                )  # fmt: skip
        panel.set_xticks(range(len(levels)), labels, fontsize=8)
        panel.set_xlim(-0.4, len(levels) - 0.6)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("epsilon", fontsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(results: Results) -> str:
    """Render the Markdown page."""
    settings, sizes = results.settings, results.settings["sizes"]
    missing = [_arm_name(arm) for arm in results.all_arms if arm not in results.arms]
    unfinished = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    rows = "\n".join(_row(results, arm) for arm in results.all_arms if arm in results.arms)
    summary = "\n".join(f"- {line}" for line in margin_sentences(results))
    observations = "\n".join(f"- {line}" for line in (*reward_sentences(results), *noise_sentences(results)))
    greedy, sampled = (results.mean(None, name) for name in ("greedy", "sampled"))
    reference = f"{greedy.mean:.3f} ± {greedy.error:.3f} | {sampled.mean:.3f} ± {sampled.error:.3f}"
    return f"""# Private preference tuning: utility against epsilon

Gain in the log-odds margin of held-out pairs, and its ratio to the gain without privacy:

{summary}
{unfinished}
| policy | margin, nats | preferred | DPO loss | correct answer, nats | greedy reward | sampled reward | KL, nats |
|---|---|---|---|---|---|---|---|
| reference | 0 | 0.5 | {math.log(2):.4f} | 0 | {reference} | 0 |
{rows}

![Utility against epsilon](dp_alignment.png)

*Means over {len(results.reference["greedy"])} held-out questions with two standard errors; the dashed line is the
reference.*

    python -m experiments.dp_alignment

- DPO and ShiQ tune LoRA adapters of SmolLM2-135M-Instruct on {sizes["units"]} private questions of the Berkeley
  Function Calling Leaderboard (simple_python), each with a correct and an incorrect answer.
- The unit of privacy is a question with both answers; delta is {settings["delta"]:g}, below 1 / {sizes["units"]}.
- ± is one standard error over questions in one run; it does not include the variation between draws of the noise.
- *Margin* is the increase over the reference in the log-odds of the correct over the incorrect answer, on
  {len(results.reference["chosen"])} held-out pairs.
- *Preferred* is the fraction of held-out pairs with a positive margin; ties count one half.
- *DPO loss* uses beta {BETA:g} on the held-out pairs, and *correct answer* is the gain in its log-probability.
- Rewards are those of the greedy answer and of two answers sampled at temperature 1; KL is the mean log-ratio of the
  sampled answers.
{observations}

{_plan(results)}

{_method(results)}
- Results in [dp_alignment/](dp_alignment) are not recomputed.
{_arm_minutes(results)}"""


def _plan(results: Results) -> str:
    """Noise by sampling probability, and the plan of all arms."""
    settings, sizes = results.settings, results.settings["sizes"]
    plans = "\n".join(
        f"| {plan['epsilon']:g} | {plan['share']:g} | {plan['steps']} | {plan['noise_multiplier']:.2f} "
        f"| {plan['noise']:.4f} | {plan['computed']} |"
        for plan in results.study["plans"]
    )
    return f"""## Batch size and noise

All arms use full batches, which have the least noise for a fixed number of per-unit gradients and need no padding:

| epsilon | sampling probability | steps | noise multiplier | noise per coordinate | units computed, with padding |
|---|---|---|---|---|---|
{plans}

- Each plan computes {settings["steps"]} gradients for each of the {sizes["units"]} units in expectation.
- *Noise per coordinate* is the standard deviation in the average gradient over all steps, with clip norm 1.
- With full batches the noise does not depend on the number of steps.
- The norm of the noise grows with the square root of the number of parameters, so the adapters are small: rank
  {settings["rank"]} on {" and ".join(settings["targets"])}."""


def _method(results: Results) -> str:
    """Reference, data, updates and learning rates."""
    settings, sizes = results.settings, results.settings["sizes"]
    rates = "\n".join(_rate_row(results, method) for method in NAMES)
    accepted = 1 - results.reference["right_answers_sampled"]
    return f"""## Method

| method | validation loss by learning rate | chosen |
|---|---|---|
{rates}

- The reference is the model after two epochs on {sizes["demonstrations"]} public demonstrations; it answers every other
  question {sizes["samples"]} times.
- A pair consists of the first correct and the first incorrect answer; questions without an incorrect answer are
  dropped.
- An accepted answer replaces a missing correct one, for {accepted:.0%} of the private questions.
- DPO (beta 0.1) trains on the pairs; ShiQ (beta 0.5, k-th action weighted by 1/k) trains on the same two answers with
  rewards relative to their mean, so both methods have the same unit of privacy.
- Each arm runs {settings["steps"]} full-batch AdamW updates at a constant learning rate with AUTO-S clipping.
- *Clipped, no noise* is not private; it separates the cost of clipping from the cost of noise.
- The learning rate of a method minimizes its loss on {sizes["tuning"] - sizes["tuning_learned"]} public questions after
  non-private training on {sizes["tuning_learned"]} other public questions.
- The rates are chosen without noise; other rates might be better in the noisiest arms.{_boundary_note(results)}"""


def margin_sentences(results: Results) -> list[str]:
    """Margin of each arm relative to the margin without privacy, one sentence per method."""
    lines = []
    for method, name in NAMES.items():
        if (method, "open") not in results.arms:
            continue
        without_privacy = results.mean((method, "open"), "margin")
        line = f"**{name}**: {_signed(without_privacy)} nats without privacy"
        if not without_privacy.significant:
            lines.append(f"{line}, which is within two standard errors of zero.")
            continue
        parts = []
        for level in ("clipped", *sorted(results.settings["epsilons"], reverse=True)):
            if (method, level) in results.arms:
                estimate = results.mean((method, level), "margin")
                ratio = f"{estimate.mean / without_privacy.mean:.0%}" if estimate.significant else "not significant"
                parts.append(f"{_level_name(level)} {_signed(estimate)} ({ratio})")
        lines.append(f"{line}; {'; '.join(parts)}." if parts else f"{line}.")
    return lines


def reward_sentences(results: Results) -> list[str]:
    """Policies whose reward differs from the reference's by more than two standard errors."""
    lines = []
    for name in ("greedy", "sampled"):
        gains = {arm: results.gain(arm, name) for arm in results.all_arms if arm in results.arms}
        for comparison, sign in (("higher", 1), ("lower", -1)):
            arms = [arm for arm, gain in gains.items() if gain.significant and gain.mean * sign > 0]
            if arms:
                names = "; ".join(map(_arm_name, arms))
                lines.append(f"The {name} reward is significantly {comparison} than the reference's for {names}.")
        if gains and not any(gain.significant for gain in gains.values()):
            lines.append(f"No policy's {name} reward differs significantly from the reference's.")
    return lines


def noise_sentences(results: Results) -> list[str]:
    """Noise of the first step relative to the mean clipped gradient."""
    lines = []
    for method, name in NAMES.items():
        private = {
            level: runs[0] for (arm, level), runs in results.arms.items() if arm == method and _is_private(level)
        }
        if (method, "clipped") not in results.arms or not private:
            continue
        signal = results.arms[method, "clipped"][0]["updates"]["grad_norm"][0]
        parts = []
        for level, run in sorted(private.items(), reverse=True):
            stddev, norm = noise_scale(run)
            parts.append(
                f"{norm:.2f} at epsilon {level:g} ({norm / signal:.1f} times the gradient; standard deviation along "
                f"the gradient {stddev:.4f}, {stddev / signal:.0%} of it)"
            )
        lines.append(
            f"{name}: in the first step the mean clipped gradient has norm {signal:.3f}; the noise in "
            f"{next(iter(private.values()))['parameters']:,} coordinates has norm {'; '.join(parts)}."
        )
    return lines


def _row(results: Results, arm: tuple[str, Any]) -> str:
    margin, right, greedy, sampled, kl = (
        results.mean(arm, name) for name in ("margin", "right", "greedy", "sampled", "kl")
    )
    preferred, loss = results.mean(arm, "preferred"), results.mean(arm, "loss")
    cells = [_signed(margin), f"{preferred.mean:.2f} ± {preferred.error:.2f}", f"{loss.mean:.4f} ± {loss.error:.4f}"]
    cells += [
        _signed(right),
        *(f"{estimate.mean:.3f} ± {estimate.error:.3f}" for estimate in (greedy, sampled)),
        _signed(kl),
    ]
    return f"| {NAMES[arm[0]]}, {_level_name(arm[1])} | {' | '.join(cells)} |"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} ± {estimate.error:.3f}"


def _rate_row(results: Results, method: str) -> str:
    tuned = results.rates[method]
    losses = "; ".join(f"{float(rate):g}: {loss:.4f}" for rate, loss in tuned["losses"].items())
    return f"| {NAMES[method]} | {losses} | {tuned['rate']:g} |"


def _boundary_note(results: Results) -> str:
    """A sentence that names the methods whose learning rate is at the boundary of the grid."""
    names = []
    for method, name in NAMES.items():
        grid = sorted(map(float, results.rates[method]["losses"]))
        if results.rates[method]["rate"] in (grid[0], grid[-1]):
            names.append(name)
    return f"\n- The chosen rate is at the boundary of the grid for {' and '.join(names)}." if names else ""


def _is_private(level: str | float) -> bool:
    return not isinstance(level, str)


def _arm_name(arm: tuple[str, Any]) -> str:
    return f"{NAMES[arm[0]]} {_level_name(arm[1])}"


def _level_name(level: str | float) -> str:
    if isinstance(level, str):
        return {"open": "not private", "clipped": "clipped, no noise"}[level]
    return f"epsilon {level:g}"


def _arm_minutes(results: Results) -> str:
    seconds = [run["seconds"] + run["measuring_seconds"] for runs in results.arms.values() for run in runs]
    machine = results.study["machine"]
    if not seconds:
        return ""
    return (
        f"- An arm took {np.mean(seconds) / 60:.0f} minutes on {machine['cpu_cores']} shared CPU cores "
        f"({machine['device']}, jax {machine['jax']}, {results.study['date']}).\n"
    )


def _margin(run: Mapping) -> np.ndarray:
    return np.asarray(run["chosen"]) - np.asarray(run["rejected"])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
