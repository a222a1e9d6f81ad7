"""Runs in rounds: sample, score, learn, again; what each round starts from and is measured from, and own recipes."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as eval_command
from shiq_jax.errors import UserError
from shiq_jax.models import fingerprint, load_hf
from shiq_jax.objectives import LossOut, Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs import pipeline, recipes, sources, train_command
from shiq_jax.runs.inspection import inspect
from shiq_jax.runs.policies import resolve_policy
from shiq_jax.runs.recipes.iterative import Iterative

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = [
    "--mesh", "fsdp=1", "--warm-start.steps", "0", "--collection.prompts", "8", "--collection.prompts-per-batch", "8",
    "--collection.samples-per-prompt", "4", "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "2",
    "--evaluation.samples-per-prompt", "2", "--evaluation.max-tokens", "4", "--evaluation.times", "1",
    "--evaluation.no-greedy", "--batch-size", "4", "--epochs", "1", "--optimizer.learning-rate", "3e-3",
]  # fmt: skip


def train(tiny, out, *more, command="dpo"):
    train_command.main([command, "--model", tiny, "--output-dir", str(out), *SMALL, *more])
    return out


def train_with(recipe, tiny, out):
    """Two rounds of a recipe of one's own."""
    arguments = ["shiq", "--model", tiny, "--output-dir", str(out), *SMALL, "--rounds", "2"]
    pipeline.train(train_command.parse(arguments), recipe)
    return out


def rows_of(run, stage):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


def weights(directory) -> str:
    return fingerprint(load_hf(directory)[1])


def annotators(round_directory) -> set[str]:
    """Fingerprints of the models whose statistics a round's buffer holds."""
    return {identity["weights"] for identity, _ in Buffer.open(round_directory / "buffer").identities()}


@pytest.fixture(scope="module")
def previous(tiny, tmp_path_factory):
    """Three rounds of iterative DPO, each measured from the policy that it samples from."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "previous", "--rounds", "3", "--round.reference", "previous")


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """The same, measured from the policy before the first round."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "first", "--rounds", "3")


def test_every_round_has_a_directory_and_the_last_policy_is_the_export(previous):
    assert [path.name for path in sorted((previous / "rounds").iterdir())] == ["000", "001", "002"]
    for number in range(3):
        here = previous / "rounds" / f"{number:03d}"
        found = json.loads((here / "round.json").read_text())
        assert found["records"] == 32 and found["updates"] > 0 and len(Buffer.open(here / "buffer")) == 32
        assert (here / "policy").exists() == (number < 2)
    policies = [previous / "rounds" / "000" / "policy", previous / "rounds" / "001" / "policy", previous / "export"]
    assert len({weights(policy) for policy in policies}) == 3
    assert not (previous / "buffer").exists() and not (previous / "checkpoints").exists()


def test_the_log_counts_on_through_the_rounds(previous):
    updates, evaluations = rows_of(previous, "update"), rows_of(previous, "evaluation")
    assert [row["step"] for row in updates] == list(range(1, len(updates) + 1))
    per_round = [json.loads((previous / f"rounds/{n:03d}/round.json").read_text())["updates"] for n in range(3)]
    assert [row["round"] for row in updates] == [n for n, count in enumerate(per_round) for _ in range(count)]
    assert [row["step"] for row in evaluations] == [0, *np.cumsum(per_round)]
    assert evaluations[0]["kl"] == 0 and all(math.isfinite(row["kl"]) for row in evaluations)
    summary = json.loads((previous / "summary.json").read_text())
    assert summary["records"] == 96 and summary["updates"] == sum(per_round)
    # Each round has a schedule of its own, which begins at a low rate and ends near 0.
    rates = [[row["learning_rate"] for row in updates if row["round"] == n] for n in range(3)]
    assert rates[0] == rates[1][: len(rates[0])] or per_round[0] != per_round[1]


def test_a_round_samples_from_the_policy_of_the_one_before(tiny, previous):
    start = Path(tiny)
    for number in range(3):
        here = previous / "rounds" / f"{number:03d}"
        # With "previous" that policy is the reference too, and its sampler's statistics serve.
        assert annotators(here) == {weights(start)}
        assert json.loads((here / "round.json").read_text())["probe"]["passed"]
        start = here / "policy"
    tokens = [
        [
            record.tokens.tolist()
            for record in map(Buffer.open(previous / f"rounds/{n:03d}/buffer").__getitem__, range(32))
        ]
        for n in range(3)
    ]
    assert tokens[0] != tokens[1] != tokens[2]


@pytest.mark.slow
def test_the_first_policy_is_the_reference_by_default(tiny, first, previous):
    for number in range(3):
        assert annotators(first / "rounds" / f"{number:03d}") == {weights(tiny)}
    # The sampler of the second round is another model, so its statistics do not serve.
    assert not json.loads((first / "rounds" / "001" / "round.json").read_text())["probe"]["passed"]
    # The first round knows one policy only.
    for name in ("000",):
        one, other = (load_file(run / "rounds" / name / "policy" / "model.safetensors") for run in (first, previous))
        assert all(np.array_equal(one[key], other[key]) for key in one)
    one, other = (load_file(run / "export" / "model.safetensors") for run in (first, previous))
    assert any(not np.array_equal(one[key], other[key]) for key in one)


def test_one_round_lies_in_the_directory_of_the_run(tiny, tmp_path):
    run = train(tiny, tmp_path / "run")
    assert not (run / "rounds").exists() and (run / "buffer").exists() and (run / "round.json").exists()
    assert not any("round" in row for row in rows_of(run, "update") + rows_of(run, "evaluation"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("shiq", ()),
        ("kto", ("--round.reference", "previous")),
        ("dpo", ("--lora.rank", "2", "--round.reference", "previous")),
        ("shiq", ("--loss.name", "ilql")),
    ],
)
def test_every_command_that_samples_has_rounds(command, more, tiny, tmp_path, monkeypatch):
    # A random model's answers are all wrong; this reward tells them apart.
    monkeypatch.setattr(sources.rewards, "resolve", lambda name: lambda row, text: sum(map(ord, text)) % 5 / 4)
    run = train(tiny, tmp_path / "run", "--rounds", "2", *more, command=command)
    evaluations = rows_of(run, "evaluation")
    assert (run / "export" / "model.safetensors").exists() and evaluations[0]["kl"] == 0 < abs(evaluations[-1]["kl"])
    base = load_file(f"{tiny}/model.safetensors")
    policies = [load_file(run / path / "model.safetensors") for path in ("rounds/000/policy", "export")]
    moved = [any(np.any(policy[name] != base[name]) for name in base) for policy in policies]
    assert moved == [command != "shiq" or not more] * 2
    if "ilql" in more:
        # The second round goes on with the heads of the first.
        heads = [load_file(run / path / "heads.safetensors") for path in ("rounds/000/policy", "export")]
        distance = sum(np.linalg.norm(heads[0][name] - heads[1][name]) for name in heads[0])
        assert 0 < distance < sum(np.linalg.norm(heads[0][name]) for name in heads[0])


def test_a_part_of_a_run_is_a_policy(previous, tmp_path, capsys):
    steps = {path.name for path in (previous / "rounds" / "001" / "checkpoints").iterdir()}
    found = resolve_policy(str(previous))
    assert (found.base, found.step) == (previous / "rounds" / "001" / "policy", None)
    assert found.checkpoints == previous / "rounds" / "002" / "checkpoints"
    middle = resolve_policy(str(previous / "rounds" / "001" / "checkpoints" / min(steps)))
    assert (middle.base, middle.step) == (previous / "rounds" / "000" / "policy", int(min(steps)))
    assert resolve_policy(str(previous / "rounds" / "000")).base != previous / "rounds" / "000"
    assert resolve_policy(str(previous / "export")).run is None
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "sort 21:", "answer": "12"}\n')
    eval_command.main([
        "--model", str(previous), "--data", str(tmp_path / "prompts.jsonl"), "--reward", "exact", "--max-tokens", "4",
        "--output-dir", str(tmp_path / "eval"), "--mesh", "fsdp=1",
    ])  # fmt: skip
    assert "kl" in json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert "round       3 of 3" in inspect(previous)


@pytest.mark.parametrize(
    ("command", "more", "complaint"),
    [
        ("dpo", ("--rounds", "0"), "rounds must be at least 1"),
        ("sft", ("--rounds", "2"), "rounds sample from the policy"),
        ("dpo", ("--round.reference", "previous"), "give rounds"),
        ("dpo", ("--rounds", "2", "--data", "rows.jsonl"), "rounds sample from the policy, but data are given once"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(command, more, complaint, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tiny, tmp_path / "run", *more, command=command)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())


class TwoReferences(Iterative):
    """A recipe whose loss reads two references by name."""

    def objective(self, round):
        def loss(example, *, beta=0.1):
            far, near = example.references["reference"], example.references["previous"]
            actions = example.action_mask
            apart = jax.numpy.sum(jax.numpy.where(actions, jax.numpy.abs(far.logp - near.logp), 0))
            value = -jax.numpy.sum(jax.numpy.where(actions, example.policy.logp, 0)) * jax.numpy.sum(example.rewards)
            return LossOut(value, jax.numpy.float32(1), {"apart": apart})

        return Objective(loss, frozenset({"references", "rewards"}), "trajectory")

    def references(self, round):
        return {"reference": round.reference, "previous": round.policy}


def test_a_recipe_names_its_references(tiny, tmp_path):
    run = train_with(TwoReferences, tiny, tmp_path / "run")
    middle = run / "rounds" / "000" / "policy"
    assert annotators(run / "rounds" / "000") == {weights(tiny)}
    assert annotators(run / "rounds" / "001") == {weights(tiny), weights(middle)}
    updates = rows_of(run, "update")
    assert all(row["apart"] == 0 for row in updates if row["round"] == 0)
    assert all(row["apart"] > 1e-3 for row in updates if row["round"] == 1)
    with pytest.raises(UserError, match="was begun with recipe='TwoReferences', not 'Iterative'"):
        job = train_command.parse(["shiq", "--model", tiny, "--output-dir", str(run), *SMALL, "--rounds", "2"])
        pipeline.train(dataclasses.replace(job, resume=True))


@pytest.mark.slow
def test_the_recipe_of_the_documentation_runs(tiny, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text().split("## Write a recipe\n")[1]
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)
    run = train_with(scope["ExpertIteration"], tiny, tmp_path / "run")
    assert (run / "export" / "model.safetensors").exists()
    for number in range(2):
        answers, best = (Buffer.open(run / "rounds" / f"{number:03d}" / name) for name in ("buffer", "best"))
        largest: dict = {}
        for group, value in zip(answers.group_ids(), answers.returns(), strict=True):
            largest[group] = max(value, largest.get(group, value))
        assert len(answers) == 32 and len(best) == 8 and dict(zip(best.group_ids(), best.returns())) == largest


def test_a_recipe_is_a_short_file():
    for file in Path(recipes.__file__).parent.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 150, file
