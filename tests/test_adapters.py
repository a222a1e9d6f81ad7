"""LoRA through the commands: training, checkpoints, export, evaluation and resuming."""

import json

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as eval_script
import train as train_script

OPTIONS = [
    "--mesh", "fsdp=1", "--batch-size", "4", "--epochs", "2", "--evaluation.max-tokens", "4", "--evaluation.prompts",
    "2", "--evaluation.samples-per-prompt", "2", "--evaluation.times", "2", "--save-every", "2",
    "--optimizer.learning-rate", "3e-2", "--lora.rank", "2",
]  # fmt: skip
TARGETS = ("--lora.targets", "q_proj", "down_proj")
ROWS = [{"prompt": f"say {i}", "chosen": f"{i}!", "rejected": f"{i % 3} or so"} for i in range(12)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def arguments(tiny, data, output_dir, *options):
    return ["dpo", "--model", tiny, "--data", data, "--output-dir", str(output_dir), *OPTIONS, *options]


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train_script.main(arguments(tiny, data, run, *TARGETS))
    return run


def tensors(directory):
    return load_file(f"{directory}/model.safetensors")


def test_export_merges_adapters_into_target_kernels_only(tiny, finished):
    before, after = tensors(tiny), tensors(finished / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    for name in changed:
        singular_values = np.linalg.svd(after[name].astype(np.float64) - before[name], compute_uv=False)
        assert singular_values[2] < 1e-4 * singular_values[0]


def test_checkpoints_store_only_adapters(finished):
    from orbax.checkpoint import v1 as ocp

    newest = max((finished / "checkpoints").iterdir(), key=lambda path: int(path.name))
    names = set(ocp.checkpointables_metadata(newest).metadata["policy"])
    assert names and all(name.endswith(("lora_a", "lora_b")) for name in names)


def test_kl_is_measured_against_the_base_model(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    kls = [row["kl"] for row in rows if row["stage"] == "evaluation"]
    assert kls[0] == 0 and kls[-1] > 1e-3


def test_evaluating_a_run_matches_evaluating_its_export(tiny, data, finished, tmp_path):
    results = []
    for model in (finished, finished / "export"):
        output_dir = tmp_path / model.name
        eval_script.main([
            "--model", str(model), "--reference", tiny, "--data", data, "--max-tokens", "4",
            "--output-dir", str(output_dir), "--mesh", "fsdp=1",
        ])  # fmt: skip
        results.append(json.loads((output_dir / "evaluation.json").read_text()))
    for metric in ("kl", "length"):
        assert results[0][metric] == pytest.approx(results[1][metric], rel=1e-3, abs=1e-4)
    losses = [result["objective_metrics"]["loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < np.log(2)


def test_resume_is_bitwise(tiny, data, finished, tmp_path, monkeypatch):
    from shiq_jax.runs.metrics import MetricsLog

    write = MetricsLog.write

    def interrupted_write(log, stage, step, **values):
        if stage == "update" and step == 5:
            raise KeyboardInterrupt
        write(log, stage, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted_write)
        with pytest.raises(SystemExit):
            train_script.main(arguments(tiny, data, tmp_path / "run", *TARGETS))
    train_script.main(arguments(tiny, data, tmp_path / "run", *TARGETS, "--resume"))
    chex.assert_trees_all_equal(tensors(tmp_path / "run" / "export"), tensors(finished / "export"))


def test_microbatches_do_not_change_the_result(tiny, data, finished, tmp_path):
    train_script.main(arguments(tiny, data, tmp_path / "run", *TARGETS, "--microbatches", "2"))
    microbatched, expected = tensors(tmp_path / "run" / "export"), tensors(finished / "export")
    chex.assert_trees_all_close(microbatched, expected, rtol=1e-7, atol=2e-3)


@pytest.mark.slow
def test_private_training_adds_noise_to_adapters_only(tiny, data, tmp_path):
    public = tmp_path / "public.jsonl"
    public.write_text(json.dumps({"prompt": "say 99"}) + "\n")
    train_script.main(
        arguments(
            tiny, data, tmp_path / "run", "--lora.targets", "v_proj", "--evaluation.data", str(public),
            "--privacy.noise-multiplier", "2", "--privacy.delta", "1e-2",
        )
    )  # fmt: skip
    before, after = tensors(tiny), tensors(tmp_path / "run" / "export")
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        name for name in before if "v_proj" in name
    }
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # At this noise level the gradient norm is about noise_multiplier * clip_norm / batch_size * sqrt(parameters).
    parameters = 2 * 2 * (32 + 16)
    norms = [row["grad_norm"] for row in updates if row["stage"] == "update"]
    assert 0.5 < np.median(norms) / (2 / 4 * parameters**0.5) < 2


DPO, SHIQ = ["dpo", "--model", "{tiny}", "--data", "{data}"], ["shiq"]


@pytest.mark.parametrize(
    "command, options, fragments",
    [
        (DPO, ["--lora.rank", "0"], ["rank", "at least 1", "0"]),
        (DPO, ["--lora.rank", "2", "--lora.alpha", "nan"], ["alpha", "positive", "finite", "nan"]),
        (DPO, ["--lora.rank", "2", "--lora.targets", "lm_head"], ["lm_head"]),
        (DPO, ["--lora.alpha", "4"], ["alpha", "rank"]),
        (SHIQ, ["--lora.rank", "4", "--loss.name", "ilql"], ["ilql", "policy"]),
    ],
)
def test_invalid_adapter_options_are_rejected(command, options, fragments, tiny, data, tmp_path, capsys):
    command = [argument.format(tiny=tiny, data=data) for argument in command]
    with pytest.raises(SystemExit) as stop:
        train_script.main([*command, "--output-dir", str(tmp_path / "run"), *options])
    # Usage errors are printed in a box that wraps lines.
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "run").exists()
