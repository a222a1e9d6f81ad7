"""Statistics of the buffer's actions under the identity of what made them."""

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
    """What made a set of statistics: weights fingerprint, dtype, attention engine and so on, as JSON values.

    Two identities are the same when their sorted JSON is: `Identity(weights="ab12", dtype="float32").digest`.
    """

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted JSON, in hexadecimal; raises ValueError when a value does not fit into JSON."""
        try:
            text = json.dumps(self, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"an identity must hold what JSON can hold, but {error}; give strings and finite numbers."
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in sorted(self.items())) or "(empty)"


class StoredStatistics:
    """(logp, lse) of every record of a buffer under one identity, readable by record index.

    `statistics[i]` is a pair of float32[A] views, `statistics.read(indices)` a list of them.
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
        """(logp, lse) of the records of these numbers, in this order."""
        return [self._get(int(index)) for index in indices]


def check_annotations(values: Sequence[tuple[np.ndarray, np.ndarray]], actions: np.ndarray, first: int) -> None:
    """Raises UserError unless each record of a shard, whose number one is `first`, has a finite (logp, lse) per
    action.
    """
    if len(values) != len(actions):
        raise UserError(
            f"statistics for {len(values)} records were given, the shard holds {len(actions)}; give one pair per "
            "record."
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
                    f"record {first + row}: {name} is not finite; a model whose statistics overflow cannot serve as "
                    "reference."
                )


def absent(buffer: "Buffer", identity: Identity, known: Mapping[str, Mapping]) -> UserError:
    """The sentence for statistics that were asked for but never made."""
    others = "; ".join(str(Identity(entry["identity"])) for entry in known.values())
    found = f"statistics made by {others}" if others else "no statistics"
    return UserError(
        f"{buffer.path} holds {found}, wanted are those made by {identity}; annotate the buffer with that model."
    )
