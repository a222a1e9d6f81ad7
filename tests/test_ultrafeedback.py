"""The commands on data with several answers per prompt, as a user runs them."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation_door
import train as training_door
from shiq_jax.replay import Buffer, pack_groups
from shiq_jax.runs import commands

DATA = Path(__file__).parent / "data"
SMALL = [
    "--batch-size", "2", "--mesh", "fsdp=1", "--optimizer.learning-rate", "1e-3", "--precision.remat", "none",
    "--evaluation.prompts", "2", "--evaluation.max-tokens", "4", "--evaluation.no-greedy",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Runs of ShiQ and of DPO on the same file."""
    out = tmp_path_factory.mktemp("runs")
    for command in ("shiq", "dpo"):
        options = ["--model", tiny, "--data", str(DATA / "ultrafeedback.jsonl"), "--output-dir", str(out / command)]
        training_door.main([f"{command}-ultrafeedback", *options, *SMALL])
    return out


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A function in a module that can be imported."""
    (tmp_path / "own_scores.py").write_text(
        "def broken(row, completion):\n    return float('nan') if completion == 'kat' else 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def refusal(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        training_door.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_both_objectives_learn_from_the_same_answers(trained):
    groups, pairs = (Buffer.open(trained / name / "buffer") for name in ("shiq", "dpo"))
    assert len(groups) == 19 and len(set(groups.group_ids())) == 6
    chosen = [number for ((best, worst),) in pack_groups(groups, "pair") for number in (best, worst)]
    assert [pairs[number].tokens.tolist() for number in range(len(pairs))] == [
        groups[number].tokens.tolist() for number in chosen
    ]
    for name, updates in (("shiq", 3), ("dpo", 3)):
        summary = json.loads((trained / name / "summary.json").read_text())
        assert summary["updates"] == updates and np.isfinite(summary["kl"]) and summary["kl"] != 0
        assert (trained / name / "export" / "model.safetensors").exists()
    settings = json.loads((trained / "shiq" / "config.json").read_text())
    assert settings["baseline"] == "group_mean" and settings["drop_longer_than"] == 2048


def test_a_trained_policy_is_evaluated_on_such_rows(trained, tmp_path):
    options = [
        "--model",
        str(trained / "dpo"),
        "--data",
        str(DATA / "ranked.jsonl"),
        "--max-tokens",
        "2",
        "--no-greedy",
    ]
    evaluation_door.main([*options, "--mesh", "fsdp=1", "--output-dir", str(tmp_path / "eval")])
    found = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert found["objective"] == "dpo" and 0 <= found["objective_metrics"]["rewards/accuracies"] <= 1
    assert len(Buffer.open(tmp_path / "eval" / "buffer")) == 10


def test_unscored_answers_ask_for_a_function_and_its_mistakes_name_row_and_answer(tiny, scorer, tmp_path, capsys):
    data = ["--model", tiny, "--data", str(DATA / "ranked.jsonl"), "--output-dir", str(tmp_path / "run"), *SMALL]
    message = refusal(["shiq", *data], capsys)
    assert "line 1: the row has no scores: ranks are no rewards" in message and "--reward module:function" in message
    message = refusal(["shiq", *data, "--reward", "own_scores:broken"], capsys)
    assert "line 3" in message and "Spell cat." in message and "'kat'" in message and "finite" in message
    assert not (tmp_path / "run").exists()


def test_answers_that_exceed_the_context_are_refused(tiny, tmp_path, capsys):
    rows = [json.loads(line) for line in (DATA / "ultrafeedback_binarized.jsonl").read_text().splitlines()]
    rows[1]["chosen"][1]["content"] = "5" * 3000
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", tiny, "--data", str(data), "--output-dir", str(tmp_path / "run"), *SMALL]
    message = refusal(["dpo", *options], capsys)
    assert "line 2: it has 30" in message and "context holds 2048" in message and "--drop-longer-than" in message
    message = refusal(["dpo", *options, "--drop-longer-than", "4"], capsys)
    assert "no usable record" in message and "6 sequences of more than 4 tokens" in message
    assert not (tmp_path / "run").exists()


def test_options_of_data_need_data(tmp_path, capsys):
    for options in (["shiq", "--score", "quality"], ["sft", "--data", "x.jsonl", "--score", "quality"]):
        with pytest.raises(SystemExit) as stop:
            training_door.main([*options, "--output-dir", str(tmp_path / "run")])
        assert stop.value.code == 2 and "score" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_bound_to_every_file_of_its_data(tmp_path):
    job = commands.Shiq(data=str(tmp_path / "part-*.jsonl"))
    (tmp_path / "part-1.jsonl").write_text("{}")
    one = job.settings()["data_digest"]
    (tmp_path / "part-2.jsonl").write_text("{}")
    two = job.settings()["data_digest"]
    (tmp_path / "part-2.jsonl").write_text("[]")
    assert len({one, two, job.settings()["data_digest"]}) == 3
