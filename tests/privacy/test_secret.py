"""The secret of a run: file permissions, derived keys, and a repr that does not leak it."""

import os
import stat

import jax
import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.privacy.secret import Secret


def test_create_and_read(tmp_path):
    created = Secret.create(tmp_path / "secret.key")
    assert stat.S_IMODE((tmp_path / "secret.key").stat().st_mode) == 0o600
    restored = Secret.read(tmp_path / "secret.key")
    assert restored.fingerprint == created.fingerprint and restored.sampling == created.sampling
    np.testing.assert_array_equal(jax.random.key_data(restored.noise), jax.random.key_data(created.noise))


def test_secrets_and_derived_keys_differ(tmp_path):
    first, second = (Secret.create(tmp_path / name) for name in ("a", "b"))
    assert first.fingerprint != second.fingerprint and first.sampling != second.sampling
    derived = {first.sampling[:8], np.asarray(jax.random.key_data(first.noise)).tobytes()}
    assert len(derived) == 2 and bytes.fromhex(first.fingerprint) not in derived


def test_repr_does_not_leak_the_key(tmp_path):
    secret = Secret.create(tmp_path / "secret.key")
    root = (tmp_path / "secret.key").read_bytes()
    for text in (repr(secret), str(secret), f"{secret}", secret.fingerprint):
        assert root.hex() not in text and repr(root) not in text
    assert secret.fingerprint in repr(secret)


def test_invalid_files_are_rejected(tmp_path):
    path = tmp_path / "secret.key"
    with pytest.raises(UserError, match="cannot be read"):
        Secret.read(path)
    Secret.create(path)
    with pytest.raises(UserError, match="holds the secret of another run"):
        Secret.create(path)
    os.chmod(path, 0o644)
    with pytest.raises(UserError, match=r"is readable by others \(mode 644\)"):
        Secret.read(path)
    os.chmod(path, 0o600)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="holds 5 bytes instead of 32"):
        Secret.read(path)
