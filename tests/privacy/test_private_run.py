"""Private runs end to end: files they write, secrecy, resumption and rejected options."""

import json
import os
import shutil
import stat

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from shiq_jax.runs import private_run
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training.checkpoints import Checkpoints

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


def arguments(tiny, files, out, *extra, private=PRIVATE):
    data = ["--data", str(files / "data.jsonl"), "--evaluation.data", str(files / "public.jsonl")]
    return ["dpo", "--model", tiny, *data, "--output-dir", str(out), *OPTIONS, *private, *extra]


def error_message(args, capsys) -> str:
    """Run `train.py` with invalid arguments; return what it prints to stderr."""
    with pytest.raises(SystemExit) as exit_info:
        train.main(args)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def rows_of(run, stage="update"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture(scope="module")
def completed_run(tiny, files, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train.main(arguments(tiny, files, run, private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"]))
    return run


@pytest.mark.slow
def test_run_spends_epsilon_and_logs_no_private_metrics(completed_run):
    updates = rows_of(completed_run)
    assert len(updates) == 6
    spent = [row["epsilon"] for row in updates]
    assert spent == sorted(set(spent)) and 2.9 < spent[-1] <= 3
    # No metric may reveal the size of a sampled batch.
    public_metrics = {"stage", "step", "grad_norm", "param_norm", "epsilon", "learning_rate", "seconds", "compiled"}
    assert all(set(row) == public_metrics for row in updates)
    assert json.loads((completed_run / "summary.json").read_text())["tokens_per_second"] is None
    account = json.loads((completed_run / "privacy.json").read_text())
    assert account["dataset_size"] == 24 and account["expected_batch"] == 4 and account["unit"] == "pair"
    assert account["epsilon"] == spent[-1] and not account["insecure"] and not account["shown"]


@pytest.mark.slow
def test_publishable_files_omit_the_data_digest(completed_run):
    """The digest would allow a membership test by someone who has all rows but one."""
    digest = json.loads((completed_run / "config.json").read_text())["data_digest"]
    publishable = [completed_run / "metrics.jsonl", completed_run / "privacy.json"]
    publishable += [file for name in ("export", "checkpoints", "samples") for file in (completed_run / name).rglob("*")]
    assert sum(file.is_file() for file in publishable) > 10
    assert not any(digest.encode() in file.read_bytes() for file in publishable if file.is_file())


@pytest.mark.slow
def test_secret_is_stored_in_one_file_only(completed_run):
    path = completed_run / "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    root = path.read_bytes()
    for file in completed_run.rglob("*"):
        if file.is_file() and file != path:
            content = file.read_bytes()
            assert root not in content and root.hex().encode() not in content, file


@pytest.mark.slow
def test_checkpoints_record_epsilon_spent(completed_run):
    metadata = Checkpoints(completed_run / "checkpoints", read_only=True).metadata(6)
    fingerprint = json.loads((completed_run / "privacy.json").read_text())["secret"]
    assert metadata["epsilon"] == rows_of(completed_run)[-1]["epsilon"]
    assert metadata["privacy"]["secret"] == fingerprint
    assert metadata["privacy"]["noise_multiplier"] > 0


@pytest.mark.slow
def test_resume_is_bitwise(tiny, files, tmp_path, monkeypatch):
    """A resumed run repeats samples and noise, so no step is released twice with different noise."""
    deterministic = ["--privacy.insecure-deterministic", "--seed", "3"]
    train.main(arguments(tiny, files, tmp_path / "uninterrupted", *deterministic))
    original = MetricsLog.write

    def interrupt(log, stage, step, **values):
        if stage == "update" and step == 4:
            raise KeyboardInterrupt
        original(log, stage, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupt)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "resumed", *deterministic))
    train.main(arguments(tiny, files, tmp_path / "resumed", *deterministic, "--resume"))
    chex.assert_trees_all_equal(
        *(load_file(tmp_path / name / "export" / "model.safetensors") for name in ("uninterrupted", "resumed"))
    )


@pytest.mark.slow
def test_runs_with_equal_options_differ(tiny, files, completed_run, tmp_path):
    """Each run has its own secret, hence its own samples and noise."""
    train.main(
        arguments(tiny, files, tmp_path / "again", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    )
    first, second = (load_file(run / "export" / "model.safetensors") for run in (completed_run, tmp_path / "again"))
    assert all(np.any(leaf != second[name]) for name, leaf in first.items())


def test_resume_after_interruption_between_secret_and_account(tiny, files, tmp_path, monkeypatch):
    def interrupt(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_run, "write_json", interrupt)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run"))
    assert (tmp_path / "run" / "secret.key").exists() and not (tmp_path / "run" / "privacy.json").exists()
    train.main(arguments(tiny, files, tmp_path / "run", "--resume"))
    assert len(rows_of(tmp_path / "run")) == 6


def test_users_as_units_and_logged_private_metrics(tiny, files, tmp_path):
    train.main(
        arguments(
            tiny, files, tmp_path / "run", "--privacy.unit", "user", "--batch-size", "2", "--privacy.log-private",
        )
    )  # fmt: skip
    account = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert account["dataset_size"] == 5 and account["unit"] == "user"
    norms = [row["private/norm"] for row in rows_of(tmp_path / "run")]
    assert any(np.isfinite(norms)) and all(norm > 0 for norm in norms if np.isfinite(norm))
    assert "private/loss" in rows_of(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seed", "1"], "anyone who knows the seed can subtract the noise"),
        (["--batch-size", "25"], "a batch of 25 is larger than the data of 24 units"),
        (["--loss.name", "aot"], "the loss aot couples the examples of a batch"),
        (
            ["--loss.use-weighting", "--privacy.method", "ghost"],
            "the loss dpo needs heads or token statistics beyond logp and lse",
        ),
        (
            ["--loss.use-weighting", "--privacy.groupwise"],
            "the loss dpo needs heads or token statistics beyond logp and lse",
        ),
    ],
)
def test_unsupported_options_are_rejected(extra, message, tiny, files, tmp_path, capsys):
    assert message in error_message(arguments(tiny, files, tmp_path / "run", *extra), capsys)
    assert not (tmp_path / "run").exists()


def test_labels_from_group_means_are_rejected(tiny, files, tmp_path, capsys):
    rows = [{"prompt": "p", "completion": text, "reward": len(text)} for text in ("a", "bb", "ccc")]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = arguments(tiny, files, tmp_path / "run", "--loss.name", "apo_zero_unpaired")
    args = ["kto", *args[1:3], "--data", str(tmp_path / "scored.jsonl"), *args[5:]]
    assert "belong to other units" in error_message(args, capsys)
    args[args.index("--batch-size") + 1] = "2"
    train.main([*args, "--threshold", "1.5"])
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["dataset_size"] == 3


def test_evaluation_requires_public_data(tiny, files, tmp_path, capsys):
    args = ["dpo", "--model", tiny, "--data", str(files / "data.jsonl"), "--output-dir", str(tmp_path / "run")]
    assert "set --evaluation.data to public prompts" in error_message([*args, *OPTIONS, *PRIVATE], capsys)


def test_invalid_options_are_rejected(tiny, files, tmp_path, capsys):
    for private, message in (
        (["--privacy.epsilon", "3"], "needs a delta"),
        (["--privacy.epsilon", "3", "--privacy.delta", "2"], "delta must lie in (0, 1)"),
        (["--privacy.epsilon", "-3", "--privacy.delta", "1e-3"], "epsilon must be positive"),
        ([*PRIVATE, "--privacy.epsilon", "1"], "mutually exclusive"),
        ([*PRIVATE, "--privacy.groupwise", "--privacy.method", "ghost"], "requires the method group"),
    ):
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run", private=private))
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_resume_without_secret_or_with_other_data_is_rejected(tiny, files, completed_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(completed_run, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints")
    os.remove(run / "secret.key")
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    assert "the secret of this private run, cannot be read" in error_message(resume, capsys)
    assert (run / "privacy.json").exists()
    shutil.copy(completed_run / "secret.key", run / "secret.key")
    account = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps(account | {"dataset_size": 23}))
    assert "has dataset_size 23" in error_message(resume, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["metrics.jsonl", "checkpoints", None])
def test_resume_without_account_is_rejected(missing, tiny, files, completed_run, tmp_path, capsys):
    """Checkpoints or metrics show that steps were released; a new secret would release them with different noise."""
    run = tmp_path / "copy"
    shutil.copytree(completed_run, run)
    os.remove(run / "privacy.json")
    os.remove(run / "summary.json")
    shutil.rmtree(run / "export")
    if missing:
        shutil.rmtree(run / missing) if (run / missing).is_dir() else os.remove(run / missing)
    secret = (run / "secret.key").read_bytes()
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    assert "the privacy account of this run, is missing" in error_message(resume, capsys)
    assert (run / "secret.key").read_bytes() == secret


@pytest.mark.slow
def test_checkpoint_of_another_secret_is_rejected(tiny, files, completed_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(completed_run, run)
    os.remove(run / "summary.json")
    shutil.rmtree(run / "export")
    fingerprint = json.loads((run / "privacy.json").read_text())["secret"]
    for path in (run / "checkpoints").rglob("_CHECKPOINT_METADATA"):
        path.write_text(path.read_text().replace(fingerprint, "0" * 16))
    resume = arguments(tiny, files, run, "--resume", private=["--privacy.epsilon", "3", "--privacy.delta", "1e-2"])
    message = error_message(resume, capsys)
    assert f"has secret '{'0' * 16}'" in message


def test_account_records_options_that_void_epsilon(tiny, files, tmp_path):
    train.main(arguments(tiny, files, tmp_path / "run", "--privacy.insecure-deterministic", "--privacy.log-private"))
    account = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert account["insecure"] and account["shown"]


@pytest.mark.slow
def test_large_delta_gives_a_warning(tiny, files, tmp_path, capsys):
    train.main(
        arguments(tiny, files, tmp_path / "run", private=["--privacy.noise-multiplier", "2", "--privacy.delta", "0.1"])
    )
    assert "warning: delta 0.1 is not below 1 / 24" in capsys.readouterr().err
