"""`train.py kto` and the evaluation of what it reads, as a user runs them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as evaluation_door
import train as training_door
from shiq_jax.replay import Buffer
from shiq_jax.training import reference
from shiq_jax.training.callbacks import CheckFinite

DATA = [
    "--mesh", "fsdp=1", "--evaluation.prompts", "2", "--evaluation.max-tokens", "4", "--batch-size", "2",
    "--precision.remat", "none", "--optimizer.learning-rate", "1e-3",
]  # fmt: skip
TOY = [
    "--mesh", "fsdp=1", "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16",
    "--collection.prompts", "8", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "4",
    "--collection.sampling.max-tokens", "6", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "6", "--evaluation.times", "1", "--batch-size", "4", "--epochs", "1",
]  # fmt: skip
ROWS = [
    {"prompt": f"say {letter}", "completion": said, "label": good}
    for letter, said, good in (("a", "A", True), ("b", "B", True), ("b", "x", False), ("c", "C", 1), ("d", "y", 0))
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments_of(tiny, data, out, *more):
    return ["kto", "--model", tiny, "--data", data, "--output-dir", str(out), *DATA, *more]


def refusal(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        training_door.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("kto")
    training_door.main(arguments_of(tiny, jsonl(root / "data.jsonl", ROWS), root / "run"))
    return root


def updates(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "update"]


def test_labelled_rows_are_enough(finished, tiny):
    answers, pairs = (Buffer.open(finished / "run" / name) for name in ("buffer", "labelled"))
    labels = [True, True, False, True, False]
    assert answers.column("label") == labels and answers.returns().tolist() == labels and not answers.identities()
    assert (
        len(pairs) == 10
        and pairs.column("label") == [each for label in labels for each in (label, None)]
        and len(pairs.identities()) == 1
    )
    for number in range(5):
        answer, other = pairs[2 * number], pairs[2 * number + 1]
        assert answer.tokens.tolist() == answers[number].tokens.tolist()
        prompt = int(np.argmax(answer.action_mask))
        assert other.tokens[:prompt].tolist() == answer.tokens[:prompt].tolist()
        theirs = [a.tokens[a.action_mask].tolist() for a in answers.read(range(5)) if a.group != answers[number].group]
        assert other.tokens[other.action_mask].tolist() in theirs
    done = updates(finished / "run")
    assert [row["weight"] for row in done] == [2, 2, 2]
    assert {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "desirable"} < set(done[0])
    # Policy and reference agree at first.
    assert done[0]["loss"] == pytest.approx(0.5, abs=1e-6) and done[-1]["loss"] != pytest.approx(0.5, abs=1e-6)
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["records"] == 5 and np.isfinite(summary["kl"])
    before, after = (load_file(f"{place}/model.safetensors") for place in (tiny, finished / "run" / "export"))
    assert any(np.any(before[name] != after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["labels", "update"])
def test_an_interrupted_run_resumes_bit_for_bit(stage, finished, tiny, tmp_path, monkeypatch):
    arguments = arguments_of(tiny, str(finished / "data.jsonl"), tmp_path / "run", "--save-every", "1")

    def die(*args):
        if stage == "labels" or args[1].step == 2:
            raise KeyboardInterrupt
        return check(*args)

    check = CheckFinite.on_update
    with monkeypatch.context() as patch:
        place = (reference, "annotate") if stage == "labels" else (CheckFinite, "on_update")
        patch.setattr(*place, lambda *a, **_: die(*a))
        with pytest.raises(SystemExit) as stop:
            training_door.main(arguments)
    assert stop.value.code == 130
    training_door.main([*arguments, "--resume"])
    for name in ("export/model.safetensors", "labelled/manifest.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


def test_an_evaluation_couples_all_rows(finished, tmp_path):
    out = tmp_path / "eval"
    evaluation_door.main([
        "--model", str(finished / "run"), "--data", str(finished / "data.jsonl"), "--max-tokens", "4",
        "--output-dir", str(out), "--mesh", "fsdp=1",
    ])  # fmt: skip
    found = json.loads((out / "evaluation.json").read_text())
    assert found["objective"] == "kto" and found["objective_metrics"]["desirable"] == pytest.approx(3 / 5)
    assert 0 < found["objective_metrics"]["loss"] < 1 and found["objective_metrics"]["kl"] >= 0


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_own_samples_are_labelled_by_the_mean_of_their_prompt(loss, tiny, tmp_path, monkeypatch, capsys):
    from shiq_jax.runs import sources

    run, kept = tmp_path / "run", sources.rewards.resolve
    # A model of three updates answers nothing right, but unlike.
    letters = lambda row, completion: float(sum(map(ord, completion)) % 5)  # noqa: E731
    monkeypatch.setattr(sources.rewards, "resolve", lambda name: letters if name == "sorting" else kept(name))
    options = ["--loss.name", loss, "--loss.undesirable-weight", "0.5", "--model", tiny, "--output-dir", str(run)]
    training_door.main(["kto", *TOY, *options])
    answers, examples = Buffer.open(run / "buffer"), Buffer.open(run / "labelled")
    returns = answers.returns().reshape(8, 4)
    wanted = np.sign(np.round(returns - returns.mean(1, keepdims=True), 6)).ravel()
    step = 2 if loss == "kto" else 1
    assert examples.column("label")[::step] == (wanted[wanted != 0] > 0).tolist()
    said = capsys.readouterr().err
    assert f"{np.sum(wanted > 0)} answers are desirable, {np.sum(wanted < 0)} undesirable" in said
    assert f"skipped {np.sum(wanted == 0)} ties" in said or np.all(wanted)
    assert {"kl" if loss == "kto" else "rewards/signed", "desirable"} < set(updates(run)[0])


def test_a_buffer_keeps_its_labels(finished, tiny, tmp_path, capsys):
    data = str(finished / "run" / "buffer")
    assert "has labels" in refusal(arguments_of(tiny, data, tmp_path / "run", "--threshold", "0.5"), capsys)
    training_door.main(arguments_of(tiny, data, tmp_path / "run"))
    ours, theirs = Buffer.open(tmp_path / "run" / "labelled"), Buffer.open(finished / "run" / "labelled")
    assert ours.read(range(10)) == theirs.read(range(10))


MISTAKES = {
    "one prompt": ([row | {"prompt": "say"} for row in ROWS], [], "have one prompt: give more prompts"),
    "no labels": ([ROWS[0], {"prompt": "a", "completion": "b"}], [], "line 2: field 'label' is missing"),
    "ties": ([{"prompt": p, "completion": "b", "reward": 1} for p in "ab"], [], "no answer is better or worse"),
    "a threshold for labels": (ROWS, ["--threshold", "1"], "has labels: omit --threshold"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(name, tiny, tmp_path, capsys):
    rows, options, said = MISTAKES[name]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    assert said in refusal(arguments_of(tiny, data, out, *options), capsys) and not out.exists()


def test_one_prompt_suffices_where_nothing_is_coupled(tiny, tmp_path):
    data, out = jsonl(tmp_path / "data.jsonl", MISTAKES["one prompt"][0]), tmp_path / "run"
    training_door.main(arguments_of(tiny, data, out, "--loss.name", "apo_zero_unpaired"))
    assert len(Buffer.open(out / "labelled")) == 5 and updates(out)[-1]["rewards/signed"] != 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss.desirable-weight", "-1"], "desirable_weight is -1.0 but must be finite and not negative"),
        (["--threshold", "nan"], "threshold must be finite"),
        (["--loss.name", "dpo"], "--loss.name"),
    ],
)
def test_options_out_of_range_are_refused(options, said, capsys):
    error = refusal(["kto", *options], capsys)
    assert said in " ".join(error.replace("│", " ").split())
