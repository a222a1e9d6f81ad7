"""Work that is done once: validating a record, building a trie, reading a file for its checksum."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from shiq_jax.data import formats, import_context
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, buffer, export, storage, trees
from shiq_jax.runs.ingest import import_records
from shiq_jax.runs.labelling import label
from shiq_jax.tasks.tiny import tiny_tokenizer
from shiq_jax.training.batches import Batches

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = tiny_tokenizer()
MODEL = SimpleNamespace(config=SimpleNamespace(max_positions=2048, vocab_size=len(TOKENIZER)))


@pytest.fixture
def validated(monkeypatch):
    """How often each record was validated, by its identity in memory."""
    calls, kept = Counter(), []

    def counted(record, *args, **options):
        calls[id(record)] += 1
        kept.append(record)
        return validate(record, *args, **options)

    validate = reading.validate
    for module in (reading, buffer, export):
        monkeypatch.setattr(module, "validate", counted)
    return calls


@pytest.fixture
def checksums(monkeypatch):
    """How often each file was read for its checksum."""
    calls, checksum = Counter(), storage.checksum
    monkeypatch.setattr(storage, "checksum", lambda path: calls.update([path]) or checksum(path))
    return calls


@pytest.mark.parametrize("read", [formats.trajectories, formats.preferences])
def test_a_record_is_validated_once_where_it_enters(read, validated, tmp_path):
    made = import_records(
        tmp_path / "made", lambda reading: read(DATA / "ultrafeedback.jsonl", TOKENIZER, reading), MODEL
    )
    # Of a prompt's answers two make a pair; all were validated before the best and the worst were chosen.
    assert set(validated.values()) == {1} and len(validated) == 19 >= len(made)


def test_records_of_tokens_are_validated_once(validated, tmp_path):
    rows = ({"tokens": [1, 5, number], "action_mask": [0, 1, 1], "rewards": [0, 0, 1]} for number in range(4))
    file = tmp_path / "tokens.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_records(tmp_path / "made", lambda reading: formats.trajectories(file, TOKENIZER, reading), MODEL)
    assert list(validated.values()) == [1] * 4


def test_records_from_elsewhere_are_validated_by_the_buffer_that_takes_them(validated, tmp_path):
    made = import_records(
        tmp_path / "made", lambda reading: formats.trajectories(DATA / "ultrafeedback.jsonl", TOKENIZER, reading), MODEL
    )
    validated.clear()
    records = made.read(range(len(made)))
    Buffer.create(tmp_path / "copy").append(records)
    assert list(validated.values()) == [1] * len(records)


def test_a_trie_is_built_once_over_all_passes(monkeypatch, tmp_path):
    made = import_records(
        tmp_path / "made", lambda reading: formats.trajectories(DATA / "ultrafeedback.jsonl", TOKENIZER, reading), MODEL
    )
    built, build = [], trees.build_trie
    monkeypatch.setattr(trees, "build_trie", lambda sequences: built.append(sequences) or build(sequences))
    batches = Batches(made, "trajectory", 2, seed=0, row_length=128)
    for step in range(batches.steps(3)):
        batches(step)
    assert len(built) == len(batches.pack_groups)


def test_a_file_is_read_for_its_checksum_when_it_is_opened_again_and_never_before(checksums, tmp_path):
    def fill():
        answers = import_records(
            tmp_path / "answers",
            lambda reading: formats.trajectories(DATA / "ultrafeedback.jsonl", TOKENIZER, reading),
            MODEL,
        )
        return answers, label(tmp_path / "labelled", answers, OBJECTIVES["kto"], None, 2048)

    fill()
    assert not checksums
    files = {file for found in fill() for file in found.record_files()}
    assert set(checksums) == files and set(checksums.values()) == {1}
