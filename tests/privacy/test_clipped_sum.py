"""Every clipping method against per-example gradients computed one by one."""

import dataclasses
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.privacy import AutoS, AutoV, DropAbove, FlatClip, Groupwise, clipped_sum, count_groups, per_example

TOLERANCE = 1e-5
NO_CLIPPING = FlatClip(1e9)


@functools.cache
def compiled(losses, kwargs):
    return jax.jit(lambda params, batch, mask: clipped_sum(losses, params, batch, mask=mask, **dict(kwargs)))


def run(losses, params, batch, mask=None, **kwargs):
    """Compute the clipped sum with a program that is shared by all batches and masks."""
    mask = np.ones(len(jax.tree.leaves(batch)[0]), bool) if mask is None else mask
    return compiled(losses, tuple(sorted(kwargs.items())))(params, batch, mask)


def per_unit_gradients(losses, params, batch):
    """Compute (gradient in float64, norm, loss) of each unit separately, without the code under test."""
    value_and_grad = jax.jit(jax.value_and_grad(lambda params, unit: losses(params, unit, None)[0]))
    results = []
    for unit in range(len(jax.tree.leaves(batch)[0])):
        value, grads = jax.device_get(value_and_grad(params, jax.tree.map(lambda leaf: leaf[unit : unit + 1], batch)))
        grads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grads)
        results.append((grads, np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads))), value))
    return results


@pytest.fixture(scope="module")
def expected(decoder, make_batch, unit_losses):
    """Make (clipped sum in float64, norms, losses)."""

    @functools.cache
    def units(variant, unit):
        model, params = decoder(variant)
        return per_unit_gradients(unit_losses(model, unit), params, make_batch(unit))

    def make(variant, unit, clip):
        grads, norms, values = zip(*units(variant, unit))
        factors = [float(clip(jnp.float32(norm))) for norm in norms]
        total = jax.tree.map(lambda *leaves: sum(map(np.multiply, factors, leaves)), *grads)
        return total, np.array(norms), np.array(values)

    return make


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk"])
@pytest.mark.parametrize(
    ("variant", "unit", "clip_over_median"),
    [
        ("tied", "trajectory", 1.0), ("biases", "group", 1.0), ("tied", "pair", 0.05),
        pytest.param("tied", "pair", None, marks=pytest.mark.slow),
        pytest.param("untied", "pair", 1.0, marks=pytest.mark.slow),
        pytest.param("query and key norms", "pair", 1.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_methods_match_per_unit_gradients(
    method, variant, unit, clip_over_median, decoder, make_batch, unit_losses, expected, relative_error
):
    """With all units clipped, half of them, or none (`clip_over_median` is None)."""
    _, unclipped_norms, _ = expected(variant, unit, NO_CLIPPING)
    clip = NO_CLIPPING if clip_over_median is None else FlatClip(float(clip_over_median * np.median(unclipped_norms)))
    model, params = decoder(variant)
    total, norms, values = run(unit_losses(model, unit), params, make_batch(unit), clip=clip, method=method)
    expected_total, expected_norms, expected_values = expected(variant, unit, clip)
    np.testing.assert_allclose(norms, expected_norms, rtol=TOLERANCE)
    np.testing.assert_allclose(values, expected_values, rtol=TOLERANCE)
    assert relative_error(total, expected_total) < TOLERANCE


@pytest.mark.parametrize("rule", [AutoS(0.3), AutoS(2.0, 5.0), AutoV(0.3), DropAbove(30.0)], ids=str)
def test_ghost_with_other_rules(rule, decoder, make_batch, unit_losses, expected, relative_error):
    model, params = decoder("tied")
    total, *_ = run(unit_losses(model, "pair"), params, make_batch("pair"), clip=rule, method="ghost")
    assert relative_error(total, expected("tied", "pair", rule)[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["ghost", "bk"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_result_is_independent_of_remat(method, remat, decoder, make_batch, unit_losses, expected, relative_error):
    model, params = decoder("biases")
    model = dataclasses.replace(model, remat=remat)
    total, norms, _ = run(unit_losses(model, "pair"), params, make_batch("pair"), clip=FlatClip(1.0), method=method)
    expected_total, expected_norms, _ = expected("biases", "pair", FlatClip(1.0))
    np.testing.assert_allclose(norms, expected_norms, rtol=TOLERANCE)
    assert relative_error(total, expected_total) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
def test_bfloat16_forward_pass(method, full_compilation, decoder, make_batch, unit_losses, relative_error):
    # On CPU, bfloat16 products with float32 accumulation need the optimization passes of XLA.
    model, params = decoder("tied")
    bfloat16_model = dataclasses.replace(model, compute_dtype=jnp.dtype(jnp.bfloat16))
    losses = unit_losses(bfloat16_model, "trajectory")
    batch = make_batch("trajectory")
    expected_total, expected_norms, _ = run(losses, params, batch, clip=FlatClip(1.0), method="vmap")
    total, norms, _ = run(losses, params, batch, clip=FlatClip(1.0), method=method)
    np.testing.assert_allclose(norms, expected_norms, rtol=2e-2)
    assert relative_error(total, expected_total) < 2e-2
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(total))


@pytest.mark.parametrize("microbatch", [1, 2, 8])
def test_scan_over_microbatches(microbatch, decoder, make_batch, unit_losses, expected, relative_error):
    model, params = decoder("tied")
    batch = make_batch("trajectory")
    assert len(batch.tokens) == 16
    losses = unit_losses(model, "trajectory")
    total, *_ = run(losses, params, batch, clip=FlatClip(1.0), method="scan", microbatch=microbatch)
    assert relative_error(total, expected("tied", "trajectory", FlatClip(1.0))[0]) < TOLERANCE
    with pytest.raises(ValueError, match="microbatch is 3"):
        run(losses, params, batch, clip=FlatClip(1.0), method="scan", microbatch=3)


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
def test_masked_units_have_no_effect(method, decoder, make_batch, unit_losses):
    model, params = decoder("tied")
    batch, losses = make_batch("trajectory"), unit_losses(model, "trajectory")
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)
    mask = np.arange(16) % 3 > 0
    changed = jax.tree.map(lambda leaf: np.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, leaf[::-1]), batch)
    assert np.any(changed.tokens != batch.tokens)
    totals = [run(losses, params, units, clip=clip, mask=mask, method=method)[0] for units in (batch, changed)]
    chex.assert_trees_all_equal(*totals)
    empty, *_ = run(losses, params, batch, clip=clip, mask=np.zeros(16, bool), method=method)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
@pytest.mark.parametrize("reward", [np.nan, np.inf, 1e19, 1e30])
def test_unit_with_non_finite_gradient_contributes_zero(
    method, reward, decoder, make_batch, unit_losses, relative_error
):
    model, params = decoder("tied")
    batch, losses = make_batch("trajectory"), unit_losses(model, "trajectory")
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)
    rewards = np.array(batch.example.rewards)
    rewards[2][rewards[2] != 0] = reward
    poisoned = batch._replace(example=batch.example._replace(rewards=rewards))
    total, *_ = run(losses, params, poisoned, clip=clip, method=method)
    without, *_ = run(losses, params, batch, clip=clip, mask=np.arange(16) != 2, method=method)
    if reward > 1e20 or np.isnan(reward):
        assert relative_error(total, without) < TOLERANCE
    distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (total, without)))))
    assert distance <= clip.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("method", ["vmap", "ghost", "bk", "group"])
def test_unit_contributes_its_clipped_gradient(method, decoder, make_batch, unit_losses):
    model, params = decoder("tied")
    batch, losses = make_batch("pair"), unit_losses(model, "pair")
    clip = Groupwise(FlatClip(0.7), count_groups(params)) if method == "group" else FlatClip(0.7)
    total, norms, _ = run(losses, params, batch, clip=clip, method=method)
    assert np.median(norms) > 0.7
    for unit in range(len(batch.tokens)):
        others, *_ = run(losses, params, batch, clip=clip, mask=np.arange(len(batch.tokens)) != unit, method=method)
        distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (total, others)))))
        assert distance <= clip.sensitivity * (1 + 1e-4)
        if method != "group":
            np.testing.assert_allclose(distance, min(0.7, norms[unit]), rtol=1e-3)


def test_groupwise_clips_each_parameter_of_each_layer(decoder, make_batch, unit_losses, relative_error):
    model, params = decoder("biases")
    batch, losses = make_batch("pair"), unit_losses(model, "pair")
    clip = Groupwise(AutoS(2.0), count_groups(params))
    # Per layer: two norms, and kernel and bias of four attention and three MLP projections. Plus table and final norm.
    assert clip.groups == 2 * (2 + 7 * 2) + 2
    total, *_ = run(losses, params, batch, clip=clip, method="auto")
    grads = jax.jit(jax.vmap(jax.grad(lambda params, unit: losses(params, unit, None)[0]), (None, 0)))(
        params, jax.tree.map(lambda leaf: leaf[:, None], batch)
    )
    rule = clip.group_rule

    def clipped(path, leaf):
        """Clip and sum [units, ...]; leaves below `layers` are clipped per layer."""
        leading_axes = 2 if path[0].key == "layers" else 1
        norms = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(leading_axes, leaf.ndim)), keepdims=True))
        return jnp.sum(rule(norms) * leaf, axis=0)

    expected_total = jax.tree_util.tree_map_with_path(clipped, grads)
    # The two uses of the tied table are clipped separately, so its gradient differs but respects the bound.
    table, expected_table = total["embed"].pop("table"), expected_total["embed"].pop("table")
    assert relative_error(total, expected_total) < TOLERANCE
    assert table.shape == expected_table.shape
    assert np.linalg.norm(table) <= len(batch.tokens) * rule.clip_norm


def test_groupwise_clips_untied_table_and_head(decoder, make_batch, unit_losses, relative_error):
    model, params = decoder("untied")
    batch, losses = make_batch("pair"), unit_losses(model, "pair")
    clip = Groupwise(AutoV(1.0), count_groups(params))
    total, *_ = run(losses, params, batch, clip=clip, method="group")
    grads = jax.jit(jax.vmap(jax.grad(lambda params, unit: losses(params, unit, None)[0]), (None, 0)))(
        params, jax.tree.map(lambda leaf: leaf[:, None], batch)
    )
    for name, leaf in (("embed", "table"), ("head", "kernel")):
        norms = jnp.sqrt(jnp.sum(jnp.square(grads[name][leaf]), axis=(1, 2), keepdims=True))
        expected_total = jnp.sum(clip.group_rule(norms) * grads[name][leaf], axis=0)
        assert relative_error(total[name][leaf], expected_total) < TOLERANCE


@pytest.mark.parametrize("method", ["ghost", "bk"])
def test_norms_exclude_frozen_parameters(method, decoder, make_batch, relative_error, unit_losses):
    model, params = decoder("tied")
    frozen = jax.tree.map(jnp.asarray, {"embed": params["embed"], "norm": params["norm"]})
    trainable = {"layers": params["layers"]}
    losses, batch = unit_losses(model, "trajectory", frozen), make_batch("trajectory")
    expected_total, expected_norms, _ = run(losses, trainable, batch, clip=FlatClip(1.0), method="vmap")
    total, norms, _ = run(losses, trainable, batch, clip=FlatClip(1.0), method=method)
    np.testing.assert_allclose(norms, expected_norms, rtol=TOLERANCE)
    assert relative_error(total, expected_total) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk", "group"])
@pytest.mark.parametrize(("variant", "trainable"), [("biases", None), ("untied", None), ("tied", ("layers", "norm"))])
def test_accumulator_is_added_to_the_sum(method, variant, trainable, decoder, make_batch, unit_losses, relative_error):
    """In place or not, with a non-finite and a masked unit; norms and losses do not depend on the accumulator."""
    model, params = decoder(variant)
    trainable = set(trainable or params)
    frozen = jax.tree.map(jnp.asarray, {name: tree for name, tree in params.items() if name not in trainable})
    params = {name: tree for name, tree in params.items() if name in trainable}
    losses, batch = unit_losses(model, "trajectory", frozen), make_batch("trajectory")
    rewards = np.array(batch.example.rewards)
    rewards[3] = np.inf
    batch = batch._replace(example=batch.example._replace(rewards=rewards))
    clip = Groupwise(FlatClip(0.1), count_groups(params)) if method == "group" else FlatClip(0.1)
    rng, mask = np.random.default_rng(4), np.arange(len(rewards)) != 1
    accumulator = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)
    total, *per_unit = run(losses, params, batch, mask, clip=clip, method=method)
    accumulated, *accumulated_per_unit = jax.jit(
        lambda accumulator: clipped_sum(
            losses, params, batch, clip=clip, mask=mask, accumulator=accumulator, method=method
        )
    )(accumulator)
    assert relative_error(accumulated, jax.tree.map(np.add, accumulator, total)) < TOLERANCE
    chex.assert_trees_all_close(accumulated_per_unit, per_unit, rtol=TOLERANCE)


@pytest.mark.slow
def test_bookkeeping_needs_fewer_flops_than_ghost(full_compilation, decoder, make_batch, unit_losses):
    """Book-keeping saves the second backward pass through layers and head."""
    model, params = decoder("untied")
    losses, batch = unit_losses(model, "pair"), make_batch("pair")
    flops = {}
    for method in ("ghost", "bk"):
        program = jax.jit(
            lambda params, method=method: clipped_sum(losses, params, batch, clip=FlatClip(1.0), method=method)[0]
        )
        flops[method] = program.lower(params).compile().cost_analysis()["flops"]
    assert flops["bk"] < 0.9 * flops["ghost"]


def test_per_example_losses():
    """Linear regression, where the gradient of an example is its residual times its input."""
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
def test_uncovered_parameters_are_rejected(decoder, make_batch, unit_losses, monkeypatch):
    model, params = decoder("tied")
    batch, losses = make_batch("trajectory"), unit_losses(model, "trajectory")
    extra_params = dict(params) | {"extra": np.ones(3, np.float32)}

    def with_untracked_parameter(params, batch, tracker):
        model_params = {name: tree for name, tree in params.items() if name != "extra"}
        return losses(model_params, batch, tracker) * jnp.sum(params["extra"])

    def used_twice(params, batch, tracker):
        return losses(params, batch, tracker) + losses(params, batch, tracker)

    def without_tracker(params, batch, tracker):
        return losses(params, batch, None)

    @jax.checkpoint
    def losses_and_params(params, batch, tracker):
        return losses(params, batch, tracker), params

    def used_after_checkpoint(params, batch, tracker):
        values, params = losses_and_params(params, batch, tracker)
        return values + jnp.sum(params["norm"]["scale"])

    def behind_a_barrier(params, batch, tracker):
        _, scale = jax.lax.optimization_barrier((batch.tokens, params["norm"]["scale"]))
        return losses(params, batch, tracker) * jnp.sum(scale)

    for uncovered_losses, all_params, name in (
        (with_untracked_parameter, extra_params, "extra"), (used_twice, params, "embed/table"),
        (without_tracker, params, "embed/table"),
        (used_after_checkpoint, params, "norm/scale"), (behind_a_barrier, params, "norm/scale"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"would miscount {name}"):
            run(uncovered_losses, all_params, batch, clip=FlatClip(1.0), method="ghost")
        # With no budget for vmap, auto must choose scan.
        monkeypatch.setattr(importlib.import_module("shiq_jax.privacy.clipped_sum"), "BUDGET", 0)
        total, *_ = run(uncovered_losses, all_params, batch, clip=FlatClip(1.0), method="auto")
        expected_total, *_ = run(uncovered_losses, all_params, batch, clip=FlatClip(1.0), method="vmap")
        chex.assert_trees_all_close(total, expected_total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["tied", "untied", "biases", "query and key norms"])
def test_groupwise_rule_with_too_few_groups_is_rejected(variant, decoder, make_batch, unit_losses):
    """Its sum would exceed the sensitivity to which the noise is scaled."""
    model, params = decoder(variant)
    batch, losses, groups = make_batch("trajectory"), unit_losses(model, "trajectory"), count_groups(params)
    run(losses, params, batch, clip=Groupwise(FlatClip(1.0), groups), method="group")
    with pytest.raises(ValueError, match=f"is for {groups - 1} groups, but these losses have {groups}"):
        run(losses, params, batch, clip=Groupwise(FlatClip(1.0), groups - 1), method="group")


@pytest.mark.parametrize(
    ("batch", "mask", "fragments"),
    [
        ({"x": np.zeros((0, 3))}, None, ["no units"]),
        ({"x": np.zeros((4, 3)), "y": np.zeros(5)}, None, ["['batch']['x'] (4, 3)", "['batch']['y'] (5,)"]),
        ({"x": np.zeros((4, 3)), "y": np.float32(1)}, None, ["['batch']['y'] ()"]),
        ({"x": np.zeros((4, 3))}, np.ones(3, bool), ["['mask'] (3,)"]),
    ],
)
def test_batches_without_a_common_unit_axis_are_rejected(batch, mask, fragments):
    losses = per_example(lambda params, unit: jnp.sum(params * unit["x"]))
    with pytest.raises(ValueError) as error:
        clipped_sum(losses, jnp.ones(3), batch, clip=FlatClip(1.0), mask=mask, method="vmap")
    assert all(fragment in str(error.value) for fragment in fragments)


def test_incompatible_method_and_rule_are_rejected(decoder, make_batch, unit_losses):
    model, params = decoder("tied")
    batch, losses = make_batch("trajectory"), unit_losses(model, "trajectory")
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
def test_margin_compensates_bfloat16_rounding(method, decoder, make_batch, unit_losses):
    """Gradients of single units, normalized to the clip norm, do not exceed it with the margin."""
    model, params = decoder("untied", compute_dtype=jnp.bfloat16)
    losses, batch = unit_losses(model, "trajectory"), make_batch("trajectory")
    clip = Groupwise(AutoV(0.37), count_groups(params)) if method == "group" else AutoV(0.37)

    @functools.partial(jax.jit, static_argnums=1)
    def relative_norm(unit, margin):
        mask = jnp.arange(len(batch.tokens)) == unit
        total = clipped_sum(losses, params, batch, clip=clip, mask=mask, margin=margin, method=method)[0]
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(total))) / clip.sensitivity

    without, with_margin = ([float(relative_norm(unit, margin)) for unit in range(16)] for margin in (0.0, 2.0**-7))
    assert max(with_margin) <= 1 and min(with_margin) > 0.97
    np.testing.assert_allclose(np.divide(with_margin, without), 1 - 2.0**-7, rtol=1e-2)
