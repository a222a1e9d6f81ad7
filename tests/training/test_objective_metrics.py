import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import LossOut, Objective
from shiq_jax.training.objective_metrics import objective_metrics


def test_an_objective_reads_each_reference_by_its_name(on_mesh, records, make_buffer):
    """The mean difference of two references, which only an objective that sees both can compute."""

    def shift(example):
        difference = example.references["previous"].logp - example.references["reference"].logp
        total = jnp.sum(jnp.where(example.action_mask, difference, 0))
        return LossOut(total, jnp.sum(example.action_mask, dtype=jnp.float32), {"shift": total})

    rng = np.random.default_rng(5)
    first, previous = (
        [tuple(rng.normal(size=(2, len(record.rewards))).astype(np.float32)) for record in records] for _ in range(2)
    )
    objective = Objective(shift, frozenset({"references"}), "trajectory", trains_policy=False)
    model, params = on_mesh()
    references = {"reference": first, "previous": previous}
    found = objective_metrics(model, params, objective, make_buffer(records), references)
    expected = np.concatenate([now[0] - then[0] for now, then in zip(previous, first, strict=True)]).mean()
    assert found["shift"] == found["loss"] == pytest.approx(expected, rel=1e-5)
