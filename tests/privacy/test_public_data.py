"""Private runs with public data: a public phase or mixed updates, and the loss-improvement metrics."""

import json
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from shiq_jax.privacy import adam_state
from shiq_jax.privacy.public_to_private import MIXING_RULES
from shiq_jax.runs import private_run
from shiq_jax.runs.inspection import inspect
from shiq_jax.runs.public_options import Public
from shiq_jax.training.checkpoints import Checkpoints

OPTIONS = [
    "--mesh", "fsdp=1", "--batch-size", "4", "--epochs", "1", "--precision.remat", "none", "--optimizer.learning-rate",
    "1e-3", "--evaluation.max-tokens", "4", "--evaluation.prompts", "2", "--evaluation.times", "2", "--save-every", "1",
    "--evaluation.samples-per-prompt", "1", "--privacy.noise-multiplier", "2", "--privacy.delta", "1e-2",
    "--privacy.insecure-deterministic", "--public.probes", "2",
]  # fmt: skip


def make_rows(first, count):
    return [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(first, first + count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    for name, rows in (("private", make_rows(0, 24)), ("public", make_rows(50, 11)), ("questions", make_rows(90, 2))):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(tiny, files, out, *extra):
    data = ["--data", str(files / "private.jsonl"), "--public.data", str(files / "public.jsonl")]
    evaluation = ["--evaluation.data", str(files / "questions.jsonl")]
    return ["sft", "--model", tiny, *data, *evaluation, "--output-dir", str(out), *OPTIONS, *extra]


def rows_of(run, stage):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def steps_of(run, stage):
    return [row["step"] for row in rows_of(run, stage)]


SWITCH = ["--public.share", "0.25"]


@pytest.fixture(scope="module")
def completed_run(tiny, files, tmp_path_factory):
    """A run of two public and six private updates."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train.main(arguments(tiny, files, run, *SWITCH))
    return run


@pytest.mark.slow
def test_public_updates_come_first_and_spend_no_epsilon(completed_run):
    assert steps_of(completed_run, "public") == [1, 2] and steps_of(completed_run, "update") == [3, 4, 5, 6, 7, 8]
    account = json.loads((completed_run / "privacy.json").read_text())
    assert account["steps"] == 6 and account["dataset_size"] == 24
    spent = [row["epsilon"] for row in rows_of(completed_run, "update")]
    assert spent == sorted(spent) and spent[-1] == account["epsilon"]
    # Losses are logged for public rows only.
    assert all(np.isfinite(row["loss"]) for row in rows_of(completed_run, "public"))
    assert not any("loss" in row for row in rows_of(completed_run, "update"))


@pytest.mark.slow
def test_improvement_is_logged_at_every_evaluation(completed_run):
    improvements = rows_of(completed_run, "improvement")
    # At the start, at the switch, in the middle and at the end.
    assert [row["step"] for row in improvements] == steps_of(completed_run, "evaluation") == [0, 2, 4, 8]
    for row in improvements:
        assert row["gradient"] > 0 and row["slowdown"] >= 1 and 0 < row["clipped"]
        assert row["private"] <= row["plain"]
    assert (completed_run / "improvement.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_documentation_lists_files_of_a_private_run(completed_run):
    page = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
    general, private = page.split("A [private run]")
    documented = re.findall(r"^\| `(.*?)/?` \|", private.split("\n\n")[1], re.MULTILINE)
    private_files = [path.name for path in completed_run.iterdir() if f"`{path.name}" not in general]
    # This run derives its secret from the seed and has no key file.
    assert sorted([*private_files, "secret.key"]) == sorted(documented)


@pytest.mark.slow
def test_inspect(completed_run, tmp_path):
    text = inspect(completed_run)
    spent = rows_of(completed_run, "update")[-1]["epsilon"]
    assert "stage       complete" in text and f"update      8: epsilon {spent:.4g}" in text
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(completed_run, "public")))
    (tmp_path / "config.json").write_text((completed_run / "config.json").read_text())
    text = inspect(tmp_path)
    assert "stage       training on public data" in text and "update      2: loss" in text


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2])
def test_resume_is_bitwise(stop, tiny, files, completed_run, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_interrupt(self, state, metadata, metrics=None):
        save(self, state, metadata, metrics)
        if int(state.step) == stop:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_interrupt)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run", *SWITCH))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.latest() == stop and (checkpoints.metadata(stop)["epsilon"] == 0) == (stop <= 2)
    train.main(arguments(tiny, files, tmp_path / "run", *SWITCH, "--resume"))
    for stage in ("public", "update", "evaluation", "improvement"):
        assert steps_of(tmp_path / "run", stage) == steps_of(completed_run, stage)
    chex.assert_trees_all_equal(
        *(load_file(run / "export" / "model.safetensors") for run in (completed_run, tmp_path / "run"))
    )


@pytest.mark.slow
def test_private_phase_starts_without_momentum(tiny, files, tmp_path, monkeypatch):
    states = []
    make_update = private_run.make_update

    def spy(*args, **kwargs):
        update = make_update(*args, **kwargs)

        def wrapper(state, batch, *args, **kwargs):
            states.append(jax.device_get((adam_state(state.opt_state), state.step)))
            return update(state, batch, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(private_run, "make_update", spy)
    train.main(arguments(tiny, files, tmp_path / "run", *SWITCH))
    adam, step = states[0]
    assert step == 2 and adam.count == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(adam.mu))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adam.nu))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(states[1][0].mu))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "public_steps"),
    [
        # Thresholds that are always or never met, so that the switch happens at a known step.
        (["--public.stall", "1000", "--public.window", "2"], 4),
        (["--public.slowdown", "1e9", "--public.window", "3"], 3),
        (["--public.slowdown", "1.0000001", "--public.window", "1"], 6),
    ],
)
def test_switch_criteria_end_the_public_phase(extra, public_steps, tiny, files, tmp_path):
    common = ["--public.share", "0.5", "--optimizer.learning-rate", "1e-2", "--optimizer.warmup", "0"]
    train.main(arguments(tiny, files, tmp_path / "run", *common, *extra))
    assert steps_of(tmp_path / "run", "public") == list(range(1, public_steps + 1))
    assert steps_of(tmp_path / "run", "update") == list(range(public_steps + 1, public_steps + 7))
    metadata = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).metadata(public_steps + 6)
    assert metadata["began"] == public_steps


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sample", "cosine"])
def test_mixing_rules_weight_a_public_gradient_in_every_update(rule, tiny, files, tmp_path, monkeypatch):
    calls = []
    make_update = private_run.make_update

    def spy(*args, **kwargs):
        update = make_update(*args, **kwargs)

        def wrapper(state, batch, *args, public, public_weight):
            calls.append((float(public_weight), int(np.sum(public.real))))
            return update(state, batch, *args, public=public, public_weight=public_weight)

        return wrapper

    monkeypatch.setattr(private_run, "make_update", spy)
    train.main(arguments(tiny, files, tmp_path / "run", "--public.rule", rule, "--public.share", "0.25"))
    assert steps_of(tmp_path / "run", "update") == [1, 2, 3, 4, 5, 6] and not steps_of(tmp_path / "run", "public")
    weights, units = zip(*calls)
    np.testing.assert_allclose(weights, [MIXING_RULES[rule](step, 6, 0.25) for step in range(6)])
    assert set(units) == {4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(share=1.0), "must lie in"),
        (dict(window=0), "window must be at least 1"),
        (dict(slowdown=1.0), "a factor above 1"),
        (dict(rule="cosine", stall=0.1), "apply to the rule switch"),
        (dict(slowdown=2.0, probes=0), "estimated with probes"),
    ],
)
def test_invalid_options_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        Public(data="public.jsonl", **fields)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--public.share", "0.2"], "have no effect without public.data"),
        (["--public.data", "FILE"], "set privacy.epsilon"),
        (["--public.data", "FILE", "--privacy.epsilon", "1", "--privacy.delta", "0.01", "--optimizer.name", "sgd"],
         "requires the optimizer adamw"),
    ],
)  # fmt: skip
def test_incompatible_options_are_rejected(extra, message, tiny, files, tmp_path, capsys):
    extra = [str(files / "public.jsonl") if argument == "FILE" else argument for argument in extra]
    data = ["--data", str(files / "private.jsonl"), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main(["sft", "--model", tiny, *data, *extra])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
