"""What holds for every objective of the library, whatever it computes: one sweep over all of them and their options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from shiq_jax.objectives import OBJECTIVES, Example, Objective, TokenStats
from shiq_jax.objectives.kto import MISMATCHED

MEMBERS = {"trajectory": 1, "pair": 2, "group": 4}
LENGTH, BATCH = 8, 3
# Options that change which formula is computed, not only its numbers.
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


every = pytest.mark.parametrize("name", CASES)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def members_of(objective: Objective) -> int:
    """Sequences of an example; KTO's groups are an answer and a mismatched one."""
    return 2 if objective.couple is MISMATCHED else MEMBERS[objective.unit]


def random_example(objective: Objective, seed: int) -> Example:
    """An example with all fields; every sequence has actions and masked tokens before, between and after them."""
    random = np.random.default_rng(seed)
    members = members_of(objective)
    shape = (members, LENGTH)

    def statistics():
        logp, lse = -np.exp(random.normal(size=shape) - 0.5), 3 + random.normal(size=shape)
        return TokenStats(logp, lse, 2 * lse - np.exp(random.normal(size=shape) - 1))

    values = {
        name: statistics() if kind == "q" else random.normal(size=shape) for name, kind in objective.heads.items()
    }
    values |= {f"target_{name}": statistics() for name in objective.target_heads}
    mask = random.random(shape) < 0.6
    mask[:, [1, 3, 5, 7]] = [True, False, True, False]
    return Example(
        policy=statistics(), references={"reference": statistics()}, action_mask=mask,
        rewards=random.normal(size=shape), values=values or None, bootstrap=random.normal(size=members),
        labels=random.random(members) < 0.5, prompt_policy=statistics(),
    )  # fmt: skip


def batch_of(objective: Objective, seed: int = 0) -> Example:
    """Examples with a leading axis, not yet coupled."""
    examples = [random_example(objective, BATCH * seed + number) for number in range(BATCH)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def coupled(objective: Objective, batch: Example) -> Example:
    """The batch in which examples know of each other, where the objective wants it."""
    if objective.couple is None:
        return batch
    summaries = jax.vmap(objective.couple.summary)(batch)
    return batch._replace(coupled=jax.device_get(objective.couple.combine(summaries, jnp.ones(BATCH))))


def first(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def one_of(name: str, seed: int = 0) -> Example:
    """A single example, coupled in a batch."""
    return first(coupled(CASES[name], batch_of(CASES[name], seed)))


def learned(example: Example):
    """What gradients are taken to, fixed models with the rest: these must not get any."""
    return example.policy, example.values, example.references


def value_of(name: str, given, example: Example):
    policy, values, references = given
    out = CASES[name].loss(example._replace(policy=policy, values=values, references=references))
    return out.value, out


@functools.cache
def compiled(name: str):
    """`value_of`, to (gradient, LossOut)."""
    return jax.jit(jax.grad(functools.partial(value_of, name), has_aux=True))


def gradient(name: str, example: Example):
    return jax.device_get(compiled(name)(learned(example), example))


def close(found, expected, rtol=1e-10, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def floats(change, tree):
    """`change` of every array of floats."""
    return jax.tree.map(lambda x: change(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def tokens(change, example: Example) -> Example:
    """`change` of every array of floats that has one for each token."""
    return floats(lambda x: change(x) if np.shape(x)[-2:] == example.action_mask.shape[-2:] else x, example)


@every
def test_jit_changes_nothing_and_vmap_makes_batches(name, x64):
    objective = CASES[name]
    batch = coupled(objective, batch_of(objective))
    each = [objective.loss(jax.tree.map(lambda leaf: leaf[place], batch)) for place in range(BATCH)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    assert each[0].value.shape == each[0].weight.shape == () and each[0].weight > 0
    assert all(np.shape(metric) == () for metric in each[0].metrics.values())
    close(gradient(name, first(batch))[1], jax.device_get(each[0]))
    backwards = jax.tree.map(lambda leaf: leaf[::-1], batch_of(objective))
    mapped = jax.jit(jax.vmap(objective.loss))
    close(mapped(batch), stacked)
    close(jax.tree.map(lambda leaf: leaf[::-1], mapped(coupled(objective, backwards))), stacked)


@every
def test_gradients_are_slopes(name, x64, monkeypatch):
    """Central differences in which constants keep, as they should, what they were before the step."""
    example, step = one_of(name), 1e-6
    found, _ = gradient(name, example)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found[2])), "the reference moves"
    point, restore = ravel_pytree((example.policy, example.values))
    steps = step * np.concatenate([np.eye(point.size), -np.eye(point.size)])
    # World 0 has taken no step; what is constant in it is the same in all others.
    monkeypatch.setattr(jax.lax, "stop_gradient", functools.partial(jax.tree.map, as_in_world_0))
    worlds = point + np.concatenate([np.zeros((1, point.size)), steps])

    def value(point):
        return value_of(name, (*restore(point), example.references), example)[0]

    values = jax.jit(jax.vmap(value, axis_name="world"))(worlds)
    up, down = np.split(np.asarray(values[1:]), 2)
    close(ravel_pytree(found[:2])[0], (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


def as_in_world_0(x):
    return jax.lax.psum(jnp.where(jax.lax.axis_index("world") == 0, x, 0), "world")


@every
def test_masked_tokens_are_not_read_and_not_moved(name, x64):
    objective = CASES[name]
    batch = batch_of(objective)
    found, out = gradient(name, first(coupled(objective, batch)))
    assert not any(leaf[~batch.action_mask[0]].any() for leaf in jax.tree.leaves(found))
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = first(coupled(objective, tokens(lambda x: np.where(batch.action_mask, x, poison), batch)))
        jax.tree.map(np.testing.assert_array_equal, gradient(name, poisoned), (found, out))


@every
def test_narrow_inputs_are_widened_before_anything_else(name):
    """In bfloat16 the loss is, to the bit, that of the same numbers in float32, which is near that in float64."""
    objective = CASES[name]
    narrow = floats(lambda x: np.asarray(x, jnp.bfloat16), batch_of(objective))
    wide = jax.tree.map(lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, narrow)
    outs = []
    for batch in (narrow, wide):
        outs.append(objective.loss(first(coupled(objective, batch))))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outs[0][:2]))
    jax.tree.map(np.testing.assert_array_equal, outs[0], outs[1])
    with jax.enable_x64(True):
        double = first(coupled(objective, floats(np.float64, wide)))
        close(outs[1], gradient(name, double)[1], rtol=2e-5, atol=2e-6)


@every
@pytest.mark.parametrize("empty", ["all", "last"])
def test_sequences_without_actions_contribute_nothing(name, empty, x64):
    """Of a pair either one's absence is the pair's; of a group the others stay what they were."""
    objective = CASES[name]
    batch = batch_of(objective)
    batch.action_mask[0, (-1 if empty == "last" else slice(None))] = False
    batch = tokens(lambda x: np.where(batch.action_mask, x, np.nan), batch)
    found, out = gradient(name, first(coupled(objective, batch)))
    assert not any(leaf[..., -1, :].any() for leaf in jax.tree.leaves(found))
    if empty == "all" or objective.unit != "group":
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((found, out)))
    else:
        assert out.weight == members_of(objective) - 1 and np.isfinite(out.value)


@every
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_what_stands_between_actions_does_not_matter(name, seed):
    """Actions moved to other places in the same order: the loss stays, the gradient moves with them."""
    random = np.random.default_rng(seed)
    with jax.enable_x64(True):
        example = one_of(name)
        found, out = gradient(name, example)
        mask = example.action_mask
        elsewhere = np.zeros_like(mask)
        for row, count in zip(elsewhere, mask.sum(1), strict=True):
            row[random.choice(LENGTH, count, replace=False)] = True

        def move(x):
            moved = np.zeros(x.shape)
            moved[elsewhere] = x[mask]
            return moved

        again, same = gradient(name, tokens(move, example)._replace(action_mask=elsewhere))
        close(same, out)
        close(again, jax.tree.map(move, found))
