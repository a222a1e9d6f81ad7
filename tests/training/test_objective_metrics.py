"""An objective's metrics over a whole buffer."""

import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import LossOut, Objective
from shiq_jax.training.objective_metrics import objective_metrics


def test_objective_reads_references_by_name(model_on_mesh, records, make_buffer):
    """The objective is the mean difference between two references."""

    def difference_loss(example):
        difference = example.references["previous"].logp - example.references["reference"].logp
        total = jnp.sum(jnp.where(example.action_mask, difference, 0))
        return LossOut(total, jnp.sum(example.action_mask, dtype=jnp.float32), {"difference": total})

    rng = np.random.default_rng(5)
    first, previous = (
        [tuple(rng.normal(size=(2, len(record.rewards))).astype(np.float32)) for record in records] for _ in range(2)
    )
    objective = Objective(difference_loss, frozenset({"references"}), "trajectory", trains_policy=False)
    model, params = model_on_mesh()
    references = {"reference": first, "previous": previous}
    metrics = objective_metrics(model, params, objective, make_buffer(records), references)
    expected = np.concatenate([a[0] - b[0] for a, b in zip(previous, first, strict=True)]).mean()
    assert metrics["difference"] == metrics["loss"] == pytest.approx(expected, rel=1e-5)
