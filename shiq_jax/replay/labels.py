"""Answers that are good or bad, by their labels or a threshold on returns, each paired with one of another prompt."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int8

from shiq_jax.errors import UserError
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import JUDGEMENTS, STATISTICS, Record

# Of what returns are that rounding may have moved off the mean of equal ones.
_ROUNDING = 1e-6


def given_labels(buffer: Buffer) -> Int8[np.ndarray, " records"]:
    """1 for a record that the data call desirable or chosen, 0 for undesirable or rejected, -1 for neither."""
    said = zip(buffer.column("label"), buffer.column("chosen"), strict=True)
    known = [chosen if label is None else label for label, chosen in said]
    return np.array([-1 if value is None else value for value in known], np.int8)


def labels(buffer: Buffer, threshold: float | None) -> Int8[np.ndarray, " records"]:
    """1 for a good record, 0 for a bad one, -1 for a tie: `given_labels`, elsewhere returns against the threshold.

    threshold: None compares each return with the mean of its group.
    """
    given, returns = given_labels(buffer), buffer.returns()
    if threshold is None:
        _, members = np.unique(np.array(buffer.group_ids(), dtype=object), return_inverse=True)
        means = (np.bincount(members, returns) / np.bincount(members))[members]
        tied = np.isclose(returns, means, rtol=_ROUNDING, atol=0)
    else:
        means = np.full(len(returns), threshold)
        tied = returns == means
    return np.where(given >= 0, given, np.where(tied, -1, returns > means)).astype(np.int8)


def mismatches(prompts: Sequence[bytes]) -> list[int]:
    """For each place one where another prompt stands, counted cyclically: as far on as its own prompt stands in a row.

    So answers to one prompt are given different answers to the next one, and single answers that of the next prompt.
    Where the prompt is the same again, the next place with another one.

    Raises UserError when there is no other prompt.
    """
    size = len(prompts)
    if len(set(prompts)) < 2:
        raise UserError(
            "kto measures a KL on answers to other prompts, but all answers that can be learned from have one prompt: "
            "give more prompts, or take --loss.name apo_zero_unpaired, which does without"
        )
    following = [0] * size
    for place in (*reversed(range(size)), *reversed(range(size))):
        after = (place + 1) % size
        following[place] = after if prompts[after] != prompts[place] else following[after]
    runs = [length for _, run in itertools.groupby(prompts) for length in [len(list(run))] for _ in range(length)]
    places = [(place + run) % size for place, run in enumerate(runs)]
    return [other if prompts[other] != prompts[place] else following[other] for place, other in enumerate(places)]


def labelled(
    buffer: Buffer, threshold: float | None = None, *, mismatched: bool = True, longest: int | None = None
) -> Iterator[Record]:
    """The records of a buffer that are good or bad, each with its label.

    Args:
        buffer: answers with labels or rewards.
        threshold: see `labels`; ties are left out.
        mismatched: after each record comes another one: its prompt, with an answer to another prompt; the two form a
            group of their own. Without, records keep their groups.
        longest: tokens at which a mismatched sequence is cut off.

    Raises:
        UserError: every record ties, or mismatched sequences are asked for and there is one prompt only.
    """
    wanted = labels(buffer, threshold)
    kept = np.flatnonzero(wanted >= 0).tolist()
    if not kept:
        against = "the mean of its prompt's answers" if threshold is None else f"the threshold {threshold:g}"
        raise UserError(
            f"no answer is better or worse than {against}, so none is desirable or undesirable: give several answers "
            "of unlike reward to a prompt, or labels, or say with --threshold from which reward on answers are good"
        )
    others = mismatches([_digest(_prompt(buffer[number])) for number in kept]) if mismatched else ()
    for place, number in enumerate(kept):
        answer = dataclasses.replace(buffer[number], label=bool(wanted[number]))
        if not mismatched:
            yield answer
            continue
        answer = dataclasses.replace(answer, group=f"{answer.group} #{number}")
        yield answer
        yield _swapped(answer, buffer[kept[others[place]]], longest)


def _prompt(record: Record) -> np.ndarray:
    """The tokens before the first action."""
    return record.tokens[: int(np.argmax(record.action_mask))]


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _swapped(record: Record, other: Record, longest: int | None) -> Record:
    """The record's prompt with the other's answer, of which nothing else is known."""
    prompt, theirs = _prompt(record), len(_prompt(other))
    mask = np.concatenate([np.zeros(len(prompt), bool), other.action_mask[theirs:]])[:longest]
    return dataclasses.replace(
        record,
        tokens=np.concatenate([prompt, other.tokens[theirs:]])[:longest],
        action_mask=mask,
        rewards=np.zeros(int(mask.sum()), np.float32),
        prompt=None,
        **dict.fromkeys((*STATISTICS, *JUDGEMENTS)),
    )
