"""The README's commands, links and example are correct."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from shiq_jax.objectives import TokenStats

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_documented_test_command():
    commands = re.findall(r"^```\n(.*)\n```$", README, re.MULTILINE)
    assert len(commands) == 2 and commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[0].endswith("train.py") and commands[1].endswith("pytest")


def test_linked_files_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("https:") or (ROOT / name).exists(), name


def test_example_computes_the_shiq_loss():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 12
    tokens = jnp.array([[1, 2, 0, 3], [3, 3, 1, 0]])
    mask = jnp.array([[0, 1, 1, 1], [0, 0, 1, 1]], bool)
    rewards = jnp.array([[0, 0.5, 0, 1.0], [0, 0, -1.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    params, ref_params = (jax.random.normal(key, (4, 4)) for key in keys)
    scope = {"my_model": lambda params, tokens: params[tokens]}
    exec(code, scope)

    def stats(logits_table):
        logits = np.asarray(logits_table, np.float64)[np.asarray(tokens)][:, :-1]
        lse = np.log(np.exp(logits).sum(-1))
        return np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)[..., 0] - lse, lse

    (logp, lse), (ref_logp, ref_lse) = stats(params), stats(ref_params)
    total = 0.0
    for row in range(2):
        actions = np.flatnonzero(np.asarray(mask)[row, 1:])
        for t in actions:
            future = actions[actions >= t]
            soft_rewards = np.asarray(rewards)[row, 1:][future] - 0.1 * (logp - ref_logp)[row, future]
            total += (soft_rewards.sum() - 0.1 * (lse - ref_lse)[row, t]) ** 2
    reference = TokenStats(jnp.asarray(ref_logp, jnp.float32), jnp.asarray(ref_lse, jnp.float32))
    batch = (reference, tokens, rewards, mask)
    np.testing.assert_allclose(scope["batch_loss"](params, *batch), total / 2, rtol=1e-5)
    assert float(jnp.abs(scope["gradient"](params, *batch)).max()) > 0
