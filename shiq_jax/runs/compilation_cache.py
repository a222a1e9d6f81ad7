"""JAX's persistent compilation cache, on by default."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

import jax

from shiq_jax.tasks.fetch import cache_directory


def enable_compilation_cache() -> None:
    """Turn on JAX's persistent compilation cache, in the cache directory of fetched inputs unless JAX names another.

    `JAX_COMPILATION_CACHE_DIR=DIR` selects another directory; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    Every kind of processor has its own subdirectory, because a home directory may be shared between machines.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = cache_directory() / "programs" / _processor()
        # A run must not fail because the home directory is read-only.
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """Name of the CPU's instruction set."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
