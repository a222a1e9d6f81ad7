"""Options are declared by the signature and docstring of a loss, which also validates their values."""

import subprocess
import sys
from typing import Literal

import pytest
from jaxtyping import ArrayLike

from shiq_jax.objectives import OBJECTIVES, Example, LossOut, Objective, Option, check_options
from shiq_jax.objectives.options import docstring_entries, options_from_signature

ALL_OPTIONS = [(name, option) for name, objective in OBJECTIVES.items() for option in objective.options]


def loss(
    example: Example, *, beta: ArrayLike, gamma: ArrayLike | None = None, n: int | None = None, sharp: bool = False,
    kind: Literal["a", "b"] = "a", plain=2.0, kl: ArrayLike = 0.0,
) -> LossOut:  # fmt: skip
    """A loss.

    Args:
      example: any example.
      beta, gamma: two numbers,
        on two lines.
      n: [T], in (0, 1): a colon.

    Returns:
      kind: not an argument.
    """


def test_signature_and_docstring_declare_the_options():
    assert options_from_signature(loss, exclude={"kl"}, defaults={"beta": 0.1}) == {
        "beta": Option(float, 0.1, "two numbers, on two lines."),
        "gamma": Option(float, None, "two numbers, on two lines."),
        "n": Option(int, None, "[T], in (0, 1): a colon."),
        "sharp": Option(bool, False),
        "kind": Option(Literal["a", "b"], "a"),
        "plain": Option(float, 2.0),
    }
    assert docstring_entries(loss)["example"] == "any example."
    with pytest.raises(ValueError, match="option 'beta' of loss has no default"):
        options_from_signature(loss)


def test_custom_objective_reads_options_from_its_loss():
    objective = Objective(lambda example, *, gamma=1.0: None, frozenset(), "trajectory")
    assert dict(objective.options) == {"gamma": Option(float, 1.0)}
    with_heads = objective._replace(target_heads=("q1",), trains_policy=False, heads={"q1": "q"})
    assert list(with_heads.options) == ["gamma", "beta", "polyak"]
    bound = with_heads.configure(beta=0.5, polyak=0.2, gamma=0.9)
    assert (bound.q_guidance, bound.polyak, bound.loss.keywords) == (2.0, 0.2, {"gamma": 0.9})
    assert objective.q_guidance == 0.0


def test_every_option_is_documented():
    texts = {}
    for name, option in ALL_OPTIONS:
        texts.setdefault(option, set()).add(OBJECTIVES[name].options[option].text)
    assert all(any(descriptions) for descriptions in texts.values()), texts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_are_valid(name):
    check_options(OBJECTIVES[name])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("shiq", {"beta": 0.0}, "beta is 0.0 but must be a positive finite number"),
        ("shiq", {"gamma": 1.5}, "gamma is 1.5"),
        ("shiq", {"horizon": "n_step"}, "n is None with horizon='n_step'"),
        ("shiq", {"value": "given"}, "value is 'given'"),
        ("pcl", {"n": 0}, "n is 0"),
        ("a_star_po", {"value_beta": -1.0}, "value_beta is -1.0"),
        ("ilql", {"tau": 1.0}, "tau is 1.0"),
        ("cql", {"alpha": -1.0}, "alpha is -1.0 but must be finite and not negative"),
        ("soft_q", {"delta": 0.0}, "delta is 0.0"),
        ("mc_returns", {"alpha": float("inf")}, "alpha is inf"),
        ("ilql", {"beta": 0.0}, "beta is 0.0"),
        ("ilql", {"polyak": 0.0}, r"polyak is 0.0 but must lie in \(0, 1\]"),
        ("exo", {"label_smoothing": 0.0}, "label_smoothing is 0.0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("dpo", {"f_divergence": "alpha_divergence"}, "f_alpha is None"),
        ("kto", {"beta": -1.0}, "beta is -1.0"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ("apo_zero_unpaired", {"undesirable_weight": float("nan")}, "undesirable_weight is nan"),
        ("aot", {"rpo_alpha": -1.0}, "rpo_alpha is -1.0"),
    ],
)
def test_invalid_values_are_rejected_without_data(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(OBJECTIVES[name].configure(**options))


def test_check_options_initializes_no_backend():
    """Options are checked before jax.distributed.initialize, which must run before the first backend is initialized."""
    code = """
from jax._src import xla_bridge
from shiq_jax.objectives import OBJECTIVES, check_options
for objective in OBJECTIVES.values():
    check_options(objective)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
