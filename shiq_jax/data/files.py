"""Readers of data rows from JSONL, JSON, Parquet, saved datasets and the Hugging Face hub.

Every row comes with its location (`answers.jsonl, line 3`) for error messages.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
LocatedRow = tuple[str, dict[str, Any]]


def rows(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `source` as dicts; see `located_rows`."""
    return (row for _, row in located_rows(source))


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, skipping blank lines; raises UserError if a line is not a JSON object."""
    return (row for _, row in _jsonl(Path(path)))


def located_rows(source: str | Path) -> Iterator[LocatedRow]:
    """Yield (location, row) for each row of a data source, without null fields.

    Args:
        source: a file (.jsonl with one object per line, .json with a list of objects, or .parquet), a pattern such as
            `data/train-*.parquet` for several files in alphabetical order, a directory written by
            `datasets.Dataset.save_to_disk`, or a hub id, optionally with a split as `owner/name:test` (default: train).

    Raises:
        UserError: the source does not exist or has no rows, or a row is not an object.
    """
    count = 0
    for file in matching_files(source) or [source]:
        for location, row in _read_source(file):
            count += 1
            yield location, {name: value for name, value in row.items() if value is not None}
    if not count:
        raise UserError(f"{source} has no rows: expected at least one")


def matching_files(source: str | Path) -> list[Path]:
    """The local files that `source` names or matches, in order; empty for directories and hub ids."""
    if Path(source).is_file():
        return [Path(source)]
    return [Path(name) for name in sorted(glob.glob(str(source))) if Path(name).is_file()]


def _read_source(source: str | Path) -> Iterator[LocatedRow]:
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"the data file {path} does not exist: check its path")
        located = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix](path)
    elif path.is_dir():
        located = _saved_dataset(path)
    elif path.exists():
        raise UserError(
            f"the data file {path} ends in {path.suffix!r}: expected {', '.join(SUFFIXES)}; convert or rename it"
        )
    else:
        located = _hub(str(source))
    return located


def _jsonl(path: Path) -> Iterator[LocatedRow]:
    # Read as bytes, so that encoding errors can be reported with their line.
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
    with file:
        for number, line in enumerate(file, 1):
            location = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{location} is not UTF-8 (byte {error.start}): save the file in UTF-8") from error
            if text:
                yield (
                    location,
                    _check_object(location, _parse_json(location, text, "expected one JSON object per line")),
                )


def _json(path: Path) -> Iterator[LocatedRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): check the file") from error
    content = _parse_json(str(path), text, "expected a list of objects; rename a file with one per line to .jsonl")
    if not isinstance(content, list):
        raise UserError(f"{path} contains a JSON {type(content).__name__}: expected a list of objects")
    for number, row in enumerate(content, 1):
        location = f"{path}, entry {number}"
        yield location, _check_object(location, row)


def _parse_json(location: str, text: str, expected: str) -> Any:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, character {error.colno}" if "\n" in text else f"character {error.colno}"
        raise UserError(f"{location} is not valid JSON ({error.msg}, {position}): {expected}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is JSON that cannot be parsed ({_first_line(error)}): {expected}") from error
    # JSON can escape a lone surrogate, but UTF-8 cannot encode it.
    if "\\ud" in text.lower():
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{location} has a lone surrogate, which UTF-8 cannot encode: fix the text") from error
    return content


def _parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            features = _features(file.schema_arrow)
            # Small batches, because rows can hold long texts.
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _from_arrow(row, features)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({_first_line(error)}): rewrite it") from error


def _saved_dataset(path: Path) -> Iterator[LocatedRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"the directory {path} is not a saved dataset ({_first_line(error)}): expected the output of "
            f"Dataset.save_to_disk, or a file ending in {', '.join(SUFFIXES)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"{path} has the splits {', '.join(loaded)}: pass the directory of one split")
        loaded = loaded["train"]
    for number, row in enumerate(loaded, 1):
        yield f"{path}, row {number}", _from_arrow(row, loaded.features)


def _hub(source: str) -> Iterator[LocatedRow]:
    name, _, split = source.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(
            f"{source} does not exist: expected a file ending in {', '.join(SUFFIXES)}, a saved dataset, or a hub id"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # The message of `datasets` lists the available splits.
        if "split" in str(error).lower() and isinstance(error, ValueError):
            raise UserError(
                f"{source!r} has no split {split or 'train'!r} ({_first_line(error)}): choose one as {name}:SPLIT"
            ) from error
        raise UserError(
            f"{source!r} is neither a file, nor a directory, nor a reachable dataset on the hub "
            f"({_first_line(error)}): check the spelling and the network"
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{source}, row {number}", _from_arrow(row, loaded.features)


def _features(schema) -> Any:
    """The features that `datasets` noted in a Parquet file; None if there are none."""
    import datasets

    if b"huggingface" not in (schema.metadata or {}):
        return None
    return datasets.Features.from_arrow_schema(schema)


def _from_arrow(value: Any, feature: Any = None) -> Any:
    """A value without the null fields that Arrow adds to objects, and with `datasets.Json` columns parsed.

    Arrow gives all objects of a column the fields of all others, so a null field is one that an object may never have
    had. JSON columns keep their nulls.
    """
    import datasets

    # datasets has JSON columns since 4.7.
    if isinstance(feature, getattr(datasets, "Json", ())):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        children = feature if isinstance(feature, dict) else {}
        return {name: _from_arrow(each, children.get(name)) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        child = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_from_arrow(each, child) for each in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_object(location: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location} contains a JSON {type(row).__name__}: expected an object with named fields")
    return row
