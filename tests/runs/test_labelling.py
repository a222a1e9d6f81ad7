"""Updates and measurements of losses on labelled answers against one record at a time, however a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.objectives import OBJECTIVES, apo_zero_unpaired_loss, kto_loss
from shiq_jax.replay import Buffer, pack, pack_groups, plan
from shiq_jax.replay.labels import labelled
from shiq_jax.training.objective_metrics import objective_metrics
from shiq_jax.training.placement import data_parallel_size, shard_batch
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

TOLERANCE = 1e-5
OPTIONS = {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.5}
LOSSES = ("kto", "apo_zero_unpaired")


@pytest.fixture(scope="module")
def buffers(records, tmp_path_factory):
    """By loss: the labelled buffer of the random records."""
    root, made = tmp_path_factory.mktemp("labels"), {}
    answers = Buffer.create(root / "answers")
    answers.append(records)
    for name in LOSSES:
        made[name] = Buffer.create(root / name)
        made[name].append(labelled(answers, mismatched=name == "kto"))
    return made


@pytest.fixture(scope="module")
def references(buffers):
    """Some model's statistics of every record, so far below the policy's that the KL is positive."""
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
    """Loss, KL and gradient from whole logits, a record to a row."""

    def get(name):
        buffer = buffers[name]
        data = unpacked_records(buffer.read(range(len(buffer))), references[name])
        good = np.array([label is True for label in buffer.column("label")])

        def loss(params):
            stats = data.statistics(model, params)
            sums = jnp.sum(jnp.where(data.mask, stats.logp - data.reference.logp, 0), axis=1)
            if name == "kto":
                kl = jnp.maximum(jax.lax.stop_gradient(jnp.mean(sums[1::2])), 0)
                return jnp.mean(kto_loss(sums[::2], good[::2], kl=kl, **OPTIONS)), kl
            return jnp.mean(apo_zero_unpaired_loss(sums, good, **OPTIONS)), 0.0

        (value, kl), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(host_params))
        return value, kl, grads

    return {name: get(name) for name in LOSSES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "microbatches"),
    [("kto", None, 1), ("kto", None, 4), ("kto", "fsdp=8", 1), ("kto", "replica=2,fsdp=2", 2),
     ("apo_zero_unpaired", None, 1), ("apo_zero_unpaired", "fsdp=8", 2)],
)  # fmt: skip
def test_loss_and_gradient_do_not_depend_on_the_cut(
    name, mesh, microbatches, buffers, references, expected, model_on_mesh, get_mesh, relative_error
):
    objective, buffer = OBJECTIVES[name].configure(**OPTIONS), buffers[name]
    model, params = model_on_mesh(mesh)
    drawn, rows = pack_groups(buffer, objective.unit), data_parallel_size(get_mesh(mesh)) * microbatches
    shape = plan(buffer, drawn, multiple=8)
    batch = shard_batch(
        pack(drawn, buffer, shape, references={"reference": references[name]}, rows_multiple=rows).batch,
        get_mesh(mesh),
    )
    rule = optax.sgd(1.0, momentum=0.0)
    update = make_update(model, objective, rule, microbatches=microbatches)
    state, metrics = update(init_state(model, params, rule), batch)
    loss, kl, grads = expected[name]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(jax.device_get(optax.tree.get(state.opt_state, "trace")), grads) < TOLERANCE
    assert metrics["weight"] == len(buffer) // (2 if name == "kto" else 1)
    if name == "kto":
        np.testing.assert_allclose(metrics["kl"], kl, rtol=TOLERANCE)
        assert kl > 0 and 0 < metrics["desirable"] < 1


@pytest.mark.parametrize("prompts_per_batch", [3, 64])
def test_a_measurement_couples_the_whole_buffer(prompts_per_batch, buffers, references, expected, model_on_mesh):
    model, params = model_on_mesh()
    objective, buffer = OBJECTIVES["kto"].configure(**OPTIONS), buffers["kto"]
    found = objective_metrics(
        model, params, objective, buffer, {"reference": references["kto"]}, prompts_per_batch=prompts_per_batch
    )
    loss, kl, _ = expected["kto"]
    assert found["loss"] == pytest.approx(loss, rel=TOLERANCE) and found["kl"] == pytest.approx(kl, rel=TOLERANCE)
    assert found["desirable"] == pytest.approx(np.mean(buffer.column("label")[::2]))
