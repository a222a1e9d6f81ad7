"""Every method of clipping against the gradients of all units at once."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.privacy import AutoS, AutoV, DropAbove, FlatClip, Groupwise, clipped_sum, count_groups, per_example

TOLERANCE = 1e-5
NEVER = FlatClip(1e9)


@functools.cache
def compiled(losses, options):
    return jax.jit(lambda params, batch, mask: clipped_sum(losses, params, batch, mask=mask, **dict(options)))


def run(losses, params, batch, mask=None, **options):
    """The clipped sum, by a program that is compiled once for all batches and masks."""
    mask = np.ones(len(jax.tree.leaves(batch)[0]), bool) if mask is None else mask
    return compiled(losses, tuple(sorted(options.items())))(params, batch, mask)


def gradients(losses, params, batch):
    """(gradient in float64, its norm, value) of one unit after the other: nothing of the code under test."""
    gradient = jax.jit(jax.value_and_grad(lambda params, unit: losses(params, unit, None)[0]))
    found = []
    for unit in range(len(jax.tree.leaves(batch)[0])):
        value, grads = jax.device_get(gradient(params, jax.tree.map(lambda leaf: leaf[unit : unit + 1], batch)))
        grads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grads)
        found.append((grads, np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads))), value))
    return found


@pytest.fixture(scope="module")
def expected(decoder, batch_of, example_losses):
    """(sum of the gradients, each scaled and added in float64; norms; losses)."""

    @functools.cache
    def units(variant, unit):
        model, params = decoder(variant)
        return gradients(example_losses(model, unit), params, batch_of(unit))

    def make(variant, unit, clip):
        grads, norms, values = zip(*units(variant, unit))
        factors = [float(clip(jnp.float32(norm))) for norm in norms]
        total = jax.tree.map(lambda *leaves: sum(map(np.multiply, factors, leaves)), *grads)
        return total, np.array(norms), np.array(values)

    return make


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk"])
@pytest.mark.parametrize(
    ("variant", "unit", "part"),
    [
        ("tied", "trajectory", 1.0), ("biases", "group", 1.0), ("tied", "pair", 0.05),
        pytest.param("tied", "pair", None, marks=pytest.mark.slow),
        pytest.param("untied", "pair", 1.0, marks=pytest.mark.slow),
        pytest.param("query and key norms", "pair", 1.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_all_methods_give_the_sum_of_clipped_gradients(
    method, variant, unit, part, decoder, batch_of, example_losses, expected, relative
):
    """Where all are clipped, half of them, and none."""
    norms = expected(variant, unit, NEVER)[1]
    clip = NEVER if part is None else FlatClip(float(part * np.median(norms)))
    model, params = decoder(variant)
    total, found, values = run(example_losses(model, unit), params, batch_of(unit), clip=clip, method=method)
    wanted, norms, losses = expected(variant, unit, clip)
    np.testing.assert_allclose(found, norms, rtol=TOLERANCE)
    np.testing.assert_allclose(values, losses, rtol=TOLERANCE)
    assert relative(total, wanted) < TOLERANCE


@pytest.mark.parametrize("rule", [AutoS(0.3), AutoS(2.0, 5.0), AutoV(0.3), DropAbove(30.0)], ids=str)
def test_rules(rule, decoder, batch_of, example_losses, expected, relative):
    model, params = decoder("tied")
    total, *_ = run(example_losses(model, "pair"), params, batch_of("pair"), clip=rule, method="ghost")
    assert relative(total, expected("tied", "pair", rule)[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["ghost", "bk"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(method, remat, decoder, batch_of, example_losses, expected, relative):
    model, params = decoder("biases")
    model = dataclasses.replace(model, remat=remat)
    total, norms, _ = run(example_losses(model, "pair"), params, batch_of("pair"), clip=FlatClip(1.0), method=method)
    wanted, expected_norms, _ = expected("biases", "pair", FlatClip(1.0))
    np.testing.assert_allclose(norms, expected_norms, rtol=TOLERANCE)
    assert relative(total, wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
def test_a_bfloat16_forward_pass(method, full_compilation, decoder, batch_of, example_losses, relative):
    # Products of bfloat16 that are summed in float32 need the compiler's passes on a CPU.
    model, params = decoder("tied")
    half = dataclasses.replace(model, compute_dtype=jnp.dtype(jnp.bfloat16))
    losses = example_losses(half, "trajectory")
    wanted, norms, _ = run(losses, params, batch_of("trajectory"), clip=FlatClip(1.0), method="vmap")
    total, found, _ = run(losses, params, batch_of("trajectory"), clip=FlatClip(1.0), method=method)
    np.testing.assert_allclose(found, norms, rtol=2e-2)
    assert relative(total, wanted) < 2e-2
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(total))


@pytest.mark.parametrize("microbatch", [1, 2, 8])
def test_a_scan_over_microbatches(microbatch, decoder, batch_of, example_losses, expected, relative):
    model, params = decoder("tied")
    batch = batch_of("trajectory")
    assert len(batch.tokens) == 16
    losses = example_losses(model, "trajectory")
    total, *_ = run(losses, params, batch, clip=FlatClip(1.0), method="scan", microbatch=microbatch)
    assert relative(total, expected("tied", "trajectory", FlatClip(1.0))[0]) < TOLERANCE
    with pytest.raises(ValueError, match="microbatch is 3"):
        run(losses, params, batch, clip=FlatClip(1.0), method="scan", microbatch=3)


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
def test_units_that_do_not_count_change_no_bit(method, decoder, batch_of, example_losses):
    model, params = decoder("tied")
    batch, losses = batch_of("trajectory"), example_losses(model, "trajectory")
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)
    mask = np.arange(16) % 3 > 0
    other = jax.tree.map(lambda leaf: np.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, leaf[::-1]), batch)
    assert np.any(other.tokens != batch.tokens)
    totals = [run(losses, params, each, clip=clip, mask=mask, method=method)[0] for each in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *totals)
    nothing, *_ = run(losses, params, batch, clip=clip, mask=np.zeros(16, bool), method=method)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19, 1e30])
def test_a_unit_whose_gradient_is_no_number_contributes_nothing(
    method, bad, decoder, batch_of, example_losses, relative
):
    model, params = decoder("tied")
    batch, losses = batch_of("trajectory"), example_losses(model, "trajectory")
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)
    rewards = np.array(batch.example.rewards)
    rewards[2][rewards[2] != 0] = bad
    poisoned = batch._replace(example=batch.example._replace(rewards=rewards))
    total, *_ = run(losses, params, poisoned, clip=clip, method=method)
    without, *_ = run(losses, params, batch, clip=clip, mask=np.arange(16) != 2, method=method)
    if bad > 1e20 or np.isnan(bad):
        assert relative(total, without) < TOLERANCE
    distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (total, without)))))
    assert distance <= clip.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("method", ["vmap", "ghost", "bk", "group"])
def test_a_unit_moves_the_sum_by_its_clipped_gradient_and_no_further(method, decoder, batch_of, example_losses):
    model, params = decoder("tied")
    batch, losses = batch_of("pair"), example_losses(model, "pair")
    clip = Groupwise(FlatClip(0.7), count_groups(params)) if method == "group" else FlatClip(0.7)
    whole, norms, _ = run(losses, params, batch, clip=clip, method=method)
    assert np.median(norms) > 0.7
    for unit in range(len(batch.tokens)):
        rest, *_ = run(losses, params, batch, clip=clip, mask=np.arange(len(batch.tokens)) != unit, method=method)
        moved = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (whole, rest)))))
        assert moved <= clip.sensitivity * (1 + 1e-4)
        if method != "group":
            np.testing.assert_allclose(moved, min(0.7, norms[unit]), rtol=1e-3)


def test_groupwise_clips_each_parameter_of_each_layer(decoder, batch_of, example_losses, relative):
    model, params = decoder("biases")
    batch, losses = batch_of("pair"), example_losses(model, "pair")
    clip = Groupwise(AutoS(2.0), count_groups(params))
    # Per layer two norms, and four projections of attention and three of the MLP with kernel and bias; table and norm.
    assert clip.groups == 2 * (2 + 7 * 2) + 2
    total, *_ = run(losses, params, batch, clip=clip, method="auto")
    grads = jax.jit(jax.vmap(jax.grad(lambda params, unit: losses(params, unit, None)[0]), (None, 0)))(
        params, jax.tree.map(lambda leaf: leaf[:, None], batch)
    )
    rule = clip.per_group

    def clipped(path, leaf):
        """[units, ...] -> the sum; a leaf of the layers is clipped layer by layer."""
        lead = 2 if path[0].key == "layers" else 1
        norms = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(lead, leaf.ndim)), keepdims=True))
        return jnp.sum(rule(norms) * leaf, axis=0)

    wanted = jax.tree_util.tree_map_with_path(clipped, grads)
    # The tied table's two uses are clipped apart, which the bound of its group still holds for.
    table, wanted_table = total["embed"].pop("table"), wanted["embed"].pop("table")
    assert relative(total, wanted) < TOLERANCE
    assert table.shape == wanted_table.shape
    assert np.linalg.norm(table) <= len(batch.tokens) * rule.clip_norm


def test_an_untied_table_and_head_are_groups_like_others(decoder, batch_of, example_losses, relative):
    model, params = decoder("untied")
    batch, losses = batch_of("pair"), example_losses(model, "pair")
    clip = Groupwise(AutoV(1.0), count_groups(params))
    total, *_ = run(losses, params, batch, clip=clip, method="group")
    grads = jax.jit(jax.vmap(jax.grad(lambda params, unit: losses(params, unit, None)[0]), (None, 0)))(
        params, jax.tree.map(lambda leaf: leaf[:, None], batch)
    )
    for name, part in (("embed", "table"), ("head", "kernel")):
        norms = jnp.sqrt(jnp.sum(jnp.square(grads[name][part]), axis=(1, 2), keepdims=True))
        wanted = jnp.sum(clip.per_group(norms) * grads[name][part], axis=0)
        assert relative(total[name][part], wanted) < TOLERANCE


@pytest.mark.parametrize("method", ["ghost", "bk"])
def test_frozen_parameters_are_no_part_of_the_norm(method, decoder, batch_of, relative, example_losses):
    model, params = decoder("tied")
    frozen = jax.tree.map(jnp.asarray, {"embed": params["embed"], "norm": params["norm"]})
    trainable = {"layers": params["layers"]}
    losses = example_losses(model, "trajectory", frozen)
    wanted, norms, _ = run(losses, trainable, batch_of("trajectory"), clip=FlatClip(1.0), method="vmap")
    total, found, _ = run(losses, trainable, batch_of("trajectory"), clip=FlatClip(1.0), method=method)
    np.testing.assert_allclose(found, norms, rtol=TOLERANCE)
    assert relative(total, wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
@pytest.mark.parametrize(("variant", "trained"), [("biases", None), ("untied", None), ("tied", ("layers", "norm"))])
def test_a_sum_goes_on_from_another(method, variant, trained, decoder, batch_of, example_losses, relative):
    """In place or not, norms know nothing of it; a unit that is no number and one that does not count add nothing."""
    model, params = decoder(variant)
    trained = set(trained or params)
    frozen = jax.tree.map(jnp.asarray, {name: part for name, part in params.items() if name not in trained})
    params = {name: part for name, part in params.items() if name in trained}
    losses, batch = example_losses(model, "trajectory", frozen), batch_of("trajectory")
    rewards = np.array(batch.example.rewards)
    rewards[3] = np.inf
    batch = batch._replace(example=batch.example._replace(rewards=rewards))
    clip = Groupwise(FlatClip(0.1), count_groups(params)) if method == "group" else FlatClip(0.1)
    rng, mask = np.random.default_rng(4), np.arange(len(rewards)) != 1
    before = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)
    own, *said = run(losses, params, batch, mask, clip=clip, method=method)
    found, *again = jax.jit(
        lambda before: clipped_sum(losses, params, batch, clip=clip, mask=mask, onto=before, method=method)
    )(before)
    assert relative(found, jax.tree.map(np.add, before, own)) < TOLERANCE
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=TOLERANCE), again, said)


def test_book_keeping_goes_back_once(full_compilation, decoder, batch_of, example_losses):
    """What it computes less than two backward passes do: the way back through the layers, and through the head."""
    model, params = decoder("untied")
    losses, batch = example_losses(model, "pair"), batch_of("pair")
    work = {}
    for method in ("ghost", "bk"):
        program = jax.jit(
            lambda params, method=method: clipped_sum(losses, params, batch, clip=FlatClip(1.0), method=method)[0]
        )
        work[method] = program.lower(params).compile().cost_analysis()["flops"]
    assert work["bk"] < 0.9 * work["ghost"]


def test_losses_of_anybody(relative):
    """A linear model whose gradient is known: the clipped sum of residual times input."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)

    def loss(w, unit):
        return 0.5 * (unit["x"] @ w - unit["y"]) ** 2

    grads = (x @ w - y)[:, None] * x
    factors = np.minimum(1, 0.5 / np.linalg.norm(grads, axis=1))
    for method in ("auto", "vmap", "scan"):
        total, norms, _ = clipped_sum(per_example(loss), w, {"x": x, "y": y}, clip=FlatClip(0.5), method=method)
        np.testing.assert_allclose(total, factors @ grads, rtol=1e-4)
        np.testing.assert_allclose(norms, np.linalg.norm(grads, axis=1), rtol=1e-4)
    with pytest.raises(ValueError, match="uses no norm tracker"):
        clipped_sum(per_example(loss), w, {"x": x, "y": y}, clip=FlatClip(0.5), method="ghost")


@pytest.mark.slow
def test_what_would_be_miscounted_is_refused(decoder, batch_of, example_losses, monkeypatch):
    model, params = decoder("tied")
    batch, losses = batch_of("trajectory"), example_losses(model, "trajectory")
    more = dict(params) | {"extra": np.ones(3, np.float32)}

    def with_another(params, batch, tracker):
        own = {name: part for name, part in params.items() if name != "extra"}
        return losses(own, batch, tracker) * jnp.sum(params["extra"])

    def used_twice(params, batch, tracker):
        return losses(params, batch, tracker) + losses(params, batch, tracker)

    def without_tracker(params, batch, tracker):
        return losses(params, batch, None)

    @jax.checkpoint
    def handed_back(params, batch, tracker):
        return losses(params, batch, tracker), params

    def used_again(params, batch, tracker):
        found, same = handed_back(params, batch, tracker)
        return found + jnp.sum(same["norm"]["scale"])

    def behind_a_barrier(params, batch, tracker):
        _, scale = jax.lax.optimization_barrier((batch.tokens, params["norm"]["scale"]))
        return losses(params, batch, tracker) * jnp.sum(scale)

    for bad, given, name in (
        (with_another, more, "extra"), (used_twice, params, "embed/table"), (without_tracker, params, "embed/table"),
        (used_again, params, "norm/scale"), (behind_a_barrier, params, "norm/scale"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"would miscount {name}"):
            run(bad, given, batch, clip=FlatClip(1.0), method="ghost")
        # And what chooses by itself takes the method that cannot miscount, where there is too much for all at once.
        monkeypatch.setattr(importlib.import_module("shiq_jax.privacy.clipped_sum"), "BUDGET", 0)
        total, *_ = run(bad, given, batch, clip=FlatClip(1.0), method="auto")
        wanted, *_ = run(bad, given, batch, clip=FlatClip(1.0), method="vmap")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), total, wanted)


@pytest.mark.parametrize("variant", ["tied", "untied", "biases", "query and key norms"])
def test_a_rule_for_fewer_groups_than_there_are_is_refused(variant, decoder, batch_of, example_losses):
    """Their clipped gradients would be longer together than the noise was made for."""
    model, params = decoder(variant)
    batch, losses, groups = batch_of("trajectory"), example_losses(model, "trajectory"), count_groups(params)
    run(losses, params, batch, clip=Groupwise(FlatClip(1.0), groups), method="group")
    with pytest.raises(ValueError, match=f"is for {groups - 1} groups, but these losses have {groups}"):
        run(losses, params, batch, clip=Groupwise(FlatClip(1.0), groups - 1), method="group")


def test_a_method_never_changes_the_rule(decoder, batch_of, example_losses):
    model, params = decoder("tied")
    batch, losses = batch_of("trajectory"), example_losses(model, "trajectory")
    for clip, method in (
        (FlatClip(1.0), "group"),
        (Groupwise(FlatClip(1.0), 3), "ghost"),
        (Groupwise(FlatClip(1.0), 3), "vmap"),
    ):
        with pytest.raises(ValueError, match=f"method '{method}' does not implement the rule {type(clip).__name__}"):
            run(losses, params, batch, clip=clip, method=method)
    with pytest.raises(ValueError, match="method 'spooky' is unknown"):
        run(losses, params, batch, clip=FlatClip(1.0), method="spooky")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "bk", "group"])
def test_a_margin_makes_up_for_passes_that_round_to_bfloat16(method, decoder, batch_of, example_losses):
    """One unit at a time, whose clipped gradient is as long as it may be at most."""
    model, params = decoder("untied", compute_dtype=jnp.bfloat16)
    losses, batch = example_losses(model, "trajectory"), batch_of("trajectory")
    clip = Groupwise(AutoV(0.37), count_groups(params)) if method == "group" else AutoV(0.37)

    @functools.partial(jax.jit, static_argnums=1)
    def length(unit, margin):
        mask = jnp.arange(len(batch.tokens)) == unit
        total = clipped_sum(losses, params, batch, clip=clip, mask=mask, margin=margin, method=method)[0]
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(total))) / clip.sensitivity

    bare, safe = ([float(length(unit, margin)) for unit in range(16)] for margin in (0.0, 2.0**-7))
    assert max(safe) <= 1 and min(safe) > 0.97
    np.testing.assert_allclose(np.divide(safe, bare), 1 - 2.0**-7, rtol=1e-2)
