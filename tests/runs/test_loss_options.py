"""Command-line options of the losses match the options that the losses declare."""

import contextlib
import io
import re
from pathlib import Path
from typing import get_args

import pytest
import tyro
from jaxtyping import Array, ArrayLike, Float

from shiq_jax import objectives
from shiq_jax.objectives import OBJECTIVES, PAIRS, lift
from shiq_jax.objectives.validation import check_positive
from shiq_jax.runs import commands, loss_options
from shiq_jax.runs.loss_options import (
    LabelLoss,
    PairLoss,
    RewardLoss,
    SftLoss,
    make_loss_options,
    objective_from_settings,
)
from shiq_jax.runs.train_command import parse

CLASSES = (RewardLoss, PairLoss, LabelLoss)
ALL_OPTIONS = [
    (options_class, loss, option)
    for options_class in CLASSES
    for loss, objective in options_class.objectives.items()
    for option in objective.options
]
# Option -> another option that it requires.
REQUIRED = {"n": {"horizon": "n_step"}, "f_alpha": {"f_divergence": "alpha_divergence"}}


def parse_options(options_class, **options):
    """Parse the options from command-line arguments."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        arguments += [f"--{flag if value else f'no-{flag}'}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return tyro.cli(options_class, args=arguments)


def non_default(option):
    """A valid value that is not the default."""
    if option.kind is bool:
        return not option.default
    return 3 if option.kind is int else next(
        value for value in get_args(option.kind) or (0.3,) if value != option.default
    )  # fmt: skip


def usage_error(options_class, **options) -> str:
    """The error message of invalid options, on one line."""
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(stderr):
        parse_options(options_class, **options)
    assert stop.value.code == 2
    return re.sub(r"[│\s]+", " ", stderr.getvalue())


def test_every_loss_has_an_options_class():
    losses = [name for options_class in (*CLASSES, SftLoss) for name in options_class.objectives]
    assert sorted(losses) == sorted(OBJECTIVES)
    assert SftLoss().build().name == "sft" and SftLoss().settings() == {"name": "sft"}


@pytest.mark.parametrize("options_class, loss, option", ALL_OPTIONS)
def test_option_is_passed_to_the_loss(options_class, loss, option):
    declared = options_class.objectives[loss].options
    values = {option: non_default(declared[option])}
    if option == "f_divergence" or (option in REQUIRED and REQUIRED[option].keys() <= declared.keys()):
        values = REQUIRED.get(option, {}) | values
    options = parse_options(options_class, name=loss, **values)
    objective = options.build()
    kwargs = dict(objective.loss.keywords)
    kwargs |= {name: getattr(objective, name) for name in values if name not in kwargs}
    assert kwargs == values == options.overrides()
    defaults = {name: declaration.default for name, declaration in declared.items()}
    assert options.settings() == {"name": loss} | defaults | values


def test_option_of_another_loss_is_an_error_even_with_its_default_value():
    for options_class in CLASSES:
        declared = {
            name: option
            for objective in options_class.objectives.values()
            for name, option in objective.options.items()
        }
        for loss, objective in options_class.objectives.items():
            for name in declared.keys() - set(objective.options):
                default = next(
                    other.options[name].default for other in options_class.objectives.values() if name in other.options
                )
                if default is not None:
                    with pytest.raises(ValueError, match=f"{name} is not an option of the loss {loss}, which takes "):
                        options_class(name=loss, **{name: default})
    assert "normalisation is not an option of the loss vargrad, which takes beta" in usage_error(
        RewardLoss, name="vargrad", normalisation="sum_t"
    )
    assert "use_weighting is not an option of the loss aot" in usage_error(PairLoss, name="aot", use_weighting=False)
    assert "label_smoothing is not an option of the loss hinge" in usage_error(
        PairLoss, name="hinge", label_smoothing=0.0
    )


def test_invalid_value_is_a_usage_error():
    assert "tau is 1.0 but an expectile lies in (0, 1)" in usage_error(RewardLoss, name="ilql", tau=1.0)
    assert "n is None with horizon='n_step'" in usage_error(RewardLoss, horizon="n_step")
    assert "f_alpha is 0.5 with f_divergence='reverse_kl'" in usage_error(PairLoss, f_alpha=0.5)


def help_of(options_class) -> str:
    stdout = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(stdout):
        tyro.cli(options_class, args=["--help"])
    return re.sub(r"[│\s]+", " ", stdout.getvalue())


@pytest.mark.parametrize("options_class", CLASSES)
def test_help_shows_every_option_once_with_losses_and_defaults(options_class):
    text = help_of(options_class)
    for option in {option for objective in options_class.objectives.values() for option in objective.options}:
        assert len(re.findall(rf" --{option.replace('_', '-')}[ ,]", text)) == 1, option
    assert "None" not in text
    if options_class is PairLoss:
        assert "(default: 0.0; exo: 0.001)" in text and "dpop: cost of a chosen completion" in text
        assert "all but cpo and orpo: weight, at least 0, of the chosen" in text
    if options_class is RewardLoss:
        assert "(default: 0.1; oreo: 0.03)" in text and "ilql, cql, mc_returns: Q / beta is added" in text


def test_documented_custom_loss_gets_command_line_options():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    function, line = re.findall(r"```python\n(.*?)```", page.split("## Add a loss")[1], re.DOTALL)[:2]
    scope = vars(objectives) | {"check_positive": check_positive}
    scope |= {"ArrayLike": ArrayLike, "Array": Array, "Float": Float}
    exec(function, scope)
    options_class = make_loss_options("Toy", "Pair losses.", PairLoss.objectives | eval(f"{{{line}}}", scope))
    assert "--target FLOAT margin: margin that a pair should have, > 0. (default: 1.0)" in help_of(options_class)
    assert parse_options(options_class, name="margin", target=2.0).build().loss.keywords == {"target": 2.0}
    message = usage_error(options_class, name="margin", target=-1.0)
    assert "target is -1.0 but must be a positive finite number" in message
    assert "target is not an option of the loss dpo" in usage_error(options_class, name="dpo", target=1.0)
    assert "--target" not in help_of(PairLoss)


def test_same_option_with_different_types_is_an_error():
    def int_loss(chosen_logratio, *, beta: ArrayLike, sharpness: int = 3):
        return beta * sharpness * chosen_logratio

    def float_loss(chosen_logratio, *, beta: ArrayLike, sharpness: ArrayLike = 3.0):
        return beta * sharpness * chosen_logratio

    with pytest.raises(ValueError, match="option 'sharpness' has different types in float and int"):
        make_loss_options("Toy", "Two.", {"float": lift(float_loss, PAIRS), "int": lift(int_loss, PAIRS)})


def test_settings_include_defaults_and_rebuild_the_objective():
    assert RewardLoss().settings() == RewardLoss(beta=0.1, gamma=1.0).settings()
    loss = RewardLoss(name="ilql", beta=0.05, polyak=0.1)
    assert loss.q_guidance == objective_from_settings(loss.settings()).q_guidance == 20.0
    assert objective_from_settings(loss.settings()).polyak == 0.1 and objective_from_settings({}).name == "sft"
    # Older runs recorded the options of all losses.
    old_settings = {"name": "ilql", "beta": 0.05, "gamma": None, "normalisation": "sum_t", "horizon": "multi"}
    assert objective_from_settings(old_settings).q_guidance == 20.0
    assert commands.Shiq(loss=loss).settings()["loss"] == loss.settings()
    assert set(loss_options.REWARD_LOSSES) == set(RewardLoss.objectives)


def test_train_command_has_loss_options():
    stdout = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(stdout):
        parse(["shiq-ultrafeedback", "--help"], "train.py")
    assert "squared residuals of a sequence. (default: mean_t)" in re.sub(r"[│\s]+", " ", stdout.getvalue())
    command = parse(["dpo", "--loss.name", "exo", "--loss.label-smoothing", "0.2", "--loss.use-weighting"], "train.py")
    assert command.loss.overrides() == {"label_smoothing": 0.2, "use_weighting": True}
