"""Handle of a reference model: loads the weights when needed and caches them in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Identity, Record
from shiq_jax.sharding import hosts
from shiq_jax.training.annotation import annotate, record_statistics, reference_identity


class Reference:
    """A model that serves annotation, evaluation and rollout; no update step holds it.

    Args:
        source: directory or hub id of the model.
        load: `source -> (model, params)`.
        vocab_size: vocabulary size of the policy, which the reference must share; None skips the check.
        cache: keep a copy of the weights in host memory, so that they are loaded once.
    """

    def __init__(
        self,
        source: str | Path,
        load: Callable[[str | Path], tuple[Any, Any]],
        vocab_size: int | None = None,
        *,
        cache: bool = True,
    ):
        self.source, self.load, self.vocab_size, self.cache = source, load, vocab_size, cache
        self._cached: tuple[Any, Any] | None = None

    def open(self) -> tuple[Any, Any]:
        """Model and parameters on the devices; drop the result after use to free device memory.

        Raises:
            UserError: its vocabulary size differs from the policy's.
        """
        if self._cached is not None:
            model, host_params = self._cached
            return model, hosts.reload(host_params)
        model, params = self.load(self.source)
        if self.vocab_size not in (None, model.config.vocab_size):
            raise UserError(
                f"the reference {self.source} has a vocabulary of {model.config.vocab_size} tokens and the policy one "
                f"of {self.vocab_size}: use a reference of the same family"
            )
        if self.cache:
            self._cached = model, hosts.offload(params)
        return model, params

    @property
    def model(self) -> Any:
        """The model without its parameters."""
        return self._cached[0] if self._cached is not None else self.open()[0]

    def close(self) -> None:
        """Free the host memory; the next `open` loads the weights again."""
        self._cached = None

    def record_statistics(self, records: Sequence[Record], **options: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logp, lse) of every action of every record under the reference; see `annotation.record_statistics`."""
        return record_statistics(*self.open(), records, **options)

    def annotate(self, buffer: Buffer, **options: Any) -> tuple[Identity, dict | None]:
        """Fill a buffer with the reference's statistics; returns their identity and the result of the probe."""
        model, params = self.open()
        identity = reference_identity(model, params)
        return identity, annotate(model, params, buffer, identity, **options)
