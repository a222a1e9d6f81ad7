"""Objectives on problems with known optima: `python -m experiments.synthetic` writes docs/results/synthetic.md.

The problems are a bandit, token trees, and a conversation with random replies; dynamic programming gives their optima.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import synthetic_page
from experiments.token_tree import Tree, make_tree, softmax
from shiq_jax.objectives import (
    bellman_residuals,
    copg_loss,
    dpo_loss,
    ipo_loss,
    sppo_hard_loss,
    squared_residuals,
    token_stats_from_logits,
)

BETA = 0.7
VARIANTS = {
    "multi-step": {"horizon": "multi"},
    "one-step": {"horizon": "one"},
    "trajectory": {"horizon": "trajectory"},
    "multi-step, no shift": {"horizon": "multi", "value": "lse"},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Number of seeds and output directory."""

    out: Path = Path("docs/results")
    """Output directory of the page, the figure and the results."""
    seeds: int = 5
    """Random problems per experiment."""
    quick: bool = False
    """Test the script with two seeds and short runs; writes to runs/synthetic."""


def main(options: Options) -> None:
    """Run all experiments and write the page."""
    seeds = range(2 if options.quick else options.seeds)
    with jax.enable_x64(True):
        numbers = {
            "bandit": bandit(steps=500 if options.quick else 20_000),
            "rewards": value_errors(seeds),
            "replies": random_replies(seeds, steps=500 if options.quick else 8000),
            "coverage": coverage(seeds, steps=300 if options.quick else 3000),
            "length": steps_by_length(seeds, longest=5 if options.quick else 7, steps=1000 if options.quick else 4000),
            "calibration": drift_without_rewards(seeds),
        }
    out = Path("runs/synthetic") if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "synthetic.json").write_text(json.dumps(numbers, indent=1) + "\n")
    synthetic_page.write(numbers, out)


# --- bandit


def bandit(steps: int = 20_000) -> dict[str, dict[str, float]]:
    """Policy that each objective converges to on a five-armed bandit with off-policy data."""
    r, reference = np.array([1, 0.5, 0, -0.5, -1]), np.array([0.0, 1, 2, 1, 0])
    behavior, beta = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), 0.5
    best = softmax(reference + r / beta)
    log_reference = np.log(softmax(reference))
    first, second = (index.ravel() for index in np.meshgrid(range(5), range(5), indexing="ij"))
    distinct = first != second
    first, second = first[distinct], second[distinct]
    pairs = behavior[first] * behavior[second]
    wins = r[first] > r[second]

    def logratios(logits):
        return jax.nn.log_softmax(logits) - log_reference

    def residual(logits, value):
        def arm(a):
            statistics = (token_stats_from_logits(x[None], a[None]) for x in (logits, jnp.asarray(reference)))
            kwargs = {"beta": beta, "value": value}
            return bellman_residuals(*statistics, jnp.asarray(r)[a][None], np.ones(1, bool), **kwargs)[0]

        return jnp.sum(behavior * jax.vmap(arm)(jnp.arange(5)) ** 2)

    def on_pairs(loss, weights, *args):
        def total(logits):
            logratio = logratios(logits)
            return jnp.sum(weights * loss(logratio[first], logratio[second], *args, beta=beta))

        return total

    def group_mean(logits):
        return jnp.sum(behavior * (logratios(logits) - (r - behavior @ r) / beta) ** 2)

    def policy_gradient(logits):
        regularized_reward = jax.lax.stop_gradient(r - beta * logratios(logits))
        return -jnp.sum(behavior * regularized_reward * jax.nn.log_softmax(logits))

    hard = np.where(wins, 2 * pairs, 0)
    objectives: dict[str, Callable] = {
        "ShiQ": partial(residual, value="lse_shift"),
        "no shift": partial(residual, value="lse"),
        "CoPG": on_pairs(copg_loss, pairs, r[first], r[second]),
        "DPO, soft labels": on_pairs(dpo_loss, 2 * pairs / (1 + np.exp(r[second] - r[first]))),
        "DPO, hard labels": on_pairs(dpo_loss, hard),
        "IPO, hard labels": on_pairs(ipo_loss, hard),
        "SPPO, hard labels": on_pairs(sppo_hard_loss, hard),
        "mean reward as value": group_mean,
        "policy gradient, no weights": policy_gradient,
    }
    results = {}
    for name, objective in objectives.items():
        logits, _ = _minimize(objective, jnp.asarray(reference), _adam(steps), steps)
        policy = softmax(np.asarray(logits))
        kl = float(np.sum(policy * (np.log(np.maximum(policy, 1e-300)) - log_reference)))
        results[name] = {
            "error": float(np.abs(policy - best).max()),
            "kl": kl,
            "worth": float(policy @ r) - beta * kl,
            "value": beta * float(jax.nn.logsumexp(logits) - jax.nn.logsumexp(reference)),
        }
    kl = float(np.sum(best * (np.log(best) - log_reference)))
    optimum = float(best @ r) - beta * kl
    results["optimum"] = {"error": 0.0, "kl": kl, "worth": optimum, "value": optimum}
    return results


# --- token trees


@partial(jax.jit, static_argnames=("horizon", "value", "gradient"))
def _tree_loss(logits, reference, states, tokens, rewards, mask, weights, **options):
    statistics = (token_stats_from_logits(x[states], tokens) for x in (logits, reference))

    def trajectory_loss(policy, reference, rewards, mask):
        return squared_residuals(bellman_residuals(policy, reference, rewards, mask, beta=BETA, **options), mask)

    return jnp.sum(weights * jax.vmap(trajectory_loss)(*statistics, rewards, mask))


def tree_loss(tree: Tree, weights: np.ndarray, **options) -> Callable:
    """Weighted loss over all trajectories of a tree as a function of logits [S, V]."""
    data = (tree.logits, tree.states, tree.tokens, tree.along(tree.rewards), tree.mask, weights)
    return lambda logits: _tree_loss(logits, *map(jnp.asarray, data), **options)


def value_errors(seeds: Sequence[int], steps: int = 300) -> dict:
    """Error of the root value, and KL from the optimal policy, along gradient descent."""
    results = {}
    for kind in ("sparse", "dense"):
        results[kind] = {name: [] for name in VARIANTS}
        for seed in seeds:
            tree = make_tree(10 + seed, sparse=kind == "sparse")
            _, v, best = tree.solve(BETA, 1.0)
            weights = np.full(len(tree.states), 1 / len(tree.states))
            for name, options in VARIANTS.items():
                loss = tree_loss(tree, weights, **options)
                _, path = _minimize(loss, jnp.asarray(tree.logits), optax.sgd(0.5), steps, record=lambda logits: logits)
                shift = _lse(tree.logits)[0] if options.get("value") != "lse" else 0.0
                value = np.abs(BETA * (_lse(path[:, 0]) - shift) - v[0])
                kl = np.sum(best * (np.log(best) - _log_softmax(path)), axis=-1).mean(axis=-1)
                indices = _log_spaced(steps)
                results[kind][name].append({"value": value[indices].tolist(), "kl": kl[indices].tolist()})
        results["steps"] = [1 + step for step in indices]
    return results


def coverage(seeds: Sequence[int], steps: int = 3000, sizes: Sequence[int] = (5, 20, 80, 320, 1280)) -> dict:
    """Regret of the policy by the number of reference trajectories in the data."""
    results = {"sizes": list(sizes)} | {name: [] for name in VARIANTS}
    for seed in seeds:
        tree = make_tree(20 + seed)
        _, v, _ = tree.solve(BETA, 1.0)
        probabilities = np.exp(tree.along(np.log(softmax(tree.logits))).sum(axis=1))
        probabilities = probabilities / probabilities.sum()
        counts = np.random.default_rng(seed).multinomial(sizes[-1], probabilities)
        samples = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(probabilities)), counts))
        for name, options in VARIANTS.items():
            losses = [
                tree_loss(tree, np.bincount(samples[:size], minlength=len(probabilities)) / size, **options)
                for size in sizes
            ]
            # Adam is elementwise, so the runs can share one optimization.
            logits, _ = _minimize(
                lambda logits, losses=losses: sum(loss(each) for loss, each in zip(losses, logits)),
                jnp.stack([tree.logits] * len(sizes)), _adam(steps), steps,
            )  # fmt: skip
            results[name].append([v[0] - tree.expected_return(softmax(policy), BETA) for policy in np.asarray(logits)])
    return results


def steps_by_length(seeds: Sequence[int], longest: int = 7, steps: int = 4000) -> dict:
    """Gradient steps until the root value stays within 10% of the optimum, by trajectory length, with sparse rewards.

    The learning rate falls with the square of the length, because the curvature of the multi-step loss grows with it.
    """
    lengths = list(range(2, longest + 1))
    results = {"lengths": lengths, "most": steps} | {name: [] for name in ("multi-step", "one-step")}
    for name in ("multi-step", "one-step"):
        for seed in seeds:
            needed = []
            for length in lengths:
                tree = make_tree(30 + seed, sparse=True, steps=length, vocabulary=3)
                _, v, _ = tree.solve(BETA, 1.0)
                # Trajectories of the uniform policy.
                weights = np.prod(np.where(tree.mask, 1 / 3, 1), axis=1)
                loss, start = tree_loss(tree, weights, **VARIANTS[name]), jnp.asarray(tree.logits)
                shift = jax.nn.logsumexp(start[0])
                record = lambda logits, shift=shift: BETA * (jax.nn.logsumexp(logits[0]) - shift)  # noqa: E731
                _, path = _minimize(loss, start, optax.sgd(4.5 / length**2), steps, record=record)
                outside = np.flatnonzero(np.abs(path - v[0]) > 0.1 * abs(v[0]))
                needed.append(int(outside[-1]) + 2 if len(outside) else 1)
            results[name].append(needed)
    return results


# --- a conversation: an action, a random reply, an action

REPLIES = {
    f"{horizon}, {gradient}": {"horizon": horizon, "gradient": gradient}
    for horizon, gradient in (
        ("multi", "semi"), ("one", "semi"), ("multi", "full"), ("one", "full"), ("trajectory", "full")
    )
}  # fmt: skip


def random_replies(seeds: Sequence[int], steps: int = 8000) -> dict:
    """Regret with random user replies, by horizon and gradient; the expected losses are exact."""
    results = {name: [] for name in REPLIES}
    for seed in seeds:
        rng, beta = np.random.default_rng(40 + seed), 0.5
        first, second = rng.normal(size=3), rng.normal(size=(3, 2, 3))
        first_reward, second_reward = 0.3 * rng.normal(size=3), 2 * rng.normal(size=(3, 2, 3))
        reply = rng.dirichlet(np.ones(2), size=3)
        a, o, b = (index.ravel() for index in np.meshgrid(range(3), range(2), range(3), indexing="ij"))
        probabilities = reply[a, o] / 9
        rewards = jnp.asarray(np.stack([first_reward[a], second_reward[a, o, b]], axis=1))
        v2 = beta * np.log(np.sum(softmax(second) * np.exp(second_reward / beta), axis=-1))
        v1 = beta * np.log(np.sum(softmax(first) * np.exp((first_reward + np.sum(reply * v2, axis=1)) / beta)))

        def rows(tables, a=a, o=o):
            return jnp.stack([tables[0][np.zeros_like(a)], tables[1][a, o]], axis=1)

        def loss(
            tables, options, probabilities=probabilities, a=a, b=b, rows=rows, reference=(first, second),
            rewards=rewards,
        ):  # fmt: skip
            tokens = np.stack([a, b], axis=1)
            tables = (tables[0][None], tables[1])
            statistics = [
                token_stats_from_logits(rows(x), tokens) for x in (tables, (reference[0][None], reference[1]))
            ]

            def episode_loss(policy, reference, rewards):
                residuals = bellman_residuals(policy, reference, rewards, jnp.ones(2, bool), beta=beta, **options)
                return jnp.sum(residuals**2)

            return jnp.sum(probabilities * jax.vmap(episode_loss)(*statistics, rewards))

        def expected_return(tables, reference=(first, second), rewards=(first_reward, second_reward), reply=reply):
            p1, p2 = (softmax(np.asarray(table)) for table in tables)
            log1, log2 = (np.log(softmax(table)) for table in reference)
            second_return = np.sum(p2 * (rewards[1] - beta * (np.log(p2) - log2)), axis=-1)
            return np.sum(p1 * (rewards[0] - beta * (np.log(p1) - log1) + np.sum(reply * second_return, axis=1)))

        for name, options in REPLIES.items():
            start = (jnp.asarray(first), jnp.asarray(second))
            tables, _ = _minimize(partial(loss, options=options), start, _adam(steps), steps)
            results[name].append(float(v1 - expected_return(tables)))
    return results


# --- zero rewards


def drift_without_rewards(seeds: Sequence[int], steps: int = 200) -> dict:
    """KL from the reference while training on zero rewards with logits that are linear in shared features."""
    results = {name: [] for name in ("shift", "no shift")}
    for seed in seeds:
        tree = make_tree(50 + seed)
        rng = np.random.default_rng(seed)
        # With fewer features than states, the states share parameters as in a language model.
        features = jnp.asarray(rng.normal(size=(len(tree.prefixes), 5)))
        matrix = jnp.asarray(rng.normal(size=(5, tree.logits.shape[1])))
        zero_reward_tree = dataclasses.replace(
            tree, logits=np.asarray(features @ matrix), rewards=np.zeros_like(tree.rewards)
        )
        weights = np.full(len(tree.states), 1 / len(tree.states))
        for name, value in (("shift", "lse_shift"), ("no shift", "lse")):
            loss = tree_loss(zero_reward_tree, weights, horizon="multi", value=value)
            _, path = _minimize(
                lambda w, loss=loss: loss(features @ w), matrix, optax.sgd(1e-2), steps, record=lambda w: features @ w
            )
            logp = _log_softmax(path)
            kl = np.sum(np.exp(logp) * (logp - _log_softmax(zero_reward_tree.logits)), axis=-1).mean(axis=-1)
            results[name].append(kl[_log_spaced(steps)].tolist())
    return results | {"steps": [1 + step for step in _log_spaced(steps)]}


# --- optimization


def _adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(1e-2, steps))


def _minimize(
    loss: Callable, start, optimizer: optax.GradientTransformation, steps: int, record: Callable = lambda params: None
):
    """Minimize a loss; return the final parameters and `record(params)` after every step, [steps, ...]."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), record(params)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, steps))
    (params, _), path = run(start)
    return params, None if path is None else np.asarray(path)


def _lse(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.logsumexp(jnp.asarray(logits), axis=-1))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits) - _lse(logits)[..., None]


def _log_spaced(steps: int) -> list[int]:
    """About twenty step indices, evenly spaced in logarithm."""
    return sorted({int(round(x)) - 1 for x in np.geomspace(1, steps, 20)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
