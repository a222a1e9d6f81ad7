"""Public, then private pre-training: where its text comes from, what is kept, and what is made of the numbers."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dp_pretraining, dp_pretraining_steps, source_code
from experiments import dp_pretraining_page as page
from experiments import dp_pretraining_sections as sections
from experiments.dp_pretraining import (
    ARMS,
    ATTACKED,
    POINTS,
    QUICK,
    RESETS,
    RULES,
    Experiment,
    Options,
    Scale,
    readings,
)
from experiments.dp_pretraining_membership import Attacks, attack
from experiments.dp_pretraining_noise import LARGE, multiplier
from experiments.dp_pretraining_steps import measured_steps
from shiq_jax.errors import UserError
from shiq_jax.privacy import FlatClip, Improvement, Landscape, Mechanism
from shiq_jax.privacy.secret import Secret


@pytest.fixture(scope="module")
def text():
    return source_code.load(2000, 4000, 200)


@pytest.mark.slow
def test_no_sequence_stands_twice(text):
    everything = np.concatenate(text)
    assert everything.shape == (6400, source_code.LENGTH) and everything.dtype == np.uint8
    assert len(np.unique(everything, axis=0)) == len(everything)
    again = source_code.load(2000, 4000, 200)
    for name, part in text._asdict().items():
        np.testing.assert_array_equal(part, getattr(again, name))


def test_more_than_there_is_is_refused():
    with pytest.raises(UserError, match="sequences of source code here, and 100000000 are needed"):
        source_code.load(100_000_000, 1, 1)


def numbers_in(text):
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?", text)]


def numbers():
    """Losses of every arm, chosen so that all comparisons are known."""
    last = {"fully public": 2.0, "only public": 3.5, "clipped, no noise": 2.5}
    for epsilon, worst in ((2, 5.0), (8, 4.0)):
        at = f"epsilon {epsilon}"
        last |= {f"fully private, {at}": worst, f"mixed 1%, {at}": worst - 0.5, f"mixed 10%, {at}": worst - 1.0}
    last |= {name: 3.2 for name in RESETS}
    look = dict.fromkeys((*Landscape._fields, *Improvement._fields, "clipped"), 1.5)
    unknown = look | {"trace": -2.0, "decelerator": 0.0, "slowdown": 9.0}

    def run(loss, arm):
        return {
            "losses": [[0, 5.5], [20, 5.2], [40, 5.1], [60, loss + 1], [200, loss]], "switch": 20,
            "monitor": [[0, unknown], [100, look]] * arm.monitor,
            "noise_multiplier": 0.8 if arm.private else None, "epsilon": arm.epsilon, "seconds": 1.0,
        }  # fmt: skip

    arms = {name: {"0": run(last[name], arm), "1": run(last[name] + 0.1, arm)} for name, arm in (ARMS | RESETS).items()}
    settings = {"batch": 128, "steps": 200, "private": 1000}
    tried = {"plain": {"0.001": 3.1, "0.01": 3.0, "0.1": 3.1}, "private": {"0.001": 4.1, "0.01": 4.0}}
    rates = {"plain": 0.01, "private": 0.01, "tried": tried}
    return {"settings": settings, "parameters": 16_384, "rates": rates, "arms": arms} | further()


def further():
    """The same of what is measured besides."""
    rules = {name: {"losses": [[200, 4.05 + 0.1 * number]]} for number, name in enumerate(RULES)}
    attacks = {
        name: {
            "loss": {"auc": 0.51, "error": 0.01}, "difference": {"auc": 0.5 + 0.01 * number, "error": 0.011},
            "held_out": {"auc": 0.53, "error": 0.01}, "sequences": [512, 2048, 2048], "mean_losses": [2.0, 2.5, 2.6],
            "units": 512 if arm.few else 1000, "steps": 600 if arm.few else 200,
        }
        for number, (name, arm) in enumerate(ATTACKED.items())
    }  # fmt: skip
    step = {"rate": 0.1, "predicted": 0.4, "measured": 0.3, "error": 0.01}
    row = {"draws": 8, "slowdown": 1.5, "private": step, "plain": step | {"measured": 0.8}}
    points = {
        name: {"step": 40, "said": {"best_batch": 30.0}, "rows": [row | {"batch": 4}, row | {"batch": 64}]}
        for name in POINTS
    }
    sigma = {"2": {"16": 1.0, "64": 1.2}, "8": {"16": 0.5, "64": 0.5}}
    noise = {name: {"units": 1000, "passes": 3, "delta": 1e-6, "sigma": sigma} for name in ("here", "large")}
    return {"rules": rules, "attacks": attacks, "single_steps": points, "noise": noise}


def test_the_page_compares_the_arms(tmp_path):
    found = numbers()
    assert page.closed(found, "mixed 10%, epsilon 8", 8) == pytest.approx(0.5)
    assert page.noise_length(found, "fully private, epsilon 8") == pytest.approx(0.8)
    _, least, most, best, clipping, slowdown, resets = map(numbers_in, page.verdicts(found))
    # Losses without public data, with 1% and with 10%, and the parts of the gap that these close.
    assert most == [8, 4.05, 3.55, 1, 3.05, 10, 25, 50]
    # 4.0 against 3.5 at epsilon 2, 3.0 against 3.5 at epsilon 8: in so many of two seeds.
    assert least == [3.55, 0, 2, 2, 10] and best == [3.55, 2, 2, 8, 10]
    assert clipping == [2.55, 2.0, 8, 25, 75] and resets == [3.05, 3.25, 3.25, 3.25]
    # The trace of the others is below 0.
    assert slowdown == [1.5, 2, 4, 0]
    assert page.reasons(found) == ""
    for run in found["arms"]["mixed 10%, epsilon 8"].values():
        run["losses"][-1][1] = 4.5
    assert {60, 8, 5.05, 4.05} <= set(numbers_in(page.reasons(found)))
    page.write(found, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert page.table(found) in text
    assert "| fully private, epsilon 8 | 0 | 1.5 | 1.5 | -2 | unknown | unknown | unknown |" in text
    assert "| fully private, epsilon 8 | 100 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 |" in text
    for figure in ("page", "page_monitored", "page_noise", "page_steps"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


def test_a_rate_at_the_end_of_what_was_tried_is_told():
    rates = numbers()["rates"]
    assert "private" in page.at_the_end(rates) and "plain" not in page.at_the_end(rates)
    assert page.at_the_end(rates | {"private": 0.1, "tried": {"private": {"0.01": 1, "0.1": 0, "1": 1}}}) == ""


def test_the_further_sections_show_the_numbers():
    found = numbers()
    # 1 / 16 against 1.44 / 64, and 1 / 4 of that of a constant multiplier.
    falls = [ratios[0] / ratios[-1] for _, ratios in (sections.ratio(found["noise"]["here"], each) for each in "28")]
    assert falls == pytest.approx([4 / 1.44, 4])
    assert "| AutoV, R = 1 | 4.050 | +0.050 |" in sections.rules(found)
    told = sections.attacks(found)
    assert "| few units, not private | 512 | 600 | 2.000 | 2.500 | 0.510 ± 0.010 | 0.550 ± 0.011 | 0.530 ± 0.0" in told
    assert "| only public | none | 200 | 2.000 | 2.500 | 0.510 ± 0.010 |  | 0.530 ± 0.010 |" in told
    # Measured over predicted with noise and without, the best batch of those tried, and that of the analysis.
    assert {0.75, 2.0, 4, 30} <= set(numbers_in(sections.agreement(found)[0]))
    found["single_steps"]["mixed 10%, epsilon 8"] |= {"rows": []}
    assert list(sections.stepped(found)) == ["fully private, epsilon 8"]
    assert "| mixed" not in sections.steps(found)
    for section in (sections.noise, sections.rules, sections.attacks, sections.steps):
        assert section({"arms": found["arms"]}) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "batch", "sigma"),
    [(2.0, 16_384, 1.021), (2.0, 65_536, 1.544), (8.0, 16_384, 0.613), (8.0, 65_536, 0.771)],
)
def test_noise_by_batch(epsilon, batch, sigma):
    """Multipliers that were computed elsewhere, to three places; calibration ends within 1e-3."""
    assert LARGE.units == 1_000_000 and LARGE.passes == 3 and LARGE.delta == 1e-7
    assert multiplier(LARGE, epsilon, batch) == pytest.approx(sigma, abs=1.5e-3)


def test_the_own_data_are_read_in_whole_steps():
    for scale in (Scale(), QUICK):
        here = readings(scale)["here"]
        read = scale.batch * scale.steps
        assert here.units * here.passes == pytest.approx(read) and here.batches
        assert all(read % batch == 0 and read // batch >= 16 for batch in here.batches)


def test_the_attack_counts_pairs():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40) / 2, rng.integers(2, 12, 60) / 2
    pairs = (members[:, None] < others) + 0.5 * (members[:, None] == others)
    assert attack(members, others).auc == pytest.approx(pairs.mean())
    assert attack(np.zeros(3), np.ones(4)) == (1, 0) and attack(np.ones(3), np.ones(4)).auc == 0.5


def test_the_error_of_an_attack_is_that_of_new_samples():
    """Exponential scores, for which the formula is exact."""
    rng = np.random.default_rng(0)
    found = [attack(-rng.exponential(1.5, 60), -rng.exponential(1, 90)) for _ in range(1000)]
    assert np.std([each.auc for each in found]) == pytest.approx(np.mean([each.error for each in found]), rel=0.1)
    assert np.mean([each.auc for each in found]) == pytest.approx(0.6, abs=0.01)


def test_single_steps_on_a_quadratic_gain_what_is_predicted():
    """Loss h (x - a)^2 / 2 by coordinate, a drawn for each unit, nothing clipped, much noise."""
    rng, width = np.random.default_rng(0), 8
    bend, scale = jnp.linspace(0.5, 3, width), jnp.linspace(1, 2, width)
    known = rng.normal(1, 0.5, (4096, width)).astype(np.float32)
    params = {"x": jnp.zeros(width)}
    # Wide enough that nothing is ever clipped.
    mechanism = Mechanism.from_noise_multiplier(
        dataset_size=4096, expected_batch=16, steps=1, delta=1e-5, noise_multiplier=0.12, clip=FlatClip(100.0)
    )

    def losses(params, units, acc=None):
        return jnp.sum(bend * (params["x"] - units) ** 2, axis=1) / 2

    gradient, curved = -bend * known.mean(0), scale**2 * bend
    said = {
        "gradient": float(jnp.sum(scale * gradient**2)), "curvature": float(jnp.sum(curved * gradient**2)),
        "trace": float(jnp.sum(curved)), "sampling": float(jnp.sum(curved * bend**2 * known.var(0))), "clipped": 1.0,
    }  # fmt: skip
    rows = measured_steps(
        losses, lambda params: float(losses(params, known).mean()), params, {"x": scale},
        lambda rng, count: known[rng.integers(0, len(known), count)], said, mechanism, (4, 16, 64), 0,
    )  # fmt: skip
    assert [row["batch"] for row in rows] == [4, 16, 64]
    assert rows[0]["slowdown"] > 2 and rows[0]["private"]["measured"] < 0.6 * rows[0]["plain"]["measured"]
    for row in rows:
        for kind in ("private", "plain"):
            assert abs(row[kind]["measured"] - row[kind]["predicted"]) < 4 * row[kind]["error"]
            assert row[kind]["error"] < 0.15 * row[kind]["predicted"]


def test_the_public_pool_is_read_once_by_the_largest_share():
    scale = Scale()
    shares = {arm.share for arm in ARMS.values() if arm.private}
    assert shares == {0, 0.01, 0.1} and 0.1 * scale.steps * scale.batch < scale.private


def test_what_was_run_is_not_run_again(tmp_path, monkeypatch):
    known, ran = numbers(), []

    class Recorded:
        parameters = 16_384

        def __init__(self, scale):
            assert scale == Scale()

        def tuned(self):
            ran.append("rates")
            return known["rates"]

        def run(self, name, arm, seed, rates):
            if len(ran) == 20:
                raise KeyboardInterrupt
            ran.append((name, seed))
            return known["arms"][name]["0"] if name in known["arms"] else known["rules"][name]

    def besides(part):
        def measured(name, *_):
            ran.append((part, name))
            return known[part][name]

        return measured

    class Recording:
        def __init__(self, *_):
            self.measure = besides("attacks")

    monkeypatch.setattr(dp_pretraining, "Experiment", Recorded)
    monkeypatch.setattr(dp_pretraining, "Attacks", Recording)
    monkeypatch.setattr(dp_pretraining, "single_steps", lambda _, name, *__: besides("single_steps")(name))
    monkeypatch.setattr(dp_pretraining, "curve", lambda *_: known["noise"]["here"])
    options = Options(json=tmp_path / "found.json")
    with pytest.raises(KeyboardInterrupt):
        dp_pretraining.main(options)
    assert not (tmp_path / "found.md").exists()
    before = len(ran)
    ran.append("stopped")
    dp_pretraining.main(options)
    every = [(name, seed) for seed in Scale().seeds for name in ARMS | RESETS]
    every += [("attacks", name) for name in ATTACKED] + [(name, 0) for name in RULES]
    every += [("single_steps", name) for name in POINTS]
    assert before == 20 and [each for each in ran if each != "stopped"] == ["rates", *every]
    dp_pretraining.main(options)
    assert len(ran) == len(every) + 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(set(runs) == {"0", "1", "2"} for runs in found["arms"].values())
    assert page.table(found) in (tmp_path / "found.md").read_text()


def test_the_kept_numbers_are_complete():
    results = Path(__file__).parents[2] / "docs" / "results"
    found = json.loads((results / "dp_pretraining.json").read_text())
    assert all(set(runs) == {"0", "1", "2"} for runs in found["arms"].values()) and set(found["arms"]) == set(
        ARMS | RESETS
    )
    besides = {"rules": RULES, "attacks": ATTACKED, "single_steps": POINTS, "noise": readings(Scale())}
    assert all(set(found[part]) == set(names) for part, names in besides.items())
    for name, reading in readings(Scale()).items():
        kept = found["noise"][name]
        assert (kept["units"], kept["passes"], kept["delta"]) == reading[:3]
        assert all(tuple(map(int, sigma)) == reading.batches for sigma in kept["sigma"].values())
        last = reading.batches[-1]
        assert kept["sigma"]["2"][str(last)] == pytest.approx(multiplier(reading, 2.0, last), rel=1e-3)


@pytest.fixture(scope="module")
def quick():
    return Experiment(QUICK)


RATES = {"plain": 3e-3, "private": 1e-2}


def test_the_last_state_of_an_arm_is_that_of_its_steps(quick):
    arm = ATTACKED["few units, not private"]
    plan = quick.plan(arm)
    assert len(plan.plain) == len(plan.private) == QUICK.held_out and plan.steps == 3 * QUICK.steps == plan.first
    assert quick.plan(ARMS["fully public"]).plain.shape[0] == quick.pool + QUICK.private
    arm = ARMS["only public"]
    assert [step for step, _ in quick.states("", arm, quick.plan(arm), 0, RATES)] == list(range(QUICK.steps + 1))


@pytest.mark.slow
def test_who_reads_little_again_and_again_is_told(quick):
    attacks = Attacks(quick, RATES, ARMS["only public"], 4)
    found = {name: attacks.measure(name, ATTACKED[name], 0) for name in ("only public", "few units, not private")}
    assert found["only public"]["difference"]["auc"] == 0.5
    one = found["few units, not private"]
    assert one["sequences"] == [QUICK.held_out, 4 * QUICK.held_out, 4 * QUICK.held_out]
    assert one["difference"]["auc"] > 0.7 and one["mean_losses"][0] < one["mean_losses"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["only public", "fully private, epsilon 8", "few units, not private"])
def test_members_are_what_was_drawn(name, quick):
    attacks, arm = Attacks(quick, RATES, ARMS["only public"], 100), ATTACKED[name]
    plan = quick.plan(arm)
    members, others = ({each.tobytes() for each in side} for side in attacks.sides(arm, plan, 0))
    assert not members & others and len(members | others) == QUICK.private
    if name == "few units, not private":
        assert members == {each.tobytes() for each in plan.private}
    if name == "fully private, epsilon 8":
        drawn = [plan.mechanism.sample(Secret.insecure(0).sampling, step) for step in range(plan.steps)]
        assert members == {quick.text.private[unit].tobytes() for units, real in drawn for unit in units[real]}


@pytest.mark.slow
def test_single_steps_of_an_arm(quick, monkeypatch):
    # Fewer draws than the experiment takes.
    monkeypatch.setattr(dp_pretraining_steps, "MOST", 12)
    name = "fully private, epsilon 8"
    found = dp_pretraining.single_steps(quick, name, ARMS[name], RATES, 0.2, (1 / 16, 2), 0.95)
    assert [row["batch"] for row in found["rows"]] == [1, 32] and found["step"] == 2
    for row in found["rows"]:
        assert row["private"]["predicted"] < row["plain"]["predicted"]
        assert 0 < row["private"]["measured"] < row["plain"]["measured"]
