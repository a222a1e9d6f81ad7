"""Somebody's data become a buffer: whole or not at all, in little memory, and with a word for what was left out."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shiq_jax.data.formats import preferences, trajectories
from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, storage
from shiq_jax.runs.ingest import import_records
from shiq_jax.runs.sources import prompts_from_buffer
from shiq_jax.tasks.tiny import tiny_tokenizer
from shiq_jax.training.baseline import GroupMeanBaseline

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = tiny_tokenizer()


def model(context: int = 2048, vocabulary: int = len(TOKENIZER)):
    return SimpleNamespace(config=SimpleNamespace(max_positions=context, vocab_size=vocabulary))


def reader(name: str, read=trajectories):
    return lambda reading: read(DATA / f"{name}.jsonl", TOKENIZER, reading)


def test_a_source_is_imported_once_whatever_its_shards(tmp_path, monkeypatch):
    whole = import_records(tmp_path / "whole", reader("ultrafeedback"), model())
    monkeypatch.setattr(storage, "SHARD_ROWS", 2)
    parts = import_records(tmp_path / "parts", reader("ultrafeedback"), model())
    assert len(parts.shards) == 10 and len(whole.shards) == 1
    assert parts.read(range(19)) == whole.read(range(19))
    again = import_records(tmp_path / "parts", lambda reading: pytest.fail("read twice"), model())
    assert len(again) == 19


def test_only_a_shard_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_ROWS", 3)
    written = []

    def watched(reading):
        for record in reader("ultrafeedback")(reading):
            written.append(len(list(tmp_path.rglob("records-*.arrow"))))
            yield record

    import_records(tmp_path / "buffer", watched, model())
    assert written == [number // 3 for number in range(19)]


def test_a_refused_source_leaves_an_empty_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_ROWS", 2)
    with pytest.raises(UserError, match="outside the vocabulary"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(vocabulary=50))
    with pytest.raises(UserError, match="line 1: it has 52 tokens and the model's context holds 51"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(context=51))
    with pytest.raises(UserError, match="nothing of the data can be learned from.*19 sequences of more than 3 tokens"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(), drop_longer_than=3)
    assert len(Buffer.open(tmp_path / "buffer")) == 0 and not list(tmp_path.rglob("records-*"))


@pytest.mark.parametrize("read", [trajectories, preferences])
def test_what_is_too_long_is_left_out_and_counted(read, tmp_path, capsys):
    whole = import_records(tmp_path / "whole", reader("ultrafeedback", read), model(), drop_longer_than=10**9)
    assert "sequences of more than" not in capsys.readouterr().err
    limit = int(np.median(whole.lengths()))
    for name, options in (("asked", {"drop_longer_than": limit}), ("context", {"drop_longer_than": 10**9})):
        fitting = model() if name == "asked" else model(context=limit)
        found = import_records(tmp_path / name, reader("ultrafeedback", read), fitting, **options)
        said = capsys.readouterr().err
        assert found.lengths().max() <= limit
        if read is trajectories:
            assert found.read(range(len(found))) == [
                record for record in whole.read(range(19)) if len(record.tokens) <= limit
            ]
            assert f"{19 - len(found)} sequences of more than {limit} tokens" in said
        else:
            # Two of a kind or none: what is left of a pair that was cut would be half a preference.
            assert all(found.group_ids().count(group) == 2 for group in found.group_ids())


def test_a_function_scores_unscored_answers(tmp_path):
    found = import_records(tmp_path / "buffer", reader("ranked"), model(), reward=lambda row, text: len(text))
    assert found.returns()[:5].tolist() == [9.0, 9.0, 6.0, 1.0, 1.0]
    assert GroupMeanBaseline(found).means[:5].tolist() == [8.0, 8.0, 8.0, 1.0, 1.0]


def test_prompts_to_evaluate_leave_room_for_an_answer(tmp_path):
    buffer = import_records(tmp_path / "buffer", reader("ultrafeedback"), model())
    lengths = [len(row["tokens"]) for row in prompts_from_buffer(buffer, 6, 2048)]
    assert len(lengths) == 6 and len(set(lengths)) > 1
    assert [len(row["tokens"]) for row in prompts_from_buffer(buffer, 6, max(lengths) - 1)] == [
        n for n in lengths if n < max(lengths)
    ]
    with pytest.raises(UserError, match="no prompt of the data has 2 tokens or fewer"):
        prompts_from_buffer(buffer, 6, 2)
