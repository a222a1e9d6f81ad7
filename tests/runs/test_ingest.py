"""Import of data files into a buffer: atomic, one shard in memory at a time, skipped rows reported."""

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
    return lambda context: read(DATA / f"{name}.jsonl", TOKENIZER, context)


def test_source_is_imported_once_for_any_shard_size(tmp_path, monkeypatch):
    one_shard = import_records(tmp_path / "one_shard", reader("ultrafeedback"), model())
    monkeypatch.setattr(storage, "SHARD_ROWS", 2)
    sharded = import_records(tmp_path / "sharded", reader("ultrafeedback"), model())
    assert len(sharded.shards) == 10 and len(one_shard.shards) == 1
    assert sharded.read(range(19)) == one_shard.read(range(19))
    reopened = import_records(tmp_path / "sharded", lambda context: pytest.fail("read twice"), model())
    assert len(reopened) == 19


def test_records_are_written_shard_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_ROWS", 3)
    shards_written = []

    def read(context):
        for record in reader("ultrafeedback")(context):
            shards_written.append(len(list(tmp_path.rglob("records-*.arrow"))))
            yield record

    import_records(tmp_path / "buffer", read, model())
    assert shards_written == [number // 3 for number in range(19)]


def test_rejected_source_leaves_an_empty_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_ROWS", 2)
    with pytest.raises(UserError, match="outside the vocabulary"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(vocabulary=50))
    with pytest.raises(UserError, match="line 1: it has 52 tokens and the model's context holds 51"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(context=51))
    with pytest.raises(UserError, match="no usable record.*19 sequences of more than 3 tokens"):
        import_records(tmp_path / "buffer", reader("ultrafeedback"), model(), drop_longer_than=3)
    assert len(Buffer.open(tmp_path / "buffer")) == 0 and not list(tmp_path.rglob("records-*"))


@pytest.mark.parametrize("read", [trajectories, preferences])
def test_long_sequences_are_skipped_and_counted(read, tmp_path, capsys):
    complete = import_records(tmp_path / "complete", reader("ultrafeedback", read), model(), drop_longer_than=10**9)
    assert "sequences of more than" not in capsys.readouterr().err
    limit = int(np.median(complete.lengths()))
    for name, drop_longer_than, context in (("option", limit, 2048), ("context", 10**9, limit)):
        buffer = import_records(
            tmp_path / name, reader("ultrafeedback", read), model(context), drop_longer_than=drop_longer_than
        )
        stderr = capsys.readouterr().err
        assert buffer.lengths().max() <= limit
        if read is trajectories:
            assert buffer.read(range(len(buffer))) == [
                record for record in complete.read(range(19)) if len(record.tokens) <= limit
            ]
            assert f"{19 - len(buffer)} sequences of more than {limit} tokens" in stderr
        else:
            # A pair is skipped as a whole.
            assert all(buffer.group_ids().count(group) == 2 for group in buffer.group_ids())


def test_reward_function_scores_unscored_answers(tmp_path):
    buffer = import_records(tmp_path / "buffer", reader("ranked"), model(), reward=lambda row, text: len(text))
    assert buffer.returns()[:5].tolist() == [9.0, 9.0, 6.0, 1.0, 1.0]
    assert GroupMeanBaseline(buffer).means[:5].tolist() == [8.0, 8.0, 8.0, 1.0, 1.0]


def test_evaluation_prompts_leave_room_for_an_answer(tmp_path):
    buffer = import_records(tmp_path / "buffer", reader("ultrafeedback"), model())
    lengths = [len(row["tokens"]) for row in prompts_from_buffer(buffer, 6, 2048)]
    assert len(lengths) == 6 and len(set(lengths)) > 1
    assert [len(row["tokens"]) for row in prompts_from_buffer(buffer, 6, max(lengths) - 1)] == [
        n for n in lengths if n < max(lengths)
    ]
    with pytest.raises(UserError, match="no prompt of the data has 2 tokens or fewer"):
        prompts_from_buffer(buffer, 6, 2)
