"""`train.py kto` and `eval.py` on labeled data, end to end."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as eval_script
import train as train_script
from shiq_jax.replay import Buffer
from shiq_jax.training import reference
from shiq_jax.training.callbacks import CheckFinite

OFFLINE = [
    "--mesh", "fsdp=1", "--evaluation.prompts", "2", "--evaluation.max-tokens", "4", "--batch-size", "2",
    "--precision.remat", "none", "--optimizer.learning-rate", "1e-3",
]  # fmt: skip
SAMPLED = [
    "--mesh", "fsdp=1", "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16",
    "--collection.prompts", "8", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "4",
    "--collection.sampling.max-tokens", "6", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "6", "--evaluation.times", "1", "--batch-size", "4", "--epochs", "1",
]  # fmt: skip
ROWS = [
    {"prompt": f"say {letter}", "completion": completion, "label": label}
    for letter, completion, label in (
        ("a", "A", True),
        ("b", "B", True),
        ("b", "x", False),
        ("c", "C", 1),
        ("d", "y", 0),
    )
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(tiny, data, output_dir, *options):
    return ["kto", "--model", tiny, "--data", data, "--output-dir", str(output_dir), *OFFLINE, *options]


def error_message(command, capsys) -> str:
    """Standard error, on one line, of a command that exits with code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        train_script.main(command)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("kto")
    train_script.main(arguments(tiny, jsonl(root / "data.jsonl", ROWS), root / "run"))
    return root


def update_metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "update"]


def test_each_labeled_record_is_stored_with_a_mismatched_completion(finished):
    records, pairs = (Buffer.open(finished / "run" / name) for name in ("buffer", "labelled"))
    labels = [True, True, False, True, False]
    assert records.column("label") == labels and records.returns().tolist() == labels and not records.identities()
    assert len(pairs) == 10 and len(pairs.identities()) == 1
    assert pairs.column("label") == [value for label in labels for value in (label, None)]
    for index in range(5):
        record, mismatched = pairs[2 * index], pairs[2 * index + 1]
        assert record.tokens.tolist() == records[index].tokens.tolist()
        prompt_length = int(np.argmax(record.action_mask))
        assert mismatched.tokens[:prompt_length].tolist() == record.tokens[:prompt_length].tolist()
        completions_of_other_prompts = [
            other.tokens[other.action_mask].tolist()
            for other in records.read(range(5))
            if other.group != records[index].group
        ]
        assert mismatched.tokens[mismatched.action_mask].tolist() in completions_of_other_prompts


def test_training_on_labeled_rows(finished, tiny):
    metrics = update_metrics(finished / "run")
    assert [row["weight"] for row in metrics] == [2, 2, 2]
    assert {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "desirable"} < set(metrics[0])
    # The policy starts at the reference, where the loss is 0.5.
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6) and metrics[-1]["loss"] != pytest.approx(0.5, abs=1e-6)
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["records"] == 5 and np.isfinite(summary["kl"])
    before, after = (load_file(f"{path}/model.safetensors") for path in (tiny, finished / "run" / "export"))
    assert any(np.any(before[name] != after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["labels", "update"])
def test_resume_is_bitwise(stage, finished, tiny, tmp_path, monkeypatch):
    command = arguments(tiny, str(finished / "data.jsonl"), tmp_path / "run", "--save-every", "1")
    on_update = CheckFinite.on_update

    def interrupt(*args, **_):
        if stage == "labels" or args[1].step == 2:
            raise KeyboardInterrupt
        return on_update(*args)

    with monkeypatch.context() as patch:
        target = (reference, "annotate") if stage == "labels" else (CheckFinite, "on_update")
        patch.setattr(*target, interrupt)
        with pytest.raises(SystemExit) as stop:
            train_script.main(command)
    assert stop.value.code == 130
    train_script.main([*command, "--resume"])
    for name in ("export/model.safetensors", "labelled/manifest.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


def test_evaluation_computes_kl_over_all_rows(finished, tmp_path):
    out = tmp_path / "eval"
    eval_script.main([
        "--model", str(finished / "run"), "--data", str(finished / "data.jsonl"), "--max-tokens", "4",
        "--output-dir", str(out), "--mesh", "fsdp=1",
    ])  # fmt: skip
    result = json.loads((out / "evaluation.json").read_text())
    metrics = result["objective_metrics"]
    assert result["objective"] == "kto" and metrics["desirable"] == pytest.approx(3 / 5)
    assert 0 < metrics["loss"] < 1 and metrics["kl"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_samples_are_labeled_by_the_mean_reward_of_their_prompt(loss, tiny, tmp_path, monkeypatch, capsys):
    from shiq_jax.runs import sources

    run, resolve = tmp_path / "run", sources.rewards.resolve
    # The sorting reward is zero for every sample of a barely trained model; this one varies.
    reward = lambda row, completion: float(sum(map(ord, completion)) % 5)  # noqa: E731
    monkeypatch.setattr(sources.rewards, "resolve", lambda name: reward if name == "sorting" else resolve(name))
    options = ["--loss.name", loss, "--loss.undesirable-weight", "0.5", "--model", tiny, "--output-dir", str(run)]
    train_script.main(["kto", *SAMPLED, *options])
    samples, examples = Buffer.open(run / "buffer"), Buffer.open(run / "labelled")
    returns = samples.returns().reshape(8, 4)
    signs = np.sign(np.round(returns - returns.mean(1, keepdims=True), 6)).ravel()
    step = 2 if loss == "kto" else 1
    assert examples.column("label")[::step] == (signs[signs != 0] > 0).tolist()
    report = next(line for line in capsys.readouterr().err.splitlines() if "undesirable" in line)
    assert {str(np.sum(signs > 0)), str(np.sum(signs < 0))} <= set(re.findall(r"\d+", report))
    assert {"kl" if loss == "kto" else "rewards/signed", "desirable"} < set(update_metrics(run)[0])


def test_training_on_a_buffer_keeps_its_labels(finished, tiny, tmp_path, capsys):
    data = str(finished / "run" / "buffer")
    message = error_message(arguments(tiny, data, tmp_path / "run", "--threshold", "0.5"), capsys)
    assert "threshold" in message and "label" in message
    train_script.main(arguments(tiny, data, tmp_path / "run"))
    labeled, expected = (Buffer.open(path / "run" / "labelled").read(range(10)) for path in (tmp_path, finished))
    assert labeled == expected


INVALID = {
    "one prompt": ([row | {"prompt": "say"} for row in ROWS], [], ["prompt"]),
    "missing label": ([ROWS[0], {"prompt": "a", "completion": "b"}], [], ["line 2", "'label'"]),
    "ties": ([{"prompt": p, "completion": "b", "reward": 1} for p in "ab"], [], ["desirable"]),
    "threshold for labels": (ROWS, ["--threshold", "1"], ["threshold", "label"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_rejected_before_writing(case, tiny, tmp_path, capsys):
    rows, options, fragments = INVALID[case]
    data, output_dir = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    message = error_message(arguments(tiny, data, output_dir, *options), capsys)
    assert all(fragment in message for fragment in fragments), message
    assert not output_dir.exists()


def test_loss_without_kl_accepts_a_single_prompt(tiny, tmp_path):
    data, output_dir = jsonl(tmp_path / "data.jsonl", INVALID["one prompt"][0]), tmp_path / "run"
    train_script.main(arguments(tiny, data, output_dir, "--loss.name", "apo_zero_unpaired"))
    assert len(Buffer.open(output_dir / "labelled")) == 5 and update_metrics(output_dir)[-1]["rewards/signed"] != 0


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--loss.desirable-weight", "-1"], ["desirable_weight", "-1.0", "finite"]),
        (["--threshold", "nan"], ["threshold", "finite"]),
        (["--loss.name", "dpo"], ["--loss.name"]),
    ],
)
def test_out_of_range_options_are_rejected(options, fragments, capsys):
    message = error_message(["kto", *options], capsys)
    assert all(fragment in message for fragment in fragments), message
