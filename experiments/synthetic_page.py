"""Page and figure of `experiments.synthetic`, rendered from its JSON results."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COLORS = {
    "multi-step": "tab:green", "one-step": "tab:orange", "trajectory": "tab:blue", "multi-step, no shift": "tab:red",
    "shift": "tab:green", "no shift": "tab:red",
}  # fmt: skip


def write(numbers: dict, out: Path) -> None:
    """Write `synthetic.md` and `synthetic.png`."""
    draw(numbers, out / "synthetic.png")
    (out / "synthetic.md").write_text(render(numbers))


def draw(numbers: dict, path: Path) -> None:
    """Draw the six panels with medians and ranges over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    steps = numbers["rewards"]["steps"]

    def band(panel, x, runs, name):
        runs = np.array(runs)
        panel.plot(x, np.median(runs, axis=0), color=COLORS[name], label=name, linewidth=1.6)
        panel.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=COLORS[name], alpha=0.12, linewidth=0)

    for panel, kind in zip(panels[0], ("sparse", "dense")):
        for name, runs in numbers["rewards"][kind].items():
            band(panel, steps, [run["value"] for run in runs], name)
        panel.set(xscale="log", yscale="log", xlabel="gradient steps")
    panels[0, 0].set_title("A. error of the root value, sparse rewards", fontsize=9)
    panels[0, 1].set_title("B. error of the root value, dense rewards", fontsize=9)
    panels[0, 0].legend(frameon=False, fontsize=8)

    bars = panels[0, 2]
    means = {name: np.mean(runs) for name, runs in numbers["replies"].items()}
    bars.barh(
        range(len(means)), list(means.values()), color=["tab:green" if "semi" in n else "tab:gray" for n in means]
    )
    for position, runs in enumerate(numbers["replies"].values()):
        bars.plot(runs, np.full(len(runs), position), "|", color="black", markersize=5)
    bars.set_yticks(range(len(means)), list(means), fontsize=8)
    bars.invert_yaxis()
    bars.set_title("C. regret with random replies", fontsize=9)

    for name, runs in numbers["coverage"].items():
        if name != "sizes":
            band(panels[1, 0], numbers["coverage"]["sizes"], runs, name)
    panels[1, 0].set(xscale="log", xlabel="reference trajectories in the data")
    panels[1, 0].set(yscale="log", ylim=(1e-4, None))
    panels[1, 0].set_title("D. regret by amount of data", fontsize=9)

    for name, runs in numbers["length"].items():
        if name in COLORS:
            band(panels[1, 1], numbers["length"]["lengths"], runs, name)
    panels[1, 1].set(yscale="log", xlabel="maximum trajectory length")
    panels[1, 1].set_title("E. gradient steps until the root value is within 10%", fontsize=9)

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
    """Render the Markdown page."""
    objectives = "\n".join(
        f"| {name} | {row['error']:.3f} | {row['kl']:.3f} | {row['worth']:.3f} | {row['value']:.3f} |"
        for name, row in numbers["bandit"].items()
    )
    seeds = len(numbers["replies"]["multi, semi"])
    steps = numbers["rewards"]["steps"]
    ratios = [
        one["value"][-1] / multi["value"][-1]
        for kind in ("sparse", "dense")
        for one, multi in zip(numbers["rewards"][kind]["one-step"], numbers["rewards"][kind]["multi-step"])
    ]
    low, high = min(ratios), max(ratios)
    return f"""# Synthetic problems with known optima

The multi-step residual of ShiQ learns the root value {low:.0f} to {high:.0f} times more accurately than the one-step
residual in the same number of steps, and its log-sum-exp shift keeps the policy at the reference if all rewards are
zero. On off-policy bandit data ShiQ, CoPG and DPO with soft labels find the optimum; hard labels and unweighted policy
gradients do not.

## Bandit

| objective | largest error of the policy | KL to the reference | reward - beta KL | value of the state |
|---|---|---|---|---|
{objectives}

- The bandit has five arms (rewards 1, 1/2, 0, -1/2, -1) and beta 1/2; the behavior policy (.4, .3, .15, .1, .05) is far
  from optimal.
- Each objective is optimized by 20,000 steps of Adam from the reference on the exact expected loss.
- ShiQ, ShiQ without the shift, CoPG, and DPO with labels of the true preference probability find the optimum under any
  behavior policy.
- Hard labels discard the size of the reward difference; the mean reward as value and the policy gradient without
  importance weights ignore the behavior policy.
- DPO with hard labels does not converge: its KL grows for as long as it trains.

## Sequences

![Six panels](synthetic.png)

*Medians and ranges over {seeds} seeds.*

- **A, B. Multi-step residuals propagate rewards faster than one-step residuals.** Gradient descent on all trajectories
  of trees with 4 tokens and at most 3 actions. After {steps[-1]} steps the error of the root value is {low:.0f} to
  {high:.0f} times smaller with the multi-step residual, for sparse and dense rewards. The shift does not change the
  speed.
- **C. With random replies only the semi-gradient is exact.** Two actions with a random reply in between. The
  semi-gradient (`--loss.gradient semi`) finds the optimum; the full gradient of the squared residual is biased.
- **D. Regret falls with the number of trajectories.** Training to convergence on trajectories sampled from the
  reference. With few trajectories the loss without the shift has the highest regret.
- **E. Multi-step residuals need fewer steps at every length.** Sparse rewards, trees of 3 tokens, the same learning
  rate for both, at most {numbers["length"]["most"]:,} steps. The advantage grows up to four actions; for longer
  trajectories both often reach the step limit.
- **F. With zero rewards the shift keeps the policy at the reference.** Gradient descent with logits that are linear in
  features shared by the states. With the shift the policy moves only by rounding errors, which Adam may amplify because
  it normalizes gradients; without the shift it leaves the reference.

## Reproduction

    python -m experiments.synthetic

- The optima are computed by backward recursion in float64; rewards and references are random.
- The command takes a few minutes; [synthetic.json](synthetic.json) holds all numbers.
"""
