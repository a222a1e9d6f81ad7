"""Every kind of source gives the same rows, and damaged sources give clear errors."""

import json

import pytest

from shiq_jax.data.files import located_rows, matching_files, read_jsonl, rows
from shiq_jax.errors import UserError

ROWS = [{"prompt": "a", "reward": 1.5}, {"prompt": [{"role": "user", "content": "é"}], "turns": [1, 2]}]
FLAT = [{"prompt": "a", "scores": [1.0, 2.0]}, {"prompt": "b", "scores": [3.0]}]


def _jsonl(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_jsonl_rows_have_their_line_numbers(tmp_path):
    path = _jsonl(tmp_path / "data.jsonl", ROWS[0], "", ROWS[1], "  ")
    assert list(rows(path)) == list(read_jsonl(path)) == ROWS
    assert [location for location, _ in located_rows(path)] == [f"{path}, line 1", f"{path}, line 3"]


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert list(rows(path)) == ROWS[:1]


def test_json_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data.json").write_text(json.dumps(FLAT))
    pq.write_table(pa.Table.from_pylist(FLAT), tmp_path / "data.parquet")
    dataset = datasets.Dataset.from_list(FLAT)
    dataset.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    for name in ("data.json", "data.parquet", "single", "splits"):
        assert list(rows(tmp_path / name)) == FLAT


def test_null_fields_count_as_missing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"a": 1, "b": None}, {"a": None, "b": 2}]), tmp_path / "data.parquet")
    assert list(rows(tmp_path / "data.parquet")) == [{"a": 1}, {"b": 2}]
    assert list(rows(_jsonl(tmp_path / "data.jsonl", {"a": None, "b": 0}))) == [{"b": 0}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', "line 2 is not valid JSON"),
        ("[1]", "line 2 contains a JSON list"),
        ('{"a": "\\ud800"}', "line 2 has a lone surrogate"),
        ("7" * 5000, "line 2 is JSON that cannot be parsed"),
    ],
)
def test_invalid_lines_are_reported(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        list(rows(_jsonl(tmp_path / "data.jsonl", ROWS[0], line)))


def test_surrogate_pairs_are_decoded(tmp_path):
    assert list(rows(_jsonl(tmp_path / "data.jsonl", '{"a": "\\ud83d\\ude00"}'))) == [{"a": "😀"}]


def test_other_encodings_are_rejected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        list(rows(path))


def test_invalid_sources_are_rejected(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "data.json").write_text('{"a": 1}')
    (tmp_path / "data.parquet").write_text("PAR1")
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, message in (
        ("data.csv", "ends in '.csv'"),
        ("data.json", "expected a list of objects"),
        ("data.parquet", "not a readable Parquet file"),
        ("directory", "is not a saved dataset"),
        ("absent.jsonl", "does not exist"),
        ("absent/deeper/still", "does not exist"),
        ("empty.jsonl", "has no rows"),
    ):
        with pytest.raises(UserError, match=message):
            list(rows(tmp_path / name))


def test_unreachable_hub_id_is_rejected():
    with pytest.raises(UserError, match="neither a file, nor a directory"):
        list(rows("nobody/nothing:test"))


def test_pattern_reads_several_files(tmp_path):
    for name, row in (("part-2.jsonl", {"a": 2}), ("part-1.jsonl", {"a": 1}), ("other.jsonl", {"a": 3})):
        _jsonl(tmp_path / name, row)
    pattern = str(tmp_path / "part-*.jsonl")
    assert [(location, row["a"]) for location, row in located_rows(pattern)] == [
        (f"{tmp_path / 'part-1.jsonl'}, line 1", 1),
        (f"{tmp_path / 'part-2.jsonl'}, line 1", 2),
    ]
    assert matching_files(pattern) == [tmp_path / "part-1.jsonl", tmp_path / "part-2.jsonl"]
    # An existing file takes precedence over a pattern of the same name.
    (tmp_path / "odd[1].jsonl").write_text('{"a": 4}')
    assert list(rows(tmp_path / "odd[1].jsonl")) == [{"a": 4}]
    with pytest.raises(UserError, match="does not exist"):
        list(rows(tmp_path / "absent-*.jsonl"))


def test_missing_split_is_reported_with_available_ones(monkeypatch):
    import datasets

    def load(name, split):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train_prefs', 'test_prefs'].")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"has no split 'train' .*train_prefs.*someone/pairs:SPLIT"):
        list(rows("someone/pairs"))
