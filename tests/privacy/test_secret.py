"""The secret of a run: where it is, who may read it, and where it must never be."""

import os
import stat

import jax
import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.privacy.secret import Secret


def test_a_secret_is_its_owners_alone_and_comes_back(tmp_path):
    made = Secret.create(tmp_path / "secret.key")
    assert stat.S_IMODE((tmp_path / "secret.key").stat().st_mode) == 0o600
    again = Secret.read(tmp_path / "secret.key")
    assert again.fingerprint == made.fingerprint and again.sampling == made.sampling
    np.testing.assert_array_equal(jax.random.key_data(again.noise), jax.random.key_data(made.noise))


def test_no_two_are_alike_and_no_use_is_another(tmp_path):
    one, other = (Secret.create(tmp_path / name) for name in ("a", "b"))
    assert one.fingerprint != other.fingerprint and one.sampling != other.sampling
    derived = {one.sampling[:8], bytes(np.asarray(jax.random.key_data(one.noise)).tobytes())}
    assert len(derived) == 2 and bytes.fromhex(one.fingerprint) not in derived


def test_it_does_not_show_itself(tmp_path):
    secret = Secret.create(tmp_path / "secret.key")
    root = (tmp_path / "secret.key").read_bytes()
    for text in (repr(secret), str(secret), f"{secret}", secret.fingerprint):
        assert root.hex() not in text and repr(root) not in text
    assert secret.fingerprint in repr(secret)


def test_what_is_refused(tmp_path):
    path = tmp_path / "secret.key"
    with pytest.raises(UserError, match="cannot be read"):
        Secret.read(path)
    Secret.create(path)
    with pytest.raises(UserError, match="holds the secret of another run"):
        Secret.create(path)
    os.chmod(path, 0o644)
    with pytest.raises(UserError, match=r"can be read by others \(mode 644\)"):
        Secret.read(path)
    os.chmod(path, 0o600)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="holds 5 bytes instead of 32"):
        Secret.read(path)
