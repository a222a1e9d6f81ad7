"""Claims of the synthetic page, checked on the committed results and on a small part that is recomputed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import synthetic

NUMBERS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "synthetic.json").read_text())


def final(kind, name, metric="value"):
    return np.array([run[metric][-1] for run in NUMBERS["rewards"][kind][name]])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_multi_step_residuals_converge_fastest(kind):
    for metric in ("value", "kl"):
        assert np.all(final(kind, "one-step", metric) > 5 * final(kind, "multi-step", metric))
        assert np.all(final(kind, "trajectory", metric) > final(kind, "multi-step", metric))


def test_only_the_semi_gradient_is_exact_with_random_replies():
    regrets = {name: np.array(runs) for name, runs in NUMBERS["replies"].items()}
    for name, regret in regrets.items():
        if "semi" in name:
            assert np.abs(regret).max() < 1e-4
        else:
            assert np.all(regret > 1e-4)
    # With two turns the one-step and multi-step full gradients have the same minimum.
    np.testing.assert_allclose(regrets["multi, full"], regrets["one, full"], rtol=0.05)
    assert regrets["trajectory, full"].mean() > regrets["multi, full"].mean()


def test_regret_falls_with_more_trajectories():
    for name in synthetic.VARIANTS:
        regret = np.array(NUMBERS["coverage"][name])
        assert np.all(regret > -1e-6)
        assert np.median(regret[:, -1]) < np.median(regret[:, 0])
    smallest = {name: np.median(NUMBERS["coverage"][name], axis=0)[0] for name in synthetic.VARIANTS}
    assert max(smallest, key=smallest.get) == "multi-step, no shift"


def test_multi_step_residuals_need_fewer_steps_at_every_length():
    needed = {name: np.median(NUMBERS["length"][name], axis=0) for name in ("multi-step", "one-step")}
    advantage = needed["one-step"] / needed["multi-step"]
    assert np.all(advantage > 1) and np.all(np.diff(advantage[:3]) > 0)


def test_shift_keeps_the_policy_at_the_reference_without_rewards():
    assert np.max(np.abs(NUMBERS["calibration"]["shift"])) < 1e-15
    assert np.min(np.max(NUMBERS["calibration"]["no shift"], axis=1)) > 1e-2


@pytest.mark.parametrize(
    ("name", "error", "kl", "expected_return"),
    [
        ("ShiQ", 0, 0.444545, 0.226102), ("no shift", 0, 0.444545, 0.226102), ("CoPG", 0, 0.444545, 0.226102),
        ("DPO, soft labels", 0, 0.444545, 0.226102), ("IPO, hard labels", 0.138, 0.099, 0.1530),
        ("SPPO, hard labels", 0.172, 0.144, 0.1600), ("mean reward as value", 0.157, None, None),
    ],
)  # fmt: skip
def test_converged_policies_on_the_bandit(name, error, kl, expected_return):
    result = NUMBERS["bandit"][name]
    assert result["error"] == pytest.approx(error, abs=1e-3)
    for key, value in (("kl", kl), ("worth", expected_return)):
        if value is not None:
            assert result[key] == pytest.approx(value, abs=1e-3)


def test_bandit_values_and_failures():
    results = NUMBERS["bandit"]
    assert results["ShiQ"]["value"] == pytest.approx(0.226102, abs=1e-5)
    assert results["no shift"]["value"] == pytest.approx(-1.122076, abs=1e-5)
    assert results["DPO, hard labels"]["kl"] > 2.5 and results["DPO, hard labels"]["worth"] < 0
    assert results["policy gradient, no weights"]["error"] > 0.05


def test_committed_results_are_reproducible():
    with jax.enable_x64(True):
        actual = synthetic.value_errors([0])["sparse"]["multi-step"][0]["value"]
        bandit = synthetic.bandit(steps=300)
    expected = NUMBERS["rewards"]["sparse"]["multi-step"][0]["value"]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
    # ShiQ approaches the optimum within a few steps.
    assert bandit["ShiQ"]["error"] < 0.3 and bandit.keys() == NUMBERS["bandit"].keys()
