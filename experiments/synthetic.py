"""ShiQ and its relatives where the truth is known: `python -m experiments.synthetic` writes docs/results/synthetic.md.

Bandits, token trees and a conversation with random replies, small enough for exact optima by dynamic programming. Every
panel answers one question; tests assert what the page says of it.
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
    """How much of everything, and where it goes."""

    out: Path = Path("docs/results")
    """Where the page, the figure and the numbers go."""
    seeds: int = 5
    """Random trees of each kind."""
    quick: bool = False
    """Two seeds and short runs, to try the script; the page goes to runs/synthetic."""


def main(options: Options) -> None:
    """Compute everything and write the page."""
    seeds = range(2 if options.quick else options.seeds)
    with jax.enable_x64(True):
        numbers = {
            "bandit": bandit(steps=500 if options.quick else 20_000),
            "rewards": rewards(seeds),
            "replies": replies(seeds, steps=500 if options.quick else 8000),
            "coverage": coverage(seeds, steps=300 if options.quick else 3000),
            "length": length(seeds, longest=5 if options.quick else 7, steps=1000 if options.quick else 4000),
            "calibration": calibration(seeds),
        }
    out = Path("runs/synthetic") if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "synthetic.json").write_text(json.dumps(numbers, indent=1) + "\n")
    synthetic_page.write(numbers, out)


# --- one action


def bandit(steps: int = 20_000) -> dict[str, dict[str, float]]:
    """What each objective converges to on a bandit of five arms, under a behaviour policy that is far from optimal."""
    r, reference = np.array([1, 0.5, 0, -0.5, -1]), np.array([0.0, 1, 2, 1, 0])
    behaviour, beta = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), 0.5
    best = softmax(reference + r / beta)
    log_reference = np.log(softmax(reference))
    first, second = (index.ravel() for index in np.meshgrid(range(5), range(5), indexing="ij"))
    unlike = first != second
    first, second = first[unlike], second[unlike]
    pairs = behaviour[first] * behaviour[second]
    wins = r[first] > r[second]

    def logratios(logits):
        return jax.nn.log_softmax(logits) - log_reference

    def residual(logits, value):
        def arm(a):
            statistics = (token_stats_from_logits(x[None], a[None]) for x in (logits, jnp.asarray(reference)))
            given = {"beta": beta, "value": value}
            return bellman_residuals(*statistics, jnp.asarray(r)[a][None], np.ones(1, bool), **given)[0]

        return jnp.sum(behaviour * jax.vmap(arm)(jnp.arange(5)) ** 2)

    def on_pairs(loss, weights, *more):
        def total(logits):
            lr = logratios(logits)
            return jnp.sum(weights * loss(lr[first], lr[second], *more, beta=beta))

        return total

    def group_mean(logits):
        return jnp.sum(behaviour * (logratios(logits) - (r - behaviour @ r) / beta) ** 2)

    def policy_gradient(logits):
        gain = jax.lax.stop_gradient(r - beta * logratios(logits))
        return -jnp.sum(behaviour * gain * jax.nn.log_softmax(logits))

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
    found = {}
    for name, objective in objectives.items():
        logits, _ = _descend(objective, jnp.asarray(reference), _adam(steps), steps)
        policy = softmax(np.asarray(logits))
        kl = float(np.sum(policy * (np.log(np.maximum(policy, 1e-300)) - log_reference)))
        found[name] = {
            "error": float(np.abs(policy - best).max()),
            "kl": kl,
            "worth": float(policy @ r) - beta * kl,
            "value": beta * float(jax.nn.logsumexp(logits) - jax.nn.logsumexp(reference)),
        }
    kl = float(np.sum(best * (np.log(best) - log_reference)))
    found["optimum"] = {
        "error": 0.0,
        "kl": kl,
        "worth": float(best @ r) - beta * kl,
        "value": float(best @ r) - beta * kl,
    }
    return found


# --- trees of tokens


@partial(jax.jit, static_argnames=("horizon", "value", "gradient"))
def _tree_loss(logits, reference, states, tokens, gains, mask, weights, **options):
    statistics = (token_stats_from_logits(x[states], tokens) for x in (logits, reference))

    def one(policy, reference, gains, mask):
        found = bellman_residuals(policy, reference, gains, mask, beta=BETA, **options)
        return squared_residuals(found, mask)

    return jnp.sum(weights * jax.vmap(one)(*statistics, gains, mask))


def tree_loss(tree: Tree, weights: np.ndarray, **options) -> Callable:
    """The loss of logits [S, V] over trajectories with these weights."""
    data = (tree.logits, tree.states, tree.tokens, tree.along(tree.rewards), tree.mask, weights)
    return lambda logits: _tree_loss(logits, *(jnp.asarray(each) for each in data), **options)


def rewards(seeds: Sequence[int], steps: int = 300) -> dict:
    """Distance of the first state's value, and of the policy, from the optimum along plain gradient descent."""
    found = {}
    for kind in ("sparse", "dense"):
        found[kind] = {name: [] for name in VARIANTS}
        for seed in seeds:
            tree = make_tree(10 + seed, sparse=kind == "sparse")
            _, v, best = tree.solve(BETA, 1.0)
            weights = np.full(len(tree.states), 1 / len(tree.states))
            for name, options in VARIANTS.items():
                loss = tree_loss(tree, weights, **options)
                _, path = _descend(loss, jnp.asarray(tree.logits), optax.sgd(0.5), steps, watch=lambda logits: logits)
                shift = _lse(tree.logits)[0] if options.get("value") != "lse" else 0.0
                value = np.abs(BETA * (_lse(path[:, 0]) - shift) - v[0])
                kl = np.sum(best * (np.log(best) - _log_softmax(path)), axis=-1).mean(axis=-1)
                at = _logarithmic(steps)
                found[kind][name].append({"value": value[at].tolist(), "kl": kl[at].tolist()})
        found["steps"] = [1 + step for step in at]
    return found


def coverage(seeds: Sequence[int], steps: int = 3000, sizes: Sequence[int] = (5, 20, 80, 320, 1280)) -> dict:
    """Worth that the optimum has more, when only so many trajectories of the reference were seen."""
    found = {"sizes": list(sizes)} | {name: [] for name in VARIANTS}
    for seed in seeds:
        tree = make_tree(20 + seed)
        _, v, _ = tree.solve(BETA, 1.0)
        chance = np.exp(tree.along(np.log(softmax(tree.logits))).sum(axis=1))
        chance = chance / chance.sum()
        counts = np.random.default_rng(seed).multinomial(sizes[-1], chance)
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(chance)), counts))
        for name, options in VARIANTS.items():
            losses = [
                tree_loss(tree, np.bincount(order[:size], minlength=len(chance)) / size, **options) for size in sizes
            ]
            # Adam treats every number on its own, so the runs can share a descent.
            logits, _ = _descend(
                lambda logits, losses=losses: sum(loss(each) for loss, each in zip(losses, logits)),
                jnp.stack([tree.logits] * len(sizes)), _adam(steps), steps,
            )  # fmt: skip
            found[name].append([v[0] - tree.worth(softmax(each), BETA) for each in np.asarray(logits)])
    return found


def length(seeds: Sequence[int], longest: int = 7, steps: int = 4000) -> dict:
    """Steps of descent until the first state's value stays within a tenth of the optimum, with sparse rewards.

    The rate falls with the square of the longest trajectory, as the curvature of the multi-step loss grows with it.
    """
    lengths = list(range(2, longest + 1))
    found = {"lengths": lengths, "most": steps} | {name: [] for name in ("multi-step", "one-step")}
    for name in ("multi-step", "one-step"):
        for seed in seeds:
            needed = []
            for most in lengths:
                tree = make_tree(30 + seed, sparse=True, steps=most, vocabulary=3)
                _, v, _ = tree.solve(BETA, 1.0)
                # Data of a policy that takes all tokens alike.
                weights = np.prod(np.where(tree.mask, 1 / 3, 1), axis=1)
                loss, start = tree_loss(tree, weights, **VARIANTS[name]), jnp.asarray(tree.logits)
                first = jax.nn.logsumexp(start[0])
                watch = lambda logits, first=first: BETA * (jax.nn.logsumexp(logits[0]) - first)  # noqa: E731
                _, path = _descend(loss, start, optax.sgd(4.5 / most**2), steps, watch=watch)
                outside = np.flatnonzero(np.abs(path - v[0]) > 0.1 * abs(v[0]))
                needed.append(int(outside[-1]) + 2 if len(outside) else 1)
            found[name].append(needed)
    return found


# --- a conversation: an action, a random reply, an action

REPLIES = {
    f"{horizon}, {gradient}": {"horizon": horizon, "gradient": gradient}
    for horizon, gradient in (
        ("multi", "semi"), ("one", "semi"), ("multi", "full"), ("one", "full"), ("trajectory", "full")
    )
}  # fmt: skip


def replies(seeds: Sequence[int], steps: int = 8000) -> dict:
    """What is lost against the optimum where a user answers at random, by horizon and gradient; losses are exact."""
    found = {name: [] for name in REPLIES}
    for seed in seeds:
        draw, beta = np.random.default_rng(40 + seed), 0.5
        first, second = draw.normal(size=3), draw.normal(size=(3, 2, 3))
        small, large = 0.3 * draw.normal(size=3), 2 * draw.normal(size=(3, 2, 3))
        reply = draw.dirichlet(np.ones(2), size=3)
        a, o, b = (index.ravel() for index in np.meshgrid(range(3), range(2), range(3), indexing="ij"))
        chance = reply[a, o] / 9
        gains = jnp.asarray(np.stack([small[a], large[a, o, b]], axis=1))
        v2 = beta * np.log(np.sum(softmax(second) * np.exp(large / beta), axis=-1))
        v1 = beta * np.log(np.sum(softmax(first) * np.exp((small + np.sum(reply * v2, axis=1)) / beta)))

        def rows(tables, a=a, o=o):
            return jnp.stack([tables[0][np.zeros_like(a)], tables[1][a, o]], axis=1)

        def loss(tables, options, chance=chance, a=a, b=b, rows=rows, reference=(first, second), gains=gains):
            tokens = np.stack([a, b], axis=1)
            tables = (tables[0][None], tables[1])
            statistics = [
                token_stats_from_logits(rows(x), tokens) for x in (tables, (reference[0][None], reference[1]))
            ]

            def one(policy, reference, gains):
                return jnp.sum(
                    bellman_residuals(policy, reference, gains, jnp.ones(2, bool), beta=beta, **options) ** 2
                )

            return jnp.sum(chance * jax.vmap(one)(*statistics, gains))

        def worth(tables, reference=(first, second), small=small, large=large, reply=reply):
            p1, p2 = (softmax(np.asarray(table)) for table in tables)
            log1, log2 = (np.log(softmax(table)) for table in reference)
            late = np.sum(p2 * (large - beta * (np.log(p2) - log2)), axis=-1)
            return np.sum(p1 * (small - beta * (np.log(p1) - log1) + np.sum(reply * late, axis=1)))

        for name, options in REPLIES.items():
            start = (jnp.asarray(first), jnp.asarray(second))
            tables, _ = _descend(partial(loss, options=options), start, _adam(steps), steps)
            found[name].append(float(v1 - worth(tables)))
    return found


# --- nothing to learn


def calibration(seeds: Sequence[int], steps: int = 200) -> dict:
    """KL from the reference while training on rewards that are all zero, with logits linear in a few features."""
    found = {name: [] for name in ("shift", "no shift")}
    for seed in seeds:
        tree = make_tree(50 + seed)
        draw = np.random.default_rng(seed)
        # Fewer features than states: the states share what they learn, as those of a language model do.
        features = jnp.asarray(draw.normal(size=(len(tree.prefixes), 5)))
        matrix = jnp.asarray(draw.normal(size=(5, tree.logits.shape[1])))
        quiet = dataclasses.replace(tree, logits=np.asarray(features @ matrix), rewards=np.zeros_like(tree.rewards))
        weights = np.full(len(tree.states), 1 / len(tree.states))
        for name, value in (("shift", "lse_shift"), ("no shift", "lse")):
            loss = tree_loss(quiet, weights, horizon="multi", value=value)
            _, path = _descend(
                lambda w, loss=loss: loss(features @ w), matrix, optax.sgd(1e-2), steps, watch=lambda w: features @ w
            )
            ours = _log_softmax(path)
            kl = np.sum(np.exp(ours) * (ours - _log_softmax(quiet.logits)), axis=-1).mean(axis=-1)
            found[name].append(kl[_logarithmic(steps)].tolist())
    return found | {"steps": [1 + step for step in _logarithmic(steps)]}


# --- descent


def _adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(1e-2, steps))


def _descend(
    loss: Callable, start, optimizer: optax.GradientTransformation, steps: int, watch: Callable = lambda point: None
):
    """Where descent ends, and what `watch` makes of every point on the way, [steps, ...]."""

    def step(carry, _):
        point, state = carry
        updates, state = optimizer.update(jax.grad(loss)(point), state, point)
        point = optax.apply_updates(point, updates)
        return (point, state), watch(point)

    run = jax.jit(lambda point: jax.lax.scan(step, (point, optimizer.init(point)), None, steps))
    (point, _), path = run(start)
    return point, None if path is None else np.asarray(path)


def _lse(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.logsumexp(jnp.asarray(logits), axis=-1))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits) - _lse(logits)[..., None]


def _logarithmic(steps: int) -> list[int]:
    """About twenty step numbers, spread evenly in their logarithm."""
    return sorted({int(round(x)) - 1 for x in np.geomspace(1, steps, 20)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
