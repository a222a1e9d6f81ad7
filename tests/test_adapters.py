"""LoRA through the commands: what learns, what is kept and exported, and that a run is found with its adapters."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as evaluation_door
import train as training_door

OPTIONS = [
    "--mesh", "fsdp=1", "--batch-size", "4", "--epochs", "2", "--evaluation.max-tokens", "4", "--evaluation.prompts",
    "2", "--evaluation.samples-per-prompt", "2", "--evaluation.times", "2", "--save-every", "2",
    "--optimizer.learning-rate", "3e-2", "--lora.rank", "2",
]  # fmt: skip
ROWS = [{"prompt": f"say {number}", "chosen": f"{number}!", "rejected": f"{number % 3} or so"} for number in range(12)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def arguments(tiny, data, out, *more):
    return ["dpo", "--model", tiny, "--data", data, "--output-dir", str(out), *OPTIONS, *more]


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    training_door.main(arguments(tiny, data, run, "--lora.targets", "q_proj", "down_proj"))
    return run


def tensors(directory):
    return load_file(f"{directory}/model.safetensors")


def test_the_export_has_the_adapters_merged_into_their_kernels_alone(tiny, finished):
    before, after = tensors(tiny), tensors(finished / "export")
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "q_proj" in name or "down_proj" in name}
    for name in moved:
        values = np.linalg.svd(after[name].astype(np.float64) - before[name], compute_uv=False)
        assert values[2] < 1e-4 * values[0]


def test_checkpoints_hold_adapters_and_no_model(tiny, finished):
    from orbax.checkpoint import v1 as ocp

    newest = max((finished / "checkpoints").iterdir(), key=lambda path: int(path.name))
    names = set(ocp.checkpointables_metadata(newest).metadata["policy"])
    assert names and all(name.endswith(("lora_a", "lora_b")) for name in names)


def test_the_distance_to_the_reference_is_that_to_the_base(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    distances = [row["kl"] for row in rows if row["stage"] == "evaluation"]
    assert distances[0] == 0 and distances[-1] > 1e-3


def test_a_run_is_evaluated_with_its_adapters_as_its_export_is(tiny, data, finished, tmp_path):
    found = []
    for name in (finished, finished / "export"):
        out = tmp_path / name.name
        evaluation_door.main([
            "--model", str(name), "--reference", tiny, "--data", data, "--max-tokens", "4", "--output-dir", str(out),
            "--mesh", "fsdp=1",
        ])  # fmt: skip
        found.append(json.loads((out / "evaluation.json").read_text()))
    for measure in ("kl", "length"):
        assert found[0][measure] == pytest.approx(found[1][measure], rel=1e-3, abs=1e-4)
    losses = [each["objective_metrics"]["loss"] for each in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < np.log(2)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(tiny, data, finished, tmp_path, monkeypatch):
    from shiq_jax.runs.metrics import MetricsLog

    written, targets = MetricsLog.write, ("--lora.targets", "q_proj", "down_proj")

    def stopped(log, stage, step, **values):
        if stage == "update" and step == 5:
            raise KeyboardInterrupt
        written(log, stage, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopped)
        with pytest.raises(SystemExit):
            training_door.main(arguments(tiny, data, tmp_path / "run", *targets))
    training_door.main(arguments(tiny, data, tmp_path / "run", *targets, "--resume"))
    whole, parts = tensors(finished / "export"), tensors(tmp_path / "run" / "export")
    for name, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[name], err_msg=name)


def test_microbatches_of_adapters_change_nothing(tiny, data, finished, tmp_path):
    targets = ("--lora.targets", "q_proj", "down_proj")
    training_door.main(arguments(tiny, data, tmp_path / "run", *targets, "--microbatches", "2"))
    whole, parts = tensors(finished / "export"), tensors(tmp_path / "run" / "export")
    for name, leaf in whole.items():
        np.testing.assert_allclose(leaf, parts[name], atol=2e-3, err_msg=name)


def test_adapters_learn_privately(tiny, data, tmp_path):
    """The noise goes into what learns: beside adapters no number of the model moves."""
    public = tmp_path / "public.jsonl"
    public.write_text(json.dumps({"prompt": "say 99"}) + "\n")
    training_door.main(
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
    # Noise alone has a norm of sigma * C / b per square root of the numbers that learn.
    learned = 2 * 2 * (32 + 16)
    norms = [row["grad_norm"] for row in updates if row["stage"] == "update"]
    assert 0.5 < np.median(norms) / (2 / 4 * learned**0.5) < 2


PAIRS, TOY = ["dpo", "--model", "{tiny}", "--data", "{data}"], ["shiq"]


@pytest.mark.parametrize(
    "command, more, message",
    [
        (PAIRS, ["--lora.rank", "0"], "the rank of LoRA must be at least 1, not 0"),
        (PAIRS, ["--lora.rank", "2", "--lora.alpha", "nan"], "the alpha of LoRA must be positive and finite, not nan"),
        (PAIRS, ["--lora.rank", "2", "--lora.targets", "lm_head"], "lm_head"),
        (PAIRS, ["--lora.alpha", "4"], "alpha and targets configure LoRA adapters: set lora.rank"),
        (TOY, ["--lora.rank", "4", "--loss.name", "ilql"], "ilql does not train the policy"),
    ],
)
def test_what_there_is_not_is_refused(command, more, message, tiny, data, tmp_path, capsys):
    given = [word.format(tiny=tiny, data=data) for word in command]
    with pytest.raises(SystemExit) as stop:
        training_door.main([*given, "--output-dir", str(tmp_path / "run"), *more])
    # The frame of a usage error breaks lines where it likes.
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and message in said
    assert not (tmp_path / "run").exists()
