"""A finite token MDP with every trajectory listed, and its optimum by backward recursion, in numpy only."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Tree:
    """States are the tuples of tokens so far; the last token of the vocabulary ends an episode, as does the T-th token.

    Trajectories are padded to [M, T]; padding has state 0, token 0, mask 0.
    """

    prefixes: tuple[tuple[int, ...], ...]
    logits: np.ndarray  # [S, V], the reference's
    rewards: np.ndarray  # [S, V]
    states: np.ndarray  # int[M, T]
    tokens: np.ndarray  # int[M, T]
    mask: np.ndarray  # bool[M, T]
    steps: int

    @cached_property
    def numbers(self) -> dict[tuple[int, ...], int]:
        """State by prefix."""
        return {prefix: number for number, prefix in enumerate(self.prefixes)}

    def successor(self, state: int, token: int) -> int | None:
        """The state after a token, None when the episode is over."""
        prefix = self.prefixes[state]
        ends = token == self.logits.shape[1] - 1 or len(prefix) + 1 == self.steps
        return None if ends else self.numbers[prefix + (token,)]

    def solve(self, beta: float, gamma: float, rewards: np.ndarray | None = None):
        """(q [S, V], v [S], pi [S, V]) of the optimal KL-regularised policy."""
        rewards = self.rewards if rewards is None else rewards
        reference = softmax(self.logits)
        q, v = np.zeros_like(self.logits), np.zeros(len(self.prefixes))
        for state in self._backwards():
            q[state] = rewards[state] + gamma * self._after(state, v)
            v[state] = beta * np.log(np.sum(reference[state] * np.exp(q[state] / beta)))
        return q, v, reference * np.exp((q - v[:, None]) / beta)

    def worth(self, policy: np.ndarray, beta: float) -> float:
        """Expected sum of rewards less beta times the log-ratio to the reference, of a policy [S, V]."""
        gains = self.rewards - beta * (np.log(policy) - np.log(softmax(self.logits)))
        v = np.zeros(len(self.prefixes))
        for state in self._backwards():
            v[state] = np.sum(policy[state] * (gains[state] + self._after(state, v)))
        return float(v[0])

    def along(self, table: np.ndarray) -> np.ndarray:
        """table [S, V] or [S] read along every trajectory, [M, T, ...]; 0 at padding."""
        read = table[self.states, self.tokens] if table.shape == self.logits.shape else table[self.states]
        return np.where(self.mask, read, 0)

    def _backwards(self) -> list[int]:
        return sorted(range(len(self.prefixes)), key=lambda state: -len(self.prefixes[state]))

    def _after(self, state: int, values: np.ndarray) -> np.ndarray:
        """values of the states that the tokens lead to, 0 at an end."""
        following = [self.successor(state, token) for token in range(self.logits.shape[1])]
        return np.array([0.0 if after is None else values[after] for after in following])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def make_tree(seed: int, sparse: bool = False, steps: int = 3, vocabulary: int = 4) -> Tree:
    """A random tree; by default 13 states and 40 trajectories of at most 3 of 4 tokens.

    The reference's logits carry a large offset per state, without which a missing shift could not be seen. sparse: only
    the last action of a trajectory is rewarded.
    """
    draw = np.random.default_rng(seed)
    prefixes = tuple(p for n in range(steps) for p in itertools.product(range(vocabulary - 1), repeat=n))
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    logits = 1.5 * draw.normal(size=(len(prefixes), vocabulary)) + 3 * draw.normal(size=(len(prefixes), 1))
    rewards = draw.normal(size=logits.shape)
    paths = []

    def walk(prefix, path):
        for token in range(vocabulary):
            here = path + [(numbers[prefix], token)]
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
