"""The reference model where it is needed for fresh text: a handle that loads it, uses it and lets it go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.errors import Refusal
from shiq_jax.replay import Buffer, Identity, Record
from shiq_jax.training.annotation import annotate, reference_identity, statistics_of


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference by where its weights are; its own configuration goes with them. No update step sees it.

    Attributes:
        source: directory or hub id.
        load: `source -> (model, params)`.
        vocab_size: of the policy, which the reference must share; None checks nothing.
    """

    source: str | Path
    load: Callable[[str | Path], tuple[Any, Any]]
    vocab_size: int | None = None

    def open(self) -> tuple[Any, Any]:
        """Model and parameters; let go of them soon.

        Raises:
            Refusal: its vocabulary is not the policy's, so that the two say nothing of each other.
        """
        model, params = self.load(self.source)
        if self.vocab_size not in (None, model.config.vocab_size):
            raise Refusal(
                f"the reference {self.source} has a vocabulary of {model.config.vocab_size} tokens and the policy one "
                f"of {self.vocab_size}: take a reference of the same family"
            )
        return model, params

    def statistics_of(self, records: Sequence[Record], **options: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logp, lse) of every action of every record under the reference; see `annotation.statistics_of`."""
        return statistics_of(*self.open(), records, **options)

    def annotate(self, buffer: Buffer, **options: Any) -> tuple[Identity, dict | None]:
        """Fill a buffer with the reference's statistics; their identity, and what the probe found."""
        model, params = self.open()
        identity = reference_identity(model, params)
        return identity, annotate(model, params, buffer, identity, **options)
