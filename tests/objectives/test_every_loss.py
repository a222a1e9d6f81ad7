"""Properties that every objective must have, checked for all objectives and the options that change their formulas."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from shiq_jax.objectives import OBJECTIVES, Example, Objective, TokenStats
from shiq_jax.objectives.kto import KTO_COUPLE

GROUP_SIZES = {"trajectory": 1, "pair": 2, "group": 4}
LENGTH, BATCH = 8, 3
# All objectives, and options that change the formula.
CASES = dict(OBJECTIVES) | {
    f"{name} {' '.join(map(str, options.values()))}": OBJECTIVES[name].configure(**options)
    for name, options in [
        ("shiq", {"gamma": 0.9, "normalisation": "mean_t", "position_weight": "inv_position"}),
        ("shiq", {"gamma": 0.9, "horizon": "one", "value": "lse"}),
        ("shiq", {"horizon": "n_step", "n": 2, "gradient": "semi"}),
        ("oreo", {"gradient": "semi"}),
        ("mc_returns", {"gamma": 1.0}),
        ("dpo", {"rpo_alpha": 0.7, "ld_alpha": 0.4, "use_weighting": True, "f_divergence": "js_divergence"}),
        ("exo", {"f_divergence": "forward_kl", "ld_alpha": 0.0}),
        ("hinge", {"f_divergence": "alpha_divergence", "f_alpha": 0.5}),
        ("aot_unpaired", {"rpo_alpha": 0.7, "label_smoothing": 0.1}),
        ("simpo", {"use_weighting": True, "rpo_alpha": 0.7}),
    ]
}


all_cases = pytest.mark.parametrize("name", CASES)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def num_sequences(objective: Objective) -> int:
    """Number of sequences of an example; KTO takes an answer and a mismatched one."""
    return 2 if objective.couple is KTO_COUPLE else GROUP_SIZES[objective.unit]


def random_example(objective: Objective, seed: int) -> Example:
    """Random example with all fields; each sequence has masked tokens before, between and after its actions."""
    random = np.random.default_rng(seed)
    sequences = num_sequences(objective)
    shape = (sequences, LENGTH)

    def random_stats():
        logp, lse = -np.exp(random.normal(size=shape) - 0.5), 3 + random.normal(size=shape)
        return TokenStats(logp, lse, 2 * lse - np.exp(random.normal(size=shape) - 1))

    values = {
        name: random_stats() if kind == "q" else random.normal(size=shape) for name, kind in objective.heads.items()
    }
    values |= {f"target_{name}": random_stats() for name in objective.target_heads}
    mask = random.random(shape) < 0.6
    mask[:, [1, 3, 5, 7]] = [True, False, True, False]
    return Example(
        policy=random_stats(), references={"reference": random_stats()}, action_mask=mask,
        rewards=random.normal(size=shape), values=values or None, bootstrap=random.normal(size=sequences),
        labels=random.random(sequences) < 0.5,
    )  # fmt: skip


def random_batch(objective: Objective, seed: int = 0) -> Example:
    """Stacked examples before coupling."""
    examples = [random_example(objective, BATCH * seed + number) for number in range(BATCH)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def with_coupled(objective: Objective, batch: Example) -> Example:
    """The batch with `coupled` filled in if the objective couples examples."""
    if objective.couple is None:
        return batch
    summaries = jax.vmap(objective.couple.summary)(batch)
    return batch._replace(coupled=jax.device_get(objective.couple.combine(summaries, jnp.ones(BATCH))))


def first(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def random_coupled_example(name: str, seed: int = 0) -> Example:
    """First example of a coupled batch."""
    return first(with_coupled(CASES[name], random_batch(CASES[name], seed)))


def differentiated(example: Example):
    """Arguments of the gradient; the references are included to check that their gradient is 0."""
    return example.policy, example.values, example.references


def value_and_out(name: str, arguments, example: Example):
    policy, values, references = arguments
    out = CASES[name].loss(example._replace(policy=policy, values=values, references=references))
    return out.value, out


@functools.cache
def compiled_gradient(name: str):
    """Compiled (gradient, LossOut) of a case."""
    return jax.jit(jax.grad(functools.partial(value_and_out, name), has_aux=True))


def gradient(name: str, example: Example):
    return jax.device_get(compiled_gradient(name)(differentiated(example), example))


def assert_close(actual, expected, rtol=1e-10, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def map_floats(function, tree):
    """Apply a function to every float array."""
    return jax.tree.map(lambda x: function(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def map_token_floats(function, example: Example) -> Example:
    """Apply a function to every float array with one entry per token."""
    return map_floats(lambda x: function(x) if np.shape(x)[-2:] == example.action_mask.shape[-2:] else x, example)


@all_cases
def test_jit_and_vmap_do_not_change_the_loss(name, x64):
    objective = CASES[name]
    batch = with_coupled(objective, random_batch(objective))
    outs = [objective.loss(jax.tree.map(lambda leaf: leaf[index], batch)) for index in range(BATCH)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *outs)
    assert outs[0].value.shape == outs[0].weight.shape == () and outs[0].weight > 0
    assert all(np.shape(metric) == () for metric in outs[0].metrics.values())
    assert_close(gradient(name, first(batch))[1], jax.device_get(outs[0]))
    reversed_batch = jax.tree.map(lambda leaf: leaf[::-1], random_batch(objective))
    mapped = jax.jit(jax.vmap(objective.loss))
    assert_close(mapped(batch), stacked)
    assert_close(jax.tree.map(lambda leaf: leaf[::-1], mapped(with_coupled(objective, reversed_batch))), stacked)


@all_cases
def test_gradients_match_finite_differences(name, x64, monkeypatch):
    """Central differences that hold the arguments of `stop_gradient` at their unperturbed values."""
    example, step = random_coupled_example(name), 1e-6
    actual, _ = gradient(name, example)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(actual[2])), "the reference gets a gradient"
    point, restore = ravel_pytree((example.policy, example.values))
    steps = step * np.concatenate([np.eye(point.size), -np.eye(point.size)])
    # Entry 0 of the vmapped axis is unperturbed; `stop_gradient` broadcasts its value to all other entries.
    monkeypatch.setattr(jax.lax, "stop_gradient", functools.partial(jax.tree.map, value_of_entry_0))
    points = point + np.concatenate([np.zeros((1, point.size)), steps])

    def value(point):
        return value_and_out(name, (*restore(point), example.references), example)[0]

    values = jax.jit(jax.vmap(value, axis_name="perturbation"))(points)
    upper, lower = np.split(np.asarray(values[1:]), 2)
    assert_close(ravel_pytree(actual[:2])[0], (upper - lower) / (2 * step), rtol=1e-6, atol=1e-7)


def value_of_entry_0(x):
    return jax.lax.psum(jnp.where(jax.lax.axis_index("perturbation") == 0, x, 0), "perturbation")


@all_cases
def test_masked_tokens_do_not_affect_loss_or_gradient(name, x64):
    objective = CASES[name]
    batch = random_batch(objective)
    actual, out = gradient(name, first(with_coupled(objective, batch)))
    assert not any(leaf[~batch.action_mask[0]].any() for leaf in jax.tree.leaves(actual))
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = first(
            with_coupled(objective, map_token_floats(lambda x: np.where(batch.action_mask, x, poison), batch))
        )
        chex.assert_trees_all_equal(gradient(name, poisoned), (actual, out))


@all_cases
def test_bfloat16_inputs_are_cast_to_float32_first(name):
    """The loss of bfloat16 inputs equals bitwise that of the same numbers in float32, and nearly that in float64."""
    objective = CASES[name]
    bfloat16 = map_floats(lambda x: np.asarray(x, jnp.bfloat16), random_batch(objective))
    float32 = jax.tree.map(lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, bfloat16)
    outs = []
    for batch in (bfloat16, float32):
        outs.append(objective.loss(first(with_coupled(objective, batch))))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outs[0][:2]))
    chex.assert_trees_all_equal(outs[0], outs[1])
    with jax.enable_x64(True):
        float64 = first(with_coupled(objective, map_floats(np.float64, float32)))
        assert_close(outs[1], gradient(name, float64)[1], rtol=2e-5, atol=2e-6)


@all_cases
@pytest.mark.parametrize("empty", ["all", "last"])
def test_sequences_without_actions_contribute_nothing(name, empty, x64):
    """An empty sequence removes its whole pair, but only itself from a group."""
    objective = CASES[name]
    batch = random_batch(objective)
    batch.action_mask[0, (-1 if empty == "last" else slice(None))] = False
    batch = map_token_floats(lambda x: np.where(batch.action_mask, x, np.nan), batch)
    actual, out = gradient(name, first(with_coupled(objective, batch)))
    assert not any(leaf[..., -1, :].any() for leaf in jax.tree.leaves(actual))
    if empty == "all" or objective.unit != "group":
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((actual, out)))
    else:
        assert out.weight == num_sequences(objective) - 1 and np.isfinite(out.value)


@all_cases
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_positions_of_masked_tokens_do_not_matter(name, seed):
    """Moving the actions to other positions in the same order keeps the loss and moves the gradient with them."""
    random = np.random.default_rng(seed)
    with jax.enable_x64(True):
        example = random_coupled_example(name)
        actual, out = gradient(name, example)
        mask = example.action_mask
        new_mask = np.zeros_like(mask)
        for row, count in zip(new_mask, mask.sum(1), strict=True):
            row[random.choice(LENGTH, count, replace=False)] = True

        def move(x):
            moved = np.zeros(x.shape)
            moved[new_mask] = x[mask]
            return moved

        moved_gradient, moved_out = gradient(name, map_token_floats(move, example)._replace(action_mask=new_mask))
        assert_close(moved_out, out)
        assert_close(moved_gradient, jax.tree.map(move, actual))
