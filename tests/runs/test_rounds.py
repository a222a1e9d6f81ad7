"""Runs with several rounds: initial policies, references, logs and directories of the rounds, and custom recipes."""

import dataclasses
import json
import math
import re
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as eval_script
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


def train(tiny, out, *flags, command="dpo"):
    train_command.main([command, "--model", tiny, "--output-dir", str(out), *SMALL, *flags])
    return out


def train_with_recipe(recipe, tiny, out):
    """Two rounds of a custom recipe."""
    arguments = ["shiq", "--model", tiny, "--output-dir", str(out), *SMALL, "--rounds", "2"]
    pipeline.train(train_command.parse(arguments), recipe)
    return out


def rows_of(run, stage):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


def weights_of(directory) -> str:
    return fingerprint(load_hf(directory)[1])


def reference_weights(round_directory) -> set[str]:
    """Fingerprints of the reference models that annotated a round's buffer."""
    return {identity["weights"] for identity, _ in Buffer.open(round_directory / "buffer").identities()}


@pytest.fixture(scope="module")
def previous_run(tiny, tmp_path_factory):
    """Three rounds of iterative DPO; the reference is the policy that the round samples from."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "previous", "--rounds", "3", "--round.reference", "previous")


@pytest.fixture(scope="module")
def first_run(tiny, tmp_path_factory):
    """Three rounds of iterative DPO; the reference is the policy before the first round."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "first", "--rounds", "3")


def test_rounds_have_directories_and_the_last_policy_is_exported(previous_run):
    assert [path.name for path in sorted((previous_run / "rounds").iterdir())] == ["000", "001", "002"]
    for number in range(3):
        directory = previous_run / "rounds" / f"{number:03d}"
        summary = json.loads((directory / "round.json").read_text())
        assert summary["records"] == 32 and summary["updates"] > 0
        assert len(Buffer.open(directory / "buffer")) == 32
        assert (directory / "policy").exists() == (number < 2)
    policies = [previous_run / path for path in ("rounds/000/policy", "rounds/001/policy", "export")]
    assert len({weights_of(policy) for policy in policies}) == 3
    assert not (previous_run / "buffer").exists() and not (previous_run / "checkpoints").exists()


def test_log_steps_count_the_updates_of_all_rounds(previous_run):
    updates, evaluations = rows_of(previous_run, "update"), rows_of(previous_run, "evaluation")
    assert [row["step"] for row in updates] == list(range(1, len(updates) + 1))
    per_round = [json.loads((previous_run / f"rounds/{n:03d}/round.json").read_text())["updates"] for n in range(3)]
    assert [row["round"] for row in updates] == [n for n, count in enumerate(per_round) for _ in range(count)]
    assert [row["step"] for row in evaluations] == [0, *np.cumsum(per_round)]
    assert evaluations[0]["kl"] == 0 and all(math.isfinite(row["kl"]) for row in evaluations)
    summary = json.loads((previous_run / "summary.json").read_text())
    assert summary["records"] == 96 and summary["updates"] == sum(per_round)
    # The learning-rate schedule restarts in every round.
    rates = [[row["learning_rate"] for row in updates if row["round"] == n] for n in range(3)]
    assert rates[0] == rates[1][: len(rates[0])] or per_round[0] != per_round[1]


def test_each_round_samples_from_the_previous_policy(tiny, previous_run):
    policy = Path(tiny)
    for number in range(3):
        directory = previous_run / "rounds" / f"{number:03d}"
        # With --round.reference previous the sampler is the reference, so the probe of its statistics passes.
        assert reference_weights(directory) == {weights_of(policy)}
        assert json.loads((directory / "round.json").read_text())["probe"]["passed"]
        policy = directory / "policy"
    buffers = [Buffer.open(previous_run / f"rounds/{n:03d}/buffer") for n in range(3)]
    tokens = [[record.tokens.tolist() for record in buffer.read(range(32))] for buffer in buffers]
    assert tokens[0] != tokens[1] != tokens[2]


@pytest.mark.slow
def test_reference_defaults_to_the_first_policy(tiny, first_run, previous_run):
    for number in range(3):
        assert reference_weights(first_run / "rounds" / f"{number:03d}") == {weights_of(tiny)}
    # In the second round the sampler is not the reference, so the probe of its statistics fails.
    assert not json.loads((first_run / "rounds" / "001" / "round.json").read_text())["probe"]["passed"]
    # The two references coincide in the first round and differ later.
    runs = (first_run, previous_run)
    chex.assert_trees_all_equal(*(load_file(run / "rounds/000/policy/model.safetensors") for run in runs))
    first_export, previous_export = (load_file(run / "export/model.safetensors") for run in runs)
    assert any(not np.array_equal(first_export[name], previous_export[name]) for name in first_export)


def test_single_round_uses_the_directory_of_the_run(tiny, tmp_path):
    run = train(tiny, tmp_path / "run")
    assert not (run / "rounds").exists() and (run / "buffer").exists() and (run / "round.json").exists()
    assert not any("round" in row for row in rows_of(run, "update") + rows_of(run, "evaluation"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("shiq", ()),
        ("kto", ("--round.reference", "previous")),
        ("dpo", ("--lora.rank", "2", "--round.reference", "previous")),
        ("shiq", ("--loss.name", "ilql")),
    ],
)
def test_rounds_with_other_commands_and_options(command, flags, tiny, tmp_path, monkeypatch):
    # All answers of a random model are wrong, so the task's reward would not distinguish them.
    monkeypatch.setattr(sources.rewards, "resolve", lambda name: lambda row, text: sum(map(ord, text)) % 5 / 4)
    run = train(tiny, tmp_path / "run", "--rounds", "2", *flags, command=command)
    evaluations = rows_of(run, "evaluation")
    assert (run / "export" / "model.safetensors").exists() and evaluations[0]["kl"] == 0 < abs(evaluations[-1]["kl"])
    base = load_file(f"{tiny}/model.safetensors")
    policies = [load_file(run / path / "model.safetensors") for path in ("rounds/000/policy", "export")]
    changed = [any(np.any(policy[name] != base[name]) for name in base) for policy in policies]
    assert changed == [command != "shiq" or not flags] * 2
    if "ilql" in flags:
        # The second round continues with the heads of the first.
        heads = [load_file(run / path / "heads.safetensors") for path in ("rounds/000/policy", "export")]
        distance = sum(np.linalg.norm(heads[0][name] - heads[1][name]) for name in heads[0])
        assert 0 < distance < sum(np.linalg.norm(heads[0][name]) for name in heads[0])


def test_runs_rounds_and_checkpoints_are_policies(previous_run, tmp_path, capsys):
    rounds = previous_run / "rounds"
    steps = {path.name for path in (rounds / "001" / "checkpoints").iterdir()}
    latest = resolve_policy(str(previous_run))
    assert (latest.base, latest.step) == (rounds / "001" / "policy", None)
    assert latest.checkpoints == rounds / "002" / "checkpoints"
    checkpoint = resolve_policy(str(rounds / "001" / "checkpoints" / min(steps)))
    assert (checkpoint.base, checkpoint.step) == (rounds / "000" / "policy", int(min(steps)))
    assert resolve_policy(str(rounds / "000")).base != rounds / "000"
    assert resolve_policy(str(previous_run / "export")).run is None
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "sort 21:", "answer": "12"}\n')
    eval_script.main([
        "--model", str(previous_run), "--data", str(tmp_path / "prompts.jsonl"), "--reward", "exact",
        "--max-tokens", "4", "--output-dir", str(tmp_path / "eval"), "--mesh", "fsdp=1",
    ])  # fmt: skip
    assert "kl" in json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert "round       3 of 3" in inspect(previous_run)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("dpo", ("--rounds", "0"), "rounds must be at least 1"),
        ("sft", ("--rounds", "2"), "rounds sample from the policy"),
        ("dpo", ("--round.reference", "previous"), "set rounds above 1"),
        (
            "dpo",
            ("--rounds", "2", "--data", "rows.jsonl"),
            "rounds sample from the policy, but data is a fixed dataset",
        ),
    ],
)
def test_invalid_combinations_with_rounds_are_errors(command, flags, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tiny, tmp_path / "run", *flags, command=command)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


class TwoReferences(Iterative):
    """Recipe whose loss reads two references."""

    def objective(self, round):
        def loss(example, *, beta=0.1):
            first, previous = example.references["reference"], example.references["previous"]
            mask = example.action_mask
            distance = jnp.sum(jnp.where(mask, jnp.abs(first.logp - previous.logp), 0))
            value = -jnp.sum(jnp.where(mask, example.policy.logp, 0)) * jnp.sum(example.rewards)
            return LossOut(value, jnp.float32(1), {"distance": distance})

        return Objective(loss, frozenset({"references", "rewards"}), "trajectory")

    def references(self, round):
        return {"reference": round.reference, "previous": round.policy}


def test_recipe_with_two_references(tiny, tmp_path):
    run = train_with_recipe(TwoReferences, tiny, tmp_path / "run")
    first_policy = run / "rounds" / "000" / "policy"
    assert reference_weights(run / "rounds" / "000") == {weights_of(tiny)}
    assert reference_weights(run / "rounds" / "001") == {weights_of(tiny), weights_of(first_policy)}
    updates = rows_of(run, "update")
    assert all(row["distance"] == 0 for row in updates if row["round"] == 0)
    assert all(row["distance"] > 1e-3 for row in updates if row["round"] == 1)
    with pytest.raises(UserError, match="was started with recipe='TwoReferences', not 'Iterative'"):
        job = train_command.parse(["shiq", "--model", tiny, "--output-dir", str(run), *SMALL, "--rounds", "2"])
        pipeline.train(dataclasses.replace(job, resume=True))


@pytest.mark.slow
def test_documented_recipe_runs(tiny, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)
    run = train_with_recipe(scope["ExpertIteration"], tiny, tmp_path / "run")
    assert (run / "export" / "model.safetensors").exists()
    for number in range(2):
        answers, best = (Buffer.open(run / "rounds" / f"{number:03d}" / name) for name in ("buffer", "best"))
        maximum: dict = {}
        for group, value in zip(answers.group_ids(), answers.returns(), strict=True):
            maximum[group] = max(value, maximum.get(group, value))
        assert len(answers) == 32 and len(best) == 8 and dict(zip(best.group_ids(), best.returns())) == maximum


def test_recipes_have_at_most_150_lines():
    for file in Path(recipes.__file__).parent.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 150, file
