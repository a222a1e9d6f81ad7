"""One sequence and what is known of it: the unit that the replay buffer stores."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32

from shiq_jax.errors import UserError

# A log-probability may leave zero by rounding; a value beyond this is a sign mistake (negative log-likelihoods).
POSITIVE_LOGP_TOLERANCE = 0.1

# The per-action columns that a record may lack.
STATISTICS = ("behaviour_logp", "logp", "lse")
# What the data say of an answer beside its rewards.
JUDGEMENTS = ("chosen", "label", "rank", "score")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One sequence with its actions, rewards and the sampler's statistics; `N` tokens of which `A` are actions.

    Per-action arrays are compact: entry `i` belongs to the `i`-th True of `action_mask`. Sequences and arrays of other
    number types are converted; what cannot be converted without loss raises ValueError. Call `validate` for the rest.

    Attributes:
        tokens: int32[N], prompt and completion(s) as the model reads them.
        action_mask: bool[N], True at tokens that the policy chose; the first entry is False, for a token without a
            predecessor has no prediction.
        rewards: float32[A], the reward for emitting each action; a sequence reward sits on the last one.
        behaviour_logp: float32[A] or None, nats under the distribution that was really sampled (temperature, top-k,
            top-p).
        logp: float32[A] or None, the sampler's log-probability of each action at temperature 1, in nats.
        lse: float32[A] or None, the sampler's log-sum-exp of the raw logits that predict each action.
        group: records of one group answer the same prompt; the name is global, also across concatenated buffers.
        prompt: JSON of the row that made the sequence, or None.
        user: whose data this is, or None.
        chosen: True for the chosen and False for the rejected answer of a preference.
        label: whether the answer is desirable.
        rank: place among the answers to its prompt, the smallest being the best.
        score: the number that the data give the whole answer.

    `chosen`, `label`, `rank` and `score` hold what the data say, and None where they say nothing.
    """

    tokens: Int32[np.ndarray, " N"]
    action_mask: Bool[np.ndarray, " N"]
    rewards: Float32[np.ndarray, " A"]
    behaviour_logp: Float32[np.ndarray, " A"] | None = None
    logp: Float32[np.ndarray, " A"] | None = None
    lse: Float32[np.ndarray, " A"] | None = None
    group: str
    prompt: str | None = None
    user: str | None = None
    chosen: bool | None = None
    label: bool | None = None
    rank: float | None = None
    score: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "tokens", _integers(self.tokens))
        object.__setattr__(self, "action_mask", _booleans(self.action_mask))
        object.__setattr__(self, "rewards", _floats("rewards", self.rewards))
        for name in STATISTICS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _floats(name, getattr(self, name)))
        for name, convert in (("chosen", _truth), ("label", _truth), ("rank", _number), ("score", _number)):
            object.__setattr__(self, name, convert(name, getattr(self, name)))

    def __eq__(self, other: object) -> bool:
        """Same texts and bitwise equal arrays."""
        if not isinstance(other, Record):
            return NotImplemented
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray):
                if mine.shape != theirs.shape or mine.tobytes() != theirs.tobytes():
                    return False
            elif isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray) or mine != theirs:
                return False
        return True

    __hash__ = None


def validate(record: Record, vocab_size: int | None = None, name: str = "record") -> None:
    """Raises UserError, in one sentence that begins with `name`, unless the record can be trained on.

    Checked are lengths, that there is an action and none without a predecessor, token ids (below `vocab_size` when it
    is given), finite rewards, statistics, rank and score, and texts that UTF-8 can hold.
    """
    tokens, mask = record.tokens, record.action_mask
    _check_texts(record, name)
    where = f"{name} (group {record.group!r})"
    if mask.shape != tokens.shape:
        raise UserError(
            f"{where}: action_mask has {mask.size} entries for {tokens.size} tokens; give one entry per token."
        )
    actions = int(mask.sum())
    if actions == 0:
        raise UserError(
            f"{where}: none of its {tokens.size} tokens is an action; mark the completion in action_mask or leave "
            "it out."
        )
    if mask[0]:
        raise UserError(
            f"{where}: its first token is marked as an action, but nothing predicts it; put a prompt or a BOS token "
            "before it."
        )
    if tokens.min() < 0:
        raise UserError(f"{where}: token id {int(tokens.min())} is negative; ids start at 0.")
    if vocab_size is not None and tokens.max() >= vocab_size:
        raise UserError(
            f"{where}: token id {int(tokens.max())} lies outside the vocabulary of {vocab_size}; "
            "encode the data with the tokenizer of this model."
        )
    for column in ("rewards", *STATISTICS):
        values = getattr(record, column)
        if values is not None:
            _check_column(where, column, values, actions)
    for column in ("rank", "score"):
        value = getattr(record, column)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{where}: {column} is {value}; give a finite number or none.")
    if record.lse is not None and record.logp is None:
        raise UserError(f"{where}: it has lse without logp; give both or neither.")


def _check_texts(record: Record, name: str) -> None:
    if not isinstance(record.group, str) or not record.group:
        raise UserError(f"{name}: its group is {record.group!r}; give a non-empty string.")
    for field in ("group", "prompt", "user"):
        text = getattr(record, field)
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{name}: its {field} is of type {type(text).__name__}; give a string.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name}: its {field} holds a lone surrogate at character {error.start}, which UTF-8 cannot store; "
                "repair the text."
            ) from error


def _check_column(where: str, column: str, values: np.ndarray, actions: int) -> None:
    if values.size != actions:
        raise UserError(f"{where}: {column} has {values.size} entries for {actions} actions; give one per action.")
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        raise UserError(f"{where}: {column} is {values[at]} at action {at}; every entry must be finite.")
    if column != "rewards" and column != "lse" and values.max() > POSITIVE_LOGP_TOLERANCE:
        raise UserError(
            f"{where}: {column} holds {values.max():.4g}, but a log-probability is at most 0; "
            "negative log-likelihoods need their sign flipped."
        )


def _integers(values: Sequence[int] | np.ndarray) -> Int32[np.ndarray, " N"]:
    array = _flat("tokens", values, np.int32)
    if array.dtype == np.int32:
        return array
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens have dtype {array.dtype}; give integer token ids.")
    bound = np.iinfo(np.int32)
    if array.size and (array.max() > bound.max or array.min() < bound.min):
        raise ValueError(f"tokens hold {array.max()}, which does not fit into 32 bits; give token ids.")
    return array.astype(np.int32)


def _booleans(values: Sequence[bool] | np.ndarray) -> Bool[np.ndarray, " N"]:
    array = _flat("action_mask", values, np.bool_)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iu" or (array.size and (array.max() > 1 or array.min() < 0)):
        raise ValueError("action_mask holds something other than true, false, 1 and 0; give one of these per token.")
    return array.astype(np.bool_)


def _floats(name: str, values: Sequence[float] | np.ndarray) -> Float32[np.ndarray, " A"]:
    array = _flat(name, values, np.float32)
    if array.dtype == np.float32:
        return array
    if array.dtype.kind not in "iufb" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} has dtype {array.dtype}; give numbers.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _truth(name: str, value: bool | None) -> bool | None:
    if value is None or isinstance(value, bool | np.bool_):
        return value if value is None else bool(value)
    raise ValueError(f"{name} is {str(value)[:60]!r}; give true, false or none.")


def _number(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name} is {str(value)[:60]!r}; give a number or none.")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} does not fit into a float; give a smaller number.") from error


def _flat(name: str, values: Sequence | np.ndarray, dtype: type) -> np.ndarray:
    """A flat array; of `dtype` when it is empty, for an empty list has no type of its own."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is not a flat list of numbers; give one number per entry.") from error
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give a flat array.")
    return array if array.size else array.astype(dtype)
