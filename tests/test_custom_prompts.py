"""`--prompts` with `--reward`, and replay buffers of earlier runs as training data."""

import json

import chex
import pytest

import train as train_script
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
    """MODULE:FUNCTION of a reward that varies between the completions of a random model."""
    path = tmp_path_factory.mktemp("modules")
    (path / "letter_rewards.py").write_text(
        "def letter_sum(row, completion):\n    return sum(map(ord, completion)) % 7 + len(row['prompt'])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield "letter_rewards:letter_sum"


@pytest.fixture(scope="module")
def sampled(tiny, prompts, reward, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sampled"
    train_script.main(
        ["shiq", "--model", tiny, "--prompts", str(prompts), "--reward", reward, "--output-dir", str(out), *SMALL,
         "--collection.prompts", "6", "--collection.samples-per-prompt", "3", "--collection.sampling.max-tokens", "6"]
    )  # fmt: skip
    return out


def test_first_prompts_are_sampled_and_scored_by_the_reward(sampled, prompts, reward):
    buffer, rows = Buffer.open(sampled / "buffer"), [json.loads(line) for line in prompts.read_text().splitlines()]
    assert len(buffer) == 18 and not is_buffer(sampled)
    sampled_prompts = [json.loads(record.prompt)["prompt"] for record in buffer.read(range(18))]
    assert sampled_prompts == [row["prompt"] for row in rows[:6] for _ in range(3)]
    assert len(set(buffer.group_ids())) == 6
    tokenizer, score = load_tokenizer(str(sampled / "export")), resolve(reward)
    for record in buffer.read(range(18)):
        completion = tokenizer.decode(record.tokens[record.action_mask].tolist(), skip_special_tokens=True)
        assert float(record.rewards.sum()) == pytest.approx(score(json.loads(record.prompt), completion))


@pytest.mark.parametrize("command", ["shiq", "dpo", "sft"])
def test_objectives_train_on_the_buffer_of_another_run(command, tiny, sampled, tmp_path):
    run, data = tmp_path / command, str(sampled / "buffer")
    train_script.main([command, "--model", tiny, "--data", data, "--output-dir", str(run), *SMALL])
    original, copy = Buffer.open(sampled / "buffer"), Buffer.open(run / "buffer")
    assert len(copy) == len(original)
    for index in range(len(copy)):
        for name in ("tokens", "action_mask", "rewards", "logp", "lse"):
            chex.assert_trees_all_equal(getattr(copy[index], name), getattr(original[index], name))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 2
    if command != "sft":
        assert summary["probe"]["passed"]


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["shiq", "--prompts", "PROMPTS", "--reward", "sorting"], ["--prompts", "--model"]),
        (["shiq", "--model", "TINY", "--prompts", "PROMPTS"], ["--prompts", "--reward"]),
        (["sft", "--model", "TINY", "--prompts", "PROMPTS", "--reward", "sorting"], ["--prompts"]),
        (["shiq", "--model", "TINY", "--prompts", "PROMPTS", "--data", "PROMPTS"], ["prompts", "data"]),
    ],
)
def test_incompatible_options_are_rejected_before_writing(arguments, fragments, tiny, prompts, tmp_path, capsys):
    paths = {"TINY": tiny, "PROMPTS": str(prompts)}
    command = [paths.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        train_script.main([*command, "--output-dir", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "run").exists()


def test_resume_with_a_changed_buffer_is_rejected(tiny, sampled, tmp_path, capsys):
    copy = tmp_path / "buffer"
    original = Buffer.open(sampled / "buffer")
    Buffer.create(copy).append(original.read(range(12)))
    command = ["shiq", "--model", tiny, "--data", str(copy), "--output-dir", str(tmp_path / "run"), *SMALL]
    train_script.main(command)
    Buffer.open(copy).append(original.read(range(12, 18)))
    with pytest.raises(SystemExit) as stop:
        train_script.main([*command, "--resume"])
    assert stop.value.code == 2 and "--data" in capsys.readouterr().err


def test_options_that_do_not_apply_to_a_buffer_are_rejected(tiny, sampled, tmp_path, capsys):
    command = ["shiq", "--model", tiny, "--data", str(sampled / "buffer"), "--output-dir", str(tmp_path / "run")]
    for options, fragment in ((["--score", "overall_score"], "--score"), (["--drop-longer-than", "2"], "2")):
        with pytest.raises(SystemExit) as stop:
            train_script.main([*command, *options, *SMALL])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in message and fragment in message.splitlines()[-1]
        assert not (tmp_path / "run").exists()
