"""A finite token MDP with all of its trajectories, and its exact optimum by backward recursion (NumPy only)."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Tree:
    """A token MDP whose states are token prefixes.

    An episode ends with the last token of the vocabulary or after T tokens. Trajectories are padded to [M, T] with
    state 0, token 0 and mask 0.
    """

    prefixes: tuple[tuple[int, ...], ...]
    logits: np.ndarray  # [S, V], of the reference
    rewards: np.ndarray  # [S, V]
    states: np.ndarray  # int[M, T]
    tokens: np.ndarray  # int[M, T]
    mask: np.ndarray  # bool[M, T]
    steps: int

    @cached_property
    def state_ids(self) -> dict[tuple[int, ...], int]:
        """State index by prefix."""
        return {prefix: number for number, prefix in enumerate(self.prefixes)}

    def successor(self, state: int, token: int) -> int | None:
        """The next state, or None if the token ends the episode."""
        prefix = self.prefixes[state]
        ends = token == self.logits.shape[1] - 1 or len(prefix) + 1 == self.steps
        return None if ends else self.state_ids[prefix + (token,)]

    def solve(self, beta: float, gamma: float, rewards: np.ndarray | None = None):
        """Optimal KL-regularized (q [S, V], v [S], policy [S, V])."""
        rewards = self.rewards if rewards is None else rewards
        reference = softmax(self.logits)
        q, v = np.zeros_like(self.logits), np.zeros(len(self.prefixes))
        for state in self._backward_order():
            q[state] = rewards[state] + gamma * self._next_values(state, v)
            v[state] = beta * np.log(np.sum(reference[state] * np.exp(q[state] / beta)))
        return q, v, reference * np.exp((q - v[:, None]) / beta)

    def expected_return(self, policy: np.ndarray, beta: float) -> float:
        """Expected KL-regularized return of a policy [S, V]: rewards minus beta times its log-ratio."""
        gains = self.rewards - beta * (np.log(policy) - np.log(softmax(self.logits)))
        v = np.zeros(len(self.prefixes))
        for state in self._backward_order():
            v[state] = np.sum(policy[state] * (gains[state] + self._next_values(state, v)))
        return float(v[0])

    def along(self, table: np.ndarray) -> np.ndarray:
        """Gather a table [S, V] or [S] along every trajectory, [M, T]; 0 at padding."""
        values = table[self.states, self.tokens] if table.shape == self.logits.shape else table[self.states]
        return np.where(self.mask, values, 0)

    def _backward_order(self) -> list[int]:
        return sorted(range(len(self.prefixes)), key=lambda state: -len(self.prefixes[state]))

    def _next_values(self, state: int, values: np.ndarray) -> np.ndarray:
        """Values [V] of the successors of a state, 0 where the episode ends."""
        successors = [self.successor(state, token) for token in range(self.logits.shape[1])]
        return np.array([0.0 if successor is None else values[successor] for successor in successors])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def make_tree(seed: int, sparse: bool = False, steps: int = 3, vocabulary: int = 4) -> Tree:
    """A random tree; by default 13 states and 40 trajectories of at most 3 tokens.

    The reference logits have a large offset per state, so that a loss without the log-sum-exp shift differs visibly.

    Args:
        seed: random seed.
        sparse: reward only the last action of each trajectory.
        steps: maximum trajectory length.
        vocabulary: number of tokens.
    """
    rng = np.random.default_rng(seed)
    prefixes = tuple(p for n in range(steps) for p in itertools.product(range(vocabulary - 1), repeat=n))
    state_ids = {prefix: number for number, prefix in enumerate(prefixes)}
    logits = 1.5 * rng.normal(size=(len(prefixes), vocabulary)) + 3 * rng.normal(size=(len(prefixes), 1))
    rewards = rng.normal(size=logits.shape)
    paths = []

    def walk(prefix, path):
        for token in range(vocabulary):
            extended = path + [(state_ids[prefix], token)]
            if token == vocabulary - 1 or len(extended) == steps:
                paths.append(extended)
            else:
                walk(prefix + (token,), extended)

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
