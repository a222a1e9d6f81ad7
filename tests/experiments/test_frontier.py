"""Comparison of policies at equal KL, and the committed results."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import frontier_page
from experiments.frontier_page import KL_LIMITS, compare_shiq, envelope, mean_envelope, rewards_at_equal_kl

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def points(*pairs, beta=0.1):
    return [{"beta": beta, "updates": 8 * (n + 1), "kl": kl, "reward": reward} for n, (kl, reward) in enumerate(pairs)]


def test_envelope_is_monotone_and_starts_at_the_reference():
    policies = points((0.2, 0.5), (0.9, 0.4), (2.0, 0.8))
    assert envelope(policies, [0.0, 0.2, 1.0, 2.0, 9.0], 0.45) == [0.45, 0.5, 0.5, 0.8, 0.8]
    assert envelope([], [1.0], 0.3) == [0.3]
    assert mean_envelope(policies, 0.45) == pytest.approx(np.mean([0.5, 0.5, 0.5, 0.8, 0.8]))
    assert KL_LIMITS == (0.25, 0.5, 1.0, 2.0, 3.0)


def test_settings_are_chosen_on_the_other_seeds():
    seeds = {
        "0": {"reference": 0.4, "ShiQ": points((0.2, 0.9), (0.4, 0.6), (0.6, 0.7))},
        "1": {"reference": 0.4, "ShiQ": points((0.2, 0.5), (0.4, 0.78), (0.6, 0.75))},
        "2": {"reference": 0.4, "ShiQ": points((0.2, 0.5), (0.4, 0.6), (0.8, 0.9))},
    }
    rewards = rewards_at_equal_kl(seeds)["ShiQ"]
    assert rewards["0.25"] == [0.9, 0.5, 0.5]
    # Within 0.5 seeds 1 and 2 choose the second point for seed 0; the high first reward of seed 0 decides the others.
    assert rewards["0.5"] == [0.6, 0.5, 0.5]
    assert rewards["1"] == [0.7, 0.75, 0.9]


def test_limits_without_policies_have_no_reward():
    seeds = {name: {"reference": 0.4, "ShiQ": points((0.4, 0.5))} for name in "01"}
    assert rewards_at_equal_kl(seeds)["ShiQ"]["0.25"] == [None, None]
    assert rewards_at_equal_kl(seeds)["ShiQ"]["0.5"] == [0.5, 0.5]


def test_compare_shiq_requires_agreement_of_all_seeds():
    rewards = {
        "ShiQ": {"1": [0.5, 0.6, 0.7]}, "DPO": {"1": [0.4, 0.5, 0.6]}, "DRO": {"1": [0.6, 0.7, 0.8]},
        "CoPG": {"1": [0.4, 0.7, 0.6]}, "REINFORCE": {"1": [None, 0.5, 0.5]},
    }  # fmt: skip
    assert compare_shiq(rewards) == {"1": {"DPO": "more", "DRO": "less", "CoPG": "unclear"}}


def test_committed_results_are_complete():
    numbers = json.loads((RESULTS / "frontier.json").read_text())
    assert len(numbers["seeds"]) >= 3
    assert frontier_page.rewards_at_equal_kl(numbers["seeds"]) == numbers["matched"]
    for seed in numbers["seeds"].values():
        for method, policies in seed.items():
            if method != "reference":
                settings = {(point["beta"], point["updates"]) for point in policies}
                betas = 1 if method == "best-of-K" else len(numbers["scale"]["betas"])
                assert len(settings) == len(policies) == betas * len(numbers["scale"]["updates"])
    for method, tuned in numbers["tuning"].items():
        best = max(tuned["heights"], key=tuned["heights"].get)
        assert float(best) == tuned["rate"], method


def test_every_method_improves_on_the_reference():
    numbers = json.loads((RESULTS / "frontier.json").read_text())
    for method in numbers["matched"]:
        for seed in numbers["seeds"].values():
            assert max(point["reward"] for point in seed[method]) > seed["reference"], method
