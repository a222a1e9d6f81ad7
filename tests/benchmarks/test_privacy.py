"""Rows of the privacy benchmark, and a step of each of its settings."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from benchmarks import privacy
from benchmarks.private_steps import Steps, Workload, settings
from shiq_jax.privacy.clipped_sum import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def details(**seconds):
    results = {name: {"seconds": value, "turns": [value]} for name, value in seconds.items()}
    return {"work": Workload(512, 4)._asdict(), "settings": results}


def test_rows_compare_the_fastest_settings():
    part = details(plain=10.0, vmap=20.0, ghost=16.0, scan=12.5, group=11.0)
    part["settings"] |= {"plain, 4 parts": {"seconds": 8.0}, "jax_privacy, 2 at once": {"seconds": 15.0}}
    part["settings"] |= {"jax_privacy, 1 at once": {"seconds": 25.0}}
    sizes = {"plain": 4, "plain, 4 parts": 2, "scan": 6, "ghost, 4 parts": 3, "group": 1}
    peaks = {name: {"peak_bytes": size} for name, size in sizes.items()}
    opacus = details(plain=10.0, ghost=15.0)
    opacus["settings"] |= {"opacus plain": {"seconds": 5.0}, "opacus ghost": {"seconds": 15.0}}
    memory = {"work": part["work"], "settings": peaks}
    rows = {row.name: row for row in privacy.table({"T512": part, "T1024": part, "opacus": opacus, "memory": memory})}
    assert rows["flat_ghost_T512"].value == 0.5 and rows["groupwise_T512"].value == 8 / 11
    assert rows["full_T1024"].value == 8 / 11 and rows["full_T2048"].value is None
    assert rows["vs_jax_privacy_T512"].value == 15 / 12.5
    # The leanest flat-clipping method; the note adds the fastest one.
    assert rows["memory_best"].value == 1.5 and rows["memory_best"].met is False
    assert rows["memory_best"].note.startswith("ghost, 4 parts:") and "; scan:" in rows["memory_best"].note
    assert rows["vs_opacus_ghost_T512"].value == 1.5 / 3 and rows["vs_opacus_ghost_T512"].met is True
    # Speed goals do not apply on a CPU.
    assert all(rows[name].goal is None for name in privacy.RATIOS)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parts"), [(2, 1)])
def test_every_setting_updates_the_parameters(rank, parts):
    steps = Steps(Workload(24, 4, "tiny", rank=rank))
    candidates = settings(parts)
    assert {method for method, _ in candidates.values()} == {"plain", *METHODS} - {"auto"}
    for method, parts in (*candidates.values(), ("jax_privacy", 2)):
        before = jax.device_get(steps.state.trainable)
        steps(method, parts)
        assert np.isfinite(jax.tree.leaves(steps.state.trainable)[0]).all()
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), before, steps.state.trainable)))
    assert int(steps.state.step) == len(candidates) + 1


def test_jax_privacy_update_has_the_same_scale():
    """With SGD at rate 1 both updates are dominated by noise of the same standard deviation."""
    updates = {}
    for method, parts in (("scan", 1), ("jax_privacy", 1)):
        steps = Steps(Workload(24, 4, "tiny"))
        steps._optimizer = optax.sgd(1.0)
        steps.state = steps.state._replace(opt_state=steps._optimizer.init(steps.state.trainable))
        before = jax.device_get(steps.state.trainable)
        steps(method, parts)
        after = jax.device_get(steps.state.trainable)
        updates[method] = np.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (before, after)))])
    own, peer = (update.std() for update in updates.values())
    assert own == pytest.approx(peer, rel=0.05) and own == pytest.approx(1 / 4, rel=0.1)


def test_committed_rows_follow_from_committed_timings():
    results = json.loads((RESULTS / "privacy.json").read_text())
    values = {row.name: row.value for row in privacy.table(results["details"])}
    assert values == pytest.approx({row["name"]: row["value"] for row in results["rows"]})
