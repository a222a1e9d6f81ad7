"""Run directory, samples, trackers, `inspect`, help texts and warnings about unused options."""

import fnmatch
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import eval as eval_script
import train as train_script
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
    """Complete run with both trackers that annotates its buffer, because the probe of sampler statistics fails."""
    out = tmp_path_factory.mktemp("runs") / "shiq"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr(annotation, "PROBE_TOLERANCE", -1.0)
        train_script.main(["shiq", "--output-dir", str(out), "--track", "tensorboard", "wandb", *OPTIONS])
    return out


@pytest.fixture(scope="module")
def evaluations(run, tmp_path_factory):
    """Output directories of an evaluation on preference pairs and of one on prompts with a reward."""
    base = tmp_path_factory.mktemp("evaluations")
    pairs = base / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "sort 21:", "chosen": "12", "rejected": "21"}) + "\n")
    for data, *scoring in ((pairs,), (run / "data" / "held_out.jsonl", "--reward", "sorting", "--prompts", "2")):
        options = ["--model", str(run), "--data", str(data), "--output-dir", str(base / data.stem)]
        eval_script.main([*options, "--max-tokens", "2", "--mesh", "fsdp=1", *scoring])
    return [base / "pairs", base / "held_out"]


def documented_paths(heading):
    """Path patterns in the first column of the table under a heading."""
    text = next(part for part in PAGE.split(heading)[1].split("\n\n") if part.lstrip().startswith("| path"))
    cells = [line.split("|")[1] for line in text.strip().splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def matches(pattern, path):
    """Whether a path matches a documented pattern: CAPITALS match any name, a final slash the whole directory."""
    glob = re.sub(r"\b[A-Z]+\b", "*", pattern)
    return fnmatch.fnmatch(path, glob + "*" if glob.endswith("/") else glob) and (
        glob.endswith("/") or path.count("/") == glob.count("/")
    )


def relative_files(directory):
    return [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_documented(patterns, directories):
    files = [file for directory in directories for file in relative_files(directory)]
    assert [file for file in files if not any(matches(pattern, file) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(matches(pattern, file) for file in files)] == []


@pytest.mark.slow
def test_documented_run_files_match(run):
    patterns = documented_paths("# The run directory")
    assert len(patterns) > 15
    check_documented(patterns, [run])


@pytest.mark.slow
def test_documented_evaluation_files_match(evaluations):
    check_documented(documented_paths("## The directory of an evaluation"), evaluations)
    rows = read_jsonl(evaluations[1] / "samples.jsonl")
    assert [row["decoding"] for row in rows] == ["sampled", "greedy"] * 2
    assert all(isinstance(row["logratio"], float) for row in rows)


@pytest.mark.slow
def test_documented_code_reads_a_run(run):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("runs/shiq", str(run))
    scope = {}
    exec(code, scope)
    assert [step for step, _ in scope["rewards"]] == [0, 6] and len(scope["answers"]) == 12
    from shiq_jax.models import fingerprint, load_hf

    assert fingerprint(scope["policy"]) == fingerprint(load_hf(run / "export")[1])


@pytest.mark.slow
def test_documented_metric_stages_match(run):
    section = PAGE.split("## metrics.jsonl")[1].split("## samples")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    stages = {stage for cell in cells for stage in re.findall(r"`([^`]+)`", cell)}
    assert {row["stage"] for row in MetricsLog(run / "metrics.jsonl").rows()} == stages


@pytest.mark.slow
def test_every_epoch_samples_the_same_prompts(run):
    samples = {int(file.stem): read_jsonl(file) for file in (run / "samples").iterdir()}
    # Six prompts in batches of three give two updates per epoch; only the last epoch ends with an evaluation.
    assert sorted(samples) == [0, 2, 4, 6]
    for step, rows in samples.items():
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in samples[0]]
        assert [row["decoding"] for row in rows] == ["sampled", "sampled", "greedy"] * 8
        assert {row["step"] for row in rows} == {step} and {row["pass"] for row in rows} == {step / 2}
        assert all(row["reward"] is not None and 1 <= row["tokens"] <= 4 for row in rows)
    assert {row["logratio"] for row in samples[0]} == {0.0} and len({row["logratio"] for row in samples[6]}) > 8
    log = MetricsLog(run / "metrics.jsonl")
    assert [row["step"] for row in log.rows("samples")] == [2, 4]
    for row in log.rows("samples"):
        greedy = [sample["reward"] for sample in samples[row["step"]] if sample["decoding"] == "greedy"]
        assert row["greedy_reward"] == pytest.approx(sum(greedy) / 8)


@pytest.mark.slow
def test_resuming_a_complete_run_backfills_a_tracker(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (event_file,) = (run / "tensorboard").iterdir()
    event_file.unlink()
    train_script.main(["shiq", "--output-dir", str(run), "--resume", "--track", "tensorboard", *OPTIONS])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(row["step"], pytest.approx(row["loss"])) for row in MetricsLog(run / "metrics.jsonl").rows("update")]
    assert [(point.step, point.value) for point in events.Scalars("update/loss")] == losses and len(losses) == 6


def test_missing_tracker_package_is_rejected_before_writing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        train_script.main(["shiq", "--track", "wandb", "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and "shiq_jax[wandb]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_inspect_summarizes_a_complete_run(run, capsys):
    train_script.main(["inspect", str(run), "--generations", "2"])
    output = capsys.readouterr().out
    last = MetricsLog(run / "metrics.jsonl").rows("evaluation")[-1]
    assert "complete" in output and "12 sequences" in output and f"{last['kl']:.4g}" in output and "6 updates" in output
    assert output.count("greedy  ") == 2 and output.count("sampled ") == 4 and "000006.jsonl" in output


def test_inspect_names_the_stage_of_an_unfinished_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"command": "shiq"}')
    assert "preparing" in inspect(tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("warm start", 1, loss=0.5)
    assert "warm start" in inspect(tmp_path)
    log.write("evaluation", 0, kl=0.0, reward=0.25, reward_stderr=0.125)
    assert "initial evaluation complete" in inspect(tmp_path) and "0.25 ± 0.12" in inspect(tmp_path)
    log.write("update", 1, loss=0.125, tokens=10, seconds=2.0, compiled=False)
    assert "training" in inspect(tmp_path) and "loss 0.125, 5 tokens/s" in inspect(tmp_path)
    before = relative_files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_script.main(["inspect", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err and relative_files(tmp_path) == before


def help_of(main, arguments, monkeypatch, capfd):
    """Help text on a terminal of 80 columns; it needs capfd, because rich draws no boxes on the stream of capsys."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    output = capfd.readouterr()
    assert not stop.value.code and not output.err, output.err
    return output.out


def parse_options(text):
    """Map the flags of each option in a help text to its description, joining wrapped lines."""
    lines = [line.strip("│ ").rstrip() for line in text.splitlines() if line.startswith("│")]
    descriptions, flags = {}, None
    for line in lines:
        if line.startswith(("-h,", "--")):
            flags, *rest = re.split(r"\s{2,}", line, maxsplit=1)
            descriptions[flags] = " ".join(rest)
        elif flags is not None:
            descriptions[flags] += f" {line}"
    return descriptions


@pytest.mark.parametrize(
    "main, arguments",
    [
        (train_script.main, ["shiq"]), (train_script.main, ["dpo", "--data", "x"]), (train_script.main, ["kto"]),
        (train_script.main, ["inspect"]), (eval_script.main, []),
    ],
)  # fmt: skip
def test_help_describes_every_option_within_80_columns(main, arguments, monkeypatch, capfd):
    text = help_of(main, arguments, monkeypatch, capfd)
    assert max(map(len, text.splitlines())) <= 80
    options = parse_options(text)
    assert options.pop("-h, --help")
    for flags, description in options.items():
        summary, _, default = description.rpartition(" (")
        assert len(summary.split()) >= 2 and default.startswith(("default:", "required")), (flags, description)
        assert "None" not in flags and "None" not in description, (flags, description)
    if arguments and arguments[0] != "inspect":
        assert len(options) > 40 and list(options)[:2] == ["--model DIR|HUB_ID", "--data FILE|HUB_ID"]


def test_help_without_a_command_lists_commands_and_examples(monkeypatch, capfd):
    text = help_of(train_script.main, [], monkeypatch, capfd)
    for name in ("shiq", "dpo", "kto", "sft", "shiq-bfcl", "inspect"):
        assert re.search(rf"• {name}\s+\w+", text), name
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("usage:"))
    assert "python train.py shiq --model DIR --data FILE" in text


@pytest.mark.parametrize(
    "job",
    [commands.pretrained_defaults(commands.Shiq(model="m", data="d")), commands.toy_defaults(commands.Shiq(seed=5))],
)
def test_used_options_cause_no_warning(job):
    assert not list(commands.ignored_options(job))


def test_every_loss_accepts_its_default_options():
    from shiq_jax.runs.loss_options import PAIR_LOSSES, REWARD_LOSSES, PairLoss, RewardLoss

    assert len(PAIR_LOSSES) > 15 and all(PairLoss(name=name).build().unit == "pair" for name in PAIR_LOSSES)
    assert len(REWARD_LOSSES) > 5 and all("rewards" in RewardLoss(name=name).build().needs for name in REWARD_LOSSES)


@pytest.mark.parametrize(
    "command, options, fragments",
    [
        ("dpo", ["--loss.name", "ipo", "--loss.margin", "1"], ["margin", "ipo", "beta"]),
        ("dpo", ["--loss.name", "exo", "--loss.label-smoothing", "0"], ["label_smoothing", "0.0", "positive"]),
        ("dpo", ["--loss.name", "discopop", "--loss.tau", "-1"], ["tau", "-1.0", "positive", "finite"]),
        ("dpo", ["--loss.name", "cpo", "--loss.rpo-alpha", "1"], ["rpo_alpha", "cpo", "beta"]),
        ("dpo", ["--loss.name", "ipo", "--loss.ld-alpha", "0"], ["ld_alpha", "ipo", "beta"]),
        ("dpo", ["--loss.name", "aot", "--loss.use-weighting"], ["use_weighting", "aot"]),
        ("dpo", ["--loss.name", "simpo", "--loss.f-divergence", "forward_kl"], ["f_divergence", "simpo"]),
        ("dpo", ["--loss.f-alpha", "0.5"], ["f_alpha", "0.5", "f_divergence"]),
        ("dpo", ["--loss.ld-alpha", "2"], ["ld_alpha", "2.0", "[0, 1]"]),
        ("shiq", ["--loss.name", "vargrad", "--loss.gamma", "0.9"], ["gamma", "vargrad", "beta"]),
        ("shiq", ["--loss.horizon", "n_step"], ["None", "n_step"]),
        ("shiq", ["--loss.horizon", "trajectory", "--loss.gradient", "semi"], ["first token"]),
    ],
)
def test_options_of_another_loss_are_rejected(command, options, fragments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_script.main([command, *options])
    message = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(fragment in message for fragment in fragments), message


def test_unused_options_cause_a_warning(tmp_path, capsys):
    job = commands.pretrained_defaults(commands.Dpo(model="m", data="d"))
    job = replace(job, collection=replace(job.collection, prompts=7), warm_start=replace(job.warm_start, steps=3))
    assert list(commands.ignored_options(job)) == ["--collection.prompts", "--warm-start.steps"]
    job = commands.toy_defaults(commands.Sft())
    job = replace(job, collection=replace(job.collection, sampling=replace(job.collection.sampling, top_k=5)))
    assert list(commands.ignored_options(job)) == ["--collection.sampling.top-k"]
    arguments = ["dpo", "--data", str(tmp_path / "no.jsonl"), "--model", str(tmp_path), "--collection.prompts", "7"]
    with pytest.raises(SystemExit) as stop:
        train_script.main([*arguments, "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "--collection.prompts" in line]
    assert warning.startswith("train.py: ")
