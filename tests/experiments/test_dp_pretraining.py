"""Public-to-private pretraining: text data, arms, attacks, single steps, and the page."""

import json
import re
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dp_pretraining, dp_pretraining_steps, source_code
from experiments import dp_pretraining_page as page
from experiments import dp_pretraining_sections as sections
from experiments.dp_pretraining import (
    ARMS,
    ATTACK_ARMS,
    QUICK,
    RESETS,
    RULES,
    SINGLE_STEP_POINTS,
    Experiment,
    Options,
    Scale,
    accounting_runs,
)
from experiments.dp_pretraining_membership import Attacks, attack
from experiments.dp_pretraining_noise import LARGE_RUN, noise_multiplier
from experiments.dp_pretraining_steps import measure_steps
from shiq_jax.errors import UserError
from shiq_jax.privacy import FlatClip, Improvement, Landscape, Mechanism
from shiq_jax.privacy.secret import Secret

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text():
    return source_code.load(2000, 4000, 200)


@pytest.mark.slow
def test_sequences_are_distinct_and_deterministic(text):
    sequences = np.concatenate(text)
    assert sequences.shape == (6400, source_code.LENGTH) and sequences.dtype == np.uint8
    assert len(np.unique(sequences, axis=0)) == len(sequences)
    chex.assert_trees_all_equal(source_code.load(2000, 4000, 200), text)


def test_too_many_sequences_raise_an_error():
    with pytest.raises(UserError, match="sequences of source code, need 100000000"):
        source_code.load(100_000_000, 1, 1)


def numbers_in(text):
    return [float(match) for match in re.findall(r"\d+(?:\.\d+)?", text)]


def make_results():
    """Results with simple losses for every arm."""
    final_losses = {"fully public": 2.0, "only public": 3.5, "clipped, no noise": 2.5}
    for epsilon, worst in ((2, 5.0), (8, 4.0)):
        at = f"epsilon {epsilon}"
        final_losses |= {
            f"fully private, {at}": worst, f"mixed 1%, {at}": worst - 0.5, f"mixed 10%, {at}": worst - 1.0
        }  # fmt: skip
    final_losses |= {name: 3.2 for name in RESETS}
    diagnostics = dict.fromkeys((*Landscape._fields, *Improvement._fields, "clipped"), 1.5)
    negative_trace = diagnostics | {"trace": -2.0, "decelerator": 0.0, "slowdown": 9.0}

    def run(loss, arm):
        return {
            "losses": [[0, 5.5], [20, 5.2], [40, 5.1], [60, loss + 1], [200, loss]], "switch": 20,
            "monitored": [[0, negative_trace], [100, diagnostics]] * arm.monitored,
            "noise_multiplier": 0.8 if arm.private else None, "epsilon": arm.epsilon, "seconds": 1.0,
        }  # fmt: skip

    arms = {
        name: {"0": run(final_losses[name], arm), "1": run(final_losses[name] + 0.1, arm)}
        for name, arm in (ARMS | RESETS).items()
    }
    settings = {"batch": 128, "steps": 200, "private": 1000}
    tried = {"plain": {"0.001": 3.1, "0.01": 3.0, "0.1": 3.1}, "private": {"0.001": 4.1, "0.01": 4.0}}
    rates = {"plain": 0.01, "private": 0.01, "tried": tried}
    return {"settings": settings, "parameters": 16_384, "rates": rates, "arms": arms} | make_section_results()


def make_section_results():
    """Results of all sections except the arms."""
    rules = {name: {"losses": [[200, 4.05 + 0.1 * number]]} for number, name in enumerate(RULES)}
    attacks = {
        name: {
            "loss": {"auc": 0.51, "error": 0.01}, "difference": {"auc": 0.5 + 0.01 * number, "error": 0.011},
            "held_out": {"auc": 0.53, "error": 0.01}, "sequences": [512, 2048, 2048], "mean_losses": [2.0, 2.5, 2.6],
            "units": 512 if arm.few_units else 1000, "steps": 600 if arm.few_units else 200,
        }
        for number, (name, arm) in enumerate(ATTACK_ARMS.items())
    }  # fmt: skip
    step = {"rate": 0.1, "predicted": 0.4, "measured": 0.3, "error": 0.01}
    row = {"draws": 8, "slowdown": 1.5, "private": step, "plain": step | {"measured": 0.8}}
    points = {
        name: {"step": 40, "said": {"best_batch": 30.0}, "rows": [row | {"batch": 4}, row | {"batch": 64}]}
        for name in SINGLE_STEP_POINTS
    }
    sigma = {"2": {"16": 1.0, "64": 1.2}, "8": {"16": 0.5, "64": 0.5}}
    noise = {name: {"units": 1000, "passes": 3, "delta": 1e-6, "sigma": sigma} for name in ("here", "large")}
    return {"rules": rules, "attacks": attacks, "single_steps": points, "noise": noise}


def test_page_compares_the_arms(tmp_path):
    results = make_results()
    assert page.gap_closed(results, "mixed 10%, epsilon 8", 8) == pytest.approx(0.5)
    assert page.noise_norm(results, "fully private, epsilon 8") == pytest.approx(0.8)
    _, private_2, public_8, private_8, clipping, slowdown, resets = map(numbers_in, page.summary(results))
    # Losses without public data, with 1% and with 10%, and the fractions of the gap that these close.
    assert public_8 == [8, 4.05, 3.55, 1, 3.05, 10, 25, 50]
    # Private data improve on the public data (3.5) in no seed at epsilon 2 (4.0) and in both at epsilon 8 (3.0).
    assert private_2 == [10, 3.55, 0, 2, 2] and private_8 == [10, 3.55, 2, 2, 8]
    assert clipping == [2.55, 8, 25, 75, 2.0] and resets == [3.05, 3.25, 3.25, 3.25]
    # Two of the four monitored states have a negative trace.
    assert slowdown == [1.5, 2, 4]
    assert page.ordering_section(results) == ""
    for run in results["arms"]["mixed 10%, epsilon 8"].values():
        run["losses"][-1][1] = 4.5
    assert {60, 8, 5.05, 4.05} <= set(numbers_in(page.ordering_section(results)))
    page.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert page.table(results) in text
    assert "| fully private, epsilon 8 | 0 | 1.5 | 1.5 | -2 | unknown | unknown | unknown |" in text
    assert "| fully private, epsilon 8 | 100 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 |" in text
    for figure in ("page", "page_monitored", "page_noise", "page_steps"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


def test_boundary_sentences_name_rates_at_the_end_of_the_grid():
    rates = make_results()["rates"]
    assert "of private steps" in page.boundary_sentences(rates)
    assert "of non-private steps" not in page.boundary_sentences(rates)
    assert page.boundary_sentences(rates | {"private": 0.1, "tried": {"private": {"0.01": 1, "0.1": 0, "1": 1}}}) == ""


def test_sections_show_their_results():
    results = make_results()
    curves = [sections.variance_per_unit(results["noise"]["here"], epsilon)[1] for epsilon in "28"]
    # From 1 / 16 to 1.44 / 64 at epsilon 2; the noise multiplier is constant at epsilon 8.
    assert [curve[0] / curve[-1] for curve in curves] == pytest.approx([4 / 1.44, 4])
    assert "| AutoV, R = 1 | 4.050 | +0.050 |" in sections.rules(results)
    assert "| FlatClip, R = 0.1 | 4.150 | +0.150 |" in sections.rules(results)
    attacks = sections.attacks(results)
    assert "| few units, not private | 512 | 600 | 2.000 | 2.500 | 0.510 ± 0.010 | 0.550 ± 0.011 |" in attacks
    assert "| only public | none | 200 | 2.000 | 2.500 | 0.510 ± 0.010 |  | 0.530 ± 0.010 |" in attacks
    # Measured over predicted with and without noise, and the measured and predicted best batch size.
    assert {0.75, 2.0, 4, 30} <= set(numbers_in(sections.agreement(results)[0]))
    results["single_steps"]["mixed 10%, epsilon 8"] |= {"rows": []}
    assert list(sections.measured_points(results)) == ["fully private, epsilon 8"]
    assert "| mixed" not in sections.steps(results)
    for section in (sections.noise, sections.rules, sections.attacks, sections.steps):
        assert section({"arms": results["arms"]}) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "batch", "sigma"),
    [(2.0, 16_384, 1.021), (2.0, 65_536, 1.544), (8.0, 16_384, 0.613), (8.0, 65_536, 0.771)],
)
def test_noise_multiplier_by_batch_size(epsilon, batch, sigma):
    """Independently computed values with three decimals; calibration has a tolerance of 1e-3."""
    assert LARGE_RUN.units == 1_000_000 and LARGE_RUN.passes == 3 and LARGE_RUN.delta == 1e-7
    assert noise_multiplier(LARGE_RUN, epsilon, batch) == pytest.approx(sigma, abs=1.5e-3)


def test_accounting_runs_have_whole_steps():
    for scale in (Scale(), QUICK):
        run = accounting_runs(scale)["here"]
        units_read = scale.batch * scale.steps
        assert run.units * run.passes == pytest.approx(units_read) and run.batches
        assert all(units_read % batch == 0 and units_read // batch >= 16 for batch in run.batches)


def test_attack_auc_counts_pairs():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.integers(0, 9, 40) / 2, rng.integers(2, 12, 60) / 2
    pairs = (members[:, None] < nonmembers) + 0.5 * (members[:, None] == nonmembers)
    assert attack(members, nonmembers).auc == pytest.approx(pairs.mean())
    assert attack(np.zeros(3), np.ones(4)) == (1, 0) and attack(np.ones(3), np.ones(4)).auc == 0.5


def test_attack_error_matches_the_variation_between_samples():
    """The formula is exact for exponential scores."""
    rng = np.random.default_rng(0)
    samples = [attack(-rng.exponential(1.5, 60), -rng.exponential(1, 90)) for _ in range(1000)]
    aucs = [sample.auc for sample in samples]
    assert np.std(aucs) == pytest.approx(np.mean([sample.error for sample in samples]), rel=0.1)
    assert np.mean(aucs) == pytest.approx(0.6, abs=0.01)


def test_single_steps_on_a_quadratic_match_the_prediction():
    """Loss h (x - a)^2 / 2 per coordinate with a random a per unit, without clipping and with much noise."""
    rng, width = np.random.default_rng(0), 8
    curvature, scale = jnp.linspace(0.5, 3, width), jnp.linspace(1, 2, width)
    targets = rng.normal(1, 0.5, (4096, width)).astype(np.float32)
    params = {"x": jnp.zeros(width)}
    # The clip norm exceeds every gradient.
    mechanism = Mechanism.from_noise_multiplier(
        dataset_size=4096, expected_batch=16, steps=1, delta=1e-5, noise_multiplier=0.12, clip=FlatClip(100.0)
    )

    def losses(params, units, acc=None):
        return jnp.sum(curvature * (params["x"] - units) ** 2, axis=1) / 2

    gradient, scaled = -curvature * targets.mean(0), scale**2 * curvature
    prediction = {
        "gradient": float(jnp.sum(scale * gradient**2)), "curvature": float(jnp.sum(scaled * gradient**2)),
        "trace": float(jnp.sum(scaled)), "sampling": float(jnp.sum(scaled * curvature**2 * targets.var(0))),
        "clipped": 1.0,
    }  # fmt: skip
    rows = measure_steps(
        losses, lambda params: float(losses(params, targets).mean()), params, {"x": scale},
        lambda rng, count: targets[rng.integers(0, len(targets), count)], prediction, mechanism, (4, 16, 64), 0,
    )  # fmt: skip
    assert [row["batch"] for row in rows] == [4, 16, 64]
    assert rows[0]["slowdown"] > 2 and rows[0]["private"]["measured"] < 0.6 * rows[0]["plain"]["measured"]
    for row in rows:
        for kind in ("private", "plain"):
            assert abs(row[kind]["measured"] - row[kind]["predicted"]) < 4 * row[kind]["error"]
            assert row[kind]["error"] < 0.15 * row[kind]["predicted"]


def test_public_shares_of_the_private_arms():
    scale = Scale()
    shares = {arm.public_share for arm in ARMS.values() if arm.private}
    assert shares == {0, 0.01, 0.1} and 0.1 * scale.steps * scale.batch < scale.private


def test_finished_measurements_are_not_repeated(tmp_path, monkeypatch):
    known, calls = make_results(), []

    class FakeExperiment:
        parameters = 16_384

        def __init__(self, scale):
            assert scale == Scale()

        def tune_rates(self):
            calls.append("rates")
            return known["rates"]

        def run(self, name, arm, seed, rates):
            if len(calls) == 20:
                raise KeyboardInterrupt
            calls.append((name, seed))
            return known["arms"][name]["0"] if name in known["arms"] else known["rules"][name]

    def fake_measurement(section):
        def measure(name, *_):
            calls.append((section, name))
            return known[section][name]

        return measure

    class FakeAttacks:
        def __init__(self, *_):
            self.measure = fake_measurement("attacks")

    monkeypatch.setattr(dp_pretraining, "Experiment", FakeExperiment)
    monkeypatch.setattr(dp_pretraining, "Attacks", FakeAttacks)
    monkeypatch.setattr(dp_pretraining, "single_steps", lambda _, name, *__: fake_measurement("single_steps")(name))
    monkeypatch.setattr(dp_pretraining, "curve", lambda *_: known["noise"]["here"])
    options = Options(json=tmp_path / "results.json")
    with pytest.raises(KeyboardInterrupt):
        dp_pretraining.main(options)
    assert not (tmp_path / "results.md").exists() and len(calls) == 20
    calls.append("interrupted")
    dp_pretraining.main(options)
    expected = [(name, seed) for seed in Scale().seeds for name in ARMS | RESETS]
    expected += [("attacks", name) for name in ATTACK_ARMS] + [(name, 0) for name in RULES]
    expected += [("single_steps", name) for name in SINGLE_STEP_POINTS]
    assert [call for call in calls if call != "interrupted"] == ["rates", *expected]
    dp_pretraining.main(options)
    assert len(calls) == len(expected) + 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(set(runs) == {"0", "1", "2"} for runs in results["arms"].values())
    assert page.table(results) in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_committed_results_are_complete():
    directory = Path(__file__).parents[2] / "docs" / "results"
    results = json.loads((directory / "dp_pretraining.json").read_text())
    assert all(set(runs) == {"0", "1", "2"} for runs in results["arms"].values())
    runs = accounting_runs(Scale())
    names = {
        "arms": ARMS | RESETS, "rules": RULES, "attacks": ATTACK_ARMS, "single_steps": SINGLE_STEP_POINTS, "noise": runs
    }  # fmt: skip
    assert all(set(results[section]) == set(expected) for section, expected in names.items())
    for name, run in runs.items():
        noise = results["noise"][name]
        assert (noise["units"], noise["passes"], noise["delta"]) == run[:3]
        assert all(tuple(map(int, sigma)) == run.batches for sigma in noise["sigma"].values())
        batch = run.batches[-1]
        assert noise["sigma"]["2"][str(batch)] == pytest.approx(noise_multiplier(run, 2.0, batch), rel=1e-3)


@pytest.fixture(scope="module")
def quick():
    return Experiment(QUICK)


RATES = {"plain": 3e-3, "private": 1e-2}


@pytest.mark.slow
def test_plans_and_number_of_states(quick):
    arm = ATTACK_ARMS["few units, not private"]
    plan = quick.plan(arm)
    assert len(plan.nonprivate) == len(plan.private) == QUICK.held_out and plan.steps == 3 * QUICK.steps == plan.switch
    assert quick.plan(ARMS["fully public"]).nonprivate.shape[0] == quick.pool + QUICK.private
    arm = ARMS["only public"]
    assert [step for step, _ in quick.states("", arm, quick.plan(arm), 0, RATES)] == list(range(QUICK.steps + 1))


@pytest.mark.slow
def test_attack_detects_overfitting(quick):
    attacks = Attacks(quick, RATES, ARMS["only public"], 4)
    results = {name: attacks.measure(name, ATTACK_ARMS[name], 0) for name in ("only public", "few units, not private")}
    assert results["only public"]["difference"]["auc"] == 0.5
    overfitted = results["few units, not private"]
    assert overfitted["sequences"] == [QUICK.held_out, 4 * QUICK.held_out, 4 * QUICK.held_out]
    assert overfitted["difference"]["auc"] > 0.7 and overfitted["mean_losses"][0] < overfitted["mean_losses"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["only public", "fully private, epsilon 8", "few units, not private"])
def test_members_are_the_sampled_units(name, quick):
    attacks, arm = Attacks(quick, RATES, ARMS["only public"], 100), ATTACK_ARMS[name]
    plan = quick.plan(arm)
    members, nonmembers = ({sequence.tobytes() for sequence in part} for part in attacks.split(arm, plan, 0))
    assert not members & nonmembers and len(members | nonmembers) == QUICK.private
    if name == "few units, not private":
        assert members == {sequence.tobytes() for sequence in plan.private}
    if name == "fully private, epsilon 8":
        batches = [plan.mechanism.sample(Secret.insecure(0).sampling, step) for step in range(plan.steps)]
        assert members == {quick.text.private[unit].tobytes() for units, real in batches for unit in units[real]}


@pytest.mark.slow
def test_single_steps_of_an_arm(quick, monkeypatch):
    # Fewer draws save time.
    monkeypatch.setattr(dp_pretraining_steps, "MAX_DRAWS", 12)
    name = "fully private, epsilon 8"
    result = dp_pretraining.single_steps(quick, name, ARMS[name], RATES, 0.2, (1 / 16, 2), 0.95)
    assert [row["batch"] for row in result["rows"]] == [1, 32] and result["step"] == 2
    for row in result["rows"]:
        assert row["private"]["predicted"] < row["plain"]["predicted"]
        assert 0 < row["private"]["measured"] < row["plain"]["measured"]
