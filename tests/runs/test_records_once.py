"""Records are validated once, tries are built once, and checksums are computed only when a buffer is reopened."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from shiq_jax.data import formats, import_context
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, buffer, export, storage, trees
from shiq_jax.runs.ingest import import_records
from shiq_jax.runs.labeling import label
from shiq_jax.tasks.tiny import tiny_tokenizer
from shiq_jax.training.batches import Batches

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = tiny_tokenizer()
MODEL = SimpleNamespace(config=SimpleNamespace(max_positions=2048, vocab_size=len(TOKENIZER)))


def import_ultrafeedback(path, read=formats.trajectories):
    return import_records(path, lambda context: read(DATA / "ultrafeedback.jsonl", TOKENIZER, context), MODEL)


@pytest.fixture
def validated(monkeypatch):
    """Number of validations of each record, by `id`."""
    calls, alive = Counter(), []

    def counting(record, *args, **kwargs):
        calls[id(record)] += 1
        # An id is unique only while its object is alive.
        alive.append(record)
        return validate(record, *args, **kwargs)

    validate = import_context.validate
    for module in (import_context, buffer, export):
        monkeypatch.setattr(module, "validate", counting)
    return calls


@pytest.fixture
def checksums(monkeypatch):
    """Number of checksum computations of each file."""
    calls, checksum = Counter(), storage.checksum
    monkeypatch.setattr(storage, "checksum", lambda path: calls.update([path]) or checksum(path))
    return calls


@pytest.mark.parametrize("read", [formats.trajectories, formats.preferences])
def test_each_record_is_validated_once_on_import(read, validated, tmp_path):
    imported = import_ultrafeedback(tmp_path / "imported", read)
    # Preferences keep two answers per prompt, but validate all.
    assert set(validated.values()) == {1} and len(validated) == 19 >= len(imported)


def test_tokenized_records_are_validated_once(validated, tmp_path):
    rows = ({"tokens": [1, 5, number], "action_mask": [0, 1, 1], "rewards": [0, 0, 1]} for number in range(4))
    file = tmp_path / "tokens.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_records(tmp_path / "imported", lambda context: formats.trajectories(file, TOKENIZER, context), MODEL)
    assert list(validated.values()) == [1] * 4


def test_append_validates_other_records_once(validated, tmp_path):
    imported = import_ultrafeedback(tmp_path / "imported")
    validated.clear()
    records = imported.read(range(len(imported)))
    Buffer.create(tmp_path / "copy").append(records)
    assert list(validated.values()) == [1] * len(records)


def test_tries_are_built_once_over_all_epochs(monkeypatch, tmp_path):
    imported = import_ultrafeedback(tmp_path / "imported")
    built, build = [], trees.build_trie
    monkeypatch.setattr(trees, "build_trie", lambda sequences: built.append(sequences) or build(sequences))
    batches = Batches(imported, "trajectory", 2, seed=0, row_length=128)
    for step in range(batches.steps(3)):
        batches(step)
    assert len(built) == len(batches.pack_groups)


def test_checksums_are_verified_once_on_reopening(checksums, tmp_path):
    def create_or_open():
        answers = import_ultrafeedback(tmp_path / "answers")
        return answers, label(tmp_path / "labelled", answers, OBJECTIVES["kto"], None, 2048)

    create_or_open()
    assert not checksums
    files = {file for opened in create_or_open() for file in opened.record_files()}
    assert set(checksums) == files and set(checksums.values()) == {1}
