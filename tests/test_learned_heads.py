"""Losses with Q and value heads through the commands: training, export and evaluation."""

import functools
import json

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as eval_script
import train as train_script

SMALL = [
    "--mesh", "fsdp=1", "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16",
    "--collection.prompts", "8", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "4", "--evaluation.times", "1", "--batch-size", "4", "--epochs", "2",
    "--optimizer.learning-rate", "1e-2",
]  # fmt: skip
ILQL = ("ilql", "--loss.beta", "0.05", "--loss.polyak", "0.1")


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that trains with a loss and its options once and returns the run directory."""

    @functools.cache
    def train(*loss):
        output_dir = tmp_path_factory.mktemp("run") / "run"
        train_script.main(["shiq", *SMALL, "--output-dir", str(output_dir), "--loss.name", *loss])
        return output_dir

    return train


def evaluate(model, root, tmp_path, name):
    """Evaluate a model on the prompts of the run `root`, against the reference of that run."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in (root / "samples" / "000000.jsonl").read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:4]))
    eval_script.main([
        "--model", str(model), "--data", str(prompts), "--reference", str(root / "reference"), "--max-tokens", "4",
        "--samples-per-prompt", "2", "--mesh", "fsdp=1", "--output-dir", str(tmp_path / name),
    ])  # fmt: skip
    return json.loads((tmp_path / name / "evaluation.json").read_text())


@pytest.mark.slow
def test_ilql_trains_heads_and_leaves_the_decoder_unchanged(run):
    root = run(*ILQL)
    before, after = (load_file(root / name / "model.safetensors") for name in ("reference", "export"))
    chex.assert_trees_all_equal(before, after)
    heads = load_file(root / "export" / "heads.safetensors")
    assert sorted(heads) == ["q1.kernel", "q2.kernel", "value.bias", "value.kernel"]
    assert np.any(heads["value.kernel"]) and np.abs(heads["q1.kernel"]).max() > 1e-2
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert {"q", "value"} <= [row for row in rows if row["stage"] == "update"][-1].keys()


def test_evaluation_applies_q_guidance(run, tmp_path):
    root = run(*ILQL)
    models = {"run": root, "export": root / "export", "reference": root / "reference"}
    kl = {name: evaluate(model, root, tmp_path, name)["kl"] for name, model in models.items()}
    assert kl["run"] == pytest.approx(kl["export"], rel=1e-5) and abs(kl["run"]) > 1e-2
    assert kl["reference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["oreo", "pcl", "dro"])
def test_losses_with_a_value_head_train_the_decoder_too(run, loss):
    root = run(loss)
    before, after = (load_file(root / name / "model.safetensors") for name in ("reference", "export"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert sorted(load_file(root / "export" / "heads.safetensors")) == ["value.bias", "value.kernel"]
    assert "kl" in json.loads((root / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cql", "mc_returns", "soft_q"])
def test_other_q_learning_losses_export_heads(run, loss):
    assert (run(loss) / "export" / "heads.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["mc_returns", "--loss.polyak", "0.1"], ["polyak", "mc_returns"]),
        (["ilql", "--loss.polyak", "2"], ["polyak", "2.0", "(0, 1]"]),
        (["ilql", "--loss.tau", "1"], ["tau", "1.0", "(0, 1)"]),
        (["oreo", "--loss.alpha", "1"], ["alpha", "oreo", "beta"]),
    ],
)
def test_invalid_loss_options_are_rejected(options, fragments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_script.main(["shiq", "--loss.name", *options])
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(fragment in message for fragment in fragments), message
