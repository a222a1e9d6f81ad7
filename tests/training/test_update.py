"""The update step: parity with an unpacked computation; invariance to packing, microbatches and meshes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES, Couple, LossOut, Objective, TokenStats, dpo_loss, sft_loss, shiq_loss
from shiq_jax.privacy import Mechanism
from shiq_jax.replay import Buffer, Record, pack, pack_groups, plan
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.placement import data_parallel_size, shard_batch
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

TOLERANCE = 1e-5


def group_loss(example):
    """REINFORCE with the group's mean return as baseline; weighted by the number of sequences."""
    real = jnp.any(example.action_mask, axis=-1)
    returns, size = jnp.sum(example.rewards, axis=-1), jnp.maximum(jnp.sum(real), 1)
    advantages = jnp.where(real, returns - jnp.sum(returns) / size, 0)
    value = -jnp.sum(advantages[:, None] * example.policy.logp)
    return LossOut(value, jnp.sum(real).astype(jnp.float32), {"return": jnp.sum(returns)})


def coupled_loss(example):
    """REINFORCE with a baseline computed from the whole batch."""
    advantage = jnp.sum(example.rewards) - example.coupled
    return LossOut(-advantage * jnp.sum(example.policy.logp), jnp.float32(1), {"baseline": example.coupled})


def summary(example):
    return {"return": jnp.sum(example.rewards), "logp": jnp.sum(example.policy.logp)}


def combine(summaries, weights):
    """Baseline: weighted mean return plus 0.3 times the mean log-probability."""
    mean = {name: jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1) for name, values in summaries.items()}
    return jnp.broadcast_to(mean["return"] + 0.3 * mean["logp"], weights.shape)


PARITY_OBJECTIVES = {
    "shiq": OBJECTIVES["shiq"].configure(beta=0.5, gamma=0.9),
    "sft": OBJECTIVES["sft"],
    "dpo": OBJECTIVES["dpo"].configure(beta=0.7, label_smoothing=0.1),
    "aot_unpaired": OBJECTIVES["aot_unpaired"].configure(beta=0.7, label_smoothing=0.1),
    "weighted": OBJECTIVES["dpo"].configure(beta=0.7, rpo_alpha=0.5, use_weighting=True),
    "group": Objective(group_loss, frozenset({"rewards"}), "group"),
    "coupled": Objective(coupled_loss, frozenset({"rewards"}), "trajectory", Couple(summary, combine)),
}


def unpacked_shiq(stats, data, buffer):
    losses = jax.vmap(lambda *x: shiq_loss(*x, beta=0.5, gamma=0.9))(stats, data.reference, data.rewards, data.mask)
    return jnp.mean(losses)


def unpacked_sft(stats, data, buffer):
    return jnp.sum(jax.vmap(sft_loss)(stats, data.mask)) / data.mask.sum()


def pairs_of(data, buffer):
    """Indices of the best and the worst record of every group, [2, pairs]."""
    groups, returns = np.array(buffer.group_ids()), data.rewards.sum(1)
    pairs = []
    for name in np.unique(groups):
        (members,) = np.nonzero(groups == name)
        if len(members) > 1:
            pairs.append((members[np.argmax(returns[members])], members[np.argmin(returns[members])]))
    return np.array(pairs).T


def pair_logratios(stats, data, buffer):
    sums = jnp.sum(jnp.where(data.mask, stats.logp - data.reference.logp, 0), axis=1)
    return sums[pairs_of(data, buffer)]


def unpacked_dpo(stats, data, buffer):
    return jnp.mean(dpo_loss(*pair_logratios(stats, data, buffer), beta=0.7, label_smoothing=0.1))


def unpacked_weighted(stats, data, buffer):
    """WPO weights times DPO plus the mean log-likelihood of the chosen record."""
    logp, collision = (jnp.mean(x, axis=1, where=data.mask) for x in (stats.logp, stats.lse2 - 2 * stats.lse))
    pairs = pairs_of(data, buffer)
    weights = jax.lax.stop_gradient(jnp.prod(jnp.exp(logp - collision)[pairs], axis=0))
    preference_term = dpo_loss(*pair_logratios(stats, data, buffer), beta=0.7)
    return jnp.mean(weights * (preference_term - 0.5 * logp[pairs[0]]))


def unpacked_aot_unpaired(stats, data, buffer):
    chosen, rejected = jnp.sort(pair_logratios(stats, data, buffer), axis=1)
    return jnp.mean(dpo_loss(chosen, rejected, beta=0.7, label_smoothing=0.1))


def unpacked_group(stats, data, buffer):
    groups, returns = np.array(buffer.group_ids()), data.rewards.sum(1)
    means = np.array([returns[groups == name].mean() for name in groups])
    return -jnp.mean((returns - means) * jnp.sum(jnp.where(data.mask, stats.logp, 0), axis=1))


def unpacked_coupled(stats, data, buffer):
    logp, returns = jnp.sum(jnp.where(data.mask, stats.logp, 0), axis=1), data.rewards.sum(1)
    baseline = jax.lax.stop_gradient(jnp.mean(returns) + 0.3 * jnp.mean(logp))
    return -jnp.mean((returns - baseline) * logp)


UNPACKED_LOSSES = {
    "shiq": unpacked_shiq, "sft": unpacked_sft, "dpo": unpacked_dpo, "group": unpacked_group,
    "coupled": unpacked_coupled, "aot_unpaired": unpacked_aot_unpaired, "weighted": unpacked_weighted,
}  # fmt: skip


@pytest.fixture(scope="module")
def references(records):
    """Random statistics of every record."""
    rng = np.random.default_rng(3)
    counts = [len(record.rewards) for record in records]
    return [tuple(rng.normal((-3, 4), 1, (count, 2)).astype(np.float32).T) for count in counts]


@pytest.fixture(scope="module")
def buffer(records, tmp_path_factory):
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)
    return buffer


@pytest.fixture(scope="module")
def packed(buffer, references):
    """All examples of the buffer in one batch."""

    def make(objective, mesh=None, *, rows_multiple=8, share_prompts=True, **sizes):
        groups = pack_groups(buffer, objective.unit, share_prompts)
        shape = plan(buffer, groups, multiple=8, **sizes)
        batch_references = {"reference": references} if "references" in objective.needs else {}
        packed_batch = pack(groups, buffer, shape, references=batch_references, rows_multiple=rows_multiple)
        return shard_batch(packed_batch.batch, mesh)

    return make


@pytest.fixture(scope="module")
def expected(model, host_params, records, references, buffer, unpacked_records):
    """`expected(name)`: loss and gradient of the unpacked computation."""
    data = unpacked_records(records, references)

    def losses(params):
        stats = data.statistics(model, params)
        values = jnp.stack([loss(stats, data, buffer) for loss in UNPACKED_LOSSES.values()])
        return values, values

    grads, values = jax.device_get(jax.jit(jax.jacrev(losses, has_aux=True))(host_params))

    def get(name):
        index = list(UNPACKED_LOSSES).index(name)
        return values[index], jax.tree.map(lambda leaf: leaf[index], grads)

    return get


@pytest.fixture(scope="module")
def sgd_step(model_on_mesh):
    """(metrics, gradient, state) of one SGD step with learning rate 1."""
    optimizer = optax.sgd(1.0, momentum=0.0)  # with momentum 0 the trace equals the gradient
    updates = {}

    def run(name, batch, mesh=None, microbatches=1):
        model, params = model_on_mesh(mesh)
        case = (name, mesh, microbatches)
        if case not in updates:
            updates[case] = make_update(model, PARITY_OBJECTIVES[name], optimizer, microbatches=microbatches)
        state, metrics = updates[case](init_state(model, params, optimizer), batch)
        return jax.device_get(metrics), jax.device_get(optax.tree.get(state.opt_state, "trace")), state

    return run


@pytest.mark.parametrize("name", UNPACKED_LOSSES)
def test_loss_and_gradient_match_unpacked_computation(name, packed, sgd_step, expected, host_params, relative_error):
    metrics, gradient, state = sgd_step(name, packed(PARITY_OBJECTIVES[name]))
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(gradient, grads) < TOLERANCE
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=TOLERANCE)
    chex.assert_trees_all_equal(jax.device_get(state.params()), optax.tree.sub(host_params, gradient))
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params()), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("name", "weight"), [("shiq", "records"), ("sft", "actions"), ("dpo", "pairs"), ("group", "records")]
)
def test_weight_is_the_count_over_the_batch(name, weight, packed, sgd_step, records, buffer):
    counts = {
        "records": len(records),
        "actions": sum(len(record.rewards) for record in records),
        "pairs": len(pack_groups(buffer, "pair")),
    }
    batch = packed(PARITY_OBJECTIVES[name])
    assert batch.real.shape[0] * batch.real.shape[1] > batch.real.sum(), "the test needs padding"
    metrics, _, _ = sgd_step(name, batch)
    assert metrics["weight"] == counts[weight]
    if weight == "records":
        mean = np.mean([record.rewards.sum() for record in records])
        np.testing.assert_allclose(metrics["return"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "microbatches"), [("shiq", 4), ("dpo", 2), ("coupled", 2), ("aot_unpaired", 2)])
def test_update_is_invariant_to_microbatches(name, microbatches, packed, sgd_step, expected, relative_error):
    metrics, gradient, _ = sgd_step(name, packed(PARITY_OBJECTIVES[name]), microbatches=microbatches)
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(gradient, grads) < TOLERANCE


@pytest.mark.parametrize(
    "packing", [{"share_prompts": False}, {"row_length": 96, "rows_multiple": 1}], ids=["unshared prompts", "long rows"]
)
def test_update_is_invariant_to_packing(packing, packed, sgd_step, expected, relative_error):
    objective = PARITY_OBJECTIVES["shiq"]
    batch = packed(objective, **packing)
    assert batch.tokens.shape != packed(objective).tokens.shape
    metrics, gradient, _ = sgd_step("shiq", batch)
    loss, grads = expected("shiq")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(gradient, grads) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "mesh", "microbatches"),
    [
        ("shiq", "fsdp=8", 1),
        ("shiq", "fsdp=2,tensor=2", 1),
        ("shiq", "replica=2,fsdp=2", 1),
        ("weighted", "fsdp=2,tensor=2", 1),
        ("coupled", "replica=2,fsdp=2", 2),
    ],
)
def test_update_is_invariant_to_the_mesh(
    name, mesh, microbatches, packed, sgd_step, expected, get_mesh, relative_error
):
    rows = data_parallel_size(get_mesh(mesh)) * microbatches
    batch = packed(PARITY_OBJECTIVES[name], get_mesh(mesh), rows_multiple=rows)
    assert len(batch.tokens.sharding.device_set) == get_mesh(mesh).size
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape)[0] * data_parallel_size(get_mesh(mesh)) == len(
        batch.tokens
    )
    metrics, gradient, state = sgd_step(name, batch, mesh, microbatches)
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(gradient, grads) < TOLERANCE
    _assert_sharded(state.params(), get_mesh(mesh))


@pytest.fixture(scope="module", params=[None, "replica=2,fsdp=2,tensor=2"], ids=["one device", "mesh"])
def trained(request, model_on_mesh, packed, get_mesh):
    """(update, new_state, batch, compilation counts after each of three updates).

    The embeddings are frozen, the norm has a target copy, and the optimizer state contains the gradient.
    """
    model, _ = model_on_mesh(request.param)
    optimizer = optax.chain(optax.trace(decay=0.0), Optimizer("adamw", learning_rate=1e-2).build(10))
    objective = PARITY_OBJECTIVES["shiq"]
    update, batch = make_update(model, objective, optimizer), packed(objective, get_mesh(request.param))

    def new_state():
        return init_state(
            model,
            model_on_mesh(request.param)[1],
            optimizer,
            trainable=lambda path: path[0] != "embed",
            targets=lambda params: {"norm": params["norm"]},
        )

    return update, new_state, batch, _compilation_counts(update, new_state(), batch)


def _compilation_counts(update, state, batch):
    compilations, counts = [], []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            state, _ = update(state, batch)
            counts.append(len(compilations))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return counts


def test_update_compiles_once(trained):
    *_, counts = trained
    assert counts == [1, 1, 1]


def test_frozen_parameters_are_unchanged_and_targets_are_averaged(trained, host_params):
    update, new_state, batch, _ = trained
    target, state = host_params["norm"]["scale"], new_state()
    for _ in range(2):
        state, _ = update(state, batch)
        target = target + PARITY_OBJECTIVES["shiq"].polyak * (np.asarray(state.trainable["norm"]["scale"]) - target)
    np.testing.assert_array_equal(state.frozen["embed"]["table"], host_params["embed"]["table"])
    np.testing.assert_array_equal(state.params()["embed"]["table"], host_params["embed"]["table"])
    np.testing.assert_allclose(state.targets["norm"]["scale"], target, rtol=1e-6)
    assert np.any(np.asarray(state.targets["norm"]["scale"]) != host_params["norm"]["scale"])
    assert "embed" not in state.trainable
    changed = jax.tree.map(
        lambda new, old: np.any(np.asarray(new) != old), state.trainable, _without(host_params, "embed")
    )
    assert all(jax.tree.leaves(changed))


def test_freezing_does_not_change_other_gradients(trained, expected, relative_error):
    update, new_state, batch, _ = trained
    state, _ = update(new_state(), batch)
    grads = optax.tree.get(state.opt_state, "trace")
    assert relative_error(jax.device_get(grads), _without(expected("shiq")[1], "embed")) < TOLERANCE


def test_update_donates_the_state(trained):
    update, new_state, batch, _ = trained
    old = new_state()
    new, _ = update(old, batch)
    remaining = [path for path, leaf in jax.tree_util.tree_leaves_with_path(old) if not leaf.is_deleted()]
    assert not remaining, [jax.tree_util.keystr(path) for path in remaining]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_update_keeps_shardings(trained):
    update, new_state, batch, _ = trained
    old = new_state()
    expected = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(old)]
    new, _ = update(old, batch)
    for (path, leaf), (sharding, ndim) in zip(jax.tree_util.tree_leaves_with_path(new), expected, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, ndim), jax.tree_util.keystr(path)
    if len(new.step.sharding.device_set) > 1:
        assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new.opt_state))


def test_stages_have_named_scopes(model, packed):
    objective, optimizer = PARITY_OBJECTIVES["shiq"], optax.sgd(1.0)
    state = init_state(model, model.abstract_params(), optimizer)
    update = make_update(model, objective, optimizer)
    text = update.lower(state, packed(objective)).as_text(debug_info=True)
    assert all(f"{scope}/" in text or f"{scope})" in text for scope in ("statistics", "objective", "optimizer"))
    assert "noise/" not in text

    mechanism = Mechanism(
        dataset_size=16, expected_batch=8, steps=1, noise_multiplier=1.0, delta=1e-5, largest_batch=8, unit="user"
    )
    update = make_update(model, objective, optimizer, privacy=mechanism)
    text = update.lower(state, packed(objective), private_key=jax.random.key(0)).as_text(debug_info=True)
    assert all(
        f"{scope}/" in text or f"{scope})" in text
        for scope in ("statistics", "objective", "clip", "noise", "optimizer")
    )


@pytest.mark.parametrize("name", ["shiq", "coupled"])
def test_batch_of_weight_zero_gives_no_update(name, packed, sgd_step, host_params):
    batch = packed(PARITY_OBJECTIVES[name])
    empty = batch._replace(real=jnp.zeros_like(batch.real))
    metrics, gradient, state = sgd_step(name, empty)
    assert metrics["weight"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(jax.device_get(state.params()), host_params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_padding_values_have_no_effect(packed, sgd_step, expected, relative_error):
    """NaN in the rewards and references of padding changes neither the loss nor the gradient."""
    objective = PARITY_OBJECTIVES["shiq"]
    batch = packed(objective)
    set_padding_to_nan = lambda values: jnp.where(batch.example.action_mask, values, jnp.nan)
    example = batch.example._replace(
        rewards=set_padding_to_nan(batch.example.rewards),
        references={"reference": TokenStats(*map(set_padding_to_nan, batch.example.references["reference"][:2]))},
    )
    metrics, gradient, _ = sgd_step("shiq", batch._replace(example=example))
    loss, grads = expected("shiq")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative_error(gradient, grads) < TOLERANCE


def test_indivisible_rows_are_rejected(packed, sgd_step):
    batch = packed(PARITY_OBJECTIVES["shiq"])
    with pytest.raises(ValueError, match=f"{len(batch.tokens)} rows cannot be split into 3 equal microbatches"):
        sgd_step("shiq", batch, microbatches=3)


def _without(params, name):
    return {key: child for key, child in params.items() if key != name}


def _assert_sharded(params, mesh):
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * shards == kernel.size


@pytest.mark.slow
def test_microbatches_need_no_additional_gradient_buffer(full_compilation, tmp_path):
    """Temporary memory of many microbatches is at most that of a single one."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=6, num_heads=2, num_kv_heads=2
    )
    model, optimizer = Model.from_config(config, remat="full"), optax.adamw(1e-3)
    rng, buffer = np.random.default_rng(0), Buffer.create(tmp_path / "buffer")
    mask = np.arange(8) > 2
    buffer.append(
        [
            Record(tokens=rng.integers(64, size=8), action_mask=mask, rewards=mask[mask] * 1.0, group=str(index))
            for index in range(8)
        ]
    )
    groups = pack_groups(buffer, "trajectory")
    batch = pack(groups, buffer, plan(buffer, groups, multiple=8)._replace(slots=1), rows_multiple=8).batch
    state = init_state(model, init_params(model, jax.random.key(0)), optimizer)

    def temporary_bytes(microbatches):
        update = make_update(model, OBJECTIVES["sft"], optimizer, microbatches=microbatches)
        return update.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 1.05 * temporary_bytes(1)
