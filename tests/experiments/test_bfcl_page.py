"""Ranking on the bfcl page, disjoint question splits, and token counts per epoch."""

import json

import numpy as np
import pytest

from experiments import bfcl_page
from experiments.bfcl import ARMS, SCALES, Seed, tokens_per_epoch
from shiq_jax.replay import Buffer, Record
from shiq_jax.training.batches import Batches

QUESTIONS = 200


@pytest.fixture
def results(tmp_path):
    """write(accuracy by policy): results of three seeds with these accuracies."""

    def write(accuracy: dict[str, float]) -> bfcl_page.Results:
        rng = np.random.default_rng(0)
        for seed in range(3):
            draws = rng.random((QUESTIONS, 2))
            arms = {
                name: {
                    "questions": [f"q{number}" for number in range(QUESTIONS)],
                    "sampled": (draws < accuracy[name]).astype(float).tolist(),
                    "greedy": (draws[:, 0] < accuracy[name]).astype(float).tolist(),
                    "logratio": np.full((QUESTIONS, 2), 0.0 if name == "reference" else 0.7).tolist(),
                    "length": np.full((QUESTIONS, 2), 20.0).tolist(),
                    "seconds": 60,
                }
                for name in ARMS
            }
            job = {
                "updates": 3, "epochs": 1.0, "batch_size": 2, "loss": {"beta": 0.1}, "learning_rate": 1e-5,
                "tokens": 1000, "seconds": 60, "losses": [1.0, 0.5, 0.2],
            }  # fmt: skip
            content = {
                "seed": seed,
                "settings": {
                    "categories": ["simple_python"], "demonstrations": 1, "prompts": 2, "samples": 8, "measured": 2,
                },
                "date": "2000-01-01",
                "machine": {"cpu_cores": 2, "device": "cpu", "jax": "0"},
                "buffer": {"records": 16, "accuracy": 0.5, "with_a_right_answer": 2, "with_both": 1},
                "arms": arms,
                "jobs": {name: job for name in ("warm_start", *ARMS[1:])},
            }  # fmt: skip
            (tmp_path / "bfcl").mkdir(exist_ok=True)
            (tmp_path / "bfcl" / f"small-{seed}.json").write_text(json.dumps(content))
        return bfcl_page.load(tmp_path, "small")

    return write


@pytest.mark.slow
def test_ranking_of_a_clear_winner(results, tmp_path):
    loaded = results({"reference": 0.3, "more_sft": 0.31, "best_of_k": 0.31, "dpo": 0.31, "shiq": 0.6})
    for name in ("sampled", "greedy"):
        best, significant, tied = bfcl_page.ranking(loaded, name)
        assert best == "shiq" and set(significant) == set(ARMS) - {"shiq"} and not tied
        assert loaded.difference("shiq", "dpo", name).low > 0
    bfcl_page.write(tmp_path, "small")
    assert (tmp_path / "bfcl.md").exists() and (tmp_path / "bfcl.png").stat().st_size > 10_000


def test_ranking_reports_ties_and_losses(results):
    loaded = results({"reference": 0.5, "more_sft": 0.5, "best_of_k": 0.7, "dpo": 0.7, "shiq": 0.2})
    best, significant, tied = bfcl_page.ranking(loaded, "sampled")
    assert best == "best_of_k" and tied == ["dpo"] and "shiq" in significant
    assert loaded.difference("shiq", "reference", "sampled").high < 0


def test_equal_policies_beat_no_other(results):
    loaded = results(dict.fromkeys(ARMS, 0.4))
    for name in ("sampled", "greedy"):
        assert bfcl_page.ranking(loaded, name)[1] == []


@pytest.mark.slow
def test_question_splits_are_disjoint(tmp_path):
    held_out = set()
    for seed in (0, 1):
        root = tmp_path / str(seed)
        Seed(SCALES["small"], seed, root, root / "results.json").write_questions()
        parts = {
            name: [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
            for name in ("held_out", "demonstrations", "prompts")
        }
        assert [len(parts[name]) for name in parts] == [200, 60, 96]
        identifiers = [row["id"] for rows in parts.values() for row in rows]
        assert len(set(identifiers)) == len(identifiers)
        functions = {
            name: {function["name"] for row in rows for function in row["functions"]} for name, rows in parts.items()
        }
        assert not functions["held_out"] & (functions["demonstrations"] | functions["prompts"])
        held_out.add(tuple(row["id"] for row in parts["held_out"]))
    assert len(held_out) == 1


def test_tokens_per_epoch_match_the_batches(tmp_path):
    rng = np.random.default_rng(5)
    buffer = Buffer.create(tmp_path / "buffer")
    for group in range(6):
        prompt = rng.integers(0, 3, 4 + group).tolist()
        answers = [rng.integers(0, 2, rng.integers(1, 6)).tolist() for _ in range(5)]
        buffer.append(
            Record(
                tokens=np.asarray(prompt + answer, np.int32),
                action_mask=np.arange(len(prompt + answer)) >= len(prompt),
                rewards=np.append(np.zeros(len(answer) - 1, np.float32), np.float32(number % 3)),
                group=str(group),
            )
            for number, answer in enumerate(answers)
        )
    for unit in ("trajectory", "pair"):
        batches = Batches(buffer, unit, 2, seed=0)
        assert tokens_per_epoch(tmp_path / "buffer", unit) == sum(batches(step).tokens for step in range(3))
