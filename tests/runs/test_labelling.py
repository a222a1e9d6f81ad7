"""Updates and metrics of losses on labeled answers match an unbatched computation for any batching and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.objectives import OBJECTIVES, apo_zero_unpaired_loss, kto_loss
from shiq_jax.replay import Buffer, pack, pack_groups, plan
from shiq_jax.replay.labels import labeled_records
from shiq_jax.training.objective_metrics import objective_metrics
from shiq_jax.training.placement import data_parallel_size, shard_batch
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

TOLERANCE = 1e-5
OPTIONS = {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.5}
LOSSES = ("kto", "apo_zero_unpaired")


@pytest.fixture(scope="module")
def buffers(records, tmp_path_factory):
    """Loss -> labeled buffer of the random records."""
    root, buffers = tmp_path_factory.mktemp("labels"), {}
    answers = Buffer.create(root / "answers")
    answers.append(records)
    for name in LOSSES:
        buffers[name] = Buffer.create(root / name)
        buffers[name].append(labeled_records(answers, mismatched=name == "kto"))
    return buffers


@pytest.fixture(scope="module")
def references(buffers):
    """Random reference statistics, low enough that the KL estimate is positive."""
    rng = np.random.default_rng(3)
    return {
        name: [
            tuple(rng.normal((-5, 4), 1, (len(record.rewards), 2)).astype(np.float32).T)
            for record in buffer.read(range(len(buffer)))
        ]
        for name, buffer in buffers.items()
    }


@pytest.fixture(scope="module")
def expected(model, host_params, buffers, references, unpacked_records):
    """Loss, KL and gradient computed from the full logits, with one record per row."""

    def compute(name):
        buffer = buffers[name]
        data = unpacked_records(buffer.read(range(len(buffer))), references[name])
        desirable = np.array([label is True for label in buffer.column("label")])

        def loss(params):
            stats = data.statistics(model, params)
            logratios = jnp.sum(jnp.where(data.mask, stats.logp - data.reference.logp, 0), axis=1)
            if name == "kto":
                kl = jnp.maximum(jax.lax.stop_gradient(jnp.mean(logratios[1::2])), 0)
                return jnp.mean(kto_loss(logratios[::2], desirable[::2], kl=kl, **OPTIONS)), kl
            return jnp.mean(apo_zero_unpaired_loss(logratios, desirable, **OPTIONS)), 0.0

        (value, kl), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(host_params))
        return value, kl, grads

    return {name: compute(name) for name in LOSSES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "microbatches"),
    [("kto", None, 1), ("kto", None, 4), ("kto", "fsdp=8", 1), ("kto", "replica=2,fsdp=2", 2),
     ("apo_zero_unpaired", None, 1), ("apo_zero_unpaired", "fsdp=8", 2)],
)  # fmt: skip
def test_loss_and_gradient_are_independent_of_mesh_and_microbatches(
    name, mesh, microbatches, buffers, references, expected, model_on_mesh, get_mesh, relative_error
):
    objective, buffer = OBJECTIVES[name].configure(**OPTIONS), buffers[name]
    model, params = model_on_mesh(mesh)
    groups, rows = pack_groups(buffer, objective.unit), data_parallel_size(get_mesh(mesh)) * microbatches
    shape = plan(buffer, groups, multiple=8)
    batch = shard_batch(
        pack(groups, buffer, shape, references={"reference": references[name]}, rows_multiple=rows).batch,
        get_mesh(mesh),
    )
    optimizer = optax.sgd(1.0, momentum=0.0)
    update = make_update(model, objective, optimizer, microbatches=microbatches)
    state, metrics = update(init_state(model, params, optimizer), batch)
    loss, kl, grads = expected[name]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(jax.device_get(optax.tree.get(state.opt_state, "trace")), grads) < TOLERANCE
    assert metrics["weight"] == len(buffer) // (2 if name == "kto" else 1)
    if name == "kto":
        np.testing.assert_allclose(metrics["kl"], kl, rtol=TOLERANCE)
        assert kl > 0 and 0 < metrics["desirable"] < 1


@pytest.mark.parametrize("prompts_per_batch", [3, 64])
def test_objective_metrics_estimate_the_kl_over_the_whole_buffer(
    prompts_per_batch, buffers, references, expected, model_on_mesh
):
    model, params = model_on_mesh()
    objective, buffer = OBJECTIVES["kto"].configure(**OPTIONS), buffers["kto"]
    metrics = objective_metrics(
        model, params, objective, buffer, {"reference": references["kto"]}, prompts_per_batch=prompts_per_batch
    )
    loss, kl, _ = expected["kto"]
    assert metrics["loss"] == pytest.approx(loss, rel=TOLERANCE) and metrics["kl"] == pytest.approx(kl, rel=TOLERANCE)
    assert metrics["desirable"] == pytest.approx(np.mean(buffer.column("label")[::2]))
