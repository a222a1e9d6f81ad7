"""The update step against one record at a time on whole logits, and what must change nothing in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES, Couple, LossOut, Objective, TokenStats, dpo_loss, sft_loss, shiq_loss
from shiq_jax.replay import Buffer, Record, pack, pack_groups, plan
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.placement import data_devices, place
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

TOLERANCE = 1e-5


def group_loss(example):
    """Each return less the mean of its group, times the log-probability; weight: the sequences."""
    real = jnp.any(example.action_mask, axis=-1)
    returns, size = jnp.sum(example.rewards, axis=-1), jnp.maximum(jnp.sum(real), 1)
    advantages = jnp.where(real, returns - jnp.sum(returns) / size, 0)
    value = -jnp.sum(advantages[:, None] * example.policy.logp)
    return LossOut(value, jnp.sum(real).astype(jnp.float32), {"return": jnp.sum(returns)})


def coupled_loss(example):
    """The return less a baseline that the batch made, times the log-probability."""
    advantage = jnp.sum(example.rewards) - example.coupled
    return LossOut(-advantage * jnp.sum(example.policy.logp), jnp.float32(1), {"baseline": example.coupled})


def summary(example):
    return {"return": jnp.sum(example.rewards), "logp": jnp.sum(example.policy.logp)}


def combine(summaries, weights):
    """The weighted mean return, and of that what the policy's own mean log-probability makes of it."""
    mean = {name: jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1) for name, values in summaries.items()}
    return jnp.broadcast_to(mean["return"] + 0.3 * mean["logp"], weights.shape)


OURS = {
    "shiq": OBJECTIVES["shiq"].configure(beta=0.5, gamma=0.9),
    "sft": OBJECTIVES["sft"],
    "dpo": OBJECTIVES["dpo"].configure(beta=0.7, label_smoothing=0.1),
    "aot_unpaired": OBJECTIVES["aot_unpaired"].configure(beta=0.7, label_smoothing=0.1),
    "weighted": OBJECTIVES["dpo"].configure(beta=0.7, rpo_alpha=0.5, use_weighting=True),
    "group": Objective(group_loss, frozenset({"rewards"}), "group"),
    "coupled": Objective(coupled_loss, frozenset({"rewards"}), "trajectory", Couple(summary, combine)),
}


def naive_shiq(stats, data, buffer):
    losses = jax.vmap(lambda *x: shiq_loss(*x, beta=0.5, gamma=0.9))(stats, data.reference, data.rewards, data.mask)
    return jnp.mean(losses)


def naive_sft(stats, data, buffer):
    return jnp.sum(jax.vmap(sft_loss)(stats, data.mask)) / data.mask.sum()


def pairs_of(data, buffer):
    """Places of the best and the worst record of every group, [2, pairs]."""
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


def naive_dpo(stats, data, buffer):
    return jnp.mean(dpo_loss(*pair_logratios(stats, data, buffer), beta=0.7, label_smoothing=0.1))


def naive_weighted(stats, data, buffer):
    """Likelihood per action of the chosen record, and the weight of either, which is a constant."""
    logp, collision = (jnp.mean(x, axis=1, where=data.mask) for x in (stats.logp, stats.lse2 - 2 * stats.lse))
    pairs = pairs_of(data, buffer)
    weights = jax.lax.stop_gradient(jnp.prod(jnp.exp(logp - collision)[pairs], axis=0))
    contrast = dpo_loss(*pair_logratios(stats, data, buffer), beta=0.7)
    return jnp.mean(weights * (contrast - 0.5 * logp[pairs[0]]))


def naive_aot_unpaired(stats, data, buffer):
    chosen, rejected = jnp.sort(pair_logratios(stats, data, buffer), axis=1)
    return jnp.mean(dpo_loss(chosen, rejected, beta=0.7, label_smoothing=0.1))


def naive_group(stats, data, buffer):
    groups, returns = np.array(buffer.group_ids()), data.rewards.sum(1)
    means = np.array([returns[groups == name].mean() for name in groups])
    return -jnp.mean((returns - means) * jnp.sum(jnp.where(data.mask, stats.logp, 0), axis=1))


def naive_coupled(stats, data, buffer):
    logp, returns = jnp.sum(jnp.where(data.mask, stats.logp, 0), axis=1), data.rewards.sum(1)
    baseline = jax.lax.stop_gradient(jnp.mean(returns) + 0.3 * jnp.mean(logp))
    return -jnp.mean((returns - baseline) * logp)


NAIVE = {
    "shiq": naive_shiq, "sft": naive_sft, "dpo": naive_dpo, "group": naive_group, "coupled": naive_coupled,
    "aot_unpaired": naive_aot_unpaired, "weighted": naive_weighted,
}  # fmt: skip


@pytest.fixture(scope="module")
def references(records):
    """Some model's statistics of every record."""
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
        drawn = pack_groups(buffer, objective.unit, share_prompts)
        shape = plan(buffer, drawn, multiple=8, **sizes)
        known = {"reference": references} if "references" in objective.needs else {}
        return place(pack(drawn, buffer, shape, references=known, rows_multiple=rows_multiple).batch, mesh)

    return make


@pytest.fixture(scope="module")
def expected(model, host_params, records, references, buffer, dense):
    """Loss and gradient of the naive computation by the objective's name, all made by one program."""
    data = dense(records, references)

    def losses(params):
        stats = data.statistics(model, params)
        values = jnp.stack([naive(stats, data, buffer) for naive in NAIVE.values()])
        return values, values

    grads, values = jax.device_get(jax.jit(jax.jacrev(losses, has_aux=True))(host_params))

    def get(name):
        place = list(NAIVE).index(name)
        return values[place], jax.tree.map(lambda leaf: leaf[place], grads)

    return get


@pytest.fixture(scope="module")
def descend(on_mesh):
    """(metrics, gradient, state) of one step of plain descent; a momentum of 0 leaves the gradient in the state."""
    rule = optax.sgd(1.0, momentum=0.0)
    updates = {}

    def run(name, batch, mesh=None, microbatches=1):
        model, params = on_mesh(mesh)
        case = (name, mesh, microbatches)
        if case not in updates:
            updates[case] = make_update(model, OURS[name], rule, microbatches=microbatches)
        state, metrics = updates[case](init_state(model, params, rule), batch)
        return jax.device_get(metrics), jax.device_get(optax.tree.get(state.opt_state, "trace")), state

    return run


@pytest.mark.parametrize("name", NAIVE)
def test_loss_and_gradient_are_those_of_each_record_alone(name, packed, descend, expected, host_params, relative):
    metrics, gradient, state = descend(name, packed(OURS[name]))
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative(gradient, grads) < TOLERANCE
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=TOLERANCE)
    # Plain descent with a rate of 1 moves the parameters by the gradient itself.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params()), _moved(host_params, gradient))
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params()), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("name", "weight"), [("shiq", "records"), ("sft", "actions"), ("dpo", "pairs"), ("group", "records")]
)
def test_the_weight_counts_the_whole_batch(name, weight, packed, descend, records, buffer):
    counts = {
        "records": len(records),
        "actions": sum(len(record.rewards) for record in records),
        "pairs": len(pack_groups(buffer, "pair")),
    }
    batch = packed(OURS[name])
    assert batch.real.shape[0] * batch.real.shape[1] > batch.real.sum(), "no padding: the test would show nothing"
    metrics, _, _ = descend(name, batch)
    assert metrics["weight"] == counts[weight]
    if weight == "records":
        mean = np.mean([record.rewards.sum() for record in records])
        np.testing.assert_allclose(metrics["return"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "microbatches"), [("shiq", 4), ("dpo", 2), ("coupled", 2), ("aot_unpaired", 2)])
def test_microbatches_change_nothing(name, microbatches, packed, descend, expected, relative):
    metrics, gradient, _ = descend(name, packed(OURS[name]), microbatches=microbatches)
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative(gradient, grads) < TOLERANCE


@pytest.mark.parametrize(
    "packing", [{"share_prompts": False}, {"row_length": 96, "rows_multiple": 1}], ids=["own prompts", "long rows"]
)
def test_packing_changes_nothing(packing, packed, descend, expected, relative):
    objective = OURS["shiq"]
    batch = packed(objective, **packing)
    assert batch.tokens.shape != packed(objective).tokens.shape
    metrics, gradient, _ = descend("shiq", batch)
    loss, grads = expected("shiq")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative(gradient, grads) < TOLERANCE


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
def test_a_mesh_changes_nothing(name, mesh, microbatches, packed, descend, expected, requested_mesh, relative):
    rows = data_devices(requested_mesh(mesh)) * microbatches
    batch = packed(OURS[name], requested_mesh(mesh), rows_multiple=rows)
    assert len(batch.tokens.sharding.device_set) == requested_mesh(mesh).size
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape)[0] * data_devices(requested_mesh(mesh)) == len(
        batch.tokens
    )
    metrics, gradient, state = descend(name, batch, mesh, microbatches)
    loss, grads = expected(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative(gradient, grads) < TOLERANCE
    _check_born_where_they_belong(state.params(), requested_mesh(mesh))


@pytest.fixture(scope="module", params=[None, "replica=2,fsdp=2,tensor=2"], ids=["one device", "mesh"])
def trained(request, on_mesh, packed, requested_mesh):
    """An update by adamw of a model with frozen embeddings and slow copies; it leaves the gradient in the state, too.

    (update, a maker of fresh states, batch, programs compiled so far after each of three updates)
    """
    model, _ = on_mesh(request.param)
    rule = optax.chain(optax.trace(decay=0.0), Optimizer("adamw", learning_rate=1e-2).build(10))
    update, batch = make_update(model, OURS["shiq"], rule), packed(OURS["shiq"], requested_mesh(request.param))

    def fresh():
        return init_state(
            model,
            on_mesh(request.param)[1],
            rule,
            trainable=lambda path: path[0] != "embed",
            targets=lambda params: {"norm": params["norm"]},
        )

    return update, fresh, batch, _programs(update, fresh(), batch)


def _programs(update, state, batch):
    compiled, counts = [], []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            state, _ = update(state, batch)
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return counts


def test_equal_shapes_compile_once(trained):
    *_, counts = trained
    assert counts == [1, 1, 1]


def test_frozen_subtrees_stay_bit_for_bit_and_slow_copies_follow(trained, host_params):
    update, fresh, batch, _ = trained
    slow, state = host_params["norm"]["scale"], fresh()
    for _ in range(2):
        state, _ = update(state, batch)
        slow = slow + OURS["shiq"].polyak * (np.asarray(state.trainable["norm"]["scale"]) - slow)
    np.testing.assert_array_equal(state.frozen["embed"]["table"], host_params["embed"]["table"])
    np.testing.assert_array_equal(state.params()["embed"]["table"], host_params["embed"]["table"])
    np.testing.assert_allclose(state.targets["norm"]["scale"], slow, rtol=1e-6)
    assert np.any(np.asarray(state.targets["norm"]["scale"]) != host_params["norm"]["scale"])
    assert "embed" not in state.trainable
    moved = jax.tree.map(
        lambda new, old: np.any(np.asarray(new) != old), state.trainable, _without(host_params, "embed")
    )
    assert all(jax.tree.leaves(moved))


def test_freezing_does_not_change_the_gradient_of_the_rest(trained, expected, relative):
    update, fresh, batch, _ = trained
    state, _ = update(fresh(), batch)
    grads = optax.tree.get(state.opt_state, "trace")
    assert relative(jax.device_get(grads), _without(expected("shiq")[1], "embed")) < TOLERANCE


def test_donation_frees_the_old_state(trained):
    update, fresh, batch, _ = trained
    old = fresh()
    new, _ = update(old, batch)
    kept = [path for path, leaf in jax.tree_util.tree_leaves_with_path(old) if not leaf.is_deleted()]
    assert not kept, [jax.tree_util.keystr(path) for path in kept]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_shardings_survive_an_update(trained):
    update, fresh, batch, _ = trained
    old = fresh()
    before = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(old)]
    new, _ = update(old, batch)
    for (path, leaf), (sharding, ndim) in zip(jax.tree_util.tree_leaves_with_path(new), before, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, ndim), jax.tree_util.keystr(path)
    if len(new.step.sharding.device_set) > 1:
        assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new.opt_state))


@pytest.mark.parametrize("name", ["shiq", "coupled"])
def test_a_batch_without_weight_moves_nothing(name, packed, descend, host_params):
    batch = packed(OURS[name])
    empty = batch._replace(real=jnp.zeros_like(batch.real))
    metrics, gradient, state = descend(name, empty)
    assert metrics["weight"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params()), host_params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_what_padding_holds_does_not_matter(packed, descend, expected, relative):
    """Poison in the rewards and references of empty places reaches neither the loss nor the gradient."""
    objective = OURS["shiq"]
    batch = packed(objective)
    poison = lambda values: jnp.where(batch.example.action_mask, values, jnp.nan)
    example = batch.example._replace(
        rewards=poison(batch.example.rewards),
        references={"reference": TokenStats(*map(poison, batch.example.references["reference"][:2]))},
    )
    metrics, gradient, _ = descend("shiq", batch._replace(example=example))
    loss, grads = expected("shiq")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=TOLERANCE)
    assert relative(gradient, grads) < TOLERANCE


def test_rows_that_cannot_be_cut_are_refused(packed, descend):
    batch = packed(OURS["shiq"])
    with pytest.raises(ValueError, match=f"{len(batch.tokens)} rows cannot be cut into 3 equal microbatches"):
        descend("shiq", batch, microbatches=3)


def _moved(params, gradient):
    return jax.tree.map(lambda param, grad: param - grad, params, gradient)


def _without(params, name):
    return {key: child for key, child in params.items() if key != name}


def _check_born_where_they_belong(params, mesh):
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    shares = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * shares == kernel.size


@pytest.mark.slow
def test_microbatches_add_up_in_one_array_of_gradients(full_compilation, tmp_path):
    """What a step needs beside the state is not more for many microbatches than for one, with its gradient."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=6, num_heads=2, num_kv_heads=2
    )
    model, rule = Model.from_config(config, remat="full"), optax.adamw(1e-3)
    rng, buffer = np.random.default_rng(0), Buffer.create(tmp_path / "buffer")
    mask = np.arange(8) > 2
    buffer.append(
        [
            Record(tokens=rng.integers(64, size=8), action_mask=mask, rewards=mask[mask] * 1.0, group=str(number))
            for number in range(8)
        ]
    )
    drawn = pack_groups(buffer, "trajectory")
    batch = pack(drawn, buffer, plan(buffer, drawn, multiple=8)._replace(slots=1), rows_multiple=8).batch
    state = init_state(model, init_params(model, jax.random.key(0)), rule)

    def beside(microbatches):
        update = make_update(model, OBJECTIVES["sft"], rule, microbatches=microbatches)
        return update.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert beside(8) < 1.05 * beside(1)
