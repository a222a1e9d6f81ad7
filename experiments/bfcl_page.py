"""The page and the figure of `experiments.bfcl`, out of the numbers that were kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.bootstrap import Interval, interval

NAMES = {
    "reference": "reference (warm start)",
    "more_sft": "more supervised training",
    "best_of_k": "best-of-K supervised",
    "dpo": "DPO",
    "shiq": "ShiQ",
}
_COLORS = dict(zip(NAMES, ("0.5", "tab:brown", "tab:orange", "tab:blue", "tab:green")))


class Results:
    """The kept numbers of all seeds of one scale, as arrays [seeds, questions]."""

    def __init__(self, files: list[Path]):
        self.seeds = [json.loads(file.read_text()) for file in files]

    def values(self, arm: str, name: str) -> np.ndarray:
        """`sampled` and `greedy` accuracy, `kl`, or `length`: per seed and question, the mean over samples."""
        field = {"kl": "logratio"}.get(name, name)
        found = [np.asarray(seed["arms"][arm][field], float) for seed in self.seeds]
        return np.stack([each if each.ndim == 1 else each.mean(axis=1) for each in found])

    def mean(self, arm: str, name: str) -> Interval:
        """The mean of one policy."""
        return interval(self.values(arm, name))

    def difference(self, arm: str, other: str, name: str) -> Interval:
        """The mean difference of two policies on the same questions and seeds."""
        return interval(self.values(arm, name) - self.values(other, name))


def kept(out: Path, scale: str) -> Results:
    """What the seeds of a scale left below the page's directory."""
    return Results(sorted((out / "bfcl").glob(f"{scale}-*.json")))


def write(out: Path, scale: str) -> None:
    """`bfcl.md` and `bfcl.png` (with the scale in their names unless it is the small one)."""
    results = kept(out, scale)
    name = "bfcl" if scale in ("small", "quick") else f"bfcl-{scale}"
    draw(results, out / f"{name}.png")
    (out / f"{name}.md").write_text(render(results, scale, name))


def draw(results: Results, path: Path) -> None:
    """Accuracy of every policy with its interval and its seeds, and accuracy against the distance gone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, plane) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1.25, 1])
    for place, arm in enumerate(NAMES):
        for offset, name, marker in ((-0.15, "sampled", "o"), (0.15, "greedy", "D")):
            found, seeds = results.mean(arm, name), results.values(arm, name).mean(axis=1)
            where = place + offset
            bars.plot([where, where], found[1:], color=_COLORS[arm], linewidth=2)
            fill = _COLORS[arm] if name == "sampled" else "white"
            bars.plot(where, found.mean, marker, color=_COLORS[arm], markerfacecolor=fill, markersize=7, zorder=3)
            bars.plot(np.full(len(seeds), where + 0.07), seeds, "_", color="black", markersize=5, alpha=0.6)
        kl, accuracy = results.mean(arm, "kl"), results.mean(arm, "sampled")
        plane.plot(kl[1:], [accuracy.mean] * 2, color=_COLORS[arm])
        plane.plot([kl.mean] * 2, accuracy[1:], color=_COLORS[arm])
        plane.plot(kl.mean, accuracy.mean, "o", color=_COLORS[arm], label=NAMES[arm])
    bars.set_xticks(
        range(len(NAMES)), [name.replace(" (", "\n(").replace(" super", "\nsuper") for name in NAMES.values()]
    )
    bars.tick_params(axis="x", labelsize=8)
    bars.set_title("right answers: sampled at temperature 1 (filled), greedy (open)", fontsize=9)
    plane.set_title("right answers sampled, against distance", fontsize=9)
    plane.set_xlabel("KL to the reference, nats per answer", fontsize=8)
    plane.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    for panel in (bars, plane):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(results: Results, scale: str, name: str) -> str:
    """The page."""
    first = results.seeds[0]
    settings, machine = first["settings"], first["machine"]
    questions, drawn = len(first["arms"]["shiq"]["questions"]), "questions"
    if len(results.seeds) > 1:
        drawn += " and seeds"
    seeds = ", ".join(str(seed["seed"]) for seed in results.seeds)
    option = {"small": "", "quick": " --quick"}.get(scale, f" --scale {scale}")
    policies = "\n".join(_policy(results, arm) for arm in NAMES)
    against = "\n".join(_against(results, arm) for arm in NAMES if arm != "shiq")
    gains = "\n".join(_gain(results, arm) for arm in NAMES if arm != "reference")
    minutes = np.mean([_seconds(seed) for seed in results.seeds]) / 60
    return f"""# Function calling: five policies from one buffer

{_verdict(results)}

SmolLM2-135M-Instruct in float32 on the Berkeley Function Calling Leaderboard ({", ".join(settings["categories"])}),
whose official AST checker gives the reward: 1 for a right answer, 0 for a wrong one. The {questions} held-out questions
share neither a question nor a function name with any other. They are the same for all seeds ({seeds}); a seed's own are
the {settings["demonstrations"]} questions that are demonstrated in the supervised warm start, which makes the
reference, the {settings["prompts"]} other questions that the reference answers {settings["samples"]} times each, what
it answers, and the order of all updates.

| policy | right, sampled | right, greedy | KL, nats per answer | tokens per answer |
|---|---|---|---|---|
{policies}

Means over seeds and questions, with 95% intervals of a bootstrap that draws {drawn} again.
Sampled: {settings["measured"]} answers per question at temperature 1. KL: the mean over those answers of the summed
log-ratio to the reference.

Paired differences (same questions, same seeds, same random numbers), in points of accuracy; those that exclude 0 are
bold:

| ShiQ minus | sampled | greedy |
|---|---|---|
{against}

| minus the reference | sampled | greedy |
|---|---|---|
{gains}

![Accuracy of the five policies, and accuracy against KL]({name}.png)

{_method(results)}

    pip install -e '.[fetch]' && python -m shiq_jax.tasks.fetch
    python -m experiments.bfcl{option}

writes this page; it goes on where it was stopped, and seeds whose numbers are in [bfcl/](bfcl) are not run again. A
seed took {minutes:.0f} minutes on {machine["cpu_cores"]} CPU cores ({machine["device"]}, jax {machine["jax"]},
{first["date"]}).
`--scale large` takes all single-turn Python categories, 600 questions and 16 answers to each, for an accelerator: not
measured yet.
"""


def _method(results: Results) -> str:
    """What the policies learn from, and what each run cost."""
    costs = "\n".join(_cost(results, arm) for arm in ("warm_start", *(arm for arm in NAMES if arm != "reference")))
    buffers = "; ".join(
        f"seed {seed['seed']}: {seed['buffer']['accuracy']:.1%} of {seed['buffer']['records']} answers are right, "
        f"{seed['buffer']['with_a_right_answer']} questions have a right one and {seed['buffer']['with_both']} both"
        for seed in results.seeds
    )
    return f"""## What was done

- **more supervised training** goes on with the warm start's demonstrations; it sees no reward.
- **best-of-K supervised** imitates one right answer to each question that has one.
- **DPO** learns from a right and a wrong answer to each question that has both.
- **ShiQ** learns from all answers, rewards relative to the mean of a question's answers.

The last four begin at the reference and read the same number of tokens in their updates (a shared prompt counted
once). {buffers}.

| run | updates | batch | passes | loss options | learning rate | tokens |
|---|---|---|---|---|---|---|
{costs}

The learning rate, one for all, and ShiQ's loss options come from a handful of trials on questions of another category,
none of which moved accuracy by more than luck would: nobody's options were searched for.
`python -m experiments.bfcl_tuning` tries more of them."""


def _policy(results: Results, arm: str) -> str:
    numbers = [results.mean(arm, name) for name in ("sampled", "greedy")]
    kl, length = results.mean(arm, "kl"), results.mean(arm, "length").mean
    distance = "0" if arm == "reference" else f"{kl.mean:.2f} [{kl.low:.2f}, {kl.high:.2f}]"
    return f"| {NAMES[arm]} | {' | '.join(map(_percent, numbers))} | {distance} | {length:.1f} |"


def _percent(found: Interval) -> str:
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _points(found: Interval) -> str:
    text = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{text}**" if _decided(found) else text


def _decided(found: Interval) -> bool:
    return found.low > 0 or found.high < 0


def _against(results: Results, arm: str) -> str:
    found = [_points(results.difference("shiq", arm, name)) for name in ("sampled", "greedy")]
    return f"| {NAMES[arm]} | {' | '.join(found)} |"


def _gain(results: Results, arm: str) -> str:
    found = [_points(results.difference(arm, "reference", name)) for name in ("sampled", "greedy")]
    return f"| {NAMES[arm]} | {' | '.join(found)} |"


def _cost(results: Results, arm: str) -> str:
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
    """The best policy by a statistic, those that it beats beyond chance, and those that it does not."""
    best, *rest = sorted(NAMES, key=lambda arm: -results.mean(arm, name).mean)
    beaten = [arm for arm in rest if _decided(results.difference(best, arm, name))]
    return best, beaten, [arm for arm in rest if arm not in beaten]


def _verdict(results: Results) -> str:
    """Who wins, in words that follow from the numbers."""
    sentences = []
    for name, what in (("sampled", "Of answers sampled at temperature 1"), ("greedy", "With greedy decoding")):
        best, beaten, level = ranking(results, name)
        sentence = f"**{what}, {NAMES[best]} has the most right ({results.mean(best, name).mean:.1%})**"
        if beaten:
            sentence += f", beyond chance above {_list(beaten)}"
        if level:
            sentence += f"{', and' if beaten else ', but'} not distinguishable from {_list(level)}"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _list(arms: list[str]) -> str:
    names = [NAMES[arm] for arm in arms]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
