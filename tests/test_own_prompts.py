"""Somebody's prompts, answered and scored here, and one replay buffer that every objective learns from."""

import json

import numpy as np
import pytest

import train as training_door
from shiq_jax.data.chat import load_tokenizer
from shiq_jax.replay import Buffer, is_buffer
from shiq_jax.tasks.rewards import resolve
from shiq_jax.tasks.sorting import sorting_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = [
    "--mesh", "fsdp=1", "--evaluation.prompts", "2", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "6", "--evaluation.times", "1", "--batch-size", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=3)))
    return path


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Somebody's own module with a function that scores: a random model's answers are all wrong, but unlike."""
    path = tmp_path_factory.mktemp("modules")
    (path / "somebody.py").write_text(
        "def letters(row, completion):\n    return sum(map(ord, completion)) % 7 + len(row['prompt'])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield "somebody:letters"


@pytest.fixture(scope="module")
def sampled(tiny, prompts, reward, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sampled"
    training_door.main(
        ["shiq", "--model", tiny, "--prompts", str(prompts), "--reward", reward, "--output-dir", str(out), *SMALL,
         "--collection.prompts", "6", "--collection.samples-per-prompt", "3", "--collection.sampling.max-tokens", "6"]
    )  # fmt: skip
    return out


def test_the_first_prompts_are_answered_and_scored_by_the_reward(sampled, prompts, reward):
    buffer, rows = Buffer.open(sampled / "buffer"), [json.loads(line) for line in prompts.read_text().splitlines()]
    assert len(buffer) == 18 and not is_buffer(sampled)
    asked = [json.loads(buffer[number].prompt)["prompt"] for number in range(18)]
    assert asked == [row["prompt"] for row in rows[:6] for _ in range(3)]
    assert len(set(buffer.group_ids())) == 6
    tokenizer, score = load_tokenizer(str(sampled / "export")), resolve(reward)
    for number in range(len(buffer)):
        record = buffer[number]
        completion = tokenizer.decode(record.tokens[record.action_mask].tolist(), skip_special_tokens=True)
        assert float(record.rewards.sum()) == pytest.approx(score(json.loads(record.prompt), completion))


@pytest.mark.parametrize("command", ["shiq", "dpo", "sft"])
def test_every_objective_learns_from_the_buffer_of_another_run(command, tiny, sampled, tmp_path):
    out = tmp_path / command
    training_door.main([command, "--model", tiny, "--data", str(sampled / "buffer"), "--output-dir", str(out), *SMALL])
    theirs, ours = Buffer.open(sampled / "buffer"), Buffer.open(out / "buffer")
    assert len(ours) == len(theirs)
    for number in range(len(ours)):
        for name in ("tokens", "action_mask", "rewards", "logp", "lse"):
            np.testing.assert_array_equal(getattr(ours[number], name), getattr(theirs[number], name))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["updates"] == {"shiq": 2, "dpo": 2, "sft": 2}[command]  # of six prompts, three each
    if command != "sft":
        assert summary["probe"]["passed"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["shiq", "--prompts", "PROMPTS", "--reward", "sorting"], "--prompts needs --model"),
        (["shiq", "--model", "TINY", "--prompts", "PROMPTS"], "--prompts needs --reward"),
        (["sft", "--model", "TINY", "--prompts", "PROMPTS", "--reward", "sorting"], "sft needs demonstrations"),
        (["shiq", "--model", "TINY", "--prompts", "PROMPTS", "--data", "PROMPTS"], "set only one of them"),
    ],
)
def test_what_prompts_need_is_said_before_anything_is_written(arguments, words, tiny, prompts, tmp_path, capsys):
    given = [{"TINY": tiny, "PROMPTS": str(prompts)}.get(word, word) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        training_door.main([*given, "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_another_buffer_at_the_same_place_is_no_data_to_resume_with(tiny, sampled, tmp_path, capsys):
    copy = tmp_path / "buffer"
    original = Buffer.open(sampled / "buffer")
    Buffer.create(copy).append(original.read(range(12)))
    command = ["shiq", "--model", tiny, "--data", str(copy), "--output-dir", str(tmp_path / "run"), *SMALL]
    training_door.main(command)
    Buffer.open(copy).append(original.read(range(12, 18)))
    with pytest.raises(SystemExit) as stop:
        training_door.main([*command, "--resume"])
    assert stop.value.code == 2 and "data" in capsys.readouterr().err


def test_what_a_buffer_cannot_be_is_refused(tiny, sampled, tmp_path, capsys):
    command = ["shiq", "--model", tiny, "--data", str(sampled / "buffer"), "--output-dir", str(tmp_path / "run")]
    cases = ((["--score", "overall_score"], "omit --score"), (["--drop-longer-than", "2"], "no usable record"))
    for options, words in cases:
        with pytest.raises(SystemExit) as stop:
            training_door.main([*command, *options, *SMALL])
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
