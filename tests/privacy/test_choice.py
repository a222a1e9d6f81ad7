"""The method that `method="auto"` chooses."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from shiq_jax.privacy import FlatClip, Groupwise, clipped_sum, per_example

MODULE = importlib.import_module("shiq_jax.privacy.clipped_sum")


@pytest.fixture
def chosen_method(decoder, make_batch, unit_losses, monkeypatch):
    """Trace a clipped sum; return the function that computes it, and the units that are materialized at a time."""

    def choose(losses=None, batch=None, clip=FlatClip(1.0), budget=2**26, long_unit=1024):
        monkeypatch.setattr(MODULE, "BUDGET", budget)
        monkeypatch.setattr(MODULE, "LONG_UNIT", {"default": long_unit})
        calls = []

        def spy(name, original):
            def wrapper(*args):
                calls.append((name, args[5] if name == "materialized" else None))
                return original(*args)

            return wrapper

        monkeypatch.setattr(MODULE, "_materialized", spy("materialized", MODULE._materialized))
        for name, original in MODULE._TRACKED_METHODS.items():
            monkeypatch.setitem(MODULE._TRACKED_METHODS, name, spy(name, original))
        model, params = decoder("tied")
        losses, batch = losses or unit_losses(model, "pair"), batch or make_batch("pair")
        jax.eval_shape(lambda params: clipped_sum(losses, params, batch, clip=clip), params)
        return calls[0]

    return choose


def test_vmap_for_few_parameters(chosen_method):
    assert chosen_method() == ("materialized", 6)


def test_ghost_for_many_parameters(chosen_method):
    assert chosen_method(budget=1000) == ("ghost", None)


def test_scan_for_long_units(chosen_method):
    assert chosen_method(long_unit=8) == ("materialized", 1)


def test_scan_for_losses_without_tracker(chosen_method, decoder, make_batch, unit_losses):
    losses = unit_losses(decoder("tied")[0], "pair")
    untracked = per_example(lambda params, unit: losses(params, jax.tree.map(lambda leaf: leaf[None], unit), None)[0])
    batch = jax.tree.map(jnp.asarray, make_batch("pair"))
    assert chosen_method(losses=untracked, batch=batch, budget=1000) == ("materialized", 1)


def test_group_for_groupwise_rules(chosen_method):
    assert chosen_method(clip=Groupwise(FlatClip(1.0), 20)) == ("group", None)
