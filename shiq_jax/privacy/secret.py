"""The root key of a private run: made by the operating system, kept in a file of its own, and never anywhere else."""

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

BYTES = 32


class Secret:
    """Bytes that whoever knows them can take the noise off again with; printed as their fingerprint alone.

    Args:
        root: the bytes.
    """

    def __init__(self, root: bytes):
        self._root = root

    @classmethod
    def create(cls, path: Path) -> Secret:
        """Fresh entropy in a new file that only its owner can read; UserError when there is a file already."""
        _write_entropy(path)
        return cls(path.read_bytes())

    @classmethod
    def read(cls, path: Path) -> Secret:
        """What `create` wrote; UserError when it is gone, cut short, or readable by others."""
        try:
            root, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise UserError(
                f"{path}, the secret of this private run, cannot be read ({error.strerror}): restore it, for with "
                "another one the run would release its steps twice"
            ) from error
        if len(root) != BYTES:
            raise UserError(f"{path} holds {len(root)} bytes instead of {BYTES}: restore the secret of this run")
        if mode & 0o077:
            raise UserError(
                f"{path} can be read by others (mode {mode:o}): its secret may be known; chmod 600 if it is not"
            )
        return cls(root)

    @classmethod
    def insecure(cls, seed: int) -> Secret:
        """A secret that anybody can guess, for tests."""
        return cls(hashlib.sha256(f"insecure {seed}".encode()).digest())

    @property
    def fingerprint(self) -> str:
        """What tells this secret from others and gives nothing of it away."""
        return self._derived("fingerprint").hex()[:16]

    @property
    def sampling(self) -> bytes:
        """What chooses the batches, see `Mechanism.sample`."""
        return self._derived("sampling")

    @property
    def noise(self) -> Array:
        """The jax key of the noise, see `privatize`."""
        words = np.frombuffer(self._derived("noise")[:8], np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")

    def _derived(self, use: str) -> bytes:
        return hashlib.sha256(use.encode() + b"\0" + self._root).digest()

    def __repr__(self) -> str:
        return f"Secret({self.fingerprint})"


# Returns nothing: what a function of `on_writer` returns travels over the network.
@hosts.on_writer
def _write_entropy(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"{path} holds the secret of another run: a secret is used for one run only, so name another file, or "
            "remove this one if nothing was released with it"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(BYTES))
        file.flush()
        os.fsync(file.fileno())
