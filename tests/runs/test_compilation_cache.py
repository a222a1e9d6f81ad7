"""Compiled programs are kept where nobody said otherwise."""

import jax
import pytest

from shiq_jax.runs import compilation_cache


@pytest.fixture
def place(tmp_path, monkeypatch, jax_config):
    """The default directory, while jax has none configured."""
    monkeypatch.setenv("SHIQ_JAX_CACHE", str(tmp_path / "cache"))
    with jax_config(jax_compilation_cache_dir=None):
        yield tmp_path / "cache" / "programs"


def test_programs_lie_apart_by_processor(place, monkeypatch):
    compilation_cache.enable_compilation_cache()
    (own,) = place.iterdir()
    assert jax.config.jax_compilation_cache_dir == str(own)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another")
    compilation_cache.enable_compilation_cache()
    assert {each.name for each in place.iterdir()} == {own.name, "another"}


@pytest.mark.parametrize("chosen", ["elsewhere", ""])
def test_a_place_that_was_chosen_stays(place, chosen):
    jax.config.update("jax_compilation_cache_dir", chosen)
    compilation_cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == chosen and not place.exists()


def test_a_home_that_cannot_be_written_to_keeps_nothing(place, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    compilation_cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
