"""The page and the figure of `experiments.synthetic`, out of its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_COLORS = {
    "multi-step": "tab:green", "one-step": "tab:orange", "trajectory": "tab:blue", "multi-step, no shift": "tab:red",
    "shift": "tab:green", "no shift": "tab:red",
}  # fmt: skip


def write(numbers: dict, out: Path) -> None:
    """`synthetic.md` and `synthetic.png`."""
    draw(numbers, out / "synthetic.png")
    (out / "synthetic.md").write_text(render(numbers))


def draw(numbers: dict, path: Path) -> None:
    """Six panels; lines are medians over seeds, bands reach from the smallest to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    steps = numbers["rewards"]["steps"]

    def band(panel, x, runs, name):
        runs = np.array(runs)
        panel.plot(x, np.median(runs, axis=0), color=_COLORS[name], label=name, linewidth=1.6)
        panel.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=_COLORS[name], alpha=0.12, linewidth=0)

    for panel, kind in zip(panels[0], ("sparse", "dense")):
        for name, runs in numbers["rewards"][kind].items():
            band(panel, steps, [run["value"] for run in runs], name)
        panel.set(xscale="log", yscale="log", xlabel="gradient steps")
        panel.set_title(f"A. error of the first state's value, {kind} rewards", fontsize=9)
    panels[0, 1].set_title("B. the same, dense rewards", fontsize=9)
    panels[0, 0].legend(frameon=False, fontsize=8)

    bars = panels[0, 2]
    means = {name: np.mean(runs) for name, runs in numbers["replies"].items()}
    bars.barh(
        range(len(means)), list(means.values()), color=["tab:green" if "semi" in n else "tab:gray" for n in means]
    )
    for place, runs in enumerate(numbers["replies"].values()):
        bars.plot(runs, np.full(len(runs), place), "|", color="black", markersize=5)
    bars.set_yticks(range(len(means)), list(means), fontsize=8)
    bars.invert_yaxis()
    bars.set_title("C. loss of worth where replies are random", fontsize=9)

    for name, runs in numbers["coverage"].items():
        if name != "sizes":
            band(panels[1, 0], numbers["coverage"]["sizes"], runs, name)
    panels[1, 0].set(xscale="log", xlabel="trajectories of the reference that were seen")
    panels[1, 0].set(yscale="log", ylim=(1e-4, None))
    panels[1, 0].set_title("D. loss of worth with so much data", fontsize=9)

    for name, runs in numbers["length"].items():
        if name in _COLORS:
            band(panels[1, 1], numbers["length"]["lengths"], runs, name)
    panels[1, 1].set(yscale="log", xlabel="actions of the longest trajectory")
    panels[1, 1].set_title("E. steps until the value is right to a tenth", fontsize=9)

    for name in ("shift", "no shift"):
        band(panels[1, 2], numbers["calibration"]["steps"], np.maximum(numbers["calibration"][name], 1e-18), name)
    panels[1, 2].set(xscale="log", yscale="log", xlabel="gradient steps", ylim=(1e-18, None))
    panels[1, 2].set_title("F. KL from the reference, all rewards zero", fontsize=9)
    panels[1, 2].legend(frameon=False, fontsize=8)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(numbers: dict) -> str:
    """The page."""
    arms = "\n".join(
        f"| {name} | {each['error']:.3f} | {each['kl']:.3f} | {each['worth']:.3f} | {each['value']:.3f} |"
        for name, each in numbers["bandit"].items()
    )
    seeds = len(numbers["replies"]["multi, semi"])
    steps = numbers["rewards"]["steps"]
    ratios = [
        one["value"][-1] / multi["value"][-1]
        for kind in ("sparse", "dense")
        for one, multi in zip(numbers["rewards"][kind]["one-step"], numbers["rewards"][kind]["multi-step"])
    ]
    low, high = min(ratios), max(ratios)
    return f"""# Where the truth is known

    python -m experiments.synthetic

computes everything on this page in some minutes: problems small enough for their optimum to be known exactly (backward
recursion in float64), rewards and references drawn at random, {seeds} seeds. Lines are medians, bands reach from the
smallest to the largest seed. `tests/experiments/test_synthetic.py` asserts what is said here. All numbers:
[synthetic.json](synthetic.json).

![Six panels](synthetic.png)

- **A, B. Several steps carry a reward to the beginning; one step passes it on one action at a time.** Trees of 4 tokens
  and at most 3 actions, plain gradient descent on all trajectories. After {steps[-1]} steps the multi-step residual's
  error of the first state's value is {low:.0f} to {high:.0f} times smaller than the one-step residual's, with rewards
  at the end only and with rewards everywhere. Without the shift it is as fast: the shift is not about speed.
- **C. Where replies are random, differentiate what is known.** Two actions with a random reply between. With the
  semi-gradient (`--loss.gradient semi`) the optimum is found; the full gradient of a squared residual is biased, and
  what it finds is worth less.
- **D. What was never seen is not learnt.** Trained to the end on so many trajectories that the reference sampled, the
  distance to the optimum's worth falls with their number. With few of them the unshifted loss does the most harm.
- **E. Several steps are sooner right at every length.** Final rewards, longer and longer trees of 3 tokens, plain
  descent with the same rate for both, {numbers["length"]["most"]:,} steps at most. Their advantage grows with the
  length up to four actions only; beyond that both often need more steps than were made.
- **F. The shift is what keeps a model in place when there is nothing to learn.** All rewards zero, logits linear in a
  few features that states share, plain descent: with the shift nothing moves beyond rounding (which Adam, blind to
  scale, can blow up to steps of its usual size); without it the policy leaves the reference.

## One action

A bandit of five arms (rewards 1, 1/2, 0, -1/2, -1), beta 1/2, data of a behaviour policy (.4, .3, .15, .1, .05) that is
far from the optimum; 20,000 steps of Adam from the reference on the exact loss.

| objective | largest error of the policy | KL to the reference | worth: reward less beta KL | value of the state |
|---|---|---|---|---|
{arms}

ShiQ, its form without the shift, CoPG, and DPO on labels of the right probability find the optimum whatever the
behaviour; what only says which of two is better (hard labels) or ignores who sampled (mean reward as value, policy
gradient without weights) does not. DPO on hard labels never stops: its KL grows as long as it is trained.
"""
