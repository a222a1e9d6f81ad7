"""The benchmark of private steps: what its rows are made of, and that every setting takes a step."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from benchmarks import privacy
from benchmarks.private_steps import Steps, Work, settings
from shiq_jax.privacy.clipped_sum import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def details(**seconds):
    work = Work(512, 4)._asdict()
    found = {name: {"seconds": each, "turns": [each]} for name, each in seconds.items()}
    return {"work": work, "settings": found}


def test_a_row_is_the_plain_step_over_the_fastest_of_its_methods():
    part = details(plain=10.0, vmap=20.0, ghost=16.0, scan=12.5, group=11.0)
    part["settings"] |= {"plain, 4 parts": {"seconds": 8.0}, "jax_privacy, 2 at once": {"seconds": 15.0}}
    part["settings"] |= {"jax_privacy, 1 at once": {"seconds": 25.0}}
    sizes = {"plain": 4, "plain, 4 parts": 2, "scan": 6, "ghost, 4 parts": 3, "group": 1}
    peaks = {name: {"peak_bytes": size} for name, size in sizes.items()}
    opacus = details(plain=10.0, ghost=15.0)
    opacus["settings"] |= {"opacus plain": {"seconds": 5.0}, "opacus ghost": {"seconds": 15.0}}
    memory = {"work": part["work"], "settings": peaks}
    found = {row.name: row for row in privacy.table({"T512": part, "T1024": part, "opacus": opacus, "memory": memory})}
    assert found["flat_ghost_T512"].value == 0.5 and found["groupwise_T512"].value == 8 / 11
    assert found["full_T1024"].value == 8 / 11 and found["full_T2048"].value is None
    assert found["vs_jax_privacy_T512"].value == 15 / 12.5
    # The leanest of those that have the same rule, and beside it the fastest.
    assert found["memory_best"].value == 1.5 and found["memory_best"].met is False
    assert found["memory_best"].note.startswith("ghost, 4 parts:") and "; scan:" in found["memory_best"].note
    assert found["vs_opacus_ghost_T512"].value == 1.5 / 3 and found["vs_opacus_ghost_T512"].met is True
    # On a CPU goals of speed say nothing.
    assert all(found[name].goal is None for name in privacy.RATIOS)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parts"), [(2, 1)])
def test_every_setting_takes_a_step(rank, parts):
    steps = Steps(Work(24, 4, "tiny", rank=rank))
    known = settings(parts)
    assert {method for method, _ in known.values()} == {"plain", *METHODS} - {"auto"}
    for method, parts in (*known.values(), ("jax_privacy", 2)):
        before = jax.device_get(steps.state.trainable)
        steps(method, parts)
        assert np.isfinite(jax.tree.leaves(steps.state.trainable)[0]).all()
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), before, steps.state.trainable)))
    assert int(steps.state.step) == len(known) + 1


def test_theirs_releases_what_ours_does():
    """The same clipped sum; the noise has other numbers and the same size."""
    moved = {}
    for method, parts in (("scan", 1), ("jax_privacy", 1)):
        steps = Steps(Work(24, 4, "tiny"))
        steps._rule = optax.sgd(1.0)
        steps.state = steps.state._replace(opt_state=steps._rule.init(steps.state.trainable))
        before = jax.device_get(steps.state.trainable)
        steps(method, parts)
        after = jax.device_get(steps.state.trainable)
        moved[method] = np.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (before, after)))])
    sizes = [values.std() for values in moved.values()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[0] == pytest.approx(1 / 4, rel=0.1)


def test_the_kept_rows_follow_from_the_kept_seconds():
    known = json.loads((RESULTS / "privacy.json").read_text())
    found = {row.name: row.value for row in privacy.table(known["details"])}
    assert found == pytest.approx({row["name"]: row["value"] for row in known["rows"]})
