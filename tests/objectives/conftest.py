"""What the tests of objectives share: double precision, and a token MDP solved exactly."""

import itertools
from dataclasses import dataclass

import jax
import numpy as np
import pytest


@pytest.fixture
def x64():
    """Double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True)
class Tree:
    """A finite token MDP with every trajectory listed, and its optimum by backward recursion, in numpy only.

    A state is the tuple of tokens so far. The last token of the vocabulary ends an episode, as does the T-th token.
    Trajectories are padded to [M, T]; padding has state 0, token 0, mask 0.
    """

    prefixes: tuple[tuple[int, ...], ...]
    logits: np.ndarray  # [S, V], the reference's
    rewards: np.ndarray  # [S, V]
    states: np.ndarray  # int[M, T]
    tokens: np.ndarray  # int[M, T]
    mask: np.ndarray  # bool[M, T]
    steps: int

    def successor(self, state: int, token: int) -> int | None:
        """The state after a token, None when the episode is over."""
        prefix = self.prefixes[state]
        ends = token == self.logits.shape[1] - 1 or len(prefix) + 1 == self.steps
        return None if ends else self.prefixes.index(prefix + (token,))

    def solve(self, beta: float, gamma: float, rewards: np.ndarray | None = None):
        """(q [S, V], v [S], pi [S, V]) of the optimal KL-regularised policy."""
        rewards = self.rewards if rewards is None else rewards
        reference = softmax(self.logits)
        q, v = np.zeros_like(self.logits), np.zeros(len(self.prefixes))
        for state in sorted(range(len(v)), key=lambda s: -len(self.prefixes[s])):
            for token in range(q.shape[1]):
                after = self.successor(state, token)
                q[state, token] = rewards[state, token] + (0 if after is None else gamma * v[after])
            v[state] = beta * np.log(np.sum(reference[state] * np.exp(q[state] / beta)))
        return q, v, reference * np.exp((q - v[:, None]) / beta)

    def along(self, table: np.ndarray) -> np.ndarray:
        """table [S, V] or [S] read along every trajectory, [M, T, ...]; 0 at padding."""
        read = table[self.states, self.tokens] if table.shape == self.logits.shape else table[self.states]
        return np.where(self.mask, read, 0)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture
def make_tree():
    """make_tree(seed, sparse=False): 4 tokens, at most 3 of them: 13 states and 40 trajectories.

    The reference's logits carry a large offset per state, without which a missing shift could not be seen.
    """

    def make(seed: int, sparse: bool = False) -> Tree:
        vocabulary, steps = 4, 3
        draw = np.random.default_rng(seed)
        prefixes = tuple(p for n in range(steps) for p in itertools.product(range(vocabulary - 1), repeat=n))
        logits = 1.5 * draw.normal(size=(len(prefixes), vocabulary)) + 3 * draw.normal(size=(len(prefixes), 1))
        rewards = draw.normal(size=logits.shape)
        paths = []

        def walk(prefix, path):
            for token in range(vocabulary):
                here = path + [(prefixes.index(prefix), token)]
                if token == vocabulary - 1 or len(here) == steps:
                    paths.append(here)
                else:
                    walk(prefix + (token,), here)

        walk((), [])
        states, tokens = np.zeros((2, len(paths), steps), int)
        mask = np.zeros((len(paths), steps), bool)
        for row, path in enumerate(paths):
            for column, (state, token) in enumerate(path):
                states[row, column], tokens[row, column], mask[row, column] = state, token, True
        if sparse:
            ends = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
            terminal = np.zeros(rewards.shape, bool)
            terminal[states[ends], tokens[ends]] = True
            rewards = np.where(terminal, rewards, 0)
        return Tree(prefixes, logits, rewards, states, tokens, mask, steps)

    return make
