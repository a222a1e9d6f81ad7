"""Rows of someone's data: plain dicts out of JSONL, JSON, Parquet, saved datasets, or a hub id, each with its place.

The place (`answers.jsonl, line 3`) goes in front of every complaint about a row.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
Located = tuple[str, dict[str, Any]]


def rows(source: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `source` as plain dicts; see `located_rows`."""
    return (row for _, row in located_rows(source))


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one a line, blank lines skipped; UserError naming the line that is not an object."""
    return (row for _, row in _jsonl(Path(path)))


def located_rows(source: str | Path) -> Iterator[Located]:
    """Pairs (place, row) of a data source; fields that are null count as missing and are left out.

    Args:
      source: a file (.jsonl: an object a line; .json: a list of objects; .parquet), a directory that
        `datasets.Dataset.save_to_disk` wrote, a pattern such as `data/train-*.parquet` for the rows of several files
        in the order of their names, or a hub id, optionally with a split as `owner/name:test` (default: train).

    Raises UserError when there is no such source, it holds no rows, or a row is not an object.
    """
    count = 0
    for part in matching_files(source) or [source]:
        for place, row in _located(part):
            count += 1
            yield place, {name: value for name, value in row.items() if value is not None}
    if not count:
        raise UserError(f"{source} holds no rows: expected at least one")


def matching_files(source: str | Path) -> list[Path]:
    """The local files that a source is, in order; none for directories and hub ids."""
    if Path(source).is_file():
        return [Path(source)]
    return [Path(name) for name in sorted(glob.glob(str(source))) if Path(name).is_file()]


def _located(source: str | Path) -> Iterator[Located]:
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"the data file {path} does not exist: check its path")
        found = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix](path)
    elif path.is_dir():
        found = _saved_dataset(path)
    elif path.exists():
        raise UserError(
            f"the data file {path} ends in {path.suffix!r}: expected {', '.join(SUFFIXES)}; convert or rename it"
        )
    else:
        found = _hub(str(source))
    return found


def _jsonl(path: Path) -> Iterator[Located]:
    # Read as bytes, so that an encoding mistake can be told with its line.
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
    with file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{place} is not UTF-8 (byte {error.start}): save the file in UTF-8") from error
            if text:
                yield place, _object(place, _parsed(place, text, "expected one whole object a line"))


def _json(path: Path) -> Iterator[Located]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): check the file") from error
    content = _parsed(str(path), text, "expected a list of objects; for one object a line, name the file .jsonl")
    if not isinstance(content, list):
        raise UserError(f"{path} holds a JSON {type(content).__name__}: expected a list of objects")
    for number, row in enumerate(content, 1):
        place = f"{path}, entry {number}"
        yield place, _object(place, row)


def _parsed(place: str, text: str, expected: str) -> Any:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, character {error.colno}" if "\n" in text else f"character {error.colno}"
        raise UserError(f"{place} is not JSON ({error.msg}, {where}): {expected}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is JSON that cannot be held ({_first_line(error)}): {expected}") from error
    # Half of a surrogate pair can be written as an escape, but no tokenizer and no file can hold it.
    if "\\ud" in text.lower():
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place} holds half of a surrogate pair, an escape that is no character: repair the text"
            ) from error
    return content


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # Rows with long texts become many objects at once.
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({_first_line(error)}): write it again") from error


def _saved_dataset(path: Path) -> Iterator[Located]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"the directory {path} is not a saved dataset ({_first_line(error)}): expected what Dataset.save_to_disk "
            f"writes, or a file ending in {', '.join(SUFFIXES)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"{path} has the splits {', '.join(loaded)}: pass the directory of one split")
        loaded = loaded["train"]
    for number, row in enumerate(loaded, 1):
        yield f"{path}, row {number}", dict(row)


def _hub(source: str) -> Iterator[Located]:
    name, _, split = source.partition(":")
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(
            f"{source} does not exist: expected a file ending in {', '.join(SUFFIXES)}, a saved dataset, or a hub id"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # The library's own sentence names the splits that there are.
        if "split" in str(error).lower() and isinstance(error, ValueError):
            raise UserError(
                f"{source!r} has no split {split or 'train'!r} ({_first_line(error)}): name one as {name}:SPLIT"
            ) from error
        raise UserError(
            f"{source!r} is neither a file, nor a directory, nor a dataset that the hub gives now "
            f"({_first_line(error)}): check the spelling and the network"
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{source}, row {number}", dict(row)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place} holds a JSON {type(row).__name__}: expected an object with named fields")
    return row
