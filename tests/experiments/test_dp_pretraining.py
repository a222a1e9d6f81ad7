"""Public, then private pre-training: where its text comes from, what is kept, and what its page makes of numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import dp_pretraining, source_code
from experiments import dp_pretraining_page as page
from experiments.dp_pretraining import ARMS, RESETS, Options, Scale
from shiq_jax.errors import Refusal
from shiq_jax.privacy import Improvement, Landscape


@pytest.fixture(scope="module")
def text():
    return source_code.load(2000, 4000, 200)


def test_no_sequence_stands_twice(text):
    everything = np.concatenate(text)
    assert everything.shape == (6400, source_code.LENGTH) and everything.dtype == np.uint8
    assert len(np.unique(everything, axis=0)) == len(everything)
    again = source_code.load(2000, 4000, 200)
    for name, part in text._asdict().items():
        np.testing.assert_array_equal(part, getattr(again, name))


def test_more_than_there_is_is_refused():
    with pytest.raises(Refusal, match="sequences of source code here, and 100000000 are needed"):
        source_code.load(100_000_000, 1, 1)


def numbers():
    """Losses of every arm, chosen so that all sentences are known."""
    last = {"fully public": 2.0, "only public": 3.5, "clipped, no noise": 2.5}
    for epsilon, worst in ((2, 5.0), (8, 4.0)):
        at = f"epsilon {epsilon}"
        last |= {f"fully private, {at}": worst, f"mixed 1%, {at}": worst - 0.5, f"mixed 10%, {at}": worst - 1.0}
    last |= {name: 3.2 for name in RESETS}
    look = dict.fromkeys((*Landscape._fields, *Improvement._fields), 1.5)

    def run(loss, arm):
        return {
            "losses": [[0, 5.5], [20, 5.2], [40, 5.1], [60, loss + 1], [200, loss]], "switch": 20,
            "monitored": [[0, look], [100, look]] * arm.monitored,
            "noise_multiplier": 0.8 if arm.private else None, "epsilon": arm.epsilon, "seconds": 1.0,
        }  # fmt: skip

    arms = {name: {"0": run(last[name], arm), "1": run(last[name] + 0.1, arm)} for name, arm in (ARMS | RESETS).items()}
    settings = {"batch": 128, "steps": 200, "private": 1000}
    tried = {"plain": {"0.01": 3.0}, "private": {"0.01": 4.0}}
    rates = {"plain": 0.01, "private": 0.003, "tried": tried}
    return {"settings": settings, "parameters": 16_384, "rates": rates, "arms": arms}


def test_the_page_says_what_the_numbers_say(tmp_path):
    found = numbers()
    assert page.closed(found, "mixed 10%, epsilon 8", 8) == pytest.approx(0.5)
    assert page.noise_length(found, "fully private, epsilon 8") == pytest.approx(0.8)
    said = " ".join(page.verdicts(found))
    assert "At epsilon 8 more public data do mean less loss: 4.050 without, 3.550 with 1% and 3.050 with 10%" in said
    assert "they close 25% and 50% of the gap" in said
    # 4.0 against 3.5 at epsilon 2, 3.0 against 3.5 at epsilon 8.
    assert "gain something in 0 of 2 seeds at epsilon 2" in said and "in 2 of 2 seeds at epsilon 8" in said
    assert "(3.050) is best among the resets" in said
    assert "comes to 2.550: of the 2.000 nats between public and private training at epsilon 8 clipping takes 25%" in said
    assert "by a factor of 1.50 at most" in said
    found["arms"]["mixed 10%, epsilon 8, reset none"]["0"]["losses"][-1][1] = 0.1
    assert "is not best among the resets" in " ".join(page.verdicts(found))
    assert page.reasons(found) == ""
    for run in found["arms"]["mixed 10%, epsilon 8"].values():
        run["losses"][-1][1] = 4.5
    assert "at step 60 and epsilon 8 the loss is 5.050 without them and 4.050 with 10%" in page.reasons(found)
    page.write(found, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert page.table(found) in text and "0.8 long" in text and (tmp_path / "page.png").stat().st_size > 10_000


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
            return known["arms"][name]["0"]

    monkeypatch.setattr(dp_pretraining, "Experiment", Recorded)
    options = Options(json=tmp_path / "found.json")
    with pytest.raises(KeyboardInterrupt):
        dp_pretraining.main(options)
    assert not (tmp_path / "found.md").exists()
    before = len(ran)
    ran.append("stopped")
    dp_pretraining.main(options)
    every = [(name, seed) for seed in Scale().seeds for name in ARMS | RESETS]
    assert before == 20 and [each for each in ran if each != "stopped"] == ["rates", *every]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(set(runs) == {"0", "1", "2"} for runs in found["arms"].values())
    assert page.table(found) in (tmp_path / "found.md").read_text()


def test_the_kept_page_is_that_of_its_numbers():
    results = Path(__file__).parents[2] / "docs" / "results"
    found = json.loads((results / "dp_pretraining.json").read_text())
    assert page.text(found) == (results / "dp_pretraining.md").read_text()
    assert all(set(runs) == {"0", "1", "2"} for runs in found["arms"].values()) and set(found["arms"]) == set(ARMS | RESETS)
