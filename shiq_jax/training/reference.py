"""A model whose weights are needed now and then: a handle that loads them once and keeps them in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Identity, Record
from shiq_jax.sharding import hosts
from shiq_jax.training.annotation import annotate, reference_identity, statistics_of


class Reference:
    """A model by where its weights are; its own configuration goes with them. No update step sees it.

    Args:
        source: directory or hub id.
        load: `source -> (model, params)`.
        vocab_size: of the policy, which the reference must share; None checks nothing.
        keep: keep a copy of the weights in host memory, so that they are read from disk once; False where loading
            them again costs nothing.
    """

    def __init__(
        self,
        source: str | Path,
        load: Callable[[str | Path], tuple[Any, Any]],
        vocab_size: int | None = None,
        *,
        keep: bool = True,
    ):
        self.source, self.load, self.vocab_size, self.keep = source, load, vocab_size, keep
        self._kept: tuple[Any, Any] | None = None

    def open(self) -> tuple[Any, Any]:
        """Model and parameters on the devices; drop them soon.

        Raises:
            UserError: its vocabulary is not the policy's, so that the two say nothing of each other.
        """
        if self._kept is not None:
            model, parts = self._kept
            return model, hosts.reload(parts)
        model, params = self.load(self.source)
        if self.vocab_size not in (None, model.config.vocab_size):
            raise UserError(
                f"the reference {self.source} has a vocabulary of {model.config.vocab_size} tokens and the policy one "
                f"of {self.vocab_size}: take a reference of the same family"
            )
        if self.keep:
            self._kept = model, hosts.offload(params)
        return model, params

    @property
    def model(self) -> Any:
        """The model without its parameters."""
        return self._kept[0] if self._kept is not None else self.open()[0]

    def close(self) -> None:
        """Free the host memory; the next `open` loads again."""
        self._kept = None

    def statistics_of(self, records: Sequence[Record], **options: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logp, lse) of every action of every record under the reference; see `annotation.statistics_of`."""
        return statistics_of(*self.open(), records, **options)

    def annotate(self, buffer: Buffer, **options: Any) -> tuple[Identity, dict | None]:
        """Fill a buffer with the reference's statistics; their identity, and what the probe found."""
        model, params = self.open()
        identity = reference_identity(model, params)
        return identity, annotate(model, params, buffer, identity, **options)
