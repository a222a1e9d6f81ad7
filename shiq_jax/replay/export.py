"""Records as JSON with one list entry per token, and as Hugging Face datasets."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import JUDGEMENTS, STATISTICS, Record, validate

if TYPE_CHECKING:
    import datasets


def record_to_json(record: Record) -> dict[str, Any]:
    """The record as JSON values: `tokens`, `action_mask`, `rewards` (0 off the actions), `group_id`, and, where the
    record has them, `behaviour_logp`, `logp`, `lse` (null off the actions), `prompt`, `user_id`, `chosen`, `label`,
    `rank` and `score`. `record_from_json` gives the record back bit for bit.
    """
    places = np.flatnonzero(record.action_mask)

    def aligned(values: np.ndarray, blank: float | None) -> list[float | None]:
        row: list[float | None] = [blank] * len(record.tokens)
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            row[place] = value
        return row

    content: dict[str, Any] = {
        "tokens": record.tokens.tolist(),
        "action_mask": record.action_mask.tolist(),
        "rewards": aligned(record.rewards, 0.0),
        "group_id": record.group,
    }
    for name in STATISTICS:
        if getattr(record, name) is not None:
            content[name] = aligned(getattr(record, name), None)
    if record.prompt is not None:
        content["prompt"] = record.prompt
    if record.user is not None:
        content["user_id"] = record.user
    said = {name: getattr(record, name) for name in JUDGEMENTS}
    return content | {name: value for name, value in said.items() if value is not None}


def record_from_json(content: Mapping[str, Any], *, check: bool = True) -> Record:
    """The record of one JSON object as `record_to_json` writes it; raises UserError naming the field that is wrong.

    check: False leaves `validate` to the caller.

    `tokens`, `action_mask` and `rewards` are needed, one entry per token. Without `group_id`, sequences whose tokens
    before the first action are equal form a group. A `prompt` that is not the JSON of an object is kept as {"prompt":
    prompt}.
    """
    tokens, mask = _list(content, "tokens", None), _list(content, "action_mask", None)
    if len(mask) != len(tokens):
        raise UserError(
            f"field 'action_mask' has {len(mask)} entries for {len(tokens)} tokens; give one entry per token."
        )
    columns = {name: _compact(content, name, mask) for name in ("rewards", *STATISTICS)}
    if columns["rewards"] is None:
        raise UserError("field 'rewards' is missing; give one number per token, 0 off the actions.")
    group, prompt, user = content.get("group_id"), content.get("prompt"), content.get("user_id")
    try:
        record = Record(
            tokens=tokens,
            action_mask=mask,
            **columns,
            group=context_group(tokens, mask) if group is None else str(group),
            prompt=None if prompt is None else _prompt(prompt),
            user=None if user is None else str(user),
            **{name: content.get(name) for name in JUDGEMENTS},
        )
    except ValueError as error:
        raise UserError(f"field {error}") from error
    if check:
        validate(record)
    return record


def context_group(tokens: list[int], action_mask: list[bool]) -> str:
    """A group name for sequences without one: a digest of the tokens before the first action."""
    first = next((place for place, action in enumerate(action_mask) if action), len(tokens))
    return hashlib.sha256(json.dumps(tokens[:first]).encode()).hexdigest()[:16]


def to_jsonl(buffer: Buffer, path: str | Path) -> int:
    """Writes every record as one line of JSON, replacing the file atomically; returns how many there are."""

    def write(file) -> None:
        for number in range(len(buffer)):
            file.write(json.dumps(record_to_json(buffer[number]), ensure_ascii=False).encode() + b"\n")

    storage.write_atomically(Path(path), write)
    return len(buffer)


def to_dataset(buffer: Buffer) -> "datasets.Dataset":
    """The buffer as a Hugging Face dataset over the same files; columns as in Record, per-action ones compact."""
    import datasets

    files = buffer.record_files()
    if not files:
        raise UserError(f"{buffer.path} is empty; append records before making a dataset of it.")
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def from_dataset(dataset: "datasets.Dataset") -> Iterator[Record]:
    """The records of a dataset with the columns of `to_dataset`; optional columns may be missing.

    Raises UserError when a needed column is.
    """
    names = [field.name for field in storage.RECORDS]
    for name in ("tokens", "action_mask", "rewards", "group"):
        if name not in dataset.column_names:
            raise UserError(f"the dataset lacks the column {name!r}; it has {', '.join(dataset.column_names)}.")
    present = [name for name in names if name in dataset.column_names]
    for row in dataset.select_columns(present).with_format(None):
        yield Record(**row)


def _list(content: Mapping[str, Any], name: str, size: int | None) -> list:
    values = content.get(name)
    if values is None:
        raise UserError(f"field {name!r} is missing; give a list with one entry per token.")
    if not isinstance(values, list):
        raise UserError(f"field {name!r} is of type {type(values).__name__}; give a list with one entry per token.")
    if size is not None and len(values) != size:
        raise UserError(f"field {name!r} has {len(values)} entries for {size} tokens; give one entry per token.")
    return values


def _compact(content: Mapping[str, Any], name: str, mask: list) -> list[float] | None:
    if content.get(name) is None:
        return None
    kept = []
    for place, (value, action) in enumerate(zip(_list(content, name, len(mask)), mask, strict=True)):
        if action:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"field {name!r} is {value!r} at token {place}, which is an action; give a number.")
            kept.append(float(value))
        elif name == "rewards" and value:
            raise UserError(
                f"field 'rewards' is {value!r} at token {place}, which is no action; move it to the action that "
                "earned it."
            )
    return kept


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        try:
            if isinstance(json.loads(prompt), dict):
                return prompt
        except ValueError:
            pass
    return json.dumps({"prompt": prompt}, ensure_ascii=False)
