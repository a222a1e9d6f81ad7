"""A private run with public data: a phase before its own, or a part of every update, and what is measured on them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from shiq_jax.privacy import adam_state
from shiq_jax.privacy.public_to_private import MIXING
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


def sentences(first, count):
    return [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(first, first + count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    for name, rows in (("private", sentences(0, 24)), ("public", sentences(50, 11)), ("questions", sentences(90, 2))):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(tiny, files, out, *more):
    data = ["--data", str(files / "private.jsonl"), "--public.data", str(files / "public.jsonl")]
    evaluation = ["--evaluation.data", str(files / "questions.jsonl")]
    return ["sft", "--model", tiny, *data, *evaluation, "--output-dir", str(out), *OPTIONS, *more]


def rows_of(run, stage):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def steps_of(run, stage):
    return [row["step"] for row in rows_of(run, stage)]


SWITCH = ["--public.share", "0.25"]


@pytest.fixture(scope="module")
def finished(tiny, files, tmp_path_factory):
    """Six private updates, which are three quarters of all."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train.main(arguments(tiny, files, run, *SWITCH))
    return run


@pytest.mark.slow
def test_public_updates_come_first_and_cost_nothing(finished):
    assert steps_of(finished, "public") == [1, 2] and steps_of(finished, "update") == [3, 4, 5, 6, 7, 8]
    about = json.loads((finished / "privacy.json").read_text())
    assert about["steps"] == 6 and about["dataset_size"] == 24
    spent = [row["epsilon"] for row in rows_of(finished, "update")]
    assert spent == sorted(spent) and spent[-1] == about["epsilon"]
    # What is public may be looked at, and nothing else.
    assert all(np.isfinite(row["loss"]) for row in rows_of(finished, "public"))
    assert not any("loss" in row for row in rows_of(finished, "update"))


def test_it_is_measured_what_noise_costs_at_every_evaluation(finished):
    measured = rows_of(finished, "improvement")
    # At the beginning, at the switch, in the middle and at the end.
    assert [row["step"] for row in measured] == steps_of(finished, "evaluation") == [0, 2, 4, 8]
    for row in measured:
        assert row["gradient"] > 0 and row["slowdown"] >= 1 and 0 < row["clipped"]
        assert row["private"] <= row["plain"]
    assert (finished / "improvement.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_name_what_it_leaves(finished):
    page = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
    general, added = page.split("A [private run]")
    named = re.findall(r"^\| `(.*?)/?` \|", added.split("\n\n")[1], re.MULTILINE)
    unnamed = [path.name for path in finished.iterdir() if f"`{path.name}" not in general]
    # The secret of a test is made of its seed.
    assert sorted([*unnamed, "secret.key"]) == sorted(named)


def test_it_can_be_looked_at(finished, tmp_path):
    said = inspect(finished)
    spent = rows_of(finished, "update")[-1]["epsilon"]
    assert "stage       complete" in said and f"update      8: epsilon {spent:.4g}" in said
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(finished, "public")))
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    said = inspect(tmp_path)
    assert "stage       training on public data" in said and "update      2: loss" in said


@pytest.mark.slow
@pytest.mark.parametrize("at", [2])
def test_a_run_that_stops_in_either_phase_goes_on(at, tiny, files, finished, tmp_path, monkeypatch):
    save = Checkpoints.save

    def stop_after(self, state, metadata, metrics=None):
        save(self, state, metadata, metrics)
        if int(state.step) == at:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop_after)
        with pytest.raises(SystemExit):
            train.main(arguments(tiny, files, tmp_path / "run", *SWITCH))
    kept = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert kept.latest() == at and (kept.metadata(at)["epsilon"] == 0) == (at <= 2)
    train.main(arguments(tiny, files, tmp_path / "run", *SWITCH, "--resume"))
    for stage in ("public", "update", "evaluation", "improvement"):
        assert steps_of(tmp_path / "run", stage) == steps_of(finished, stage)
    first, second = (load_file(run / "export" / "model.safetensors") for run in (finished, tmp_path / "run"))
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name])


@pytest.mark.slow
def test_the_private_phase_begins_without_momentum(tiny, files, tmp_path, monkeypatch):
    seen = []
    make = private_run.make_update

    def spy(*given, **named):
        update = make(*given, **named)

        def looked(state, batch, *more, **others):
            seen.append(jax.device_get((adam_state(state.opt_state), state.step)))
            return update(state, batch, *more, **others)

        return looked

    monkeypatch.setattr(private_run, "make_update", spy)
    train.main(arguments(tiny, files, tmp_path / "run", *SWITCH))
    memory, step = seen[0]
    assert step == 2 and memory.count == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(memory.mu))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(memory.nu))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(seen[1][0].mu))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "public"),
    [
        # No loss falls by a thousand nats, nor is a step slowed a million times after the first evaluation.
        (["--public.stall", "1000", "--public.window", "2"], 4),
        (["--public.slowdown", "1e9", "--public.window", "3"], 3),
        (["--public.slowdown", "1.0000001", "--public.window", "1"], 6),
    ],
)
def test_public_numbers_end_the_public_phase(more, public, tiny, files, tmp_path):
    given = ["--public.share", "0.5", "--optimizer.learning-rate", "1e-2", "--optimizer.warmup", "0"]
    train.main(arguments(tiny, files, tmp_path / "run", *given, *more))
    assert steps_of(tmp_path / "run", "public") == list(range(1, public + 1))
    assert steps_of(tmp_path / "run", "update") == list(range(public + 1, public + 7))
    shown = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).metadata(public + 6)
    assert shown["began"] == public


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sample", "cosine"])
def test_a_public_gradient_in_every_update(rule, tiny, files, tmp_path, monkeypatch):
    seen = []
    make = private_run.make_update

    def spy(*given, **named):
        update = make(*given, **named)

        def looked(state, batch, *more, public, public_weight):
            seen.append((float(public_weight), int(np.sum(public.real))))
            return update(state, batch, *more, public=public, public_weight=public_weight)

        return looked

    monkeypatch.setattr(private_run, "make_update", spy)
    train.main(arguments(tiny, files, tmp_path / "run", "--public.rule", rule, "--public.share", "0.25"))
    assert steps_of(tmp_path / "run", "update") == [1, 2, 3, 4, 5, 6] and not steps_of(tmp_path / "run", "public")
    weights, units = zip(*seen)
    np.testing.assert_allclose(weights, [MIXING[rule](step, 6, 0.25) for step in range(6)])
    assert set(units) == {4}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (dict(share=1.0), "must lie in"),
        (dict(window=0), "window must be at least 1"),
        (dict(slowdown=1.0), "a factor above 1"),
        (dict(rule="cosine", stall=0.1), "apply to the rule switch"),
        (dict(slowdown=2.0, probes=0), "estimated with probes"),
    ],
)
def test_options_that_make_no_sense(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        Public(data="somewhere", **given)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--public.share", "0.2"], "without public.data"),
        (["--public.data", "FILE"], "set privacy.epsilon"),
        (["--public.data", "FILE", "--privacy.epsilon", "1", "--privacy.delta", "0.01", "--optimizer.name", "sgd"],
         "requires the optimizer adamw"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(more, complaint, tiny, files, tmp_path, capsys):
    given = [str(files / "public.jsonl") if each == "FILE" else each for each in more]
    data = ["--data", str(files / "private.jsonl"), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main(["sft", "--model", tiny, *data, *given])
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
