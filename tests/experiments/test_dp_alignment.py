"""Plans, data and settings of the private alignment experiment, and its page."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import dp_alignment_page
from experiments.dp_alignment import FULL, QUICK, ClippedOnly, Study, arms
from experiments.dp_alignment_data import answer_rows, make_pair
from experiments.dp_alignment_plans import plan
from shiq_jax.privacy import Mechanism

RESULTS = Path(__file__).parents[2] / "docs" / "results"
QUESTIONS = 40


@pytest.mark.slow
def test_full_batches_have_the_least_noise_for_any_number_of_steps():
    full, sampled = (plan(64, 256, share, 8.0, 1e-3) for share in (1.0, 0.25))
    assert full["noise"] < sampled["noise"] and full["computed"] == 256 < sampled["computed"]
    assert plan(64, 512, 1.0, 8.0, 1e-3)["noise"] == pytest.approx(full["noise"], rel=0.01)
    sigma, steps = full["noise_multiplier"], full["steps"]
    assert steps == 4 and full["noise"] == pytest.approx(sigma / 64 / math.sqrt(steps))


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_settings_are_consistent(settings, tmp_path):
    sizes, study = settings.sizes, Study(settings, tmp_path, tmp_path, 1)
    assert settings.delta < 1 / sizes.units and 0 < sizes.tuning_learned < sizes.tuning
    names = [arm.name for arm in arms(settings)]
    assert len(set(names)) == len(names) == 2 * (2 + len(settings.epsilons))
    for epsilon in settings.epsilons:
        privacy = study.privacy(epsilon)
        assert (
            privacy.enabled and privacy.unit == "user" and (privacy.epsilon, privacy.delta) == (epsilon, settings.delta)
        )
    assert not study.privacy("open").enabled
    assert study.privacy("clipped").mechanism(
        {}, dataset_size=4, expected_batch=4, steps=1, multiple=1, example="pair"
    ).noise_multiplier == 0  # fmt: skip
    assert isinstance(study.privacy("clipped"), ClippedOnly)


def test_pair_has_the_first_correct_and_the_first_incorrect_answer():
    row = {"id": "q", "prompt": [{"role": "user", "content": "?"}], "target": "[f(1)]"}
    pair = make_pair(row, [("[f(2)]", 0.0), ("[f(x=1)]", 1.0), ("[f(3)]", 0.0)])
    assert (pair["chosen"], pair["rejected"], pair["sampled"], pair["user_id"]) == ("[f(x=1)]", "[f(2)]", True, "q")
    assert make_pair(row, [("[f(2)]", 0.0)])["chosen"] == "[f(1)]"
    assert make_pair(row, [("[f(x=1)]", 1.0)]) is None
    answers = answer_rows(pair)
    assert [answer["reward"] for answer in answers] == [0.5, -0.5]
    assert {answer["user_id"] for answer in answers} == {"q"}


def test_page_marks_significant_and_missing_arms(tmp_path):
    rng = np.random.default_rng(0)
    settings = json.loads(json.dumps(dataclasses.asdict(FULL)))
    directory = tmp_path / "dp_alignment"
    directory.mkdir()

    def write(name, numbers):
        (directory / f"{name}.json").write_text(json.dumps({"settings": settings, "date": "2000-01-01"} | numbers))

    def policy(margin, accuracy):
        correct = (np.arange(QUESTIONS) < accuracy * QUESTIONS).astype(float)
        return {
            "greedy": correct.tolist(),
            "sampled": np.tile(correct[:, None], 2).tolist(),
            "logratio": np.zeros((QUESTIONS, 2)).tolist(), "length": 20.0,
            "chosen": (-10 + margin).tolist(), "rejected": np.full(QUESTIONS, -20.0).tolist(), "measuring_seconds": 60,
        }  # fmt: skip

    plans = [plan(128, 512, 1.0, 8.0, 1e-3)]
    write("study", {"plans": plans, "machine": {"cpu_cores": 2, "device": "cpu", "jax": "0"}})
    write("reference", policy(np.zeros(QUESTIONS), 0.3) | {"right_answers_sampled": 0.5})
    write("rates", {method: {"rate": 1e-3, "losses": {"0.001": 0.5, "0.003": 0.6}} for method in ("dpo", "shiq")})
    shifts = {("dpo", "open"): 4.0, ("dpo", "clipped"): 4.0, ("dpo", 8.0): 1.0, ("shiq", "open"): 0.0}
    for (method, level), shift in shifts.items():
        margin = shift + rng.normal(0, 0.5, QUESTIONS)
        if not shift:
            margin -= margin.mean()
        accounts = {"noise_multiplier": 1.28, "expected_batch": 128} if level == 8.0 else None
        write(f"{method}-{level}-0", policy(margin, 0.3) | {
            "method": method, "privacy": level, "repetition": 0, "seconds": 60, "parameters": 10_000,
            "updates": {"grad_norm": [0.5]}, "accounts": accounts,
        })  # fmt: skip
    results = dp_alignment_page.Results(tmp_path)
    missing = [("dpo", 32.0), ("dpo", 2.0), *(("shiq", level) for level in ("clipped", 32.0, 8.0, 2.0))]
    assert [arm for arm in results.all_arms if arm not in results.arms] == missing
    significant = {arm: results.mean(arm, "margin").significant for arm in shifts}
    assert significant == {("dpo", "open"): True, ("dpo", "clipped"): True, ("dpo", 8.0): True, ("shiq", "open"): False}
    assert results.mean(("dpo", "open"), "margin").mean == pytest.approx(4, abs=0.3)
    # 1.28 / 128 per coordinate; the norm over 10,000 coordinates is 100 times as large.
    assert dp_alignment_page.noise_scale(results.arms["dpo", 8.0][0]) == pytest.approx((0.01, 1.0))
    assert not any(results.gain(arm, "greedy").significant for arm in shifts)
    dp_alignment_page.write(tmp_path)
    assert (tmp_path / "dp_alignment.md").exists() and (tmp_path / "dp_alignment.png").stat().st_size > 10_000


def test_committed_results_match_the_settings():
    results = dp_alignment_page.Results(RESULTS)
    assert results.settings == json.loads(json.dumps(dataclasses.asdict(FULL)))
    assert set(results.arms) <= set(results.all_arms)
    expected = results.study["plans"][0]
    # Calibration on another machine agrees within its tolerance.
    actual = plan(FULL.sizes.units, FULL.sizes.units * FULL.steps, expected["share"], expected["epsilon"], FULL.delta)
    assert actual == pytest.approx(expected, rel=1e-3)
    for method, tuned in results.rates.items():
        if method in dp_alignment_page.NAMES:
            assert tuned["rate"] == float(min(tuned["losses"], key=tuned["losses"].get))
    for (_, level), runs in results.arms.items():
        for run in runs:
            # Rank 2 on q_proj (576 to 576) and v_proj (576 to 192) of 30 layers.
            assert run["parameters"] == 2 * 30 * (576 + 576 + 576 + 192)
            if not isinstance(level, str):
                accounts = run["accounts"]
                epsilon = Mechanism.from_noise_multiplier(
                    dataset_size=FULL.sizes.units, expected_batch=FULL.sizes.units, steps=FULL.steps, delta=FULL.delta,
                    noise_multiplier=accounts["noise_multiplier"], unit="user",
                ).epsilon()  # fmt: skip
                assert (
                    epsilon == pytest.approx(accounts["epsilon"], rel=1e-3) and 0.99 * level < epsilon <= level + 1e-3
                )
                assert accounts["largest_batch"] == accounts["dataset_size"] == FULL.sizes.units
