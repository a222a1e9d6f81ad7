"""What the page on synthetic problems says, asserted of its committed numbers and of a small part computed anew."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import synthetic

NUMBERS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "synthetic.json").read_text())


def final(kind, name, of="value"):
    return np.array([run[of][-1] for run in NUMBERS["rewards"][kind][name]])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_several_steps_find_value_and_policy_first(kind):
    for of in ("value", "kl"):
        assert np.all(final(kind, "one-step", of) > 5 * final(kind, "multi-step", of))
        assert np.all(final(kind, "trajectory", of) > final(kind, "multi-step", of))


def test_with_random_replies_only_the_semi_gradient_is_exact():
    found = {name: np.array(runs) for name, runs in NUMBERS["replies"].items()}
    for name, runs in found.items():
        if "semi" in name:
            assert np.abs(runs).max() < 1e-4
        else:
            assert np.all(runs > 1e-4)
    # In two turns one step and several have the same full-gradient minimum.
    np.testing.assert_allclose(found["multi, full"], found["one, full"], rtol=0.05)
    assert found["trajectory, full"].mean() > found["multi, full"].mean()


def test_more_trajectories_leave_less_to_miss():
    for name in synthetic.VARIANTS:
        regret = np.array(NUMBERS["coverage"][name])
        assert np.all(regret > -1e-6)
        assert np.median(regret[:, -1]) < np.median(regret[:, 0])
    few = {name: np.median(NUMBERS["coverage"][name], axis=0)[0] for name in synthetic.VARIANTS}
    assert max(few, key=few.get) == "multi-step, no shift"


def test_several_steps_are_sooner_right_at_every_length():
    needed = {name: np.median(NUMBERS["length"][name], axis=0) for name in ("multi-step", "one-step")}
    advantage = needed["one-step"] / needed["multi-step"]
    assert np.all(advantage > 1) and np.all(np.diff(advantage[:3]) > 0)


def test_without_rewards_the_shift_keeps_the_model_where_it_is():
    assert np.max(np.abs(NUMBERS["calibration"]["shift"])) < 1e-15
    assert np.min(np.max(NUMBERS["calibration"]["no shift"], axis=1)) > 1e-2


@pytest.mark.parametrize(
    ("name", "error", "kl", "worth"),
    [
        ("ShiQ", 0, 0.444545, 0.226102), ("no shift", 0, 0.444545, 0.226102), ("CoPG", 0, 0.444545, 0.226102),
        ("DPO, soft labels", 0, 0.444545, 0.226102), ("IPO, hard labels", 0.138, 0.099, 0.1530),
        ("SPPO, hard labels", 0.172, 0.144, 0.1600), ("mean reward as value", 0.157, None, None),
    ],
)  # fmt: skip
def test_where_objectives_end_on_a_bandit(name, error, kl, worth):
    found = NUMBERS["bandit"][name]
    assert found["error"] == pytest.approx(error, abs=1e-3)
    for key, value in (("kl", kl), ("worth", worth)):
        if value is not None:
            assert found[key] == pytest.approx(value, abs=1e-3)


def test_values_and_failures_on_a_bandit():
    found = NUMBERS["bandit"]
    assert found["ShiQ"]["value"] == pytest.approx(0.226102, abs=1e-5)
    assert found["no shift"]["value"] == pytest.approx(-1.122076, abs=1e-5)
    assert found["DPO, hard labels"]["kl"] > 2.5 and found["DPO, hard labels"]["worth"] < 0
    assert found["policy gradient, no weights"]["error"] > 0.05


def test_the_numbers_can_be_made_again():
    with jax.enable_x64(True):
        anew = synthetic.rewards([0])["sparse"]["multi-step"][0]
        bandit = synthetic.bandit(steps=300)
    np.testing.assert_allclose(
        anew["value"], NUMBERS["rewards"]["sparse"]["multi-step"][0]["value"], rtol=1e-6, atol=1e-9
    )
    # On the way already, after few steps.
    assert bandit["ShiQ"]["error"] < 0.3 and bandit.keys() == NUMBERS["bandit"].keys()
