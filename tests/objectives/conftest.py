"""Fixtures of the tests of objectives: double precision and a token MDP with a known solution."""

import jax
import pytest

from experiments import token_tree


@pytest.fixture
def x64():
    """Enable double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def make_tree():
    """The function make_tree(seed, sparse=False) of `experiments.token_tree`."""
    return token_tree.make_tree
