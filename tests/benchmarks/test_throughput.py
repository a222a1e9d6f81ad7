"""Rows of the throughput benchmark: speedups with annotation, choice of the fastest peer, quick and resumed runs."""

import pytest

from benchmarks import rows, throughput
from benchmarks.comparison import OURS

TRIAL_SECONDS = {
    "trl, reference beforehand, 2 pairs at once": 6.0,
    "trl, defaults, 2 pairs at once": 9.0,
    "tunix, defaults, 2 pairs at once": 5.0,
    "tunix, defaults, 1 pair at once": 5.5,
    "tunix, remat decoder, 1 pair at once": None,
}
INTERLEAVED_SECONDS = {"trl, reference beforehand": 4.0, "trl, defaults": 8.0, "tunix, defaults": 5.0}


class FakeComparison:
    """Fixed timings in which the library that is slower in the trial is faster when interleaved."""

    default_settings = ("trl, defaults, 2 pairs at once", "tunix, defaults, 2 pairs at once")

    def __init__(self):
        self.calls = []

    def time_peer_settings(self, steps):
        return {
            setting: {"seconds": seconds, "peak_bytes": int(seconds * 1e9)} if seconds else {"failed": "no memory"}
            for setting, seconds in TRIAL_SECONDS.items()
        }

    def compare(self, setting, repeats):
        self.calls.append(setting)
        own = {"seconds": 2.0, "peak_bytes": 3 * 10**9, "about": {"annotation_seconds": 0.5}}
        results = {"ours": own, "fastest": own | {"seconds": 1.5}}
        if setting != "alone":
            results["peer"] = {"seconds": INTERLEAVED_SECONDS[setting.rpartition(",")[0]], "peak_bytes": 1, "about": {}}
        return results


@pytest.fixture
def benchmark(tmp_path, monkeypatch, comparison):
    monkeypatch.setattr(throughput.fetch, "smollm2", lambda: tmp_path)
    monkeypatch.setattr(throughput.Benchmark, "_comparison", lambda self, name: comparison)

    def make(**options):
        return throughput.Benchmark(throughput.Options(json=tmp_path / "rows.json", runs=tmp_path / "runs", **options))

    return make


@pytest.fixture
def comparison():
    return FakeComparison()


def test_rows_compare_with_the_fastest_interleaved_peer(benchmark):
    results = {row.name: row for row in benchmark().training("pairs")}
    assert results["pairs_vs_best_peer"].value == pytest.approx(4.0 / 2.5) and results["pairs_vs_best_peer"].met
    assert "trl, reference beforehand, 2 pairs at once: 4.0 s" in results["pairs_vs_best_peer"].note
    assert results["pairs_vs_best_peer_fastest"].value == pytest.approx(4.0 / 2.0)
    assert results["pairs_vs_best_peer_fastest"].goal is None
    # Default settings process the whole step as one batch.
    assert results["pairs_vs_peer_defaults"].value == pytest.approx(5.0 / 2.5)
    assert results["memory_vs_leanest_peer"].value == pytest.approx(3 / 5) and results["memory_vs_leanest_peer"].met
    assert results["memory_vs_peer_defaults"].value == pytest.approx(3 / 5)
    assert results["memory_vs_peer_defaults"].met is False


def test_quick_rows_have_no_values(benchmark):
    results = {row.name: row for row in benchmark(quick=True).training("pairs")}
    assert len(results) == 4 * len(OURS)
    assert all(row.value is None and row.met is None for row in results.values())
    assert (
        results["memory_vs_leanest_peer"].goal == 0.65
        and "remat full: 3.00 GB" in results["memory_vs_leanest_peer"].note
    )


def test_only_pairs_is_compared_with_peer_defaults(benchmark):
    assert [row.name for row in benchmark().training("bfcl_pairs")] == [
        "bfcl_pairs_vs_best_peer", "bfcl_pairs_vs_best_peer_fastest",
    ]  # fmt: skip


def test_resume_measures_only_missing_settings(benchmark, comparison, tmp_path):
    first = benchmark()
    results = first.training("pairs")
    # TRL's default setting was more than 25% slower in the trial.
    assert comparison.calls == ["tunix, defaults, 2 pairs at once", "trl, reference beforehand, 2 pairs at once"]
    rows.write_json(tmp_path / "rows.json", results, details=first.details)
    assert benchmark(resume=True).training("pairs") == results and len(comparison.calls) == 2
    del first.details["pairs"]["turns"]["tunix, defaults, 2 pairs at once"]
    rows.write_json(tmp_path / "rows.json", results, details=first.details)
    assert benchmark(resume=True).training("pairs") == results
    assert comparison.calls[2:] == ["tunix, defaults, 2 pairs at once"]
