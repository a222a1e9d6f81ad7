"""Input that the commands reject: one-line message, exit code 2, no change on disk."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eval as eval_script
import train as train_script
from shiq_jax.replay import Schedule
from shiq_jax.runs import pipeline
from shiq_jax.tasks.tiny import tiny_directory
from shiq_jax.training.callbacks import CheckFinite
from shiq_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
ROWS = [
    {"prompt": f"say {letter}", "completion": answer, "reward": reward, "group_id": letter}
    for letter in "abcd"
    for answer, reward in (("y", 1), ("n", 0))
]
TOKENS = {"tokens": [1, 20, 30, 40], "action_mask": [0, 0, 1, 1], "rewards": [0, 0, 0, 1], "group_id": "a"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
WEIGHTS = "model/model.safetensors"


def snapshot(root):
    """Map every path below a directory to the bytes of the file, or None for directories."""
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def error_message(script, root, arguments, capsys) -> str:
    """The one-line error of a rejected command, which must leave `root` unchanged."""
    before, _ = snapshot(root), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and snapshot(root) == before and "Traceback" not in error
    lines, prefix = error.splitlines(), f"{script.__name__}.py: "
    assert [line.startswith(prefix) for line in lines].index(True) == len(lines) - 1, lines
    return lines[-1].removeprefix(prefix)


def check_error(script, root, arguments, capsys, fragments):
    message = error_message(script, root, arguments, capsys)
    assert all(fragment in message for fragment in fragments), message


def arguments(root, *options):
    return [
        "shiq", "--model", str(root / "model"), "--data", str(root / "data.jsonl"), "--output-dir", str(root / "run"),
        "--mesh", "fsdp=1", "--batch-size", "1", "--epochs", "1", "--save-every", "1", "--evaluation.prompts", "2",
        "--evaluation.max-tokens", "4", "--evaluation.no-greedy", "--optimizer.learning-rate", "1e-3", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Directory with a tiny model and valid data."""
    root = tmp_path_factory.mktemp("original")
    tiny_directory(root / "model", max_positions=64, **SIZES)
    write_rows(root / "data.jsonl", ROWS)
    return root


@pytest.fixture
def root(original, tmp_path):
    """Copy of the original model and data for one test to damage."""
    return shutil.copytree(original, tmp_path / "root")


# ---- damage: each function returns, or is itself, a function of the root directory ----


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace_data(*rows):
    return lambda root: write_rows(root / "data.jsonl", rows)


def overwrite(name, content):
    return lambda root: (root / name).write_bytes(content)


def truncate(pattern, end):
    """Keep the bytes before `end`, which counts from the end of the file if negative."""
    return lambda root: match(root, pattern).write_bytes(match(root, pattern).read_bytes()[:end])


def flip_byte(pattern):
    def damage(root):
        content = bytearray(match(root, pattern).read_bytes())
        content[len(content) // 2] ^= 255
        match(root, pattern).write_bytes(content)

    return damage


def remove(pattern):
    def damage(root):
        path = match(root, pattern)
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


def match(root, pattern):
    """The only path that matches a pattern."""
    (path,) = root.glob(pattern)
    return path


def edit_config(**changes):
    def damage(root):
        path = root / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_weights(change):
    def damage(root):
        tensors = load_file(root / WEIGHTS)
        change(tensors)
        save_file(tensors, root / WEIGHTS, metadata={"format": "pt"})

    return damage


def remove_second_shard(root):
    tensors = load_file(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    save_file(tensors, root / "model" / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"model-0000{1 + (index > 3)}-of-00002.safetensors" for index, name in enumerate(tensors)}
    (root / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shrink_vocabulary(root):
    def shrink(tensors):
        tensors.update({name: tensors[name][:100].copy() for name in ("model.embed_tokens.weight", "lm_head.weight")})

    edit_weights(shrink)(root)
    edit_config(vocab_size=100)(root)


def replace_model(**changes):
    return lambda root: tiny_directory(root / "model", max_positions=64, **SIZES | changes)


# ---- invalid input of a new run: the damage and the fragments in the message ----

MODELS = {
    "missing directory": (remove("model"), ["/model"]),
    "missing config": (remove("model/config.json"), ["config.json"]),
    "missing weights": (remove(WEIGHTS), ["model.safetensors"]),
    "missing tokenizer": (remove("model/tokenizer.json"), ["tokenizer"]),
    "incomplete download": (
        lambda root: (root / WEIGHTS).rename(root / f"{WEIGHTS}.incomplete"),
        ["model.safetensors.incomplete"],
    ),
    "missing shard": (remove_second_shard, ["model-00002-of-00002.safetensors"]),
    "LFS pointer as weights": (overwrite(WEIGHTS, POINTER), ["model.safetensors", "Git LFS"]),
    "LFS pointer as tokenizer": (overwrite("model/tokenizer.json", POINTER), ["tokenizer.json", "Git LFS"]),
    "empty weights": (truncate(WEIGHTS, 0), ["model.safetensors", "damaged"]),
    "truncated weights header": (truncate(WEIGHTS, 200), ["model.safetensors", "damaged"]),
    "truncated weights": (truncate(WEIGHTS, -1), ["model.safetensors", "damaged"]),
    "garbage as weights": (
        overwrite(WEIGHTS, struct.pack("<Q", 20) + b"x" * 5000),
        ["model.safetensors", "damaged"],
    ),
    "NaN in the weights": (
        edit_weights(lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan)),
        ["model.norm.weight", "NaN"],
    ),
    "unsupported architecture": (edit_config(model_type="gpt2"), ["model_type", "'gpt2'", "llama"]),
    "wrong hidden size": (edit_config(hidden_size=32, head_dim=16), ["(264, 16)", "config.json", "(264, 32)"]),
    "too many layers": (edit_config(num_hidden_layers=2), ["model.layers.1."]),
    "size of the wrong type": (edit_config(hidden_size="16"), ["hidden_size", "'16'"]),
    "truncated config": (truncate("model/config.json", 100), ["config.json", "JSON"]),
    "truncated tokenizer": (truncate("model/tokenizer.json", 500), ["tokenizer"]),
    "tokenizer of another model": (shrink_vocabulary, ["263", "vocabulary", "100"]),
}
DATA = {
    "missing file": (remove("data.jsonl"), ["data.jsonl"]),
    "empty file": (replace_data(), ["data.jsonl"]),
    "truncated file": (truncate("data.jsonl", -9), ["line 8", "JSON"]),
    "invalid UTF-8": (overwrite("data.jsonl", b'{"prompt": "\xff"}'), ["line 1", "UTF-8"]),
    "list as a row": (replace_data(ROWS[0], [1]), ["line 2", "list"]),
    "missing field": (replace_data(ROWS[0], {"prompt": "a", "completion": "b"}), ["line 2", "'reward'"]),
    "field of the wrong type": (replace_data(ROWS[0] | {"prompt": 3}), ["line 1", "'prompt'", "int"]),
    "empty completion": (replace_data(ROWS[0] | {"completion": ""}), ["line 1", "'completion'", "empty"]),
    "NaN reward": (replace_data(ROWS[0], ROWS[1] | {"reward": float("nan")}), ["line 2", "'reward'", "NaN"]),
    "infinite reward": (replace_data(ROWS[0] | {"reward": -1e39}), ["line 1", "'reward'", "-1e+39"]),
    "NaN reward of a token": (replace_data(TOKENS | {"rewards": [0, 0, 0, float("nan")]}), ["line 1", "'a'", "nan"]),
    "sequence exceeds the context": (
        replace_data(ROWS[0], ROWS[1] | {"completion": "x" * 100}),
        ["line 2", "107 tokens", "context", "64"],
    ),
    "token id outside the vocabulary": (
        replace_data(TOKENS, TOKENS | {"tokens": [1, 2, 3, 264]}),
        ["line 2", "'a'", "264", "vocabulary"],
    ),
    "no actions": (replace_data(TOKENS | {"action_mask": [0] * 4, "rewards": [0] * 4}), ["line 1", "'a'", "action"]),
    "short action mask": (replace_data(TOKENS | {"action_mask": [0, 1]}), ["line 1", "'action_mask'", "2", "4"]),
    "short lse": (replace_data(TOKENS | {"logp": [0, 0, -1, -1], "lse": [0, 1]}), ["line 1", "'lse'", "2", "4"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_invalid_model_is_rejected(case, root, capsys):
    damage, fragments = MODELS[case]
    damage(root)
    check_error(train_script, root, arguments(root), capsys, fragments)


@pytest.mark.parametrize("case", DATA)
def test_invalid_data_is_rejected(case, root, capsys):
    damage, fragments = DATA[case]
    damage(root)
    check_error(train_script, root, arguments(root), capsys, fragments)


def test_evaluation_rejects_invalid_models_and_data(root, capsys):
    command = ["--model", str(root / "model"), "--data", str(root / "data.jsonl"), "--output-dir", str(root / "eval")]
    write_rows(root / "data.jsonl", [ROWS[0], {"prompt": 3, "completion": "x", "reward": 1}])
    check_error(eval_script, root, command, capsys, ["line 2", "'prompt'"])
    shrink_vocabulary(root)
    check_error(eval_script, root, command, capsys, ["vocabulary", "100"])
    truncate(WEIGHTS, -1)(root)
    check_error(eval_script, root, command, capsys, ["model.safetensors", "damaged"])


@pytest.mark.parametrize("exists", [True, False])
def test_rejected_run_leaves_output_directory_unchanged(exists, root, capsys):
    output_dir = root / "runs" / "today" / "run"
    if exists:
        output_dir.mkdir(parents=True)
    remove(WEIGHTS)(root)
    check_error(train_script, root, arguments(root, "--output-dir", str(output_dir)), capsys, ["model.safetensors"])


OPTIONS = {
    "out of range": (["--batch-size", "0"], ["batch_size", "1"]),
    "NaN": (["--optimizer.learning-rate", "nan"], ["learning_rate"]),
    "infinite": (["--epochs", "inf"], ["epochs"]),
    "not a number": (["--batch-size", "x"], ["--batch-size"]),
    "unknown option": (["--batch-sise", "3"], ["--batch-size"]),
    "unknown choice": (["--loss.normalisation", "mean"], ["--loss.normalisation"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_invalid_option_is_rejected(case, root, capsys):
    before, (options, fragments) = snapshot(root), OPTIONS[case]
    with pytest.raises(SystemExit) as stop:
        train_script.main(arguments(root, *options))
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and snapshot(root) == before
    assert all(fragment in message for fragment in fragments), message
    assert "Traceback" not in message and "tyro" not in message


def test_nan_reward_is_rejected(root, capsys, monkeypatch):
    (root / "bad_rewards.py").write_text("def score(row, completion):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    command = [
        "shiq", "--model", str(root / "model"), "--output-dir", str(root / "run"), "--reward", "bad_rewards:score",
        "--warm-start.steps", "0", "--collection.prompts", "2", "--collection.sampling.max-tokens", "2",
    ]  # fmt: skip
    check_error(train_script, root, command, capsys, ["bad_rewards:score", "nan", "sort"])


# ---- resuming a damaged run ----


@pytest.fixture(scope="module")
def interrupted(original, tmp_path_factory):
    """Directory with a run that was interrupted after its second of four updates, and with a backup of it."""
    directory = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(original, directory / "root")
    on_update = CheckFinite.on_update

    def interrupt(callback, done):
        if done.step == 3:
            raise KeyboardInterrupt
        on_update(callback, done)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckFinite, "on_update", interrupt)
        train_script.main(arguments(directory / "root"))
    shutil.copytree(directory / "root", directory / "backup")
    return directory


@pytest.fixture
def interrupted_root(interrupted):
    """Root directory of the interrupted run, restored from the backup; the run records its absolute path."""
    shutil.rmtree(interrupted / "root")
    return shutil.copytree(interrupted / "backup", interrupted / "root")


def change_checkpoint_settings(root):
    path = match(root, "run/checkpoints/2/_CHECKPOINT_METADATA")
    path.write_text(path.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.5'))


RESUMED = {
    "missing run": (remove("run"), ["/run", "config.json"]),
    "missing run config": (remove("run/config.json"), ["/run", "config.json"]),
    "truncated run config": (truncate("run/config.json", -9), ["config.json", "JSON"]),
    "truncated records": (truncate("run/buffer/records-00000.arrow", -9), ["records-00000.arrow", "manifest"]),
    "corrupt records": (flip_byte("run/buffer/records-00000.arrow"), ["records-00000.arrow", "corrupt"]),
    "missing records": (remove("run/buffer/records-00000.arrow"), ["records-00000.arrow", "missing"]),
    "truncated statistics": (truncate("run/buffer/statistics/*/00000.arrow", -9), ["00000.arrow", "manifest"]),
    "corrupt statistics": (flip_byte("run/buffer/statistics/*/00000.arrow"), ["00000.arrow", "corrupt"]),
    "missing statistics": (remove("run/buffer/statistics"), ["00000.arrow", "missing"]),
    "truncated manifest": (truncate("run/buffer/manifest.json", -9), ["manifest.json", "JSON"]),
    "missing manifest": (remove("run/buffer/manifest.json"), ["run/buffer", "manifest.json"]),
    "truncated checkpoint": (truncate("run/checkpoints/2/policy/manifest.ocdbt", -9), ["checkpoint 2"]),
    "incomplete checkpoint": (remove("run/checkpoints/2/policy"), ["checkpoint 2"]),
    "checkpoint with other settings": (change_checkpoint_settings, ["learning_rate=0.5", "0.001"]),
    "missing model": (remove("model"), ["/model"]),
    "changed weights": (replace_model(seed=5), ["/model", "weights"]),
    "changed model size": (replace_model(hidden_size=32), ["/model", "weights"]),
    "changed data": (replace_data(*ROWS[:4]), ["--data"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_of_damaged_run_is_rejected(case, interrupted_root, capsys):
    damage, fragments = RESUMED[case]
    damage(interrupted_root)
    check_error(train_script, interrupted_root, arguments(interrupted_root, "--resume"), capsys, fragments)


@pytest.mark.parametrize("case", ["truncated records", "corrupt records", "missing statistics", "missing manifest"])
def test_inspect_rejects_damaged_buffer(case, interrupted_root, capsys):
    RESUMED[case][0](interrupted_root)
    command = ["inspect", str(interrupted_root / "run" / "buffer")]
    check_error(train_script, interrupted_root, command, capsys, ["run/buffer"])


def test_existing_run_needs_resume_and_the_same_settings(interrupted_root, capsys):
    check_error(train_script, interrupted_root, arguments(interrupted_root), capsys, ["/run", "--resume"])
    command = arguments(interrupted_root, "--resume", "--seed", "7")
    check_error(train_script, interrupted_root, command, capsys, ["seed=0", "7"])


def test_resume_with_changed_evaluation_data_is_rejected(root, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    write_rows(root / "prompts.jsonl", [{"prompt": "say a"}])
    command = arguments(root, "--evaluation.data", str(root / "prompts.jsonl"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pipeline, "set_up", interrupt)
        train_script.main(command)
    write_rows(root / "prompts.jsonl", [{"prompt": "say b"}])
    check_error(train_script, root, [*command, "--resume"], capsys, ["--evaluation.data"])


def test_evaluation_of_damaged_run_is_rejected(interrupted_root, capsys):
    policy = ["--model", str(interrupted_root / "run"), "--output-dir", str(interrupted_root / "eval")]
    command = [*policy, "--data", str(interrupted_root / "data.jsonl")]
    remove("run/checkpoints/2/policy")(interrupted_root)
    check_error(eval_script, interrupted_root, command, capsys, ["checkpoint 2"])
    overwrite("run/task.json", b"{")(interrupted_root)
    check_error(eval_script, interrupted_root, command, capsys, ["task.json", "JSON"])


# ---- non-finite updates ----


def test_nonfinite_loss_keeps_the_last_finite_checkpoint(root, capsys):
    """The square of a reward in the third batch overflows float32."""
    (index,) = Schedule(4, 1, seed=0).indices(2)
    group = "abcd"[index]
    write_rows(root / "data.jsonl", [row | {"reward": 1e30 if row["group_id"] == group else 1} for row in ROWS])
    command = arguments(root)
    with pytest.raises(SystemExit) as stop:
        train_script.main(command)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    for fragment in ("step 3", f"records {2 * index}, {2 * index + 1}", f"groups {group}", "finite"):
        assert fragment in message, message
    checkpoints = Checkpoints(root / "run" / "checkpoints", read_only=True)
    assert checkpoints.latest() == 2
    checkpoints.close()
    # Resuming repeats the same update.
    check_error(train_script, root, [*command, "--resume"], capsys, ["step 3"])


def test_nonfinite_parameters_are_not_saved(root, capsys):
    with pytest.raises(SystemExit) as stop:
        train_script.main(arguments(root, "--optimizer.learning-rate", "1e30"))
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "param_norm" in message and "step 1" in message
    assert not [path for path in (root / "run" / "checkpoints").iterdir() if path.name.isdigit()]
