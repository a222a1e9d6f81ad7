"""`train.py` and `eval.py` end to end, on sizes that take seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import eval as eval_script
import train as train_script
from shiq_jax.replay import Buffer, to_jsonl

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
SMALL = [
    "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "32",
    "--collection.prompts", "12", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "3",
    "--collection.sampling.max-tokens", "8", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "2",
    "--evaluation.max-tokens", "8", "--evaluation.times", "2", "--batch-size", "4", "--epochs", "2",
    "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Directory of a complete ShiQ run."""
    out = tmp_path_factory.mktemp("runs") / "shiq"
    train_script.main(["shiq", "--model", tiny, "--output-dir", str(out), "--mesh", "fsdp=1", *SMALL])
    return out


def error_message(script, arguments, capsys) -> str:
    """Standard error of a command that exits with code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    return message


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_run_writes_documented_files(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "tokens_per_second"} <= set(summary)
    assert summary["updates"] == 6 and summary["records"] == 36 and summary["probe"]["passed"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "update"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["stage"] == "evaluation"] == [0, 3, 6]
    assert rows[-1]["kl"] == summary["kl"]
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (finished / "samples" / "000006.jsonl").read_text().splitlines()]
    # Two samples and a greedy completion for each of four prompts.
    assert len(samples) == 12 and {"prompt", "completion", "reward", "logratio", "decoding"} < set(samples[0])
    assert max(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == "6"


@pytest.mark.slow
def test_export_loads_in_transformers(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shiq_jax.data.chat import end_of_turn
    from shiq_jax.models import load_hf

    exported = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokens = AutoTokenizer.from_pretrained(finished / "export")("sort 312:").input_ids
    model, params = load_hf(finished / "export")
    logits = np.asarray(model.logits(params, np.array([tokens])))
    with torch.no_grad():
        expected = exported(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # transformers stops at every token that ends a turn.
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    assert {tokenizer.eos_token_id, end_of_turn(tokenizer)} <= set(np.ravel(exported.generation_config.eos_token_id))
    reference = load_hf(finished / "reference")[1]
    assert np.abs(np.asarray(params["embed"]["table"]) - np.asarray(reference["embed"]["table"])).max() > 0


@pytest.mark.slow
def test_buffer_statistics_match_dense_logits_of_the_reference(finished):
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
        action_mask = record.action_mask[1:]
        np.testing.assert_allclose(statistics[index][0], np.asarray(dense.logp)[action_mask], atol=1e-4)
        np.testing.assert_allclose(statistics[index][1], np.asarray(dense.lse)[action_mask], atol=1e-4)


def test_complete_run_is_reported_and_never_overwritten(finished, tiny, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    arguments = ["shiq", "--model", tiny, "--output-dir", str(finished), "--mesh", "fsdp=1", *SMALL]
    train_script.main([*arguments, "--resume"])
    assert "complete" in capsys.readouterr().out
    assert "--resume" in error_message(train_script, arguments, capsys)
    assert "seed=0" in error_message(train_script, [*arguments, "--resume", "--seed", "7"], capsys)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_resume_without_a_run_is_rejected(tmp_path, capsys):
    output_dir = tmp_path / "none"
    message = error_message(train_script, ["shiq", "--resume", "--output-dir", str(output_dir)], capsys)
    assert str(output_dir) in message and "--resume" in message and not output_dir.exists()


def test_inspect_summarizes_a_buffer(finished, capsys):
    train_script.main(["inspect", str(finished / "buffer")])
    assert "36 in 12 groups" in capsys.readouterr().out


@pytest.mark.slow
def test_documented_python_examples_run_on_a_buffer(finished):
    full_training, lora_training = (
        re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)[1]
        .replace("runs/shiq", str(finished))
        .replace("batch_size=8", "batch_size=4")
        for page in ("python.md", "lora.md")
    )
    scope: dict = {}
    exec(full_training, scope)
    assert int(scope["state"].step) == len(scope["losses"]) == 10 and np.all(np.isfinite(scope["losses"]))
    exec(lora_training, scope)
    assert int(scope["state"].step) == 1 and np.isfinite(float(scope["metrics"]["loss"]))
    assert scope["reference"].lora is None and "lora" not in str(jax.tree.structure(scope["base"]))


OFFLINE = [
    "--batch-size", "2", "--evaluation.prompts", "2", "--evaluation.max-tokens", "4",
    "--optimizer.learning-rate", "1e-3",
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


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_training_on_external_data(name, tiny, tmp_path):
    command, rows = FORMATS[name]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    # One case uses all eight devices; the others compile faster on one.
    mesh = [] if name == "scored" else ["--mesh", "fsdp=1"]
    train_script.main([command, "--data", data, "--model", tiny, "--output-dir", str(out), *OFFLINE, *mesh])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reward_before"] is None and np.isfinite(summary["kl"])
    buffer = Buffer.open(out / "buffer")
    assert len(buffer) == sum(2 if "chosen" in row else 1 for row in rows)
    assert len(buffer.identities()) == (command != "sft")
    assert not (out / "reference").exists()


@pytest.mark.slow
def test_samples_of_one_run_train_another(finished, tiny, tmp_path):
    data = tmp_path / "samples.jsonl"
    first = Buffer.open(finished / "buffer")
    to_jsonl(first, data)
    out = tmp_path / "run"
    options = ["--reward", "sorting", "--baseline", "group_mean"]
    reference = str(finished / "reference")
    train_script.main(["shiq", "--data", str(data), "--model", reference, "--output-dir", str(out), *OFFLINE, *options])
    second = Buffer.open(out / "buffer")
    for record, original in zip(second.read(range(36)), first.read(range(36)), strict=True):
        chex.assert_trees_all_equal((record.tokens, record.lse), (original.tokens, original.lse))
    summary = json.loads((out / "summary.json").read_text())
    # The same model sampled the data, so its statistics serve as reference; the rows keep the answers for the reward.
    assert summary["probe"]["passed"] and summary["reward_before"] is not None


INVALID = {
    "missing field": (
        ["shiq"],
        [{"prompt": "a", "completion": "b", "reward": 1}, {"prompt": "a", "completion": "b"}],
        "line 2",
    ),
    "unknown reward": (["shiq", "--reward", "nothing:here"], FORMATS["scored"][1], "nothing:here"),
    "too many devices": (["shiq", "--mesh", "fsdp=99"], FORMATS["scored"][1], "fsdp=99"),
    "sequence exceeds the context": (
        ["shiq"],
        [{"prompt": "a" * 5000, "completion": "b", "reward": 1}],
        "2048",
    ),
    "baseline removes every reward": (
        ["shiq", "--baseline", "group_mean"],
        [{"prompt": "a", "completion": "b", "reward": 1}],
        "--baseline",
    ),
    "no preference pairs": (["dpo"], [{"prompt": "a", "completion": "b", "reward": 1}], "chosen"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_rejected_before_writing(case, tiny, tmp_path, capsys):
    (command, *options), rows, fragment = INVALID[case]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    arguments = [command, "--data", data, "--model", tiny, "--output-dir", str(out), *OFFLINE, *options]
    assert fragment in error_message(train_script, arguments, capsys)
    assert not out.exists()


def test_out_of_range_values_are_rejected_before_writing(tmp_path, capsys):
    for flag, value in (
        ("--loss.beta", "0"),
        ("--loss.gamma", "1.5"),
        ("--collection.samples-per-prompt", "0"),
        ("--seed", "-1"),
    ):
        message = error_message(train_script, ["shiq", flag, value, "--output-dir", str(tmp_path / "run")], capsys)
        name = flag.split(".")[-1].strip("-")
        assert name in message or name.replace("-", "_") in message
    assert not (tmp_path / "run").exists()


def test_data_without_a_model_is_rejected(tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", FORMATS["scored"][1])
    assert "--model" in error_message(
        train_script, ["shiq", "--data", data, "--output-dir", str(tmp_path / "run")], capsys
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, metric", [("pairs", "rewards/accuracies"), ("scored", "logratio"), ("demonstrations", "probability")]
)
def test_evaluation_reports_the_objective_of_the_data(name, metric, finished, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", FORMATS[name][1])
    out = tmp_path / "eval"
    mesh = [] if name == "pairs" else ["--mesh", "fsdp=1"]
    eval_script.main(["--model", str(finished), "--data", data, "--max-tokens", "4", "--output-dir", str(out), *mesh])
    result = json.loads((out / "evaluation.json").read_text())
    assert result["objective"] == FORMATS[name][0] and np.isfinite(result["objective_metrics"][metric])
    assert result["objective_metrics"]["loss"] > 0 and result["reference"] and "reward" not in result
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_resumes_only_with_the_same_options(finished, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"prompt": "a"}])
    arguments = [
        "--model", str(finished), "--mesh", "fsdp=1", "--output-dir", str(tmp_path / "eval"), "--data", data,
        "--max-tokens", "2",
    ]  # fmt: skip
    eval_script.main(arguments)
    eval_script.main([*arguments, "--resume"])
    assert "--resume" in error_message(eval_script, arguments, capsys)
    assert "max_tokens=2" in error_message(eval_script, [*arguments, "--resume", "--max-tokens", "3"], capsys)


@pytest.mark.slow
def test_run_export_and_checkpoints_evaluate_equally(finished, tmp_path):
    data = str(finished / "data" / "held_out.jsonl")

    def evaluate(name, *options):
        out = tmp_path / f"{name.replace('/', '-')}{len(options)}"
        policy = ["--model", str(finished / name), "--output-dir", str(out)]
        eval_script.main(
            [*policy, "--data", data, "--reward", "sorting", "--max-tokens", "8", "--mesh", "fsdp=1", *options]
        )
        result = json.loads((out / "evaluation.json").read_text())
        assert len((out / "samples.jsonl").read_text().splitlines()) == 8
        keys = ("reward", "accuracy", "greedy_reward", "kl", "length", "rows", "objective_metrics")
        return {key: result.get(key) for key in keys}

    run = evaluate(".")
    assert run["rows"] == 4 and run["objective_metrics"]["logratio"] == pytest.approx(run["kl"], abs=1e-4)
    assert evaluate("checkpoints") == evaluate("checkpoints/6") == run
    assert evaluate("export", "--reference", str(finished / "reference")) == run
    assert evaluate("export")["kl"] is None
    assert evaluate("reference", "--reference", str(finished / "reference"))["kl"] == pytest.approx(0, abs=1e-5)


def test_help_and_unknown_flags_in_a_subprocess():
    command = [sys.executable, str(ROOT / "train.py")]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("shiq", "dpo", "sft", "shiq-bfcl", "inspect"))
    result = subprocess.run([*command, "shiq", "--batch-sise", "3"], capture_output=True, text=True)
    assert result.returncode == 2 and "batch-size" in result.stdout + result.stderr
