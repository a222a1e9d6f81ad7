"""The default directory of JAX's compilation cache."""

import jax
import pytest

from shiq_jax.runs import compilation_cache


@pytest.fixture
def default_directory(tmp_path, monkeypatch, jax_config):
    """The default cache directory, with no directory configured in JAX."""
    monkeypatch.setenv("SHIQ_JAX_CACHE", str(tmp_path / "cache"))
    with jax_config(jax_compilation_cache_dir=None):
        yield tmp_path / "cache" / "programs"


def test_each_cpu_type_has_its_own_directory(default_directory, monkeypatch):
    compilation_cache.enable_compilation_cache()
    (directory,) = default_directory.iterdir()
    assert jax.config.jax_compilation_cache_dir == str(directory)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation_cache, "_cpu_id", lambda: "other-cpu")
    compilation_cache.enable_compilation_cache()
    assert {path.name for path in default_directory.iterdir()} == {directory.name, "other-cpu"}


@pytest.mark.parametrize("configured", ["elsewhere", ""])
def test_configured_directory_is_kept(default_directory, configured):
    jax.config.update("jax_compilation_cache_dir", configured)
    compilation_cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == configured and not default_directory.exists()


def test_unwritable_directory_disables_the_cache(default_directory, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compilation_cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
