"""Training and evaluation on data with several completions per prompt, end to end."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import eval as eval_script
import train as train_script
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
    """Directory with a ShiQ run and a DPO run on the same file."""
    out = tmp_path_factory.mktemp("runs")
    for command in ("shiq", "dpo"):
        options = ["--model", tiny, "--data", str(DATA / "ultrafeedback.jsonl"), "--output-dir", str(out / command)]
        train_script.main([f"{command}-ultrafeedback", *options, *SMALL])
    return out


@pytest.fixture
def nan_reward(tmp_path, monkeypatch):
    """MODULE:FUNCTION of a reward that is NaN for one completion."""
    (tmp_path / "nan_rewards.py").write_text(
        "def score(row, completion):\n    return float('nan') if completion == 'kat' else 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "nan_rewards:score"


def error_message(arguments, capsys) -> str:
    """Standard error of a command that exits with code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        train_script.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    return message


def test_shiq_and_dpo_train_on_the_same_completions(trained):
    groups, pairs = (Buffer.open(trained / name / "buffer") for name in ("shiq", "dpo"))
    assert len(groups) == 19 and len(set(groups.group_ids())) == 6
    paired = [index for (pair,) in pack_groups(groups, "pair") for index in pair]
    assert [pairs[index].tokens.tolist() for index in range(len(pairs))] == [
        groups[index].tokens.tolist() for index in paired
    ]
    for name, updates in (("shiq", 3), ("dpo", 3)):
        summary = json.loads((trained / name / "summary.json").read_text())
        assert summary["updates"] == updates and np.isfinite(summary["kl"]) and summary["kl"] != 0
        assert (trained / name / "export" / "model.safetensors").exists()
    settings = json.loads((trained / "shiq" / "config.json").read_text())
    assert settings["baseline"] == "group_mean" and settings["drop_longer_than"] == 2048


def test_evaluation_on_ranked_completions(trained, tmp_path):
    eval_script.main([
        "--model", str(trained / "dpo"), "--data", str(DATA / "ranked.jsonl"), "--max-tokens", "2", "--no-greedy",
        "--mesh", "fsdp=1", "--output-dir", str(tmp_path / "eval"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert result["objective"] == "dpo" and 0 <= result["objective_metrics"]["rewards/accuracies"] <= 1
    assert len(Buffer.open(tmp_path / "eval" / "buffer")) == 10


def test_ranked_completions_need_a_finite_reward(tiny, nan_reward, tmp_path, capsys):
    data = ["--model", tiny, "--data", str(DATA / "ranked.jsonl"), "--output-dir", str(tmp_path / "run"), *SMALL]
    message = error_message(["shiq", *data], capsys)
    assert "line 1" in message and "--reward" in message
    message = error_message(["shiq", *data, "--reward", nan_reward], capsys)
    assert "line 3" in message and "Spell cat." in message and "'kat'" in message and "finite" in message
    assert not (tmp_path / "run").exists()


def test_sequences_longer_than_the_context_are_rejected(tiny, tmp_path, capsys):
    rows = [json.loads(line) for line in (DATA / "ultrafeedback_binarized.jsonl").read_text().splitlines()]
    rows[1]["chosen"][1]["content"] = "5" * 3000
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", tiny, "--data", str(data), "--output-dir", str(tmp_path / "run"), *SMALL]
    message = error_message(["dpo", *options], capsys)
    assert all(fragment in message for fragment in ("line 2", "2048", "--drop-longer-than"))
    message = error_message(["dpo", *options, "--drop-longer-than", "4"], capsys)
    assert re.search(r"\b6\b.*\b4 tokens", message)
    assert not (tmp_path / "run").exists()


def test_score_without_scored_data_is_rejected(tmp_path, capsys):
    for options in (["shiq", "--score", "quality"], ["sft", "--data", "x.jsonl", "--score", "quality"]):
        assert "score" in error_message([*options, "--output-dir", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_data_digest_covers_every_file_of_a_glob(tmp_path):
    job, digests = commands.Shiq(data=str(tmp_path / "part-*.jsonl")), set()
    for name, content in (("part-1.jsonl", "{}"), ("part-2.jsonl", "{}"), ("part-2.jsonl", "[]")):
        (tmp_path / name).write_text(content)
        digests.add(job.settings()["data_digest"])
    assert len(digests) == 3
