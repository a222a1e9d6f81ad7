"""Page and figure of `experiments.bfcl`, rendered from its JSON results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.bootstrap import Interval, interval

NAMES = {
    "reference": "reference (warm start)",
    "more_sft": "continued SFT",
    "best_of_k": "best-of-K SFT",
    "dpo": "DPO",
    "shiq": "ShiQ",
}
COLORS = dict(zip(NAMES, ("0.5", "tab:brown", "tab:orange", "tab:blue", "tab:green")))


class Results:
    """Results of all seeds of one scale."""

    def __init__(self, files: list[Path]):
        self.seeds = [json.loads(file.read_text()) for file in files]

    def values(self, arm: str, name: str) -> np.ndarray:
        """A metric (`sampled`, `greedy`, `kl` or `length`) averaged over samples, [seeds, questions]."""
        field = {"kl": "logratio"}.get(name, name)
        arrays = [np.asarray(seed["arms"][arm][field], float) for seed in self.seeds]
        return np.stack([array if array.ndim == 1 else array.mean(axis=1) for array in arrays])

    def mean(self, arm: str, name: str) -> Interval:
        """Mean of a metric of one policy."""
        return interval(self.values(arm, name))

    def difference(self, arm: str, baseline: str, name: str) -> Interval:
        """Mean paired difference of a metric between two policies."""
        return interval(self.values(arm, name) - self.values(baseline, name))


def load(out: Path, scale: str) -> Results:
    """Load the results of all seeds of a scale."""
    return Results(sorted((out / "bfcl").glob(f"{scale}-*.json")))


def write(out: Path, scale: str) -> None:
    """Write `bfcl.md` and `bfcl.png`, or `bfcl-SCALE.*` for the large scale."""
    results = load(out, scale)
    name = "bfcl" if scale in ("small", "quick") else f"bfcl-{scale}"
    draw(results, out / f"{name}.png")
    (out / f"{name}.md").write_text(render(results, scale, name))


def draw(results: Results, path: Path) -> None:
    """Plot accuracy with intervals and individual seeds, and accuracy against KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, plane) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1.25, 1])
    for position, arm in enumerate(NAMES):
        for offset, name, marker in ((-0.15, "sampled", "o"), (0.15, "greedy", "D")):
            estimate, seeds = results.mean(arm, name), results.values(arm, name).mean(axis=1)
            x = position + offset
            bars.plot([x, x], estimate[1:], color=COLORS[arm], linewidth=2)
            fill = COLORS[arm] if name == "sampled" else "white"
            bars.plot(x, estimate.mean, marker, color=COLORS[arm], markerfacecolor=fill, markersize=7, zorder=3)
            bars.plot(np.full(len(seeds), x + 0.07), seeds, "_", color="black", markersize=5, alpha=0.6)
        kl, accuracy = results.mean(arm, "kl"), results.mean(arm, "sampled")
        plane.plot(kl[1:], [accuracy.mean] * 2, color=COLORS[arm])
        plane.plot([kl.mean] * 2, accuracy[1:], color=COLORS[arm])
        plane.plot(kl.mean, accuracy.mean, "o", color=COLORS[arm], label=NAMES[arm])
    bars.set_xticks(range(len(NAMES)), [name.replace(" (", "\n(") for name in NAMES.values()])
    bars.tick_params(axis="x", labelsize=8)
    bars.set_title("accuracy: sampled at temperature 1 (filled), greedy (open)", fontsize=9)
    plane.set_title("sampled accuracy against KL", fontsize=9)
    plane.set_xlabel("KL to the reference, nats per answer", fontsize=8)
    plane.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    for panel in (bars, plane):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(results: Results, scale: str, name: str) -> str:
    """Render the Markdown page."""
    first = results.seeds[0]
    settings, machine = first["settings"], first["machine"]
    questions = len(first["arms"]["shiq"]["questions"])
    resampled = "questions and seeds" if len(results.seeds) > 1 else "questions"
    seeds = ", ".join(str(seed["seed"]) for seed in results.seeds)
    option = {"small": "", "quick": " --quick"}.get(scale, f" --scale {scale}")
    policies = "\n".join(_policy_row(results, arm) for arm in NAMES)
    against = "\n".join(_difference_row(results, arm, "shiq", arm) for arm in NAMES if arm != "shiq")
    gains = "\n".join(_difference_row(results, arm, arm, "reference") for arm in NAMES if arm != "reference")
    minutes = np.mean([_seconds(seed) for seed in results.seeds]) / 60
    return f"""# Function calling: five policies from one buffer

{_summary(results)}

| policy | accuracy, sampled | accuracy, greedy | KL, nats per answer | tokens per answer |
|---|---|---|---|---|
{policies}

![Accuracy of the five policies, and accuracy against KL]({name}.png)

Paired differences in percentage points of accuracy; bold intervals exclude 0:

| ShiQ minus | sampled | greedy |
|---|---|---|
{against}

| minus the reference | sampled | greedy |
|---|---|---|
{gains}

    pip install -e '.[fetch]' && python -m shiq_jax.tasks.fetch
    python -m experiments.bfcl{option}

- The model is SmolLM2-135M-Instruct in float32 on the Berkeley Function Calling Leaderboard
  ({", ".join(settings["categories"])}); the official AST checker gives reward 1 for a correct answer and 0 otherwise.
- The {questions} held-out questions are the same for all seeds ({seeds}) and share no question or function name with
  the training questions.
- Each seed has its own {settings["demonstrations"]} demonstrations for the supervised warm start, which produces the
  reference, and its own {settings["prompts"]} training questions.
- The reference answers each training question {settings["samples"]} times.
- Intervals are 95% bootstrap intervals that resample {resampled}.
- Sampled accuracy and KL use {settings["measured"]} answers per question at temperature 1; KL is the mean summed
  log-ratio to the reference.
- All policies are evaluated with the same random numbers.
- An interrupted run resumes, and seeds with results in [bfcl/](bfcl) are not rerun.
- A seed took {minutes:.0f} minutes on {machine["cpu_cores"]} CPU cores ({machine["device"]}, jax {machine["jax"]},
  {first["date"]}).
- `--scale large` uses all single-turn Python categories, 600 questions and 16 answers per question on an accelerator;
  it has not been measured yet.

{_method(results)}
"""


def _method(results: Results) -> str:
    """Training data and cost of each run."""
    costs = "\n".join(_run_row(results, arm) for arm in ("warm_start", *(arm for arm in NAMES if arm != "reference")))
    buffers = "; ".join(
        f"seed {seed['seed']}: {seed['buffer']['accuracy']:.1%} of {seed['buffer']['records']} answers are correct, "
        f"{seed['buffer']['with_a_right_answer']} questions have a correct answer and {seed['buffer']['with_both']} "
        "have both kinds"
        for seed in results.seeds
    )
    return f"""## Training

- **Continued SFT** trains further on the warm start's demonstrations without rewards.
- **Best-of-K SFT** trains on one correct answer per question that has one.
- **DPO** trains on a correct and an incorrect answer per question that has both.
- **ShiQ** trains on all answers, with the mean reward of the question as a baseline.
- All four start from the reference and process the same number of tokens, with shared prompts counted once.
- Buffers: {buffers}.

| run | updates | batch size | epochs | loss options | learning rate | tokens |
|---|---|---|---|---|---|---|
{costs}

The common learning rate and ShiQ's loss options come from a few trials on another category, none of which changed
accuracy significantly; the options were not tuned per method. `python -m experiments.bfcl_tuning` runs more trials."""


def _policy_row(results: Results, arm: str) -> str:
    numbers = [results.mean(arm, name) for name in ("sampled", "greedy")]
    kl, length = results.mean(arm, "kl"), results.mean(arm, "length").mean
    kl_text = "0" if arm == "reference" else f"{kl.mean:.2f} [{kl.low:.2f}, {kl.high:.2f}]"
    return f"| {NAMES[arm]} | {' | '.join(map(_percent, numbers))} | {kl_text} | {length:.1f} |"


def _percent(estimate: Interval) -> str:
    return f"{estimate.mean:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _points(estimate: Interval) -> str:
    text = f"{100 * estimate.mean:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
    return f"**{text}**" if _is_significant(estimate) else text


def _is_significant(estimate: Interval) -> bool:
    return estimate.low > 0 or estimate.high < 0


def _difference_row(results: Results, label: str, arm: str, baseline: str) -> str:
    cells = [_points(results.difference(arm, baseline, name)) for name in ("sampled", "greedy")]
    return f"| {NAMES[label]} | {' | '.join(cells)} |"


def _run_row(results: Results, arm: str) -> str:
    job = results.seeds[0]["jobs"][arm]
    tokens = np.mean([seed["jobs"][arm]["tokens"] for seed in results.seeds])
    options = ", ".join(f"{name} {value}" for name, value in job["loss"].items() if value is not None) or "none"
    return (
        f"| {NAMES.get(arm, 'warm start')} | {job['updates']} | {job['batch_size']} | {job['epochs']:.1f} | {options} "
        f"| {job['learning_rate']:g} | {tokens:,.0f} |"
    )


def _seconds(seed: dict) -> float:
    return sum(job["seconds"] for job in seed["jobs"].values()) + sum(arm["seconds"] for arm in seed["arms"].values())


def ranking(results: Results, name: str) -> tuple[str, list[str], list[str]]:
    """The best policy by a metric, the policies it beats significantly, and the others."""
    best, *rest = sorted(NAMES, key=lambda arm: -results.mean(arm, name).mean)
    significant = [arm for arm in rest if _is_significant(results.difference(best, arm, name))]
    return best, significant, [arm for arm in rest if arm not in significant]


def _summary(results: Results) -> str:
    """One sentence per decoding mode that names the best policy."""
    sentences = []
    for name, decoding in (("sampled", "With answers sampled at temperature 1"), ("greedy", "With greedy decoding")):
        best, significant, tied = ranking(results, name)
        sentence = f"**{decoding}, {NAMES[best]} has the highest accuracy ({results.mean(best, name).mean:.1%})**"
        if significant:
            sentence += f", significantly above {_list(significant)}"
        if tied:
            sentence += f"{', and' if significant else ', but'} not significantly different from {_list(tied)}"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _list(arms: list[str]) -> str:
    names = ["the reference" if arm == "reference" else NAMES[arm] for arm in arms]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
