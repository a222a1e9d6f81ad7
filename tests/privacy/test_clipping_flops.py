"""FLOPs of each clipping method, counted in the traced program."""

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

# Rows long enough that norms come from materialized per-row gradients, and a vocabulary of negligible cost.
LENGTH, ROWS = 64, 2
CONFIG = DecoderConfig(
    vocab_size=8, hidden_size=16, intermediate_size=480, num_layers=3, num_heads=2, num_kv_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip


def relative_flops(method: str, remat: str) -> float:
    """FLOPs of the clipped sum over those of one forward pass of all linear layers; includes attention."""
    model = Model.from_config(CONFIG, compute_dtype=jnp.float32, remat=remat)
    params = init_params(model, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, full_rows(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 8))
    losses = UnitLosses(model, OBJECTIVES["sft"], {}, {})
    clip = Groupwise(FlatClip(1.0), count_groups(params)) if method == "group" else FlatClip(1.0)

    def total(params):
        return clipped_sum(losses, params, batch, clip=clip, method=method)

    traced = jax.make_jaxpr(total)(params)
    # Remove dead code, as the compiler does.
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    flops = executed_flops(lambda *leaves: jax.core.eval_jaxpr(jaxpr, traced.consts, *leaves), *jax.tree.leaves(params))
    weights_per_layer = 4 * 16 * 16 + 3 * 16 * 480
    return flops / (2 * ROWS * LENGTH * weights_per_layer * CONFIG.num_layers)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_bookkeeping_reuses_stored_cotangents(remat):
    # Both add the norms to a forward and a backward pass; ghost clipping also repeats the backward pass of the inputs.
    baseline = relative_flops("scan", remat)
    assert relative_flops("bk", remat) - baseline == pytest.approx(1, abs=0.1)
    assert relative_flops("ghost", remat) - baseline == pytest.approx(2, abs=0.3)


def test_bookkeeping_with_full_remat_adds_a_forward_pass():
    assert relative_flops("bk", "full") - relative_flops("scan", "full") == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_groupwise_clipping_costs_no_extra_matmuls(remat):
    assert relative_flops("group", remat) == pytest.approx(relative_flops("scan", remat), abs=0.1)
