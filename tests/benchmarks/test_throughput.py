"""What is made of the contestants' times: ratios with the reference's share, the fairest opponent, empty quick rows."""

import pytest

from benchmarks import rows, throughput
from benchmarks.contest import OURS

SECONDS = {
    "trl, reference beforehand, 2 pairs at once": 6.0,
    "trl, defaults, 2 pairs at once": 9.0,
    "tunix, defaults, 2 pairs at once": 5.0,
    "tunix, defaults, 1 pair at once": 5.5,
    "tunix, remat decoder, 1 pair at once": None,
}
TURNS = {"trl, reference beforehand": 4.0, "trl, defaults": 8.0, "tunix, defaults": 5.0}


class Fake:
    """Contestants whose times are known: in turns, the library that lost the trial is the faster."""

    as_they_come = ("trl, defaults, 2 pairs at once", "tunix, defaults, 2 pairs at once")

    def __init__(self):
        self.asked = []

    def tried(self, steps):
        return {
            setting: {"seconds": seconds, "peak_bytes": int(seconds * 1e9)} if seconds else {"failed": "no memory"}
            for setting, seconds in SECONDS.items()
        }

    def measured(self, setting, repeats):
        self.asked.append(setting)
        own = {"seconds": 2.0, "peak_bytes": 3 * 10**9, "about": {"annotation_seconds": 0.5}}
        found = {"ours": own, "fastest": own | {"seconds": 1.5}}
        if setting != "alone":
            found["peer"] = {"seconds": TURNS[setting.rpartition(",")[0]], "peak_bytes": 1, "about": {}}
        return found


@pytest.fixture
def measured(tmp_path, monkeypatch, fake):
    monkeypatch.setattr(throughput.fetch, "smollm2", lambda: tmp_path)
    monkeypatch.setattr(throughput.Measured, "_contest", lambda self, name: fake)

    def make(**options):
        return throughput.Measured(throughput.Options(json=tmp_path / "rows.json", runs=tmp_path / "runs", **options))

    return make


@pytest.fixture
def fake():
    return Fake()


def test_ratios_are_against_the_opponent_that_is_fastest_in_turns(measured):
    found = {row.name: row for row in measured().training("pairs")}
    assert found["pairs_vs_best_peer"].value == pytest.approx(4.0 / 2.5) and found["pairs_vs_best_peer"].met
    assert "trl, reference beforehand, 2 pairs at once: 4.0 s" in found["pairs_vs_best_peer"].note
    assert found["pairs_vs_best_peer_fastest"].value == pytest.approx(4.0 / 2.0)
    assert found["pairs_vs_best_peer_fastest"].goal is None
    # As they come, both take a whole step at once.
    assert found["pairs_vs_peer_defaults"].value == pytest.approx(5.0 / 2.5)
    assert found["memory_vs_leanest_peer"].value == pytest.approx(3 / 5) and found["memory_vs_leanest_peer"].met
    assert found["memory_vs_peer_defaults"].value == pytest.approx(3 / 5)
    assert found["memory_vs_peer_defaults"].met is False


def test_alone_there_is_nothing_to_compare(measured):
    found = {row.name: row for row in measured(quick=True).training("pairs")}
    assert len(found) == 4 * len(OURS)
    assert all(row.value is None and row.met is None for row in found.values())
    assert (
        found["memory_vs_leanest_peer"].goal == 0.65 and "remat full: 3.00 GB" in found["memory_vs_leanest_peer"].note
    )


def test_other_works_have_no_row_of_defaults(measured):
    assert [row.name for row in measured().training("bfcl_pairs")] == [
        "bfcl_pairs_vs_best_peer", "bfcl_pairs_vs_best_peer_fastest",
    ]  # fmt: skip


def test_who_has_been_measured_is_kept_when_asked_to(measured, fake, tmp_path):
    first = measured()
    found = first.training("pairs")
    # TRL as it comes lost the trial by more than a trial may err.
    assert fake.asked == ["tunix, defaults, 2 pairs at once", "trl, reference beforehand, 2 pairs at once"]
    rows.write_json(tmp_path / "rows.json", found, details=first.details)
    assert measured(resume=True).training("pairs") == found and len(fake.asked) == 2
    del first.details["pairs"]["turns"]["tunix, defaults, 2 pairs at once"]
    rows.write_json(tmp_path / "rows.json", found, details=first.details)
    assert measured(resume=True).training("pairs") == found
    assert fake.asked[2:] == ["tunix, defaults, 2 pairs at once"]
