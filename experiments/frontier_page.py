"""The page and the figure of `experiments.frontier`, out of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# Distances at which methods are compared, in nats per answer.
DISTANCES = (0.25, 0.5, 1.0, 2.0, 3.0)
_COLORS = {
    "ShiQ": "tab:green", "DPO": "tab:orange", "DRO": "tab:blue", "CoPG": "tab:purple", "REINFORCE": "tab:red",
    "best-of-K": "0.4",
}  # fmt: skip

Points = Sequence[Mapping[str, float]]


def matched(seeds: Mapping[str, Mapping]) -> dict[str, dict[str, list[float | None]]]:
    """Reward by method and distance, a number per seed: of the policy that the *other* seeds choose.

    They choose, among strengths and lengths of training, what is best in their mean at no more than that distance; so
    nobody profits from the luck of an evaluation. None where no policy of a method stays within a distance.
    """
    methods = [name for name in next(iter(seeds.values())) if name != "reference"]
    found: dict[str, dict[str, list[float | None]]] = {}
    for method in methods:
        found[method] = {}
        for distance in DISTANCES:
            rewards = [_chosen_by_others(seeds, seed, method, distance) for seed in seeds]
            found[method][f"{distance:g}"] = rewards
    return found


def _chosen_by_others(seeds: Mapping[str, Mapping], seed: str, method: str, distance: float) -> float | None:
    others = [each for name, each in seeds.items() if name != seed] or [seeds[seed]]
    settings = [(point["beta"], point["updates"]) for point in seeds[seed][method]]
    means = {}
    for place, setting in enumerate(settings):
        kl, reward = (np.mean([each[method][place][name] for each in others]) for name in ("kl", "reward"))
        if kl <= distance:
            means[setting] = reward
    if not means:
        return None
    return seeds[seed][method][settings.index(max(means, key=means.get))]["reward"]


def envelope(points: Points, distances: Sequence[float], start: float) -> list[float]:
    """The most reward of policies within each distance; `start`, the reference's, is there at distance 0."""
    return [max([start, *(point["reward"] for point in points if point["kl"] <= distance)]) for distance in distances]


def mean_height(points: Points, start: float) -> float:
    """Mean of the envelope over the distances that are compared."""
    return float(np.mean(envelope(points, DISTANCES, start)))


def verdict(numbers: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, dict[str, str]]:
    """By distance and other method: whether ShiQ has "more" reward in every seed, "less" in every seed, or neither."""
    found: dict[str, dict[str, str]] = {}
    for distance, ours in numbers["ShiQ"].items():
        found[distance] = {}
        for method, theirs in numbers.items():
            pairs = list(zip(ours, theirs[distance]))
            if method == "ShiQ" or any(None in pair for pair in pairs):
                continue
            gains = [mine - their for mine, their in pairs]
            word = "more" if min(gains) > 0 else "less" if max(gains) < 0 else "unclear"
            found[distance][method] = word
    return found


def sentences(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The verdict in words, a sentence for each distance."""
    lines = []
    for distance, words in found.items():
        said = []
        for word, text in (("more", "more than {}"), ("less", "less than {}"), ("unclear", "not to be told from {}")):
            methods = [method for method, its in words.items() if its == word]
            if methods:
                said.append(text.format(_list(methods)))
        if said:
            lines.append(f"Within {distance} nats ShiQ has {'; '.join(said)}.")
    return lines


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write(numbers: Mapping, out: Path) -> None:
    """`frontier.md` and `frontier.png`."""
    draw(numbers, out / "frontier.png")
    (out / "frontier.md").write_text(render(numbers))


def draw(numbers: Mapping, path: Path) -> None:
    """All policies and every method's frontier, in the means over seeds; and what the table says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(numbers["seeds"].values())
    start = np.mean([each["reference"] for each in seeds])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    for method in numbers["matched"]:
        kl, reward = (
            np.mean([[point[name] for point in each[method]] for each in seeds], axis=0) for name in ("kl", "reward")
        )
        left.scatter(kl, reward, s=10, alpha=0.45, color=_COLORS[method], linewidths=0)
        points = [{"kl": x, "reward": y} for x, y in zip(kl, reward)]
        within = np.unique([0.0, *kl[kl <= DISTANCES[-1] * 1.6]])
        left.step(
            within, envelope(points, within, start), where="post", color=_COLORS[method], label=method, linewidth=1.6
        )
    left.plot(0, start, "k*", markersize=10, label="reference")
    left.set(
        xlim=(-0.05, DISTANCES[-1] * 1.6), xlabel="KL to the reference, nats per answer", ylabel="reward",
        title="policies (dots) and the best within a distance (lines)",
    )  # fmt: skip
    left.legend(frameon=False, fontsize=8, loc="lower right")
    methods = list(numbers["matched"])
    for place, method in enumerate(methods):
        offsets = np.arange(len(DISTANCES)) + (place - len(methods) / 2 + 0.5) * 0.13
        for offset, rewards in zip(offsets, numbers["matched"][method].values()):
            there = [reward for reward in rewards if reward is not None]
            if there:
                right.plot([offset] * len(there), there, ".", color=_COLORS[method], markersize=4, alpha=0.6)
                right.plot(offset, np.mean(there), "_", color=_COLORS[method], markersize=9, markeredgewidth=2)
    right.set_xticks(range(len(DISTANCES)), [f"{distance:g}" for distance in DISTANCES])
    right.set(xlabel="at most so many nats", title="chosen by the other seeds: seeds (dots), mean (dash)")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(numbers: Mapping) -> str:
    """The page."""
    scale, seeds = numbers["scale"], numbers["seeds"]
    head = "| method | rate | " + " | ".join(f"{distance:g}" for distance in DISTANCES) + " |"
    rows = []
    for method, by_distance in numbers["matched"].items():
        cells = [_cell(rewards) for rewards in by_distance.values()]
        rows.append(f"| {method} | {numbers['tuning'][method]['rate']:g} | " + " | ".join(cells) + " |")
    table = "\n".join([head, "|---" * (len(DISTANCES) + 2) + "|", *rows])
    start = np.mean([each["reference"] for each in seeds.values()])
    said = "\n".join(f"- {line}" for line in sentences(verdict(numbers["matched"])))
    betas = ", ".join(f"{beta:g}" for beta in scale["betas"])
    return f"""# Reward against distance

    python -m experiments.frontier

On the embedded task (a tiny decoder learns to sort digits; its teacher wrote half of the answers backwards) a
warm-started reference answers {scale["prompts"]} prompts {scale["samples"]} times. From these same answers, scored,
every method learns for {scale["updates"][-1]} updates of {scale["batch"]} prompts: ShiQ, DRO (which learns a value) and
REINFORCE (with the KL in its reward, and a prompt's other answers as baseline) on all answers, DPO and CoPG on the best
and the worst of each prompt, supervised training on the best. Regularised methods run at beta {betas}; policies are
evaluated after {", ".join(map(str, scale["updates"]))} updates on {scale["held_out"]} held-out prompts, four samples
each; {len(seeds)} seeds. The learning rate of each method is the best of
{", ".join(f"{rate:g}" for rate in scale["rates"])} on another seed{_at_the_end(numbers)}.

![Reward against KL](frontier.png)

*Left: every policy, and the most reward that each method has within a distance, in the mean over seeds. Right: reward
at equal distance, where beta and the number of updates are chosen by the other seeds.*

The reference has reward {start:.3f}. What each method has within so many nats, the mean over seeds (and the smallest
and the largest):

{table}

{said}

"More" and "less" hold in every seed; nothing else is claimed. It is a small task with one right answer per prompt, and
what wins here need not win elsewhere: on [function calling](bfcl.md) supervised training gained most. All numbers:
[frontier.json](frontier.json).
"""


def _at_the_end(numbers: Mapping) -> str:
    """Which methods might have done better at a rate that was not tried."""
    ends = (min(numbers["scale"]["rates"]), max(numbers["scale"]["rates"]))
    methods = [method for method, tuned in numbers["tuning"].items() if tuned["rate"] in ends]
    return f"; for {_list(methods)} it lies at the end of what was tried" if methods else ""


def _cell(rewards: Sequence[float | None]) -> str:
    there = [reward for reward in rewards if reward is not None]
    if len(there) < len(rewards):
        return "-"
    return f"{np.mean(there):.3f} ({min(there):.3f}, {max(there):.3f})"
