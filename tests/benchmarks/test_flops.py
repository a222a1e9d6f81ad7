"""FLOP counts of traced programs and of training steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flops
from shiq_jax.models import DecoderConfig, Model
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Record, pack, plan
from shiq_jax.training.examples import summed_loss


def test_executed_flops_count_loop_iterations_and_batched_products():
    left, right = jnp.ones((3, 5)), jnp.ones((5, 7))

    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry + jax.jit(jnp.matmul)(x, right).sum(), None), 0.0, length=4)

    assert flops.executed_flops(looped, left) == 4 * 2 * 3 * 5 * 7
    batched = lambda x: jnp.einsum("abc,acd->abd", x, jnp.ones((2, 5, 7)))  # noqa: E731
    assert flops.executed_flops(batched, jnp.ones((2, 3, 5))) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("tied", [False, True])
def test_needed_flops_match_those_of_a_full_row(tied):
    config = DecoderConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Model.from_config(config)
    length = 64
    mask = np.arange(length) >= 1
    record = Record(tokens=np.arange(length), action_mask=mask, rewards=np.zeros(length - 1), group="a")
    batch = pack([((0,),)], [record], plan([record], [((0,),)])).batch
    params = model.abstract_params()
    gradient = jax.value_and_grad(lambda params: summed_loss(model, OBJECTIVES["sft"], params, batch).value)
    executed = flops.executed_flops(gradient, params)
    # The program computes the scores of all pairs, although causal attention needs half of them, and recomputes them
    # in the backward pass.
    square = length * length
    upper = flops.needed_flops(config, length, batch.predictors.shape[1], square * 7 / 6)
    lower = flops.needed_flops(config, length, length - 1, square / 2)
    assert lower < executed <= upper
    attention = 12.0 * 3 * 32 * square
    assert upper - lower < 1.2 * attention


def test_remat_policies_recompute_only_what_they_do_not_save():
    config = DecoderConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4)
    record = Record(tokens=np.arange(64), action_mask=np.arange(64) >= 1, rewards=np.zeros(63), group="a")
    batch = pack([((0,),)], [record], plan([record], [((0,),)])).batch

    def executed(remat):
        model = Model.from_config(config, remat=remat)
        value = lambda params: summed_loss(model, OBJECTIVES["sft"], params, batch).value  # noqa: E731
        return flops.executed_flops(jax.value_and_grad(value), model.abstract_params())

    layer = 2 * 64 * (4 * 32 * 32 + 3 * 32 * 48)
    assert executed("dots") == executed("none")
    # The last product of a layer is not recomputed, because no gradient of the layer needs its output.
    assert executed("full") - executed("none") >= 3 * (layer - 2 * 64 * 32 * 48)
