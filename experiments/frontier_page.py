"""Page and figure of `experiments.frontier`, rendered from its JSON results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# KL limits at which methods are compared, in nats per answer.
KL_LIMITS = (0.25, 0.5, 1.0, 2.0, 3.0)
COLORS = {
    "ShiQ": "tab:green", "DPO": "tab:orange", "DRO": "tab:blue", "CoPG": "tab:purple", "REINFORCE": "tab:red",
    "best-of-K": "0.4",
}  # fmt: skip

Points = Sequence[Mapping[str, float]]


def rewards_at_equal_kl(seeds: Mapping[str, Mapping]) -> dict[str, dict[str, list[float | None]]]:
    """Reward by method and KL limit, one number per seed.

    Beta and the number of updates are chosen on the other seeds, by the best mean reward whose mean KL is within the
    limit. This avoids selection on the evaluation noise of a seed. None if no policy of a method is within the limit.
    """
    methods = [name for name in next(iter(seeds.values())) if name != "reference"]
    return {
        method: {
            f"{limit:g}": [_cross_validated_reward(seeds, seed, method, limit) for seed in seeds] for limit in KL_LIMITS
        }
        for method in methods
    }


def _cross_validated_reward(seeds: Mapping[str, Mapping], seed: str, method: str, limit: float) -> float | None:
    other_seeds = [results for name, results in seeds.items() if name != seed] or [seeds[seed]]
    settings = [(point["beta"], point["updates"]) for point in seeds[seed][method]]
    means = {}
    for index, setting in enumerate(settings):
        kl, reward = (np.mean([results[method][index][name] for results in other_seeds]) for name in ("kl", "reward"))
        if kl <= limit:
            means[setting] = reward
    if not means:
        return None
    return seeds[seed][method][settings.index(max(means, key=means.get))]["reward"]


def envelope(points: Points, limits: Sequence[float], reference_reward: float) -> list[float]:
    """Highest reward of the policies within each KL limit, at least that of the reference, at KL 0."""
    return [max([reference_reward, *(point["reward"] for point in points if point["kl"] <= limit)]) for limit in limits]


def mean_envelope(points: Points, reference_reward: float) -> float:
    """Mean of the envelope over `KL_LIMITS`."""
    return float(np.mean(envelope(points, KL_LIMITS, reference_reward)))


def compare_shiq(rewards: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, dict[str, str]]:
    """By KL limit and method: whether ShiQ has "more" reward in every seed, "less" in every seed, or "unclear"."""
    outcomes: dict[str, dict[str, str]] = {}
    for limit, shiq in rewards["ShiQ"].items():
        outcomes[limit] = {}
        for method, by_limit in rewards.items():
            pairs = list(zip(shiq, by_limit[limit]))
            if method == "ShiQ" or any(None in pair for pair in pairs):
                continue
            gains = [reward - baseline for reward, baseline in pairs]
            outcomes[limit][method] = "more" if min(gains) > 0 else "less" if max(gains) < 0 else "unclear"
    return outcomes


def sentences(outcomes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One sentence per KL limit for the result of `compare_shiq`."""
    templates = {
        "more": "more reward than {}", "less": "less reward than {}", "unclear": "no consistent difference from {}",
    }  # fmt: skip
    lines = []
    for limit, by_method in outcomes.items():
        parts = []
        for outcome, template in templates.items():
            methods = [method for method, value in by_method.items() if value == outcome]
            if methods:
                parts.append(template.format(_list(methods)))
        if parts:
            lines.append(f"Within {limit} nats ShiQ has {'; '.join(parts)}.")
    return lines


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write(numbers: Mapping, out: Path) -> None:
    """Write `frontier.md` and `frontier.png`."""
    draw(numbers, out / "frontier.png")
    (out / "frontier.md").write_text(render(numbers))


def draw(numbers: Mapping, path: Path) -> None:
    """Plot all policies with the frontier of each method, and the rewards of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(numbers["seeds"].values())
    reference_reward = np.mean([seed["reference"] for seed in seeds])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    for method in numbers["matched"]:
        kl, reward = (
            np.mean([[point[name] for point in seed[method]] for seed in seeds], axis=0) for name in ("kl", "reward")
        )
        left.scatter(kl, reward, s=10, alpha=0.45, color=COLORS[method], linewidths=0)
        points = [{"kl": x, "reward": y} for x, y in zip(kl, reward)]
        limits = np.unique([0.0, *kl[kl <= KL_LIMITS[-1] * 1.6]])
        left.step(
            limits,
            envelope(points, limits, reference_reward),
            where="post",
            color=COLORS[method],
            label=method,
            linewidth=1.6,
        )
    left.plot(0, reference_reward, "k*", markersize=10, label="reference")
    left.set(
        xlim=(-0.05, KL_LIMITS[-1] * 1.6), xlabel="KL to the reference, nats per answer", ylabel="reward",
        title="policies (dots) and highest reward within a KL limit (lines)",
    )  # fmt: skip
    left.legend(frameon=False, fontsize=8, loc="lower right")
    methods = list(numbers["matched"])
    for index, method in enumerate(methods):
        positions = np.arange(len(KL_LIMITS)) + (index - len(methods) / 2 + 0.5) * 0.13
        for x, rewards in zip(positions, numbers["matched"][method].values()):
            measured = [reward for reward in rewards if reward is not None]
            if measured:
                right.plot([x] * len(measured), measured, ".", color=COLORS[method], markersize=4, alpha=0.6)
                right.plot(x, np.mean(measured), "_", color=COLORS[method], markersize=9, markeredgewidth=2)
    right.set_xticks(range(len(KL_LIMITS)), [f"{limit:g}" for limit in KL_LIMITS])
    right.set(xlabel="KL limit, nats per answer", title="reward within a KL limit: seeds (dots), mean (dash)")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(numbers: Mapping) -> str:
    """Render the Markdown page."""
    scale, seeds = numbers["scale"], numbers["seeds"]
    head = "| method | learning rate | " + " | ".join(f"{limit:g}" for limit in KL_LIMITS) + " |"
    rows = []
    for method, by_limit in numbers["matched"].items():
        cells = [_cell(rewards) for rewards in by_limit.values()]
        rows.append(f"| {method} | {numbers['tuning'][method]['rate']:g} | " + " | ".join(cells) + " |")
    table = "\n".join([head, "|---" * (len(KL_LIMITS) + 2) + "|", *rows])
    reference_reward = np.mean([seed["reference"] for seed in seeds.values()])
    comparisons = sentences(compare_shiq(numbers["matched"]))
    others = "".join(f"- {sentence}\n" for sentence in comparisons[1:-1])
    betas = ", ".join(f"{beta:g}" for beta in scale["betas"])
    return f"""# Reward at equal KL

{" ".join(comparisons[:: max(len(comparisons) - 1, 1)])}

Held-out reward within a KL limit in nats per answer, mean over seeds (minimum, maximum); the reference has
{reference_reward:.3f}:

{table}

![Reward against KL](frontier.png)

*Left: all policies, and the highest reward of each method within a KL limit, averaged over seeds. Right: the rewards of
the table.*

    python -m experiments.frontier

{others}- A comparison is stated only if it holds in all {len(seeds)} seeds.
- The task is the built-in toy task: a tiny decoder learns to sort digits after a warm start on demonstrations of which
  half are reversed.
- The reference answers {scale["prompts"]} prompts {scale["samples"]} times; all methods train on these scored answers
  for {scale["updates"][-1]} updates of {scale["batch"]} prompts.
- ShiQ, DRO (with a learned value) and REINFORCE (with the KL in the reward and a leave-one-out baseline) train on all
  answers, DPO and CoPG on the best and the worst of each prompt, supervised training (best-of-K) on the best.
- Regularized methods run at beta {betas}.
- Policies are evaluated after {", ".join(map(str, scale["updates"]))} updates on {scale["held_out"]} held-out prompts
  with four samples each.
- Beta and the number of updates in the table are chosen on the other seeds.
- The learning rate of each method is the best of {", ".join(f"{rate:g}" for rate in scale["rates"])} on another seed.
{_boundary_note(numbers)}- The task is small and has one correct answer per prompt; on [function calling](bfcl.md)
  supervised training gained most.
- [frontier.json](frontier.json) holds all numbers.
"""


def _boundary_note(numbers: Mapping) -> str:
    """A sentence that names the methods whose learning rate is at the boundary of the grid."""
    ends = (min(numbers["scale"]["rates"]), max(numbers["scale"]["rates"]))
    methods = [method for method, tuned in numbers["tuning"].items() if tuned["rate"] in ends]
    return f"- The chosen rate is at the boundary of the grid for {_list(methods)}.\n" if methods else ""


def _cell(rewards: Sequence[float | None]) -> str:
    measured = [reward for reward in rewards if reward is not None]
    if len(measured) < len(rewards):
        return "-"
    return f"{np.mean(measured):.3f} ({min(measured):.3f}, {max(measured):.3f})"
