"""The two doors, run as a user runs them, on sizes that take seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation_door
import train as training_door
from shiq_jax.data.tiny import tiny_directory
from shiq_jax.replay import Buffer
from shiq_jax.training import passes

ROOT = Path(__file__).parent.parent
SMALL = [
    "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "32",
    "--collection.prompts", "12", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "3",
    "--collection.sampling.max-tokens", "8", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "2",
    "--evaluation.max-tokens", "8", "--evaluation.times", "2", "--batch-size", "4", "--epochs", "2", "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return str(tiny_directory(tmp_path_factory.mktemp("tiny") / "model", **sizes))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One undisturbed run of the main job."""
    out = tmp_path_factory.mktemp("runs") / "shiq"
    training_door.main(["shiq", "--model", tiny, "--output-dir", str(out), "--mesh", "fsdp=1", *SMALL])
    return out


def refusal(door, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        door.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_leaves_what_the_readme_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "tokens_per_second"} <= set(summary)
    assert summary["updates"] == 6 and summary["records"] == 36 and summary["probe"]["passed"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "update"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["stage"] == "evaluation"] == [0, 3, 6]
    assert rows[-1]["kl"] == summary["kl"]
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (finished / "samples" / "000006.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and set(samples[0]) == {"prompt", "completion", "reward"}
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit())[-1] == "6"


def test_the_export_loads_in_transformers_and_is_the_last_policy(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shiq_jax.models import load_hf

    exported = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokens = AutoTokenizer.from_pretrained(finished / "export")("sort 312:").input_ids
    model, params = load_hf(finished / "export")
    ours = np.asarray(model.logits(params, np.array([tokens])))
    with torch.no_grad():
        theirs = exported(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    reference = load_hf(finished / "reference")[1]
    assert np.abs(np.asarray(params["embed"]["table"]) - np.asarray(reference["embed"]["table"])).max() > 0


def test_the_reference_statistics_of_the_buffer_are_those_of_the_reference(finished):
    from shiq_jax.models import load_hf
    from shiq_jax.objectives import token_stats_from_logits
    from shiq_jax.training.annotation import reference_identity

    model, params = load_hf(finished / "reference")
    buffer = Buffer.open(finished / "buffer")
    statistics = buffer.statistics(reference_identity(model, params))
    for index in (0, 17, 35):
        record = buffer[index]
        logits = model.logits(params, record.tokens[None, :-1])[0]
        dense = token_stats_from_logits(logits, record.tokens[1:])
        acting = record.action_mask[1:]
        np.testing.assert_allclose(statistics[index][0], np.asarray(dense.logp)[acting], atol=1e-4)
        np.testing.assert_allclose(statistics[index][1], np.asarray(dense.lse)[acting], atol=1e-4)


@pytest.mark.parametrize("stage, step", [("warm start", 2), ("update", 3), ("update", 5)])
def test_an_interrupted_run_resumes_bit_for_bit(finished, tiny, tmp_path, monkeypatch, stage, step):
    arguments = ["shiq", "--model", tiny, "--output-dir", str(tmp_path / "run"), "--mesh", "fsdp=1", *SMALL]
    check = passes._check

    def die(metrics, name, number, members):
        if (name, number + 1) == (stage, step):
            raise KeyboardInterrupt
        check(metrics, name, number, members)

    monkeypatch.setattr(passes, "_check", die)
    with pytest.raises(KeyboardInterrupt):
        training_door.main(arguments)
    monkeypatch.setattr(passes, "_check", check)
    training_door.main([*arguments, "--resume"])
    same = ("export/model.safetensors", "reference/model.safetensors", "buffer/manifest.json", "samples/000006.jsonl")
    for name in same:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name
    losses = [
        [row["loss"] for row in map(json.loads, (where / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for where in (finished, tmp_path / "run")
    ]
    assert losses[0] == losses[1]


def test_sampling_that_stopped_goes_on_with_the_same_samples(finished, tiny, tmp_path, monkeypatch):
    from shiq_jax.training import pipeline

    arguments = ["shiq", "--model", tiny, "--output-dir", str(tmp_path / "run"), "--mesh", "fsdp=1", *SMALL]
    collect = pipeline.collect

    def die(*args, first, **kwargs):
        if first == 8:
            raise KeyboardInterrupt
        return collect(*args, first=first, **kwargs)

    monkeypatch.setattr(pipeline, "collect", die)
    with pytest.raises(KeyboardInterrupt):
        training_door.main(arguments)
    assert len(Buffer.open(tmp_path / "run" / "buffer")) == 24
    monkeypatch.setattr(pipeline, "collect", collect)
    training_door.main([*arguments, "--resume"])
    assert Buffer.open(tmp_path / "run" / "buffer").read(range(36)) == Buffer.open(finished / "buffer").read(range(36))


def test_a_finished_run_is_shown_again_and_never_overwritten(finished, tiny, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    arguments = ["shiq", "--model", tiny, "--output-dir", str(finished), "--mesh", "fsdp=1", *SMALL]
    training_door.main([*arguments, "--resume"])
    assert "is complete" in capsys.readouterr().out
    assert "holds a run already" in refusal(training_door, arguments, capsys)
    assert "seed=0, not 7" in refusal(training_door, [*arguments, "--resume", "--seed", "7"], capsys)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    error = refusal(training_door, ["shiq", "--resume", "--output-dir", str(tmp_path / "none")], capsys)
    assert "no run to resume" in error and not (tmp_path / "none").exists()


def test_inspect_shows_the_buffer(finished, capsys):
    training_door.main(["inspect", str(finished / "buffer")])
    assert "36 in 12 groups" in capsys.readouterr().out


def test_the_python_example_of_the_docs_learns_from_the_run(finished):
    text = (ROOT / "docs" / "training.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("runs/shiq", str(finished))
    scope: dict = {}
    exec(code.replace("batch_size=8", "batch_size=4"), scope)
    assert int(scope["state"].step) == 10 and np.isfinite(float(scope["metrics"]["loss"]))


OFFLINE = ["--batch-size", "2", "--epochs", "1", "--evaluation.prompts", "2", "--evaluation.max-tokens", "4"]


@pytest.mark.parametrize(
    "command, rows",
    [
        ("shiq", [{"prompt": f"say {p}", "completion": c, "reward": r} for p in "abc" for c, r in (("yes", 1), ("no", 0))]),
        ("dpo", [{"prompt": f"say {p}", "chosen": "yes", "rejected": "no"} for p in "abcd"]),
        ("sft", [{"prompt": f"say {p}", "completion": "yes"} for p in "abcd"]),
    ],
)
def test_somebody_elses_data_alone_is_enough(command, rows, tiny, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", rows)
    out = tmp_path / "run"
    options = ["--warm-start.steps", "0"] if command != "sft" else []
    rate = ["--optimizer.learning-rate", "1e-3"]
    training_door.main([command, "--data", data, "--model", tiny, "--output-dir", str(out), *OFFLINE, *options, *rate])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reward_before"] is None and summary["kl"] is not None
    buffer = Buffer.open(out / "buffer")
    assert len(buffer) == sum(2 if "chosen" in row else 1 for row in rows)
    assert len(buffer.identities()) == (command != "sft")


def test_data_are_refused_with_file_and_line(tiny, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "reward": 1}\n{"prompt": "a", "completion": "b"}\n')
    arguments = ["shiq", "--data", str(data), "--model", tiny, "--output-dir", str(tmp_path / "run"), "--warm-start.steps", "0"]
    error = refusal(training_door, arguments, capsys)
    assert "data.jsonl" in error and "line 2" in error and "reward" in error
    assert "--model" in refusal(training_door, ["shiq", "--data", str(data), "--output-dir", str(tmp_path / "other")], capsys)


def test_evaluation_of_a_run_its_export_and_its_checkpoints_agree(finished, tmp_path, capsys):
    def numbers(name, *more):
        capsys.readouterr()
        out = tmp_path / str(abs(hash((name, more))))
        evaluation_door.main([
            "--model", str(finished / name), "--data", str(finished / "data" / "held_out.jsonl"), "--reward", "sorting",
            "--max-tokens", "8", "--output-dir", str(out), "--mesh", "fsdp=1", *more,
        ])  # fmt: skip
        printed = json.loads(capsys.readouterr().out)
        assert json.loads((out / "evaluation.json").read_text()) == printed
        return {key: printed.get(key) for key in ("reward", "greedy_reward", "kl", "length", "prompts")}

    run = numbers(".")
    assert run["prompts"] == 4 and run["kl"] is not None
    assert numbers("checkpoints") == numbers("checkpoints/6") == run
    assert numbers("export", "--reference", str(finished / "reference")) == run
    assert numbers("export")["kl"] is None
    assert numbers("reference", "--reference", str(finished / "reference"))["kl"] == pytest.approx(0, abs=1e-5)


def test_help_and_mistakes_on_the_command_line():
    run = [sys.executable, str(ROOT / "train.py")]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and all(name in shown.stdout for name in ("shiq", "dpo", "sft", "shiq-bfcl", "inspect"))
    wrong = subprocess.run([*run, "shiq", "--batch-sise", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "batch-size" in wrong.stdout + wrong.stderr
