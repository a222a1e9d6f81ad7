"""What the tests of objectives share: double precision, and a token MDP solved exactly."""

import jax
import pytest

from experiments import token_tree


@pytest.fixture
def x64():
    """Double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def make_tree():
    """make_tree(seed, sparse=False): see `experiments.token_tree`."""
    return token_tree.make_tree
