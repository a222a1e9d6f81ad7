"""Someone's data as records: scored trajectories, preferences, demonstrations; and prompts.

    trajectories    {"prompt", "completion", "reward"}           reward: a number, or a list with one per assistant turn
                    {"tokens", "action_mask", "rewards"}         one entry per token; optional logp, lse, behaviour_logp
    preferences     {"prompt", "chosen", "rejected"}             answers, or whole conversations, as in TRL
    labelled        {"prompt", "completion", "label"}            label: true or false, as in TRL; also the rows above
    demonstrations  {"prompt", "completion"} or {"messages"} or {"text"}
    prompts         {"prompt", ...}                              other fields are for the reward

Trajectories and preferences also read rows with several answers to a prompt, see `shiq_jax.data.answers`. A prompt is
text or messages, a completion is text or the messages that follow. Optional everywhere: `group_id` (default: rows with
one prompt form a group), `user_id`, and `tools` for chat templates that take them. `files.located_rows` says which
files, directories and hub ids can be read; every complaint names the row's place and field.
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

from shiq_jax.data.answers import SCORES, Answers, answer_text, prompt_row, split_answers
from shiq_jax.data.chat import Encoded, encode_completion, encode_text
from shiq_jax.data.fields import check_prompt, check_text, field, split_conversation
from shiq_jax.data.files import located_rows, read_jsonl, rows
from shiq_jax.data.import_context import ImportContext
from shiq_jax.data.kinds import Kind, classify
from shiq_jax.errors import UserError
from shiq_jax.replay.export import record_from_json
from shiq_jax.replay.preference import chosen_and_rejected
from shiq_jax.replay.records import JUDGEMENTS, STATISTICS, Record

_LARGEST_REWARD = float(np.finfo(np.float32).max)
_LABEL = "true for a desirable answer, false for an undesirable one"

__all__ = [
    "ImportContext",
    "demonstrations",
    "labelled",
    "preferences",
    "prompts",
    "read_jsonl",
    "rows",
    "trajectories",
]


def trajectories(source: str | Path, tokenizer, reading: ImportContext | None = None) -> Iterator[Record]:
    """Records of scored sequences: text with `reward`, tokens with `rewards`, or several answers with scores.

    A number as reward stands on the last action; a list stands on the last action of each assistant turn, in order.
    Answers of one row form a group; those that are empty or have no score are left out and counted. Raises UserError
    naming the row and the field that is missing or wrong.
    """
    reading = reading or ImportContext()
    for place, row in located_rows(source):
        with located_errors(place):
            kind = classify(row, reading.score)
            found = [record for record in _scored(row, kind, tokenizer, reading) if reading.wanted(record)]
        yield from found


def preferences(source: str | Path, tokenizer, reading: ImportContext | None = None) -> Iterator[Record]:
    """Two records of one group for every preference, the better answer first.

    Either `chosen` and `rejected`, or of several answers with scores or ranks the best and the worst that can be used;
    prompts whose answers tie are left out and counted. Scores are rewards; without scores the better answer has the
    reward 1 and the other one 0. `reading.score` makes scores count also where there are `chosen` and `rejected`.
    Conversational answers may be given alone or with the whole conversation before them; without `prompt`, what both
    share at the beginning is the prompt. Every row is a group of its own, also when its prompt occurs again.
    """
    reading = reading or ImportContext()
    for number, (place, row) in enumerate(located_rows(source)):
        with located_errors(place):
            kind = classify(row, reading.score)
            if kind.pair or not kind.answers:
                found = _from_pair(row, tokenizer, number)
                found = found if all(reading.wanted(record) for record in found) else ()
            else:
                found = filter(reading.wanted, _from_answers(row, kind, tokenizer, reading, ranked=True))
                found = _extremes(list(found), _digest([number, row]), reading)
        yield from found


def labelled(source: str | Path, tokenizer, reading: ImportContext | None = None) -> Iterator[Record]:
    """Records of single answers that are good or bad, or have scores from which that will be told.

    A `label` is true or 1 for a desirable answer, false or 0 for an undesirable one. Of `chosen` and `rejected`, the
    one is desirable and the other is not. Either way the rewards are 1 and 0. Other rows, and with `reading.score` all,
    are read as `trajectories` reads them. Rows of one source all have labels or all have scores.
    """
    reading = reading or ImportContext()
    for number, (place, row) in enumerate(located_rows(source)):
        with located_errors(place):
            kind = classify(row, reading.score)
            if kind.tokens:
                reading.settle("label" if kind.label else "rewards", "")
                found = [_from_tokens(row, reading)]
            elif kind.labelled:
                reading.settle("label", "")
                found = _from_pair(row, tokenizer, number) if kind.pair else [_from_label(row, tokenizer)]
            else:
                if kind.completion and not kind.scored and (reading.score or reading.reward) is None:
                    field(row, "label", _LABEL)
                found = _scored(row, kind, tokenizer, reading)
            found = [record for record in found if reading.wanted(record)]
        yield from found


def demonstrations(source: str | Path, tokenizer, reading: ImportContext | None = None) -> Iterator[Record]:
    """Records without rewards, for the supervised loss.

    `prompt` and `completion`: the completion's actions count. `messages`: every assistant turn counts. `text`:
    everything counts but its first token, which nothing predicts.
    """
    reading = reading or ImportContext()
    for place, row in located_rows(source):
        with located_errors(place):
            kind = classify(row)
            if kind.messages:
                row = row | split_conversation(row["messages"])
            if kind.text and not kind.messages and not kind.completion:
                check_text("text", row["text"])
                group = str(row.get("group_id", _digest(row["text"])))
                record = _record(row, encode_text(tokenizer, row["text"]), [0.0], group)
            else:
                check_prompt(row)
                check_text("completion", field(row, "completion", "the answer that is to be imitated"))
                record = _record(row, _encode(tokenizer, row, row["completion"]), [0.0], _group(row))
            wanted = reading.wanted(record)
        if wanted:
            yield record


def prompts(source: str | Path) -> list[dict[str, Any]]:
    """All rows of a source, each with a `prompt` that is text or messages; its other fields are kept for the reward.

    An `instruction` is a prompt of one message, and conversations `chosen` and `rejected` say what their prompt is.
    """
    found = []
    for place, row in located_rows(source):
        with located_errors(place):
            row = prompt_row(row)
            check_prompt(row)
        found.append(row)
    return found


@contextlib.contextmanager
def located_errors(place: str) -> Iterator[None]:
    """Put the place of a row in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def _scored(row: Mapping[str, Any], kind: Kind, tokenizer, reading: ImportContext) -> list[Record]:
    """The answers of a row with their rewards."""
    if kind.tokens:
        return [_from_tokens(row, reading)]
    if kind.answers and not kind.completion:
        return _from_answers(row, kind, tokenizer, reading, ranked=False)
    return [_from_scored_text(row, tokenizer, reading)]


def _from_tokens(row: Mapping[str, Any], reading: ImportContext) -> Record:
    if reading.score not in (None, "rewards"):
        raise UserError("a row with 'tokens' has its rewards in 'rewards', one per token: leave --score out")
    # A dataset made from a buffer keeps per-action columns compact and calls the group by its field's name.
    if "group" in row and "group_id" not in row:
        fields = ("tokens", "action_mask", "rewards", *STATISTICS, "group", "prompt", "user", *JUDGEMENTS)
        missing = [name for name in fields[:3] if name not in row]
        if missing:
            raise UserError(
                f"field {missing[0]!r} is missing: a row with 'tokens' also needs 'action_mask' and 'rewards'"
            )
        return Record(**{name: row[name] for name in fields if name in row})
    return record_from_json(row, check=False)


def _from_scored_text(row: Mapping[str, Any], tokenizer, reading: ImportContext) -> Record:
    check_prompt(row)
    check_text("completion", field(row, "completion", "the answer whose reward this is"))
    name = reading.score or "reward"
    if name in row or reading.reward is None:
        reward = field(row, name, "a number, or a list with one number per assistant turn")
        reading.settle(name, "")
    else:
        reading.settle(None, "")
        unanswered = {key: value for key, value in row.items() if key != "completion"}
        reward = reading.reward(unanswered, answer_text(row["completion"]))
    encoded = _encode(tokenizer, row, row["completion"])
    turns = len(encoded.turn_ends)
    values = reward if isinstance(reward, list) else [reward]
    if isinstance(reward, list) and len(reward) != turns:
        raise UserError(
            f"field {name!r} has {len(reward)} entries, but the completion has {turns} assistant turns: give one "
            "number per turn, or a single number for all"
        )
    for value in values:
        if not isinstance(value, int | float) or not abs(value) <= _LARGEST_REWARD:
            raise UserError(f"field {name!r} holds {json.dumps(value, default=str)[:60]}: expected finite numbers")
    judged = {"label": bool(row["label"])} if reading.score is None and row.get("label") in (0, 1) else {}
    if reading.score is not None and not isinstance(reward, list):
        judged["score"] = float(reward)
    return _record(row, encoded, values, _group(row), **judged)


def _from_label(row: Mapping[str, Any], tokenizer) -> Record:
    """An answer with its label; its reward is 1 or 0."""
    check_prompt(row)
    check_text("completion", field(row, "completion", "the answer that the label is about"))
    label = row["label"]
    if not isinstance(label, int | float) or label not in (0, 1):
        raise UserError(f"field 'label' holds {json.dumps(label, default=str)[:60]}: expected {_LABEL}")
    encoded = _encode(tokenizer, row, row["completion"])
    return _record(row, encoded, [float(label)], _group(row), label=bool(label))


def _from_pair(row: Mapping[str, Any], tokenizer, number: int) -> list[Record]:
    """The chosen and the rejected answer; their rewards are 1 and 0."""
    found = split_answers(row)
    group = _digest([number, found.row["prompt"], *found.texts])
    for name, answer in zip(("chosen", "rejected"), found.texts, strict=True):
        check_text(name, answer)
    scores = found.scores or (None, None)
    return [
        _record(found.row, _encode(tokenizer, found.row, answer), [float(chosen)], group, chosen=chosen, score=score)
        for answer, chosen, score in zip(found.texts, (True, False), scores, strict=True)
    ]


def _from_answers(
    row: Mapping[str, Any], kind: Kind, tokenizer, reading: ImportContext, *, ranked: bool
) -> list[Record]:
    """The answers of a row with their rewards; with `ranked`, ranks do where there are no scores."""
    found, left_out = split_answers(row, reading.score), reading.left_out
    check_prompt(found.row)
    if not found.texts:
        left_out["prompts without an answer"] += 1
        return []
    if ranked and found.scores is None and found.ranks is not None:
        reading.settle("rank", "")
        rewards = [0.0] * len(found.texts)
    elif reading.settle(found.field, _without_scores(found, kind)):
        rewards = found.scores
    else:
        rewards = [reading.reward(found.row, answer_text(text)) if _is_said(text) else None for text in found.texts]
    records, absent = [], [None] * len(found.texts)
    judged = {
        "chosen": (True, False) if kind.pair else absent,
        "rank": found.ranks or absent,
        "score": found.scores or absent,
    }
    for number, (text, reward) in enumerate(zip(found.texts, rewards, strict=True)):
        if not _is_said(text):
            left_out["empty answers"] += 1
        elif reward is None:
            left_out[f"answers without a number in {found.field!r}"] += 1
        else:
            check_text("answer", text)
            encoded = _encode(tokenizer, found.row, text)
            about = {name: values[number] for name, values in judged.items()}
            records.append(_record(found.row, encoded, [reward], _group(found.row), **about))
    return records


def _extremes(records: list[Record], group: str, reading: ImportContext) -> list[Record]:
    """The best and the worst of some answers, the earlier of equal ones, in a group of their own; or none."""
    judged = ([getattr(record, name) for record in records] for name in ("chosen", "rank", "score"))
    places = chosen_and_rejected(*judged, np.array([record.rewards.sum() for record in records])) if records else None
    if places is None:
        reading.left_out["prompts without two answers that differ in score or rank"] += 1
        return []
    pair = [dataclasses.replace(records[place], group=group) for place in places]
    if all(record.rank is not None and record.score is None for record in pair):
        pair[0] = dataclasses.replace(pair[0], rewards=[*pair[0].rewards[:-1], 1.0])
    return pair


def _without_scores(found: Answers, kind: Kind) -> str:
    asked = "score the answers with --reward module:function"
    if found.ranks is not None:
        return f"ranks are no rewards, so {asked}, or learn from their order with dpo"
    if kind.pair:
        return f"add score_chosen and score_rejected, {asked}, or learn from chosen and rejected with dpo"
    return f"{asked}, or name the field that holds them (known are {', '.join(SCORES)}) with --score"


def _is_said(answer: Any) -> bool:
    """Whether an answer says anything: data sets hold empty ones."""
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(not isinstance(turn, Mapping) or turn.get("content") or turn.get("tool_calls") for turn in answer)


def _encode(tokenizer, row: Mapping[str, Any], completion: Any) -> Encoded:
    return encode_completion(tokenizer, row["prompt"], completion, row.get("tools"))


def _record(row: Mapping[str, Any], encoded: Encoded, rewards: list[float], group: str, **judged: Any) -> Record:
    """A record with rewards on the ends of the last `len(rewards)` turns; it keeps the row without its answers.

    judged: what the row says of the answer, by the names of `Record`.
    """
    per_token = np.zeros(len(encoded.tokens), np.float32)
    per_token[encoded.turn_ends[-len(rewards) :]] = rewards
    dropped = ("completion", "reward", "label", "chosen", "rejected", "messages", "group_id", "user_id", "text")
    kept = {name: value for name, value in row.items() if name not in dropped}
    return Record(
        tokens=encoded.tokens,
        action_mask=encoded.action_mask,
        rewards=per_token[encoded.action_mask],
        group=group,
        prompt=json.dumps(kept, ensure_ascii=False, default=str) if "prompt" in kept else None,
        user=str(row["user_id"]) if "user_id" in row else None,
        **judged,
    )


def _group(row: Mapping[str, Any]) -> str:
    return str(row["group_id"]) if "group_id" in row else _digest([row["prompt"], row.get("tools")])


def _digest(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
