"""Everything that the commands refuse: one sentence, exit code 2, and not a byte on disk is another one afterwards."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eval as evaluation_door
import train as training_door
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


def tree(root):
    """Every path below a directory, with the bytes of files."""
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refused(door, root, arguments, capsys) -> str:
    """The sentence with which a command is refused, after a look at the disk."""
    before, _ = tree(root), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        door.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and tree(root) == before
    name = f"{door.__name__}.py: "
    assert [line.startswith(name) for line in lines].index(True) == len(lines) - 1, lines
    return lines[-1].removeprefix(name)


def arguments_of(root, *more):
    return [
        "shiq", "--model", str(root / "model"), "--data", str(root / "data.jsonl"), "--output-dir", str(root / "run"),
        "--mesh", "fsdp=1", "--batch-size", "1", "--epochs", "1", "--save-every", "1", "--evaluation.prompts", "2",
        "--evaluation.max-tokens", "4", "--evaluation.no-greedy", "--optimizer.learning-rate", "1e-3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model and data that suit it."""
    root = tmp_path_factory.mktemp("original")
    tiny_directory(root / "model", max_positions=64, **SIZES)
    write_rows(root / "data.jsonl", ROWS)
    return root


@pytest.fixture
def root(original, tmp_path):
    """Model and data of our own, to be damaged."""
    return shutil.copytree(original, tmp_path / "root")


# ---- what can be wrong with a file; each takes the root, or gives something that does ----


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(*lines):
    return lambda root: write_rows(root / "data.jsonl", lines)


def put(name, content):
    return lambda root: (root / name).write_bytes(content)


def cut(pattern, keep):
    """The one file that matches, cut to so many bytes, or by so many."""
    return lambda root: one(root, pattern).write_bytes(one(root, pattern).read_bytes()[:keep])


def flip(pattern):
    def damage(root):
        content = bytearray(one(root, pattern).read_bytes())
        content[len(content) // 2] ^= 255
        one(root, pattern).write_bytes(content)

    return damage


def without(pattern):
    def damage(root):
        path = one(root, pattern)
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


def one(root, pattern):
    (path,) = root.glob(pattern)
    return path


def config(**changes):
    def damage(root):
        path = root / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(change):
    def damage(root):
        held = load_file(root / WEIGHTS)
        change(held)
        save_file(held, root / WEIGHTS, metadata={"format": "pt"})

    return damage


def second_shard_absent(root):
    held = load_file(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    save_file(held, root / "model" / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    names = {name: f"model-0000{1 + (number > 3)}-of-00002.safetensors" for number, name in enumerate(held)}
    (root / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def smaller_vocabulary(root):
    def change(held):
        held.update({name: held[name][:100].copy() for name in ("model.embed_tokens.weight", "lm_head.weight")})

    tensors(change)(root)
    config(vocab_size=100)(root)


def another_model(**changes):
    return lambda root: tiny_directory(root / "model", max_positions=64, **SIZES | changes)


# ---- before a run ----

MODELS = {
    "no directory": (without("model"), "no such directory"),
    "no config": (without("model/config.json"), "config.json: no such file"),
    "no weights": (without(WEIGHTS), "model.safetensors: no such file"),
    "no tokenizer": (without("model/tokenizer.json"), "holds no tokenizer"),
    "download under way": (
        lambda root: (root / WEIGHTS).rename(root / f"{WEIGHTS}.incomplete"),
        "model.safetensors.incomplete is there: finish the download",
    ),
    "a shard not downloaded": (second_shard_absent, "model-00002-of-00002.safetensors: no such file"),
    "weights not fetched by git": (put(WEIGHTS, POINTER), "model.safetensors: is a pointer of Git LFS"),
    "tokenizer not fetched by git": (put("model/tokenizer.json", POINTER), "tokenizer.json: is a pointer of Git LFS"),
    "an empty file": (cut(WEIGHTS, 0), "damaged or incomplete safetensors"),
    "header cut": (cut(WEIGHTS, 200), "damaged or incomplete safetensors"),
    "data cut": (cut(WEIGHTS, -1), "damaged or incomplete safetensors"),
    "garbage": (put(WEIGHTS, struct.pack("<Q", 20) + b"x" * 5000), "damaged or incomplete safetensors"),
    "bits lost": (
        tensors(lambda held: held["model.norm.weight"].__setitem__(3, np.nan)),
        "tensor model.norm.weight holds infinities or NaN",
    ),
    "another kind": (config(model_type="gpt2"), "model_type is 'gpt2'; supported: llama"),
    "another width": (config(hidden_size=32, head_dim=16), "shape (264, 16), config.json says (264, 32)"),
    "more layers": (config(num_hidden_layers=2), "tensor model.layers.1."),
    "a size that is text": (config(hidden_size="16"), "hidden_size is '16'"),
    "config cut": (cut("model/config.json", 100), "config.json: cannot be read as JSON"),
    "tokenizer cut": (cut("model/tokenizer.json", 500), "holds no tokenizer that transformers can load"),
    "tokenizer of another model": (smaller_vocabulary, "the id 263, and the model has a vocabulary of 100"),
}
DATA = {
    "no file": (without("data.jsonl"), "data.jsonl does not exist"),
    "nothing": (rows(), "data.jsonl holds no rows"),
    "cut": (cut("data.jsonl", -9), "line 8 is not JSON"),
    "no UTF-8": (put("data.jsonl", b'{"prompt": "\xff"}'), "line 1 is not UTF-8"),
    "no object": (rows(ROWS[0], [1]), "line 2 holds a JSON list"),
    "a field missing": (rows(ROWS[0], {"prompt": "a", "completion": "b"}), "line 2: field 'reward' is missing"),
    "a field of another type": (rows(ROWS[0] | {"prompt": 3}), "line 1: field 'prompt' is of type int"),
    "an empty completion": (rows(ROWS[0] | {"completion": ""}), "line 1: field 'completion' is empty"),
    "a reward that is NaN": (rows(ROWS[0], ROWS[1] | {"reward": float("nan")}), "line 2: field 'reward' holds NaN"),
    "a reward that is infinite": (rows(ROWS[0] | {"reward": -1e39}), "line 1: field 'reward' holds -1e+39"),
    "a token's reward that is NaN": (
        rows(TOKENS | {"rewards": [0, 0, 0, float("nan")]}),
        "line 1: record (group 'a'): rewards is nan at action 1",
    ),
    "longer than the context": (
        rows(ROWS[0], ROWS[1] | {"completion": "x" * 100}),
        "line 2: it has 107 tokens and the model's context holds 64",
    ),
    "a token beyond the vocabulary": (
        rows(TOKENS, TOKENS | {"tokens": [1, 2, 3, 264]}),
        "line 2: record (group 'a'): token id 264 lies outside the vocabulary of 264",
    ),
    "no actions": (
        rows(TOKENS | {"action_mask": [0] * 4, "rewards": [0] * 4}),
        "line 1: record (group 'a'): none of its 4 tokens is an action",
    ),
    "a mask too short": (rows(TOKENS | {"action_mask": [0, 1]}), "'action_mask' has 2 entries for 4 tokens"),
    "lse for some tokens only": (
        rows(TOKENS | {"logp": [0, 0, -1, -1], "lse": [0, 1]}),
        "line 1: field 'lse' has 2 entries for 4 tokens",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, root, capsys):
    damage, said = MODELS[case]
    damage(root)
    assert said in refused(training_door, root, arguments_of(root), capsys)


@pytest.mark.parametrize("case", DATA)
def test_data(case, root, capsys):
    damage, said = DATA[case]
    damage(root)
    assert said in refused(training_door, root, arguments_of(root), capsys)


def test_the_same_through_the_other_door(root, capsys):
    arguments = ["--model", str(root / "model"), "--data", str(root / "data.jsonl"), "--output-dir", str(root / "eval")]
    write_rows(root / "data.jsonl", [ROWS[0], {"prompt": 3, "completion": "x", "reward": 1}])
    assert "line 2: field 'prompt'" in refused(evaluation_door, root, arguments, capsys)
    smaller_vocabulary(root)
    assert "a vocabulary of 100" in refused(evaluation_door, root, arguments, capsys)
    cut(WEIGHTS, -1)(root)
    assert "damaged or incomplete" in refused(evaluation_door, root, arguments, capsys)


@pytest.mark.parametrize("made_before", [True, False])
def test_directories_that_were_there_stay_and_others_are_not_left(made_before, root, capsys):
    place = root / "runs" / "today" / "one"
    if made_before:
        place.mkdir(parents=True)
    without(WEIGHTS)(root)
    arguments = arguments_of(root, "--output-dir", str(place))
    assert "no such file" in refused(training_door, root, arguments, capsys)


OPTIONS = {
    "a number out of range": (["--batch-size", "0"], "batch_size must be at least 1"),
    "a number that is none": (["--optimizer.learning-rate", "nan"], "learning_rate must be"),
    "a number without end": (["--epochs", "inf"], "epochs must be"),
    "no number": (["--batch-size", "x"], "--batch-size"),
    "an option that is not there": (["--batch-sise", "3"], "--batch-size"),
    "a value that is not offered": (["--loss.normalisation", "mean"], "--loss.normalisation"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, root, capsys):
    before, (options, said) = tree(root), OPTIONS[case]
    with pytest.raises(SystemExit) as stop:
        training_door.main(arguments_of(root, *options))
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and tree(root) == before
    assert said in error and "Traceback" not in error and "tyro" not in error


def test_rewards_that_are_not_finite(root, capsys, monkeypatch):
    (root / "my_rewards.py").write_text("def bad(row, completion):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    arguments = [
        "shiq", "--model", str(root / "model"), "--output-dir", str(root / "run"), "--reward", "my_rewards:bad",
        "--warm-start.steps", "0", "--collection.prompts", "2", "--collection.sampling.max-tokens", "2",
    ]  # fmt: skip
    said = refused(training_door, root, arguments, capsys)
    assert "the reward 'my_rewards:bad' returned nan for the row with the prompt \"sort" in said


# ---- in the middle of a run ----


@pytest.fixture(scope="module")
def stopped(original, tmp_path_factory):
    """Where a run lies that was stopped after its second update of four, and a copy to bring it back from."""
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(original, place / "root")
    check = CheckFinite.on_update

    def stop(callback, done):
        if done.step == 3:
            raise KeyboardInterrupt
        check(callback, done)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckFinite, "on_update", stop)
        training_door.main(arguments_of(place / "root"))
    shutil.copytree(place / "root", place / "kept")
    return place


@pytest.fixture
def halfway(stopped):
    shutil.rmtree(stopped / "root")
    return shutil.copytree(stopped / "kept", stopped / "root")


def checkpoint_of_other_options(root):
    """As if a checkpoint of another run had been copied here."""
    path = one(root, "run/checkpoints/2/_CHECKPOINT_METADATA")
    path.write_text(path.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.5'))


RESUMED = {
    "no run": (without("run"), "holds no run to resume (it has no config.json)"),
    "no config": (without("run/config.json"), "holds no run to resume (it has no config.json)"),
    "config cut": (cut("run/config.json", -9), "config.json is not readable as JSON"),
    "records cut": (cut("run/buffer/records-00000.arrow", -9), "the manifest says"),
    "records damaged": (flip("run/buffer/records-00000.arrow"), "records-00000.arrow is corrupt"),
    "records gone": (without("run/buffer/records-00000.arrow"), "records-00000.arrow is missing"),
    "statistics cut": (cut("run/buffer/statistics/*/00000.arrow", -9), "the manifest says"),
    "statistics damaged": (flip("run/buffer/statistics/*/00000.arrow"), "00000.arrow is corrupt"),
    "statistics gone": (without("run/buffer/statistics"), "00000.arrow is missing"),
    "manifest cut": (cut("run/buffer/manifest.json", -9), "manifest.json is not readable as JSON"),
    "manifest gone": (without("run/buffer/manifest.json"), "of a replay buffer that lost its manifest.json"),
    "checkpoint cut": (cut("run/checkpoints/2/policy/manifest.ocdbt", -9), "checkpoint 2 in"),
    "half a checkpoint": (without("run/checkpoints/2/memory"), "checkpoint 2 in"),
    "checkpoint of another configuration": (checkpoint_of_other_options, "learning_rate=0.5, not 0.001"),
    "model gone": (without("model"), "no such directory"),
    "other weights": (another_model(seed=5), "model holds other weights than those that"),
    "a model of another size": (another_model(hidden_size=32), "model holds other weights than those that"),
    "other data": (rows(*ROWS[:4]), "the files of --data are not those that"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_going_on(case, halfway, capsys):
    damage, said = RESUMED[case]
    damage(halfway)
    assert said in refused(training_door, halfway, arguments_of(halfway, "--resume"), capsys)


@pytest.mark.parametrize("case", ["records cut", "records damaged", "statistics gone", "manifest gone"])
def test_inspecting(case, halfway, capsys):
    RESUMED[case][0](halfway)
    assert "run/buffer" in refused(training_door, halfway, ["inspect", str(halfway / "run" / "buffer")], capsys)


def test_a_run_is_begun_once_and_resumed_with_its_own_options(halfway, capsys):
    assert "holds a run already: add --resume" in refused(training_door, halfway, arguments_of(halfway), capsys)
    other = arguments_of(halfway, "--resume", "--seed", "7")
    assert "was begun with seed=0, not 7" in refused(training_door, halfway, other, capsys)


def test_what_is_evaluated_on_stays_the_same(root, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_rows(root / "prompts.jsonl", [{"prompt": "say a"}])
    arguments = arguments_of(root, "--evaluation.data", str(root / "prompts.jsonl"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pipeline, "set_up", interrupted)
        training_door.main(arguments)
    write_rows(root / "prompts.jsonl", [{"prompt": "say b"}])
    said = refused(training_door, root, [*arguments, "--resume"], capsys)
    assert "the files of --evaluation.data are not those that" in said


def test_evaluating_a_damaged_run(halfway, capsys):
    policy = ["--model", str(halfway / "run"), "--output-dir", str(halfway / "eval")]
    arguments = [*policy, "--data", str(halfway / "data.jsonl")]
    without("run/checkpoints/2/policy")(halfway)
    assert "checkpoint 2 in" in refused(evaluation_door, halfway, arguments, capsys)
    put("run/task.json", b"{")(halfway)
    assert "task.json is not readable as JSON" in refused(evaluation_door, halfway, arguments, capsys)


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(root, capsys):
    """A reward whose square is too large, in the prompt that the third update learns from."""
    (third,) = Schedule(4, 1, seed=0).indices(2)
    group = "abcd"[third]
    write_rows(root / "data.jsonl", [row | {"reward": 1e30 if row["group_id"] == group else 1} for row in ROWS])
    arguments = arguments_of(root)
    with pytest.raises(SystemExit) as stop:
        training_door.main(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert f"of update step 3 (records {2 * third}, {2 * third + 1} of groups {group}) are not finite" in said
    checkpoints = Checkpoints(root / "run" / "checkpoints", read_only=True)
    assert checkpoints.latest() == 2
    checkpoints.close()
    # It stands there for whoever wants to look at it, but going on with it leads to the same place.
    assert "of update step 3" in refused(training_door, root, [*arguments, "--resume"], capsys)


def test_an_update_that_would_ruin_the_parameters_is_not_saved(root, capsys):
    with pytest.raises(SystemExit) as stop:
        training_door.main(arguments_of(root, "--optimizer.learning-rate", "1e30"))
    assert stop.value.code == 2
    assert "param_norm of update step 1 (records" in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in (root / "run" / "checkpoints").iterdir() if path.name.isdigit()]
