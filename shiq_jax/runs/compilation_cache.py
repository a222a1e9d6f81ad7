"""JAX's persistent compilation cache, on by default."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

import jax

from shiq_jax.tasks.fetch import cache_directory


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache, in shiq_jax's cache directory unless JAX already has a directory.

    `JAX_COMPILATION_CACHE_DIR=DIR` selects another directory; `JAX_ENABLE_COMPILATION_CACHE=false` disables the cache.
    Each CPU type has its own subdirectory, because machines may share a home directory.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = cache_directory() / "programs" / _cpu_id()
        # A read-only home directory only disables the cache.
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))


def _cpu_id() -> str:
    """Identifier of the CPU's architecture and instruction-set extensions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
