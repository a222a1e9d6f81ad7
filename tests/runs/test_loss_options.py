"""The command line's options of losses are those that the losses declare, whichever losses there are."""

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
from shiq_jax.runs.loss_options import LabelLoss, PairLoss, RewardLoss, SftLoss, family, recorded
from shiq_jax.runs.train_command import parse

FAMILIES = (RewardLoss, PairLoss, LabelLoss)
EVERY = [(kind, name, option) for kind in FAMILIES for name, each in kind.objectives.items() for option in each.options]
# Options that go together.
BESIDE = {"n": {"horizon": "n_step"}, "f_alpha": {"f_divergence": "alpha_divergence"}}


def parsed(kind, **options):
    """The options as `--loss.*` gives them."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        arguments += [f"--{flag if value else f'no-{flag}'}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return tyro.cli(kind, args=arguments)


def another(option):
    """A value that is not the default."""
    if option.kind is bool:
        return not option.default
    return 3 if option.kind is int else next(
        value for value in get_args(option.kind) or (0.3,) if value != option.default
    )  # fmt: skip


def refused(kind, **options) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(said):
        parsed(kind, **options)
    assert stop.value.code == 2
    return re.sub(r"[│\s]+", " ", said.getvalue())


def test_every_loss_is_in_a_family():
    assert sorted(name for kind in (*FAMILIES, SftLoss) for name in kind.objectives) == sorted(OBJECTIVES)
    assert SftLoss().configured().name == "sft" and SftLoss().settings() == {"name": "sft"}


@pytest.mark.parametrize("kind, name, option", EVERY)
def test_every_option_reaches_the_loss(kind, name, option):
    declared = kind.objectives[name].options
    given = {option: another(declared[option])}
    if option == "f_divergence" or (option in BESIDE and BESIDE[option].keys() <= declared.keys()):
        given = BESIDE.get(option, {}) | given
    loss = parsed(kind, name=name, **given)
    objective = loss.configured()
    reached = dict(objective.loss.keywords)
    reached |= {each: getattr(objective, each) for each in given if each not in reached}
    assert reached == given == loss.given()
    assert loss.settings() == {"name": name} | {each: about.default for each, about in declared.items()} | given


def test_an_option_of_another_loss_is_refused_even_at_that_loss_s_default():
    for kind in FAMILIES:
        for name, objective in kind.objectives.items():
            others = {option for each in kind.objectives.values() for option in each.options} - set(objective.options)
            for option in others:
                default = next(
                    each.options[option].default for each in kind.objectives.values() if option in each.options
                )
                if default is not None:
                    with pytest.raises(ValueError, match=f"{option} is not an option of the loss {name}, which takes "):
                        kind(name=name, **{option: default})
    assert "normalisation is not an option of the loss vargrad, which takes beta" in refused(
        RewardLoss, name="vargrad", normalisation="sum_t"
    )
    assert "use_weighting is not an option of the loss aot" in refused(PairLoss, name="aot", use_weighting=False)
    assert "label_smoothing is not an option of the loss hinge" in refused(PairLoss, name="hinge", label_smoothing=0.0)


def test_losses_refuse_values_on_the_command_line():
    assert "tau is 1.0 but an expectile lies in (0, 1)" in refused(RewardLoss, name="ilql", tau=1.0)
    assert "n is None with horizon='n_step'" in refused(RewardLoss, horizon="n_step")
    assert "f_alpha is 0.5 with f_divergence='reverse_kl'" in refused(PairLoss, f_alpha=0.5)


def help_of(kind) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        tyro.cli(kind, args=["--help"])
    return re.sub(r"[│\s]+", " ", said.getvalue())


@pytest.mark.parametrize("kind", FAMILIES)
def test_help_shows_every_option_once_with_its_losses_and_defaults(kind):
    text = help_of(kind)
    for option in {option for each in kind.objectives.values() for option in each.options}:
        assert len(re.findall(rf" --{option.replace('_', '-')}[ ,]", text)) == 1, option
    assert "None" not in text
    if kind is PairLoss:
        assert "(default: 0.0; exo: 0.001)" in text and "dpop: cost of a chosen completion" in text
        assert "all but cpo and orpo: weight, at least 0, of the chosen" in text
    if kind is RewardLoss:
        assert "(default: 0.1; oreo: 0.03)" in text and "ilql, cql, mc_returns: Q / beta is added" in text


def test_a_new_loss_is_one_function_and_one_line():
    """That of the documentation, which knows a view and a check and nothing of the command line."""
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    function, line = re.findall(r"```python\n(.*?)```", page.split("## Add a loss")[1], re.DOTALL)[:2]
    known = vars(objectives) | {"check_positive": check_positive}
    known |= {"ArrayLike": ArrayLike, "Array": Array, "Float": Float}
    exec(function, known)
    kind = family("Toy", "Pairs and a toy.", PairLoss.objectives | eval(f"{{{line}}}", known))
    assert "--target FLOAT margin: margin that a pair should have, > 0. (default: 1.0)" in help_of(kind)
    assert parsed(kind, name="margin", target=2.0).configured().loss.keywords == {"target": 2.0}
    assert "target is -1.0 but must be a positive finite number" in refused(kind, name="margin", target=-1.0)
    assert "target is not an option of the loss dpo" in refused(kind, name="dpo", target=1.0)
    assert "--target" not in help_of(PairLoss)


def test_options_of_one_name_and_several_types_are_refused_where_losses_are_put_together():
    def other_loss(chosen_logratio, *, beta: ArrayLike, sharpness: int = 3):
        return beta * sharpness * chosen_logratio

    def toy_loss(chosen_logratio, *, beta: ArrayLike, sharpness: ArrayLike = 3.0):
        return beta * sharpness * chosen_logratio

    with pytest.raises(ValueError, match="option 'sharpness' is of different types in one and other"):
        family("Toy", "Two.", {"one": lift(toy_loss, PAIRS), "other": lift(other_loss, PAIRS)})


def test_settings_hold_what_was_not_given_too_and_make_the_objective_again():
    assert RewardLoss().settings() == RewardLoss(beta=0.1, gamma=1.0).settings()
    loss = RewardLoss(name="ilql", beta=0.05, polyak=0.1)
    assert loss.q_guidance == recorded(loss.settings()).q_guidance == 20.0
    assert recorded(loss.settings()).polyak == 0.1 and recorded({}).name == "sft"
    # As runs recorded them that knew the options of all losses.
    older = {"name": "ilql", "beta": 0.05, "gamma": None, "normalisation": "sum_t", "horizon": "multi"}
    assert recorded(older).q_guidance == 20.0
    assert commands.Shiq(loss=loss).settings()["loss"] == loss.settings()
    assert set(loss_options.REWARD_LOSSES) == set(RewardLoss.objectives)


def test_the_whole_command_line_knows_them():
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        parse(["shiq-ultrafeedback", "--help"], "train.py")
    assert "squared residuals of a sequence. (default: mean_t)" in re.sub(r"[│\s]+", " ", said.getvalue())
    command = parse(["dpo", "--loss.name", "exo", "--loss.label-smoothing", "0.2", "--loss.use-weighting"], "train.py")
    assert command.loss.given() == {"label_smoothing": 0.2, "use_weighting": True}
