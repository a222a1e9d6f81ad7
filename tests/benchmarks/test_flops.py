"""Operations are counted as they run, and what a step needs is what the whole forward and backward pass executes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flops
from shiq_jax.models import DecoderConfig, Model
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Record, pack, plan
from shiq_jax.training.examples import summed_loss


def test_products_in_loops_count_as_often_as_they_run():
    left, right = jnp.ones((3, 5)), jnp.ones((5, 7))

    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry + jax.jit(jnp.matmul)(x, right).sum(), None), 0.0, length=4)

    assert flops.executed(looped, left) == 4 * 2 * 3 * 5 * 7
    batched = lambda x: jnp.einsum("abc,acd->abd", x, jnp.ones((2, 5, 7)))  # noqa: E731
    assert flops.executed(batched, jnp.ones((2, 3, 5))) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_needed_is_what_a_full_row_executes(tied):
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
    executed = flops.executed(gradient, params)
    # The executed attention is that of all pairs of places, half of which no token sees, and its scores are made
    # once more on the way back.
    square = length * length
    most = flops.needed(config, length, batch.predictors.shape[1], square * 7 / 6)
    least = flops.needed(config, length, length - 1, square / 2)
    assert least < executed <= most
    attention = 12.0 * 3 * 32 * square
    assert most - least < 1.2 * attention


def test_what_a_policy_keeps_is_not_computed_again():
    config = DecoderConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4)
    record = Record(tokens=np.arange(64), action_mask=np.arange(64) >= 1, rewards=np.zeros(63), group="a")
    batch = pack([((0,),)], [record], plan([record], [((0,),)])).batch

    def executed(remat):
        model = Model.from_config(config, remat=remat)
        value = lambda params: summed_loss(model, OBJECTIVES["sft"], params, batch).value  # noqa: E731
        return flops.executed(jax.value_and_grad(value), model.abstract_params())

    layer = 2 * 64 * (4 * 32 * 32 + 3 * 32 * 48)
    assert executed("dots") == executed("none")
    # What the last product of a layer gives is its result, which no gradient of the layer asks for.
    assert executed("full") - executed("none") >= 3 * (layer - 2 * 64 * 32 * 48)
