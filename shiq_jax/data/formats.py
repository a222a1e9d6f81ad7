"""Conversion of data rows to records: trajectories, preferences, demonstrations and prompts.

    trajectories          {"prompt", "completion", "reward"}      reward: a number, or one number per assistant turn
                          {"tokens", "action_mask", "rewards"}    per token; optional logp, lse, behaviour_logp
    preferences           {"prompt", "chosen", "rejected"}        answers, or full conversations, as in TRL
    unpaired_preferences  {"prompt", "completion", "label"}       label: true or false, as in TRL; also the rows above
    demonstrations        {"prompt", "completion"} or {"messages"} or {"text"}
    prompts               {"prompt", ...}                         other fields are passed to the reward function

`trajectories` and `preferences` also read rows with several answers, see `shiq_jax.data.answers`. A prompt is text or
messages; a completion is text or the messages that follow. Optional fields: `group_id` (by default, rows with the same
prompt form a group), `user_id`, and `tools` for the chat template. See `files.located_rows` for the supported sources.
Errors name the location of the row and the field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.data.answers import SCORE_FIELDS, Answers, answer_text, extract_answers, with_prompt
from shiq_jax.data.chat import Encoded, encode_completion, encode_text
from shiq_jax.data.fields import check_completion, check_prompt, require_field, split_conversation
from shiq_jax.data.files import located_rows, read_jsonl, rows
from shiq_jax.data.import_context import ImportContext
from shiq_jax.data.kinds import Kind, classify
from shiq_jax.data.messages import normalize_row
from shiq_jax.errors import UserError
from shiq_jax.replay.export import normalize_id, record_from_json
from shiq_jax.replay.preference import select_pair
from shiq_jax.replay.records import FEEDBACK, STATISTICS, Record

_MAX_REWARD = float(np.finfo(np.float32).max)
_LABEL_FORMAT = "true for a desirable answer, false for an undesirable one"

__all__ = [
    "ImportContext",
    "demonstrations",
    "preferences",
    "prompts",
    "read_jsonl",
    "rows",
    "trajectories",
    "unpaired_preferences",
]


def trajectories(source: str | Path, tokenizer, context: ImportContext | None = None) -> Iterator[Record]:
    """Yield records of scored sequences: text with `reward`, tokens with `rewards`, or several answers with scores.

    A scalar reward is assigned to the last action; a list is assigned to the last action of each assistant turn, in
    order. The answers of a row form a group. Answers that are empty or have no score are skipped and counted.

    Args:
        source: see `files.located_rows`.
        tokenizer: from `load_tokenizer`.
        context: import options and counts.

    Raises:
        UserError: a field is missing or invalid.
    """
    context = context or ImportContext()
    for location, row in _plain_rows(source):
        with located_errors(location):
            kind = classify(row, context.score)
            records = _scored_records(row, kind, tokenizer, context)
            records = [record for record in records if context.validate_and_accept(record)]
        yield from records


def preferences(source: str | Path, tokenizer, context: ImportContext | None = None) -> Iterator[Record]:
    """Yield two records per preference, the preferred answer first.

    The pair is `chosen` and `rejected`, with rewards 1 and 0, or the best and the worst of several answers with scores
    or ranks; prompts whose answers tie are skipped and counted. Scores become rewards; ranked answers without scores
    have the rewards 1 and 0. If `context.score` is set, scores take precedence over `chosen` and `rejected`.
    Conversational answers may include the conversation before them; without `prompt`, their shared beginning is the
    prompt. Every row is its own group, even if prompts repeat.

    Args:
        source: see `files.located_rows`.
        tokenizer: from `load_tokenizer`.
        context: import options and counts.

    Raises:
        UserError: a field is missing or invalid.
    """
    context = context or ImportContext()
    for number, (location, row) in enumerate(_plain_rows(source)):
        with located_errors(location):
            kind = classify(row, context.score)
            if kind.pair or not kind.answers:
                records = _pair_records(row, tokenizer, number)
                records = records if all(context.validate_and_accept(record) for record in records) else ()
            else:
                records = _answer_records(row, kind, tokenizer, context, allow_ranks=True)
                records = [record for record in records if context.validate_and_accept(record)]
                records = _best_and_worst(records, _digest([number, row]), context)
        yield from records


def unpaired_preferences(source: str | Path, tokenizer, context: ImportContext | None = None) -> Iterator[Record]:
    """Yield records of single answers with a label, or with a score from which `replay.labels` derives one.

    `label` is true or 1 for a desirable answer, false or 0 for an undesirable one. A `chosen` answer is desirable and a
    `rejected` one undesirable. Labeled answers have the rewards 1 and 0. Other rows, or all rows if `context.score` is
    set, are read as by `trajectories`. The rows of a source must all have labels or all have scores.

    Args:
        source: see `files.located_rows`.
        tokenizer: from `load_tokenizer`.
        context: import options and counts.

    Raises:
        UserError: a field is missing or invalid.
    """
    context = context or ImportContext()
    for number, (location, row) in enumerate(_plain_rows(source)):
        with located_errors(location):
            kind = classify(row, context.score)
            if kind.tokens:
                context.check_score_source("label" if kind.label else "rewards", "")
                records = [_token_record(row, context)]
            elif kind.labeled:
                context.check_score_source("label", "")
                records = _pair_records(row, tokenizer, number) if kind.pair else [_labeled_record(row, tokenizer)]
            else:
                if kind.completion and not kind.scored and (context.score or context.reward) is None:
                    require_field(row, "label", _LABEL_FORMAT)
                records = _scored_records(row, kind, tokenizer, context)
            records = [record for record in records if context.validate_and_accept(record)]
        yield from records


def demonstrations(source: str | Path, tokenizer, context: ImportContext | None = None) -> Iterator[Record]:
    """Yield records without rewards, for supervised fine-tuning.

    The actions are the completion of rows with `prompt` and `completion`, the assistant turns of `messages`, and all
    tokens of `text` except the first.

    Args:
        source: see `files.located_rows`.
        tokenizer: from `load_tokenizer`.
        context: import options and counts.

    Raises:
        UserError: a field is missing or invalid.
    """
    context = context or ImportContext()
    for location, row in _plain_rows(source):
        with located_errors(location):
            kind = classify(row)
            if kind.messages:
                row = row | split_conversation(row["messages"])
            if kind.text and not kind.messages and not kind.completion:
                check_completion("text", row["text"])
                group = normalize_id("group_id", row["group_id"]) if "group_id" in row else _digest(row["text"])
                record = _record(row, encode_text(tokenizer, row["text"]), [0.0], group)
            else:
                check_prompt(row)
                check_completion("completion", require_field(row, "completion", "the answer to imitate"))
                record = _record(row, _encode(tokenizer, row, row["completion"]), [0.0], _group(row))
            accepted = context.validate_and_accept(record)
        if accepted:
            yield record


def prompts(source: str | Path) -> list[dict[str, Any]]:
    """All rows of a source, each with a `prompt` that is text or messages; other fields are kept for the reward.

    Rows without `prompt` may have an `instruction`, or conversations `chosen` and `rejected` with a shared beginning.
    """
    prompt_rows = []
    for location, row in _plain_rows(source):
        with located_errors(location):
            row = with_prompt(row)
            check_prompt(row)
        prompt_rows.append(row)
    return prompt_rows


def _plain_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source with plain messages, each with its location."""
    for location, row in located_rows(source):
        with located_errors(location):
            row = normalize_row(row)
        yield location, row


@contextlib.contextmanager
def located_errors(location: str) -> Iterator[None]:
    """Prefix the message of a ValueError with the location of the row, and raise it as UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error


def _scored_records(row: Mapping[str, Any], kind: Kind, tokenizer, context: ImportContext) -> list[Record]:
    """The records of a row with rewards or scores."""
    if kind.tokens:
        return [_token_record(row, context)]
    if kind.answers and not kind.completion:
        return _answer_records(row, kind, tokenizer, context, allow_ranks=False)
    return [_completion_record(row, tokenizer, context)]


def _token_record(row: Mapping[str, Any], context: ImportContext) -> Record:
    if context.score not in (None, "rewards"):
        raise UserError("a row with 'tokens' has its rewards in 'rewards', one per token: omit --score")
    # Datasets converted from a buffer have one entry per action, and name the group `group` instead of `group_id`.
    if "group" in row and "group_id" not in row:
        fields = ("tokens", "action_mask", "rewards", *STATISTICS, "group", "prompt", "user", *FEEDBACK)
        missing = [name for name in fields[:3] if name not in row]
        if missing:
            raise UserError(
                f"field {missing[0]!r} is missing: a row with 'tokens' also needs 'action_mask' and 'rewards'"
            )
        return Record(**{name: row[name] for name in fields if name in row})
    return record_from_json(row, check=False)


def _completion_record(row: Mapping[str, Any], tokenizer, context: ImportContext) -> Record:
    check_prompt(row)
    check_completion("completion", require_field(row, "completion", "the answer that the reward scores"))
    name = context.score or "reward"
    if name in row or context.reward is None:
        reward = require_field(row, name, "a number, or a list with one number per assistant turn")
        context.check_score_source(name, "")
    else:
        context.check_score_source(None, "")
        prompt_fields = {key: value for key, value in row.items() if key != "completion"}
        reward = context.reward(prompt_fields, answer_text(row["completion"]))
    encoded = _encode(tokenizer, row, row["completion"])
    turns = len(encoded.turn_ends)
    values = reward if isinstance(reward, list) else [reward]
    if isinstance(reward, list) and len(reward) != turns:
        raise UserError(
            f"field {name!r} has {len(reward)} entries, but the completion has {turns} assistant turns: give one "
            "number per turn, or a single number"
        )
    for value in values:
        if not isinstance(value, int | float) or not abs(value) <= _MAX_REWARD:
            raise UserError(f"field {name!r} contains {json.dumps(value, default=str)[:60]}: expected finite numbers")
    feedback = {"label": bool(row["label"])} if context.score is None and row.get("label") in (0, 1) else {}
    if context.score is not None and not isinstance(reward, list):
        feedback["score"] = float(reward)
    return _record(row, encoded, values, _group(row), **feedback)


def _labeled_record(row: Mapping[str, Any], tokenizer) -> Record:
    """The record of an answer with a label; its reward is 1 or 0."""
    check_prompt(row)
    check_completion("completion", require_field(row, "completion", "the labeled answer"))
    label = row["label"]
    if not isinstance(label, int | float) or label not in (0, 1):
        raise UserError(f"field 'label' is {json.dumps(label, default=str)[:60]}: expected {_LABEL_FORMAT}")
    encoded = _encode(tokenizer, row, row["completion"])
    return _record(row, encoded, [float(label)], _group(row), label=bool(label))


def _pair_records(row: Mapping[str, Any], tokenizer, number: int) -> list[Record]:
    """The records of the chosen and the rejected answer, with rewards 1 and 0."""
    answers = extract_answers(row)
    group = _digest([number, answers.row["prompt"], *answers.texts])
    for name, text in zip(("chosen", "rejected"), answers.texts, strict=True):
        check_completion(name, text)
    scores = answers.scores or (None, None)
    return [
        _record(answers.row, _encode(tokenizer, answers.row, text), [float(chosen)], group, chosen=chosen, score=score)
        for text, chosen, score in zip(answers.texts, (True, False), scores, strict=True)
    ]


def _answer_records(
    row: Mapping[str, Any], kind: Kind, tokenizer, context: ImportContext, *, allow_ranks: bool
) -> list[Record]:
    """The records of a row with several answers; `allow_ranks` accepts ranks without scores, with rewards of 0."""
    answers, skipped = extract_answers(row, context.score), context.skipped
    check_prompt(answers.row)
    if not answers.texts:
        skipped["prompts without an answer"] += 1
        return []
    if allow_ranks and answers.scores is None and answers.ranks is not None:
        context.check_score_source("rank", "")
        rewards = [0.0] * len(answers.texts)
    elif context.check_score_source(answers.field, _missing_scores_hint(answers, kind)):
        rewards = answers.scores
    else:
        rewards = [
            None if _is_empty(text) else context.reward(answers.row, answer_text(text)) for text in answers.texts
        ]
    records, missing = [], [None] * len(answers.texts)
    columns = {
        "chosen": (True, False) if kind.pair else missing,
        "rank": answers.ranks or missing,
        "score": answers.scores or missing,
    }
    for number, (text, reward) in enumerate(zip(answers.texts, rewards, strict=True)):
        if _is_empty(text):
            skipped["empty answers"] += 1
        elif reward is None:
            skipped[f"answers without a number in {answers.field!r}"] += 1
        else:
            check_completion("answer", text)
            encoded = _encode(tokenizer, answers.row, text)
            feedback = {name: values[number] for name, values in columns.items()}
            records.append(_record(answers.row, encoded, [reward], _group(answers.row), **feedback))
    return records


def _best_and_worst(records: list[Record], group: str, context: ImportContext) -> list[Record]:
    """The pair chosen by `select_pair`, as records of `group`; empty if all answers tie."""
    feedback = ([getattr(record, name) for record in records] for name in ("chosen", "rank", "score"))
    indices = select_pair(*feedback, np.array([record.rewards.sum() for record in records])) if records else None
    if indices is None:
        context.skipped["prompts without two answers that differ in score or rank"] += 1
        return []
    pair = [dataclasses.replace(records[index], group=group) for index in indices]
    if all(record.rank is not None and record.score is None for record in pair):
        pair[0] = dataclasses.replace(pair[0], rewards=[*pair[0].rewards[:-1], 1.0])
    return pair


def _missing_scores_hint(answers: Answers, kind: Kind) -> str:
    remedy = "score the answers with --reward module:function"
    if answers.ranks is not None:
        return f"ranks are not rewards, so {remedy}, or train on their order with dpo"
    if kind.pair:
        return f"add score_chosen and score_rejected, {remedy}, or train on chosen and rejected with dpo"
    return f"{remedy}, or name the score field with --score (recognized by default: {', '.join(SCORE_FIELDS)})"


def _is_empty(answer: Any) -> bool:
    """Whether an answer has no content; some datasets contain such answers."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(not isinstance(turn, Mapping) or turn.get("content") or turn.get("tool_calls") for turn in answer)


def _encode(tokenizer, row: Mapping[str, Any], completion: Any) -> Encoded:
    return encode_completion(tokenizer, row["prompt"], completion, row.get("tools"))


def _record(row: Mapping[str, Any], encoded: Encoded, rewards: list[float], group: str, **feedback: Any) -> Record:
    """Build a record; its `prompt` is the row without the answers.

    Args:
        row: the row.
        encoded: the tokenized sequence.
        rewards: rewards of the last `len(rewards)` assistant turns.
        group: name of the group.
        **feedback: the `chosen`, `label`, `rank` and `score` of the record.
    """
    per_token = np.zeros(len(encoded.tokens), np.float32)
    per_token[encoded.turn_ends[-len(rewards) :]] = rewards
    excluded = ("completion", "reward", "label", "chosen", "rejected", "messages", "group_id", "user_id", "text")
    prompt_fields = {name: value for name, value in row.items() if name not in excluded}
    return Record(
        tokens=encoded.tokens,
        action_mask=encoded.action_mask,
        rewards=per_token[encoded.action_mask],
        group=group,
        prompt=json.dumps(prompt_fields, ensure_ascii=False, default=str) if "prompt" in row else None,
        user=normalize_id("user_id", row["user_id"]) if "user_id" in row else None,
        **feedback,
    )


def _group(row: Mapping[str, Any]) -> str:
    return (
        normalize_id("group_id", row["group_id"]) if "group_id" in row else _digest([row["prompt"], row.get("tools")])
    )


def _digest(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
