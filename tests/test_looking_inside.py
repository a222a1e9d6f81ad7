"""What a user sees of a run: its directory as documented, generations to compare, trackers, help, options in vain."""

import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest

import eval as evaluation_door
import train as training_door
from shiq_jax.runs import commands
from shiq_jax.runs.inspection import inspect
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training import annotation

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "run-directory.md").read_text()
OPTIONS = [
    "--mesh", "fsdp=1", "--warm-start.steps", "2", "--warm-start.batch-size", "4", "--warm-start.demonstrations", "8",
    "--collection.prompts", "6", "--collection.prompts-per-batch", "6", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "12", "--evaluation.samples-per-prompt", "3",
    "--evaluation.max-tokens", "4", "--evaluation.times", "1", "--evaluation.prompts-in-flight", "12",
    "--batch-size", "3", "--epochs", "3", "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of the toy with both trackers, whose sampler's statistics do not serve."""
    out = tmp_path_factory.mktemp("runs") / "shiq"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr(annotation, "PROBE_TOLERANCE", -1.0)
        training_door.main(["shiq", "--output-dir", str(out), "--track", "tensorboard", "wandb", *OPTIONS])
    return out


@pytest.fixture(scope="module")
def evaluations(run, tmp_path_factory):
    """One evaluation of rows that are examples, and one of prompts that a reward scores."""
    base = tmp_path_factory.mktemp("evaluations")
    pairs = base / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "sort 21:", "chosen": "12", "rejected": "21"}) + "\n")
    for data, *more in ((pairs,), (run / "data" / "held_out.jsonl", "--reward", "sorting", "--prompts", "2")):
        options = ["--model", str(run), "--data", str(data), "--output-dir", str(base / data.stem)]
        evaluation_door.main([*options, "--max-tokens", "2", "--mesh", "fsdp=1", *more])
    return [base / "pairs", base / "held_out"]


def documented(heading):
    """Paths of the first column of the table under a heading, as patterns."""
    text = next(part for part in PAGE.split(heading)[1].split("\n\n") if part.lstrip().startswith("| path"))
    cells = [line.split("|")[1] for line in text.strip().splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def matches(pattern, path):
    """Whether a documented path stands for a file: capitals for any name, a final slash for all beneath."""
    glob = re.sub(r"\b[A-Z]+\b", "*", pattern)
    return fnmatch.fnmatch(path, glob + "*" if glob.endswith("/") else glob) and (
        glob.endswith("/") or path.count("/") == glob.count("/")
    )


def files(directory):
    return [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_page(patterns, directories):
    found = [file for directory in directories for file in files(directory)]
    assert [file for file in found if not any(matches(pattern, file) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(matches(pattern, file) for file in found)] == []


@pytest.mark.slow
def test_the_page_names_every_file_of_a_run_and_no_other(run):
    patterns = documented("# The run directory")
    assert len(patterns) > 15
    check_page(patterns, [run])


@pytest.mark.slow
def test_the_page_names_every_file_of_an_evaluation_and_no_other(evaluations):
    check_page(documented("## The directory of an evaluation"), evaluations)
    rows = jsonl(evaluations[1] / "samples.jsonl")
    assert [row["decoding"] for row in rows] == ["sampled", "greedy"] * 2
    assert all(isinstance(row["logratio"], float) for row in rows)


def test_the_page_tells_how_to_read_a_run(run):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("runs/shiq", str(run))
    scope = {}
    exec(code, scope)
    assert [step for step, _ in scope["rewards"]] == [0, 6] and len(scope["answers"]) == 12
    from shiq_jax.models import fingerprint, load_hf

    assert fingerprint(scope["policy"]) == fingerprint(load_hf(run / "export")[1])


def test_stages_of_the_log_are_those_of_the_page(run):
    section = PAGE.split("## metrics.jsonl")[1].split("## samples")[0]
    named = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    stages = {stage for cell in named for stage in re.findall(r"`([^`]+)`", cell)}
    assert {row["stage"] for row in MetricsLog(run / "metrics.jsonl").rows()} == stages


def test_every_pass_leaves_generations_to_the_same_prompts(run):
    kept = {int(file.stem): jsonl(file) for file in (run / "samples").iterdir()}
    # Six prompts in batches of three are two updates a pass; only the last pass ends with an evaluation.
    assert sorted(kept) == [0, 2, 4, 6]
    for step, rows in kept.items():
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in kept[0]]
        assert [row["decoding"] for row in rows] == ["sampled", "sampled", "greedy"] * 8
        assert {row["step"] for row in rows} == {step} and {row["pass"] for row in rows} == {step / 2}
        assert all(row["reward"] is not None and 1 <= row["tokens"] <= 4 for row in rows)
    assert {row["logratio"] for row in kept[0]} == {0.0} and len({row["logratio"] for row in kept[6]}) > 8
    log = MetricsLog(run / "metrics.jsonl")
    assert [row["step"] for row in log.rows("samples")] == [2, 4]
    for row in log.rows("samples"):
        greedy = [each["reward"] for each in kept[row["step"]] if each["decoding"] == "greedy"]
        assert row["greedy_reward"] == pytest.approx(sum(greedy) / 8)


def test_a_finished_run_is_tracked_when_asked_later(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (event_file,) = (run / "tensorboard").iterdir()
    event_file.unlink()
    training_door.main(["shiq", "--output-dir", str(run), "--resume", "--track", "tensorboard", *OPTIONS])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(row["step"], pytest.approx(row["loss"])) for row in MetricsLog(run / "metrics.jsonl").rows("update")]
    assert [(point.step, point.value) for point in events.Scalars("update/loss")] == losses and len(losses) == 6


def test_a_missing_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        training_door.main(["shiq", "--track", "wandb", "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and "pip install 'shiq_jax[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_inspect_shows_how_far_a_run_is(run, capsys):
    training_door.main(["inspect", str(run), "--generations", "2"])
    shown = capsys.readouterr().out
    last = MetricsLog(run / "metrics.jsonl").rows("evaluation")[-1]
    assert "complete" in shown and "12 sequences" in shown and f"{last['kl']:.4g}" in shown and "6 updates" in shown
    assert shown.count("greedy  ") == 2 and shown.count("sampled ") == 4 and "000006.jsonl" in shown


def test_inspect_names_the_stage_of_a_run_that_is_not_over(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"command": "shiq"}')
    assert "preparing" in inspect(tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("warm start", 1, loss=0.5)
    assert "warm start" in inspect(tmp_path)
    log.write("evaluation", 0, kl=0.0, reward=0.25, reward_stderr=0.125)
    assert "initial evaluation complete" in inspect(tmp_path) and "0.25 ± 0.12" in inspect(tmp_path)
    log.write("update", 1, loss=0.125, tokens=10, seconds=2.0, compiled=False)
    assert "training" in inspect(tmp_path) and "loss 0.125, 5 tokens/s" in inspect(tmp_path)
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        training_door.main(["inspect", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and "neither a run" in capsys.readouterr().err and files(tmp_path) == before


def help_of(main, arguments, monkeypatch, capfd):
    """What a terminal of 80 columns shows; with capsys, whose encoding is spelt in capitals, boxes would be missing."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    shown = capfd.readouterr()
    assert not stop.value.code and not shown.err, shown.err
    return shown.out


def options_of(text):
    """{flags: help} of the boxes, whose lines are put together again."""
    lines = [line.strip("│ ").rstrip() for line in text.splitlines() if line.startswith("│")]
    found, current = {}, None
    for line in lines:
        if line.startswith(("-h,", "--")):
            current, *rest = re.split(r"\s{2,}", line, maxsplit=1)
            found[current] = " ".join(rest)
        elif current is not None:
            found[current] += f" {line}"
    return found


@pytest.mark.parametrize(
    "main, arguments",
    [
        (training_door.main, ["shiq"]), (training_door.main, ["dpo", "--data", "x"]), (training_door.main, ["kto"]),
        (training_door.main, ["inspect"]), (evaluation_door.main, []),
    ],
)  # fmt: skip
def test_help_explains_every_option_within_80_columns(main, arguments, monkeypatch, capfd):
    text = help_of(main, arguments, monkeypatch, capfd)
    assert max(map(len, text.splitlines())) <= 80
    options = options_of(text)
    assert options.pop("-h, --help")
    for flags, explained in options.items():
        # Something in words, and beside it what holds without the option.
        words, _, default = explained.rpartition(" (")
        assert len(words.split()) >= 2 and default.startswith(("default:", "required")), (flags, explained)
        assert "None" not in flags and "None" not in explained, (flags, explained)
    if arguments and arguments[0] != "inspect":
        assert len(options) > 40 and list(options)[:2] == ["--model DIR|HUB_ID", "--data FILE|HUB_ID"]


def test_help_without_a_command_lists_the_commands_with_examples(monkeypatch, capfd):
    text = help_of(training_door.main, [], monkeypatch, capfd)
    for name in ("shiq", "dpo", "kto", "sft", "shiq-bfcl", "inspect"):
        assert re.search(rf"• {name}\s+\w+", text), name
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("usage:"))
    assert "python train.py shiq --model DIR --data FILE" in text


@pytest.mark.parametrize(
    "job, said",
    [
        (commands.pretrained_defaults(commands.Shiq(model="m", data="d")), ()),
        (commands.toy_defaults(commands.Shiq(seed=5)), ()),
    ],
)
def test_options_that_are_of_use_are_not_complained_of(job, said):
    assert tuple(commands.ignored_options(job)) == said


def test_options_of_another_loss_are_refused_and_every_loss_takes_its_own(capsys):
    from shiq_jax.runs.loss_options import PAIR_LOSSES, REWARD_LOSSES, PairLoss, RewardLoss

    assert len(PAIR_LOSSES) > 15 and all(PairLoss(name=name).build().unit == "pair" for name in PAIR_LOSSES)
    assert len(REWARD_LOSSES) > 5 and all(
        "rewards" in RewardLoss(name=name).build().needs for name in REWARD_LOSSES
    )
    for arguments, words in (
        (["--loss.name", "ipo", "--loss.margin", "1"], "margin is not an option of the loss ipo, which takes beta"),
        (["--loss.name", "exo", "--loss.label-smoothing", "0"], "label_smoothing is 0.0 but must be a positive"),
        (["--loss.name", "discopop", "--loss.tau", "-1"], "tau is -1.0 but must be a positive finite number"),
        (["--loss.name", "cpo", "--loss.rpo-alpha", "1"], "rpo_alpha is not an option of the loss cpo, which takes beta"),
        (["--loss.name", "ipo", "--loss.ld-alpha", "0"], "ld_alpha is not an option of the loss ipo, which takes beta"),
        (["--loss.name", "aot", "--loss.use-weighting"], "use_weighting is not an option of the loss aot, which takes"),
        (
            ["--loss.name", "simpo", "--loss.f-divergence", "forward_kl"],
            "f_divergence is not an option of the loss simpo, which takes",
        ),
        (["--loss.f-alpha", "0.5"], "f_alpha is 0.5 with f_divergence='reverse_kl'"),
        (["--loss.ld-alpha", "2"], "ld_alpha is 2.0 but must lie in [0, 1]"),
        (["--loss.name", "vargrad", "--loss.gamma", "0.9"], "gamma is not an option of the loss vargrad, which takes beta"),
        (["--loss.horizon", "n_step"], "n is None with horizon='n_step'"),
        (["--loss.horizon", "trajectory", "--loss.gradient", "semi"], "would train the first token only"),
    ):
        with pytest.raises(SystemExit) as stop:
            training_door.main(["shiq" if {"vargrad", "--loss.horizon"} & {*arguments} else "dpo", *arguments])
        said = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
        assert stop.value.code == 2 and words in said


def test_options_in_vain_are_named(tmp_path, capsys):
    from dataclasses import replace

    job = commands.pretrained_defaults(commands.Dpo(model="m", data="d"))
    job = replace(job, collection=replace(job.collection, prompts=7), warm_start=replace(job.warm_start, steps=3))
    assert list(commands.ignored_options(job)) == ["--collection.prompts", "--warm-start.steps"]
    job = commands.toy_defaults(commands.Sft())
    job = replace(job, collection=replace(job.collection, sampling=replace(job.collection.sampling, top_k=5)))
    assert list(commands.ignored_options(job)) == ["--collection.sampling.top-k"]
    arguments = ["dpo", "--data", str(tmp_path / "no.jsonl"), "--model", str(tmp_path), "--collection.prompts", "7"]
    with pytest.raises(SystemExit) as stop:
        training_door.main([*arguments, "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "warning: ignored --collection.prompts: --data skips sampling" in capsys.readouterr().err
