"""Conversion of records to and from JSON and Hugging Face datasets."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import FEEDBACK, STATISTICS, Record, validate

if TYPE_CHECKING:
    import datasets


def record_to_json(record: Record) -> dict[str, Any]:
    """Convert a record to a JSON object with one list entry per token.

    Keys: `tokens`, `action_mask`, `rewards` (0 at tokens that are not actions), `group_id`; and, if the record has
    them, `behaviour_logp`, `logp`, `lse` (null at tokens that are not actions), `prompt`, `user_id`, `chosen`, `label`,
    `rank` and `score`. `record_from_json` restores the record bitwise.
    """
    positions = np.flatnonzero(record.action_mask)

    def per_token(values: np.ndarray, fill: float | None) -> list[float | None]:
        entries: list[float | None] = [fill] * len(record.tokens)
        for position, value in zip(positions.tolist(), values.tolist(), strict=True):
            entries[position] = value
        return entries

    content: dict[str, Any] = {
        "tokens": record.tokens.tolist(),
        "action_mask": record.action_mask.tolist(),
        "rewards": per_token(record.rewards, 0.0),
        "group_id": record.group,
    }
    for name in STATISTICS:
        if getattr(record, name) is not None:
            content[name] = per_token(getattr(record, name), None)
    if record.prompt is not None:
        content["prompt"] = record.prompt
    if record.user is not None:
        content["user_id"] = record.user
    feedback = {name: getattr(record, name) for name in FEEDBACK}
    return content | {name: value for name, value in feedback.items() if value is not None}


def record_from_json(content: Mapping[str, Any], *, check: bool = True) -> Record:
    """Convert a JSON object in the format of `record_to_json` to a record; raises UserError naming an invalid field.

    `tokens`, `action_mask` and `rewards` are required, with one entry per token. Without `group_id`, the group is a
    digest of the tokens before the first action. A `prompt` that is not itself a JSON object is stored as
    {"prompt": prompt}.

    Args:
        content: the JSON object.
        check: whether to `validate` the record.
    """
    tokens, mask = _require_list(content, "tokens", None), _require_list(content, "action_mask", None)
    if len(mask) != len(tokens):
        raise UserError(
            f"field 'action_mask' has {len(mask)} entries for {len(tokens)} tokens; give one entry per token."
        )
    columns = {name: _per_action(content, name, mask) for name in ("rewards", *STATISTICS)}
    if columns["rewards"] is None:
        raise UserError("field 'rewards' is missing; give one number per token, 0 where the token is not an action.")
    group, prompt, user = content.get("group_id"), content.get("prompt"), content.get("user_id")
    try:
        record = Record(
            tokens=tokens,
            action_mask=mask,
            **columns,
            group=context_group(tokens, mask) if group is None else normalize_id("group_id", group),
            prompt=None if prompt is None else _prompt_json(prompt),
            user=None if user is None else normalize_id("user_id", user),
            **{name: content.get(name) for name in FEEDBACK},
        )
    except ValueError as error:
        raise UserError(f"field {error}") from error
    if check:
        validate(record)
    return record


def normalize_id(field: str, value: Any) -> str:
    """The text of an id; 7, 7.0 and "7" are the same id. UserError for values other than text and whole numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return str(int(value))
    raise UserError(f"field {field!r} is {value!r}; give text or a whole number.")


def context_group(tokens: list[int], action_mask: list[bool]) -> str:
    """Default group name of a sequence: a digest of the tokens before its first action."""
    first = next((position for position, action in enumerate(action_mask) if action), len(tokens))
    return hashlib.sha256(json.dumps(tokens[:first]).encode()).hexdigest()[:16]


def to_jsonl(buffer: Buffer, path: str | Path) -> int:
    """Write one JSON object per line for every record, replacing the file atomically; returns the number of records."""

    def write(file) -> None:
        for number in range(len(buffer)):
            file.write(json.dumps(record_to_json(buffer[number]), ensure_ascii=False).encode() + b"\n")

    storage.write_atomically(Path(path), write)
    return len(buffer)


def to_dataset(buffer: Buffer) -> "datasets.Dataset":
    """Open the buffer as a Hugging Face dataset without copying; the columns are the fields of `Record`."""
    import datasets

    files = buffer.record_files()
    if not files:
        raise UserError(f"{buffer.path} is empty; append records before converting it to a dataset.")
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def from_dataset(dataset: "datasets.Dataset") -> Iterator[Record]:
    """Yield the records of a dataset with the columns of `to_dataset`; raises UserError if one is missing."""
    names = [field.name for field in storage.RECORD_SCHEMA]
    for name in ("tokens", "action_mask", "rewards", "group"):
        if name not in dataset.column_names:
            raise UserError(f"the dataset has no column {name!r}; its columns are {', '.join(dataset.column_names)}.")
    present = [name for name in names if name in dataset.column_names]
    for row in dataset.select_columns(present).with_format(None):
        yield Record(**row)


def _require_list(content: Mapping[str, Any], name: str, size: int | None) -> list:
    values = content.get(name)
    if values is None:
        raise UserError(f"field {name!r} is missing; give a list with one entry per token.")
    if not isinstance(values, list):
        raise UserError(f"field {name!r} is of type {type(values).__name__}; give a list with one entry per token.")
    if size is not None and len(values) != size:
        raise UserError(f"field {name!r} has {len(values)} entries for {size} tokens; give one entry per token.")
    return values


def _per_action(content: Mapping[str, Any], name: str, mask: list) -> list[float] | None:
    if content.get(name) is None:
        return None
    action_values = []
    for position, (value, action) in enumerate(zip(_require_list(content, name, len(mask)), mask, strict=True)):
        if action:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"field {name!r} is {value!r} at token {position}, which is an action; give a number.")
            action_values.append(float(value))
        elif name == "rewards" and value:
            raise UserError(
                f"field 'rewards' is {value!r} at token {position}, which is not an action; move it to the action "
                "that earned it."
            )
    return action_values


def _prompt_json(prompt: Any) -> str:
    if isinstance(prompt, str):
        try:
            if isinstance(json.loads(prompt), dict):
                return prompt
        except ValueError:
            pass
    return json.dumps({"prompt": prompt}, ensure_ascii=False)
