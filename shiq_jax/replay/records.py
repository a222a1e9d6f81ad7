"""The record: one sequence with its rewards, sampler statistics and feedback, as the replay buffer stores it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32

from shiq_jax.errors import UserError

# Rounding can make a log-probability slightly positive; a larger value is a negative log-likelihood.
POSITIVE_LOGP_TOLERANCE = 0.1

# Optional columns with one entry per action.
STATISTICS = ("behaviour_logp", "logp", "lse")
# Optional preferences, labels, ranks and scores from the data.
FEEDBACK = ("chosen", "label", "rank", "score")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One sequence of `N` tokens, of which `A` are actions, with rewards, sampler statistics and feedback.

    Per-action arrays are compact: entry `i` belongs to the `i`-th True of `action_mask`. Lists and arrays of other
    dtypes are converted; a lossy conversion raises ValueError. `validate` checks everything else.

    Attributes:
        tokens: int32[N], prompt and completion.
        action_mask: bool[N], True at tokens sampled from the policy. The first entry is False, because no logits
            predict the first token.
        rewards: float32[A], the reward of each action; a sequence reward is assigned to the last action.
        behaviour_logp: float32[A] or None, log-probability in nats under the sampling distribution (after temperature,
            top-k and top-p).
        logp: float32[A] or None, the sampler's log-probability of each action at temperature 1, in nats.
        lse: float32[A] or None, the sampler's log-sum-exp of the raw logits that predict each action.
        group: name shared by the answers to one prompt; concatenated buffers merge groups of the same name.
        prompt: JSON of the data row without its answers, or None.
        user: the user whose data this is, or None.
        chosen: True for the chosen and False for the rejected answer of a preference; None without one.
        label: whether the answer is desirable; None without a label.
        rank: rank among the answers to the prompt, lower is better; None without a rank.
        score: score of the whole answer in the data; None without a score.
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
        object.__setattr__(self, "tokens", _int_array(self.tokens))
        object.__setattr__(self, "action_mask", _bool_array(self.action_mask))
        object.__setattr__(self, "rewards", _float_array("rewards", self.rewards))
        for name in STATISTICS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _float_array(name, getattr(self, name)))
        for name, convert in (("chosen", _bool), ("label", _bool), ("rank", _float), ("score", _float)):
            object.__setattr__(self, name, convert(name, getattr(self, name)))

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; arrays are compared bitwise."""
        if not isinstance(other, Record):
            return NotImplemented
        for field in dataclasses.fields(self):
            left, right = getattr(self, field.name), getattr(other, field.name)
            if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
                if left.shape != right.shape or left.tobytes() != right.tobytes():
                    return False
            elif isinstance(left, np.ndarray) or isinstance(right, np.ndarray) or left != right:
                return False
        return True

    __hash__ = None


def validate(record: Record, vocab_size: int | None = None, name: str = "record") -> None:
    """Raise UserError unless the record can be trained on.

    Checks array lengths, token ids, that there is an action and the first token is not one, that rewards, statistics,
    rank and score are finite, and that strings can be encoded as UTF-8.

    Args:
        record: the record.
        vocab_size: token ids must be less than this; None skips the check.
        name: what the error message calls the record.
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
            f"{where}: none of its {tokens.size} tokens is an action; mark the completion in action_mask or drop "
            "the record."
        )
    if mask[0]:
        raise UserError(
            f"{where}: its first token is marked as an action, but no logits predict it; prepend a prompt or a BOS "
            "token."
        )
    if tokens.min() < 0:
        raise UserError(f"{where}: token id {int(tokens.min())} is negative; token ids start at 0.")
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
            raise UserError(f"{where}: {column} is {value}; give a finite number or null.")
    if record.lse is not None and record.logp is None:
        raise UserError(f"{where}: has lse but no logp; give both or neither.")


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
                f"{name}: its {field} has a lone surrogate at character {error.start}, which UTF-8 cannot encode; "
                "fix the text."
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
            f"{where}: {column} contains {values.max():.4g}, but log-probabilities are at most 0; "
            "flip the sign of negative log-likelihoods."
        )


def _int_array(values: Sequence[int] | np.ndarray) -> Int32[np.ndarray, " N"]:
    array = _flat_array("tokens", values, np.int32)
    if array.dtype == np.int32:
        return array
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens have dtype {array.dtype}; give integer token ids.")
    bound = np.iinfo(np.int32)
    if array.size and (array.max() > bound.max or array.min() < bound.min):
        raise ValueError(f"tokens contain {array.max()}, which does not fit into 32 bits; give token ids.")
    return array.astype(np.int32)


def _bool_array(values: Sequence[bool] | np.ndarray) -> Bool[np.ndarray, " N"]:
    array = _flat_array("action_mask", values, np.bool_)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iu" or (array.size and (array.max() > 1 or array.min() < 0)):
        raise ValueError("action_mask contains a value other than true, false, 1 and 0; give one of these per token.")
    return array.astype(np.bool_)


def _float_array(name: str, values: Sequence[float] | np.ndarray) -> Float32[np.ndarray, " A"]:
    array = _flat_array(name, values, np.float32)
    if array.dtype == np.float32:
        return array
    if array.dtype.kind not in "iufb" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} has dtype {array.dtype}; give numbers.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _bool(name: str, value: bool | None) -> bool | None:
    if value is None or isinstance(value, bool | np.bool_):
        return value if value is None else bool(value)
    raise ValueError(f"{name} is {str(value)[:60]!r}; give true, false or null.")


def _float(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name} is {str(value)[:60]!r}; give a number or null.")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} does not fit into a float; give a smaller number.") from error


def _flat_array(name: str, values: Sequence | np.ndarray, dtype: type) -> np.ndarray:
    """Convert to a one-dimensional array; an empty list becomes an empty array of `dtype`."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is not a flat list of numbers; give one number per entry.") from error
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give a flat array.")
    return array if array.size else array.astype(dtype)
