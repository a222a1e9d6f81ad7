"""Compiled programs outlive the process that compiled them."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

import jax

from shiq_jax.tasks.fetch import cache_directory


def keep_programs() -> None:
    """JAX's persistent compilation cache, below the directory of fetched inputs, unless JAX was told where to have it.

    `JAX_COMPILATION_CACHE_DIR=DIR` names another place and `JAX_ENABLE_COMPILATION_CACHE=false` does without. Programs
    of unlike processors lie apart, for a home directory may be shared and a program runs only where it was made for.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = cache_directory() / "programs" / _processor()
        # A home that cannot be written to is no reason not to run.
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """A name for what programs of the CPU are made for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
