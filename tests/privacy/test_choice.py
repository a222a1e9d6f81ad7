"""Which method is taken where none is named."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from shiq_jax.privacy import FlatClip, Groupwise, clipped_sum, per_example


@pytest.fixture
def taken(decoder, batch_of, example_losses, monkeypatch):
    """`taken(...) -> name of the function that computes`; the program is traced and never run."""

    def make(losses=None, batch=None, clip=FlatClip(1.0), budget=2**26, long=1024):
        module = importlib.import_module("shiq_jax.privacy.clipped_sum")
        monkeypatch.setattr(module, "BUDGET", budget)
        monkeypatch.setattr(module, "LONG", {"otherwise": long})
        called = []

        def spy(name, own):
            def spied(*given):
                called.append((name, given[5] if name == "instantiated" else None))
                return own(*given)

            return spied

        monkeypatch.setattr(module, "_instantiated", spy("instantiated", module._instantiated))
        for name, own in module._BY_OPERATIONS.items():
            monkeypatch.setitem(module._BY_OPERATIONS, name, spy(name, own))
        model, params = decoder("tied")
        losses, batch = losses or example_losses(model, "pair"), batch or batch_of("pair")
        jax.eval_shape(lambda params: clipped_sum(losses, params, batch, clip=clip), params)
        return called[0]

    return make


def test_few_parameters_are_told_apart_at_once(taken):
    assert taken() == ("instantiated", 6)


def test_many_by_their_norms(taken):
    assert taken(budget=1000) == ("ghost", None)


def test_long_units_one_after_the_other(taken):
    assert taken(long=8) == ("instantiated", 1)


def test_losses_that_hand_nothing_on_one_after_the_other(taken, decoder, batch_of, example_losses):
    whole = example_losses(decoder("tied")[0], "pair")
    one = per_example(lambda params, unit: whole(params, jax.tree.map(lambda leaf: leaf[None], unit), None)[0])
    assert taken(losses=one, batch=jax.tree.map(jnp.asarray, batch_of("pair")), budget=1000) == ("instantiated", 1)


def test_groups_by_each_operation(taken):
    assert taken(clip=Groupwise(FlatClip(1.0), 20)) == ("group", None)
