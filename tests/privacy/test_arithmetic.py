"""How many products of matrices each method takes, counted in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from benchmarks.flops import executed_flops
from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, clipped_sum, count_groups
from shiq_jax.replay import full_rows
from shiq_jax.training.private_gradient import UnitLosses

# Long rows beside the matrices, so that norms are had of rows' whole gradients; a vocabulary that hardly counts.
LENGTH, ROWS = 64, 2
CONFIG = DecoderConfig(
    vocab_size=8, hidden_size=16, intermediate_size=480, num_layers=3, num_heads=2, num_kv_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip


def count(method: str, remat: str) -> float:
    """Of the clipped sum, in products of all layers' matrices with all places; attention's own are in it."""
    model = Model.from_config(CONFIG, compute_dtype=jnp.float32, remat=remat)
    params = init_params(model, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, full_rows(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 8))
    losses = UnitLosses(model, OBJECTIVES["sft"], {}, {})
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)

    def total(params):
        return clipped_sum(losses, params, batch, clip=clip, method=method)

    traced = jax.make_jaxpr(total)(params)
    # What nothing depends on is traced, but no part of the program.
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    operations = executed_flops(lambda *leaves: jax.core.eval_jaxpr(needed, traced.consts, *leaves), *jax.tree.leaves(params))
    matrices = 4 * 16 * 16 + 3 * 16 * 480
    return operations / (2 * ROWS * LENGTH * matrices * CONFIG.num_layers)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_book_keeping_takes_the_gradients_of_what_it_has_kept(remat):
    # Beyond a forward and a backward pass either takes the norms; ghost norms also run the cotangents back again.
    plain = count("scan", remat)
    assert count("bk", remat) - plain == pytest.approx(1, abs=0.1)
    assert count("ghost", remat) - plain == pytest.approx(2, abs=0.3)


def test_book_keeping_with_the_least_memory_runs_forward_once_more():
    assert count("bk", "full") - count("scan", "full") == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_clipping_by_groups_takes_no_product_beyond_plain_ones(remat):
    assert count("group", remat) == pytest.approx(count("scan", remat), abs=0.1)
