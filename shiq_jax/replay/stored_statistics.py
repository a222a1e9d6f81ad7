"""Token statistics stored in a buffer, keyed by the identity of the model that computed them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from shiq_jax.errors import UserError

if TYPE_CHECKING:
    from shiq_jax.replay.buffer import Buffer


class Identity(dict):
    """Model and settings that computed a set of statistics: weights fingerprint, dtype, attention engine, ...

    Example: `Identity(weights="ab12", dtype="float32")`. Identities with equal digests are the same.
    """

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the JSON with sorted keys; raises ValueError if a value is not valid JSON."""
        try:
            text = json.dumps(self, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"an identity must contain JSON values, but {error}; use strings and finite numbers."
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in sorted(self.items())) or "(empty)"


class StoredStatistics:
    """(logp, lse) of every record of a buffer, computed by one identity.

    `statistics[i]` is the pair of float32[A] views of record `i`.
    """

    def __init__(self, identity: Identity, size: int, get: Callable[[int], tuple[np.ndarray, np.ndarray]]):
        self.identity = identity
        self._size = size
        self._get = get

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Float32[np.ndarray, " A"], Float32[np.ndarray, " A"]]:
        return self._get(index)

    def read(self, indices: Sequence[int]) -> list[tuple[Float32[np.ndarray, " A"], Float32[np.ndarray, " A"]]]:
        """(logp, lse) of the records at `indices`, in that order."""
        return [self._get(int(index)) for index in indices]


def check_statistics(values: Sequence[tuple[np.ndarray, np.ndarray]], actions: np.ndarray, first: int) -> None:
    """Raise UserError unless `values` has a finite (logp, lse) for each action of each record in a shard.

    Args:
        values: (logp, lse) of each record.
        actions: number of actions of each record.
        first: index of the shard's first record in the buffer.
    """
    if len(values) != len(actions):
        raise UserError(
            f"got statistics of {len(values)} records for a shard of {len(actions)}; give one (logp, lse) per record."
        )
    for row, (pair, count) in enumerate(zip(values, actions, strict=True)):
        for name, column in zip(("logp", "lse"), pair, strict=True):
            if np.shape(column) != (count,):
                raise UserError(
                    f"record {first + row}: {name} has shape {np.shape(column)} for {count} actions; give one "
                    "number per action."
                )
            if not np.isfinite(np.asarray(column, np.float32)).all():
                raise UserError(
                    f"record {first + row}: {name} is not finite; check the reference model and its dtype for overflow."
                )


def missing_statistics_error(buffer: "Buffer", identity: Identity, stored: Mapping[str, Mapping]) -> UserError:
    """The error for a buffer without statistics of `identity`; `stored` is the manifest's `statistics`."""
    identities = "; ".join(str(Identity(entry["identity"])) for entry in stored.values())
    found = f"statistics computed by {identities}" if identities else "no statistics"
    return UserError(
        f"{buffer.path} has {found}, but statistics computed by {identity} are required; annotate the buffer with that "
        "model."
    )
