"""Binary labels for KTO: which answers are desirable, and mismatched answers for its KL estimate."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int8

from shiq_jax.errors import UserError
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import FEEDBACK, STATISTICS, Record

# The mean of equal returns may differ from them by rounding.
_RELATIVE_TOLERANCE = 1e-6


def explicit_labels(buffer: Buffer) -> Int8[np.ndarray, " records"]:
    """Labels in the data: 1 for label true or chosen, 0 for label false or rejected, -1 for unlabeled records."""
    columns = zip(buffer.column("label"), buffer.column("chosen"), strict=True)
    values = [chosen if label is None else label for label, chosen in columns]
    return np.array([-1 if value is None else value for value in values], np.int8)


def assign_labels(buffer: Buffer, threshold: float | None) -> Int8[np.ndarray, " records"]:
    """Label every record: 1 desirable, 0 undesirable, -1 tied.

    `explicit_labels` take precedence; records without one are labeled by comparing their return with the threshold.

    Args:
        buffer: the records.
        threshold: return above which a record is desirable; None compares with the mean return of its group.
    """
    explicit, returns = explicit_labels(buffer), buffer.returns()
    if threshold is None:
        _, members = np.unique(np.array(buffer.group_ids(), dtype=object), return_inverse=True)
        means = (np.bincount(members, returns) / np.bincount(members))[members]
        tied = np.isclose(returns, means, rtol=_RELATIVE_TOLERANCE, atol=0)
    else:
        means = np.full(len(returns), threshold)
        tied = returns == means
    return np.where(explicit >= 0, explicit, np.where(tied, -1, returns > means)).astype(np.int8)


def mismatched_indices(prompts: Sequence[bytes]) -> list[int]:
    """For each answer, the index of an answer to another prompt.

    The index is shifted cyclically by the number of consecutive answers to the same prompt, so that the answers to one
    prompt are matched with different answers to the next. If the shifted index has the same prompt, the next answer to
    another prompt is used.

    Args:
        prompts: the prompt of each answer, or a digest of it.

    Raises:
        UserError: all prompts are equal.
    """
    size = len(prompts)
    if len(set(prompts)) < 2:
        raise UserError(
            "kto estimates its KL on answers to other prompts, but all usable answers have the same prompt: "
            "add prompts, or use --loss.name apo_zero_unpaired, which needs no KL estimate"
        )
    next_prompt = [0] * size
    for index in (*reversed(range(size)), *reversed(range(size))):
        successor = (index + 1) % size
        next_prompt[index] = successor if prompts[successor] != prompts[index] else next_prompt[successor]
    run_lengths = [
        length for _, run in itertools.groupby(prompts) for length in [len(list(run))] for _ in range(length)
    ]
    shifted = [(index + length) % size for index, length in enumerate(run_lengths)]
    return [match if prompts[match] != prompts[index] else next_prompt[match] for index, match in enumerate(shifted)]


def labeled_records(
    buffer: Buffer, threshold: float | None = None, *, mismatched: bool = True, max_length: int | None = None
) -> Iterator[Record]:
    """Yield the records of a buffer that are desirable or undesirable, with their labels; ties are skipped.

    Args:
        buffer: answers with labels or rewards.
        threshold: see `assign_labels`.
        mismatched: follow each record by its prompt with an answer to another prompt, in a new group of the two.
            If False, records keep their groups.
        max_length: mismatched sequences are truncated to this many tokens.

    Raises:
        UserError: all records tie, or `mismatched` is set and all prompts are equal.
    """
    labels = assign_labels(buffer, threshold)
    kept = np.flatnonzero(labels >= 0).tolist()
    if not kept:
        baseline = "the mean of its prompt's answers" if threshold is None else f"the threshold {threshold:g}"
        raise UserError(
            f"no answer is better or worse than {baseline}, so none is desirable or undesirable: provide several "
            "answers with different rewards per prompt, or labels, or set --threshold to the reward that separates them"
        )
    matches = mismatched_indices([_digest(_prompt(buffer[number])) for number in kept]) if mismatched else ()
    for index, number in enumerate(kept):
        record = dataclasses.replace(buffer[number], label=bool(labels[number]))
        if not mismatched:
            yield record
            continue
        record = dataclasses.replace(record, group=f"{record.group} #{number}")
        yield record
        yield _mismatch(record, buffer[kept[matches[index]]], max_length)


def _prompt(record: Record) -> np.ndarray:
    """The tokens before the first action."""
    return record.tokens[: int(np.argmax(record.action_mask))]


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _mismatch(record: Record, source: Record, max_length: int | None) -> Record:
    """The prompt of `record` followed by the answer of `source`, without rewards, statistics and feedback."""
    prompt, start = _prompt(record), len(_prompt(source))
    mask = np.concatenate([np.zeros(len(prompt), bool), source.action_mask[start:]])[:max_length]
    return dataclasses.replace(
        record,
        tokens=np.concatenate([prompt, source.tokens[start:]])[:max_length],
        action_mask=mask,
        rewards=np.zeros(int(mask.sum()), np.float32),
        prompt=None,
        **dict.fromkeys((*STATISTICS, *FEEDBACK)),
    )
