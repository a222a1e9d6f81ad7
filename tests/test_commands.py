"""The two doors, run as a user runs them, on sizes that take seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import eval as evaluation_door
import train as training_door
from shiq_jax.replay import Buffer, to_jsonl

ROOT = Path(__file__).parent.parent
SMALL = [
    "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "32",
    "--collection.prompts", "12", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "3",
    "--collection.sampling.max-tokens", "8", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "2",
    "--evaluation.max-tokens", "8", "--evaluation.times", "2", "--batch-size", "4", "--epochs", "2", "--save-every", "2",
]  # fmt: skip


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


@pytest.mark.slow
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
    # Of each of the four prompts two samples and the greedy answer.
    assert len(samples) == 12 and {"prompt", "completion", "reward", "logratio", "decoding"} < set(samples[0])
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
        logits = jax.jit(model.logits)(params, record.tokens[None, :-1])[0]
        dense = token_stats_from_logits(logits, record.tokens[1:])
        acting = record.action_mask[1:]
        np.testing.assert_allclose(statistics[index][0], np.asarray(dense.logp)[acting], atol=1e-4)
        np.testing.assert_allclose(statistics[index][1], np.asarray(dense.lse)[acting], atol=1e-4)


def test_a_finished_run_is_shown_again_and_never_overwritten(finished, tiny, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    arguments = ["shiq", "--model", tiny, "--output-dir", str(finished), "--mesh", "fsdp=1", *SMALL]
    training_door.main([*arguments, "--resume"])
    assert "is complete" in " ".join(capsys.readouterr().out.split())
    assert "already holds a run" in refusal(training_door, arguments, capsys)
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
    whole, adapters = (
        re.search(r"```python\n(.*?)```", text.split(f"## {heading}\n")[1], re.DOTALL)[1]
        .replace("runs/shiq", str(finished))
        .replace("batch_size=8", "batch_size=4")
        for heading in ("From Python", "LoRA")
    )
    scope: dict = {}
    exec(whole, scope)
    assert int(scope["state"].step) == len(scope["losses"]) == 10 and np.all(np.isfinite(scope["losses"]))
    exec(adapters, scope)
    assert int(scope["state"].step) == 1 and np.isfinite(float(scope["metrics"]["loss"]))
    assert scope["reference"].lora is None and "lora" not in str(jax.tree.structure(scope["base"]))


OFFLINE = [
    "--batch-size", "2", "--evaluation.prompts", "2", "--evaluation.max-tokens", "4", "--optimizer.learning-rate", "1e-3",
]  # fmt: skip
TOKENS = {"tokens": [1, 20, 30, 40], "action_mask": [0, 0, 1, 1], "rewards": [0, 0, 0.5, 1], "group_id": "a"}
FORMATS = {
    "scored": (
        "shiq",
        [{"prompt": f"say {p}", "completion": c, "reward": r} for p in "ab" for c, r in (("y", 1), ("n", 0))],
    ),
    "tokens": ("shiq", [TOKENS, TOKENS | {"tokens": [1, 20, 50, 60], "rewards": [0, 0, 0, 0]}]),
    "pairs": ("dpo", [{"prompt": f"say {p}", "chosen": "yes", "rejected": "no"} for p in "abcd"]),
    "demonstrations": ("sft", [{"prompt": f"say {p}", "completion": "yes"} for p in "abcd"]),
    "messages": (
        "sft",
        [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "yes"}]} for p in "ab"],
    ),
    "text": ("sft", [{"text": "one two"}, {"text": "three"}]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_somebody_elses_data_alone_is_enough(name, tiny, tmp_path):
    command, rows = FORMATS[name]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    # All eight devices for the first, which compile for longer, and one for the others.
    mesh = [] if name == "scored" else ["--mesh", "fsdp=1"]
    training_door.main([command, "--data", data, "--model", tiny, "--output-dir", str(out), *OFFLINE, *mesh])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reward_before"] is None and np.isfinite(summary["kl"])
    buffer = Buffer.open(out / "buffer")
    assert len(buffer) == sum(2 if "chosen" in row else 1 for row in rows)
    assert len(buffer.identities()) == (command != "sft")
    assert not (out / "reference").exists()


def test_samples_of_one_run_are_data_for_another(finished, tiny, tmp_path):
    data = tmp_path / "samples.jsonl"
    first = Buffer.open(finished / "buffer")
    to_jsonl(first, data)
    out = tmp_path / "run"
    options = ["--reward", "sorting", "--baseline", "group_mean"]
    reference = str(finished / "reference")
    training_door.main(
        ["shiq", "--data", str(data), "--model", reference, "--output-dir", str(out), *OFFLINE, *options]
    )
    second = Buffer.open(out / "buffer")
    for mine, theirs in zip(second.read(range(36)), first.read(range(36)), strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.lse, theirs.lse)
    summary = json.loads((out / "summary.json").read_text())
    # The samples came from this very model, so their statistics were taken over; and the rows' answers still score.
    assert summary["probe"]["passed"] and summary["reward_before"] is not None


MISTAKES = {
    "a missing field": (
        ["shiq"],
        [{"prompt": "a", "completion": "b", "reward": 1}, {"prompt": "a", "completion": "b"}],
        "line 2",
    ),
    "a reward that does not exist": (["shiq", "--reward", "nothing:here"], FORMATS["scored"][1], "nothing:here"),
    "devices that do not exist": (["shiq", "--mesh", "fsdp=99"], FORMATS["scored"][1], "--mesh fsdp=99"),
    "no room for the context": (
        ["shiq"],
        [{"prompt": "a" * 5000, "completion": "b", "reward": 1}],
        "context holds 2048",
    ),
    "nothing left of the rewards": (
        ["shiq", "--baseline", "group_mean"],
        [{"prompt": "a", "completion": "b", "reward": 1}],
        "--baseline none",
    ),
    "no unlike rewards": (["dpo"], [{"prompt": "a", "completion": "b", "reward": 1}], "chosen"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(name, tiny, tmp_path, capsys):
    (command, *options), rows, said = MISTAKES[name]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    arguments = [command, "--data", data, "--model", tiny, "--output-dir", str(out), *OFFLINE, *options]
    assert said in refusal(training_door, arguments, capsys)
    assert not out.exists()


def test_numbers_out_of_range_are_refused_before_anything_is_done(tmp_path, capsys):
    for flag, value in (
        ("--loss.beta", "0"),
        ("--loss.gamma", "1.5"),
        ("--collection.samples-per-prompt", "0"),
        ("--seed", "-1"),
    ):
        with pytest.raises(SystemExit) as stop:
            training_door.main(["shiq", flag, value, "--output-dir", str(tmp_path / "run")])
        assert stop.value.code == 2 and flag.split(".")[-1].strip("-").replace("-", "_") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_need_a_model(tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", FORMATS["scored"][1])
    assert "--model" in refusal(training_door, ["shiq", "--data", data, "--output-dir", str(tmp_path / "run")], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, metric", [("pairs", "rewards/accuracies"), ("scored", "logratio"), ("demonstrations", "probability")]
)
def test_evaluation_measures_the_objective_of_the_rows(name, metric, finished, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", FORMATS[name][1])
    out = tmp_path / "eval"
    mesh = [] if name == "pairs" else ["--mesh", "fsdp=1"]
    evaluation_door.main(
        ["--model", str(finished), "--data", data, "--max-tokens", "4", "--output-dir", str(out), *mesh]
    )
    found = json.loads((out / "evaluation.json").read_text())
    assert found["objective"] == FORMATS[name][0] and np.isfinite(found["objective_metrics"][metric])
    assert found["objective_metrics"]["loss"] > 0 and found["reference"] and "reward" not in found
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_another_evaluation_is_not_shown_as_this_one(finished, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"prompt": "a"}])
    policy = ["--model", str(finished), "--mesh", "fsdp=1", "--output-dir", str(tmp_path / "eval")]
    arguments = [*policy, "--data", data, "--max-tokens", "2"]
    evaluation_door.main(arguments)
    evaluation_door.main([*arguments, "--resume"])
    assert "--resume" in refusal(evaluation_door, arguments, capsys)
    assert "max_tokens=2, not 3" in refusal(evaluation_door, [*arguments, "--resume", "--max-tokens", "3"], capsys)


def test_evaluation_of_a_run_its_export_and_its_checkpoints_agree(finished, tmp_path):
    data = str(finished / "data" / "held_out.jsonl")

    def numbers(name, *more):
        out = tmp_path / f"{name.replace('/', '-')}{len(more)}"
        policy = ["--model", str(finished / name), "--output-dir", str(out)]
        evaluation_door.main(
            [*policy, "--data", data, "--reward", "sorting", "--max-tokens", "8", "--mesh", "fsdp=1", *more]
        )
        found = json.loads((out / "evaluation.json").read_text())
        assert len((out / "samples.jsonl").read_text().splitlines()) == 8
        shown = ("reward", "accuracy", "greedy_reward", "kl", "length", "rows", "objective_metrics")
        return {key: found.get(key) for key in shown}

    run = numbers(".")
    assert run["rows"] == 4 and run["objective_metrics"]["logratio"] == pytest.approx(run["kl"], abs=1e-4)
    assert numbers("checkpoints") == numbers("checkpoints/6") == run
    assert numbers("export", "--reference", str(finished / "reference")) == run
    assert numbers("export")["kl"] is None
    assert numbers("reference", "--reference", str(finished / "reference"))["kl"] == pytest.approx(0, abs=1e-5)


def test_help_and_mistakes_on_the_command_line():
    run = [sys.executable, str(ROOT / "train.py")]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and all(
        name in shown.stdout for name in ("shiq", "dpo", "sft", "shiq-bfcl", "inspect")
    )
    wrong = subprocess.run([*run, "shiq", "--batch-sise", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "batch-size" in wrong.stdout + wrong.stderr
