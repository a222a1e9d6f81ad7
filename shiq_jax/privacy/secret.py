"""Root key of a private run, created from operating-system entropy and stored in its own file only."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from shiq_jax.errors import UserError
from shiq_jax.sharding import hosts

KEY_BYTES = 32


class Secret:
    """Root key of a private run; anyone who holds it can subtract the noise. Its repr shows only the fingerprint.

    Args:
        root: the key, as bytes.
    """

    def __init__(self, root: bytes):
        self._root = root

    @classmethod
    def create(cls, path: Path) -> Secret:
        """Write fresh entropy to a new file, readable by its owner only; UserError if the file exists."""
        _write_entropy(path)
        return cls(path.read_bytes())

    @classmethod
    def read(cls, path: Path) -> Secret:
        """Read a file written by `create`; UserError if it is missing, truncated, or readable by others."""
        try:
            root, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise UserError(
                f"{path}, the secret of this private run, cannot be read ({error.strerror}): restore it, because with "
                "another secret the run would release its steps a second time"
            ) from error
        if len(root) != KEY_BYTES:
            raise UserError(f"{path} holds {len(root)} bytes instead of {KEY_BYTES}: restore the secret of this run")
        if mode & 0o077:
            raise UserError(
                f"{path} is readable by others (mode {mode:o}): if the secret has not leaked, run chmod 600; otherwise "
                "start a new run"
            )
        return cls(root)

    @classmethod
    def insecure(cls, seed: int) -> Secret:
        """Derive a guessable secret from a seed, for tests."""
        return cls(hashlib.sha256(f"insecure {seed}".encode()).digest())

    @property
    def fingerprint(self) -> str:
        """Public identifier, from which the key cannot be computed."""
        return self._derive("fingerprint").hex()[:16]

    @property
    def sampling(self) -> bytes:
        """Key of the batch sampler, see `Mechanism.sample`."""
        return self._derive("sampling")

    @property
    def noise(self) -> Array:
        """Jax key of the noise, see `privatize`."""
        key_data = np.frombuffer(self._derive("noise")[:8], np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(key_data), impl="threefry2x32")

    def _derive(self, purpose: str) -> bytes:
        return hashlib.sha256(purpose.encode() + b"\0" + self._root).digest()

    def __repr__(self) -> str:
        return f"Secret({self.fingerprint})"


# Returns None, because `on_writer` broadcasts return values over the network.
@hosts.on_writer
def _write_entropy(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"{path} holds the secret of another run, and a secret must not be reused: name another file, or remove "
            "this one if nothing was released with it"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
