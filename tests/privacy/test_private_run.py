"""A private run as a user has it: what it leaves, what it keeps to itself, and what it refuses."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from shiq_jax.runs import private_run
from shiq_jax.runs.metrics import MetricsLog

PRIVATE = ["--privacy.noise-multiplier", "2", "--privacy.delta", "1e-2"]
OPTIONS = [
    "--mesh", "fsdp=1", "--batch-size", "4", "--epochs", "1", "--precision.remat", "none", "--optimizer.learning-rate",
    "1e-3", "--evaluation.max-tokens", "4", "--evaluation.prompts", "2", "--evaluation.times", "1", "--save-every", "2",
]  # fmt: skip
ROWS = [
    {"prompt": f"say {number}", "chosen": f"{number}!", "rejected": f"{number % 3} or so", "user_id": f"u{number % 5}"}
    for number in range(24)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("private")
    for name, rows in (("data", ROWS), ("public", [{"prompt": "say 99"}, {"prompt": "say 98"}])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(tiny, files, out, *more, private=PRIVATE):
    data = ["--data", str(files / "data.jsonl"), "--evaluation.data", str(files / "public.jsonl")]
    return ["dpo", "--model", tiny, *data, "--output-dir", str(out), *OPTIONS, *private, *more]


def refusal(given, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(given)
    assert stop.value.code == 2
    return capsys.readouterr().err


def rows_of(run, stage="update"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture(scope="module")
def finished(tiny, files, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train.main(arguments(tiny, files, run, private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"]))
    return run


def test_it_spends_what_it_was_given_and_says_nothing_of_the_data(finished):
    updates = rows_of(finished)
    assert len(updates) == 6
    spent = [row["epsilon"] for row in updates]
    assert spent == sorted(set(spent)) and 2.9 < spent[-1] <= 3
    # Batches are samples of unlike size, which nothing tells.
    told = {"stage", "step", "grad_norm", "param_norm", "epsilon", "learning_rate", "seconds", "compiled"}
    assert all(set(row) == told for row in updates)
    assert json.loads((finished / "summary.json").read_text())["tokens_per_second"] is None
    about = json.loads((finished / "privacy.json").read_text())
    assert about["dataset_size"] == 24 and about["expected_batch"] == 4 and about["unit"] == "pair"
    assert about["epsilon"] == spent[-1] and not about["insecure"] and not about["shown"]


def test_what_may_be_shown_says_nothing_by_which_rows_could_be_tried(finished):
    """Whoever knows all rows but one could compare the digest of what he thinks that it was."""
    digest = json.loads((finished / "config.json").read_text())["data_digest"]
    shown = [finished / "metrics.jsonl", finished / "privacy.json"]
    shown += [file for name in ("export", "checkpoints", "samples") for file in (finished / name).rglob("*")]
    assert sum(file.is_file() for file in shown) > 10
    assert not any(digest.encode() in file.read_bytes() for file in shown if file.is_file())


def test_the_secret_is_nowhere_else(finished):
    path = finished / "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    root = path.read_bytes()
    for file in finished.rglob("*"):
        if file.is_file() and file != path:
            content = file.read_bytes()
            assert root not in content and root.hex().encode() not in content, file


def test_every_checkpoint_says_what_was_spent(finished):
    from shiq_jax.training.checkpoints import Checkpoints

    shelf = Checkpoints(finished / "checkpoints", read_only=True)
    about, fingerprint = shelf.metadata(6), json.loads((finished / "privacy.json").read_text())["secret"]
    assert about["epsilon"] == rows_of(finished)[-1]["epsilon"] and about["privacy"]["secret"] == fingerprint
    assert about["privacy"]["noise_multiplier"] > 0


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tiny, files, tmp_path, monkeypatch, capsys):
    """Same secret, same samples and noise: nothing is released twice with other noise."""
    given = ["--privacy.insecure-deterministic", "--seed", "3"]
    train.main(arguments(tiny, files, tmp_path / "whole", *given))
    written = MetricsLog.write

    def stopped(log, stage, step, **values):
        if stage == "update" and step == 4:
            raise KeyboardInterrupt
        written(log, stage, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopped)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "parts", *given))
    train.main(arguments(tiny, files, tmp_path / "parts", *given, "--resume"))
    whole, parts = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "parts"))
    for name, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[name], err_msg=name)


@pytest.mark.slow
def test_two_runs_are_unlike(tiny, files, finished, tmp_path):
    """Another secret, other samples and other noise, with the same options."""
    train.main(
        arguments(tiny, files, tmp_path / "again", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    )
    first, second = (load_file(run / "export" / "model.safetensors") for run in (finished, tmp_path / "again"))
    assert all(np.any(leaf != second[name]) for name, leaf in first.items())


def test_a_run_that_was_stopped_before_it_had_both_files_goes_on(tiny, files, tmp_path, monkeypatch):
    def stopped(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_run, "write_json", stopped)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run"))
    assert (tmp_path / "run" / "secret.key").exists() and not (tmp_path / "run" / "privacy.json").exists()
    train.main(arguments(tiny, files, tmp_path / "run", "--resume"))
    assert len(rows_of(tmp_path / "run")) == 6


def test_users_are_units_when_they_are_asked_for(tiny, files, tmp_path):
    train.main(
        arguments(
            tiny, files, tmp_path / "run", "--privacy.unit", "user", "--batch-size", "2", "--privacy.log-private",
        )
    )  # fmt: skip
    about = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert about["dataset_size"] == 5 and about["unit"] == "user"
    told = [row["private/norm"] for row in rows_of(tmp_path / "run")]
    assert any(np.isfinite(told)) and all(norm > 0 for norm in told if np.isfinite(norm))
    assert "private/loss" in rows_of(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--seed", "1"], "anyone who knows the seed can subtract the noise"),
        (["--batch-size", "25"], "a batch of 25 is larger than the data of 24 units"),
        (["--loss.name", "aot"], "the loss aot couples the examples of a batch"),
        (["--loss.use-weighting", "--privacy.method", "ghost"], "the loss dpo needs heads or token statistics beyond"),
        (["--loss.use-weighting", "--privacy.groupwise"], "the loss dpo needs heads or token statistics beyond"),
    ],
)
def test_refusals(more, complaint, tiny, files, tmp_path, capsys):
    assert complaint in refusal(arguments(tiny, files, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()


def test_labels_by_the_mean_of_other_answers_are_refused(tiny, files, tmp_path, capsys):
    rows = [{"prompt": "p", "completion": text, "reward": len(text)} for text in ("a", "bb", "ccc")]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = arguments(tiny, files, tmp_path / "run", "--loss.name", "apo_zero_unpaired")
    given = ["kto", *given[1:3], "--data", str(tmp_path / "scored.jsonl"), *given[5:]]
    assert "belong to other units" in refusal(given, capsys)
    given[given.index("--batch-size") + 1] = "2"
    train.main([*given, "--threshold", "1.5"])
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["dataset_size"] == 3


def test_an_evaluation_takes_public_data_only(tiny, files, tmp_path, capsys):
    given = ["dpo", "--model", tiny, "--data", str(files / "data.jsonl"), "--output-dir", str(tmp_path / "run")]
    assert "set --evaluation.data to public prompts" in refusal([*given, *OPTIONS, *PRIVATE], capsys)


def test_options_that_make_no_sense(tiny, files, tmp_path, capsys):
    for private, complaint in (
        (["--privacy.epsilon", "3"], "needs a delta"),
        (["--privacy.epsilon", "3", "--privacy.delta", "2"], "delta must lie in (0, 1)"),
        (["--privacy.epsilon", "-3", "--privacy.delta", "1e-3"], "epsilon must be positive"),
        ([*PRIVATE, "--privacy.epsilon", "1"], "set only one of them"),
        ([*PRIVATE, "--privacy.groupwise", "--privacy.method", "ghost"], "requires the method group"),
    ):
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run", private=private))
        assert complaint in " ".join(capsys.readouterr().err.split())


def test_a_secret_that_is_gone_or_data_that_have_changed_end_a_run(tiny, files, finished, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints")
    os.remove(run / "secret.key")
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    assert "the secret of this private run, cannot be read" in refusal(resume, capsys)
    assert (run / "privacy.json").exists()
    shutil.copy(finished / "secret.key", run / "secret.key")
    about = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps(about | {"dataset_size": 23}))
    assert "has dataset_size 23, but this run has 24" in refusal(resume, capsys)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "checkpoints", None])
def test_a_run_whose_account_is_gone_releases_nothing_again(lost, tiny, files, finished, tmp_path, capsys):
    """Another secret would give its steps other noise; what was released is seen by checkpoints or rows."""
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    os.remove(run / "privacy.json")
    os.remove(run / "summary.json")
    shutil.rmtree(run / "export")
    if lost:
        shutil.rmtree(run / lost) if (run / lost).is_dir() else os.remove(run / lost)
    secret = (run / "secret.key").read_bytes()
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    assert "privacy.json, the privacy account of this run, is missing" in refusal(resume, capsys)
    assert (run / "secret.key").read_bytes() == secret


def test_a_checkpoint_of_another_secret_is_refused(tiny, files, finished, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    os.remove(run / "summary.json")
    shutil.rmtree(run / "export")
    own = json.loads((run / "privacy.json").read_text())["secret"]
    for path in (run / "checkpoints").rglob("_CHECKPOINT_METADATA"):
        path.write_text(path.read_text().replace(own, "0" * 16))
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    said = refusal(resume, capsys)
    assert f"has secret '{'0' * 16}', but this run has" in said and "restore the original secret" in said


def test_a_run_that_anybody_can_look_into_says_so(tiny, files, tmp_path):
    train.main(arguments(tiny, files, tmp_path / "run", "--privacy.insecure-deterministic", "--privacy.log-private"))
    about = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert about["insecure"] and about["shown"]


@pytest.mark.slow
def test_delta_that_means_nothing_is_warned_about(tiny, files, tmp_path, capsys):
    train.main(
        arguments(tiny, files, tmp_path / "run", private=["--privacy.noise-multiplier", "2", "--privacy.delta", "0.1"])
    )
    assert "warning: delta 0.1 is not below 1 / 24" in capsys.readouterr().err
