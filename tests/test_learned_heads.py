"""Losses with heads through the commands: what learns, what is exported, and that an evaluation finds the heads."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as evaluation_door
import train as training_door

SMALL = [
    "--mesh", "fsdp=1", "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16",
    "--collection.prompts", "8", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "4", "--evaluation.times", "1", "--batch-size", "4", "--epochs", "2",
    "--optimizer.learning-rate", "1e-2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with a loss, made once."""
    made = {}

    def get(*loss):
        if loss not in made:
            made[loss] = tmp_path_factory.mktemp("run") / "run"
            arguments = ["shiq", *SMALL, "--output-dir", str(made[loss])]
            training_door.main([*arguments, "--loss.name", *loss])
        return made[loss]

    return get


def measured(name, root, tmp_path, out):
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in (root / "samples" / "000000.jsonl").read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:4]))
    evaluation_door.main([
        "--model", str(name), "--data", str(prompts), "--reference", str(root / "reference"), "--max-tokens", "4",
        "--samples-per-prompt", "2", "--mesh", "fsdp=1", "--output-dir", str(tmp_path / out),
    ])  # fmt: skip
    return json.loads((tmp_path / out / "evaluation.json").read_text())


def test_q_heads_learn_beside_a_decoder_that_stays(run):
    root = run("ilql", "--loss.beta", "0.05", "--loss.polyak", "0.1")
    before, after = (load_file(root / name / "model.safetensors") for name in ("reference", "export"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    heads = load_file(root / "export" / "heads.safetensors")
    assert sorted(heads) == ["q1.kernel", "q2.kernel", "value.bias", "value.kernel"]
    assert np.any(heads["value.kernel"]) and np.abs(heads["q1.kernel"]).max() > 1e-2
    updates = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert {"q", "value"} <= [row for row in updates if row["stage"] == "update"][-1].keys()


def test_what_they_steer_is_what_is_evaluated(run, tmp_path):
    root = run("ilql", "--loss.beta", "0.05", "--loss.polyak", "0.1")
    found = [
        measured(name, root, tmp_path, out)
        for name, out in ((root, "of-run"), (root / "export", "of-export"), (root / "reference", "of-reference"))
    ]
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-5) and abs(found[0]["kl"]) > 1e-2
    assert found[2]["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["oreo", "pcl", "dro"])
def test_with_a_learned_value_the_decoder_learns_too(run, loss):
    root = run(loss)
    before, after = (load_file(root / name / "model.safetensors") for name in ("reference", "export"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert sorted(load_file(root / "export" / "heads.safetensors")) == ["value.bias", "value.kernel"]
    assert "kl" in json.loads((root / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cql", "mc_returns"])
def test_the_other_baselines_run(run, loss):
    assert (run(loss) / "export" / "heads.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss.name", "mc_returns", "--loss.polyak", "0.1"], "polyak is not an option of the loss mc_returns"),
        (["--loss.name", "ilql", "--loss.polyak", "2"], "polyak is 2.0 but must lie in (0, 1]"),
        (["--loss.name", "ilql", "--loss.tau", "1"], "tau is 1.0 but an expectile lies in (0, 1)"),
        (["--loss.name", "oreo", "--loss.alpha", "1"], "alpha is not an option of the loss oreo, which takes beta and"),
    ],
)
def test_options_out_of_place_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        training_door.main(["shiq", *arguments])
    assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.replace("│", " ").split())
