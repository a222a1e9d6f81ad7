"""Devices, threads and compilation cache of every test process, set before jax starts."""

import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Pytest workers run in parallel, so each computes and compiles on one thread. Collectives on a busy machine can exceed
# the default timeout of 40 s, which aborts the process. Compilation dominates the suite's time, and XLA's older CPU
# emitters compile twice as fast; tests/test_wheel.py uses the default ones.
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_multi_thread_eigen": "false",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1200,
    "xla_cpu_collective_timeout_seconds": 1200,
}
for flag, value in FLAGS.items():
    if flag not in os.environ.setdefault("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] += f" --{flag}={value}"
# Size of XLA's thread pool. A collective blocks one thread per device, so eight devices that enter two collectives in
# different orders deadlock a pool of eight threads.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A process is aborted above Linux's limit of 65,530 memory mappings, and each compiled program holds several.
MAX_MAPPINGS = 25_000
# Counting the mappings takes up to 30 ms.
TESTS_BETWEEN_COUNTS = 10


def pytest_configure(config):
    """Share one compilation cache among the workers and subprocesses of this pytest run, and delete it at the end.

    Set `JAX_COMPILATION_CACHE_DIR=DIR` to keep the cache for the next run.
    """
    if hasattr(config, "workerinput") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    directory = tempfile.mkdtemp(prefix="jax-compilation-cache-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that all workers finish at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Clear jax's caches when the process holds many memory mappings."""
    session = item.session
    session.tests_since_count = getattr(session, "tests_since_count", 0) + 1
    maps = Path("/proc/self/maps")
    if session.tests_since_count < TESTS_BETWEEN_COUNTS or not maps.exists():
        return
    session.tests_since_count = 0
    if maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _jax_config(**values) -> Iterator[None]:
    import jax

    previous = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in previous.items():
            jax.config.update(name, value)


@pytest.fixture(scope="session")
def jax_config():
    """Context manager that sets jax options and restores the previous values: `with jax_config(name=value)`."""
    return _jax_config


@pytest.fixture(scope="module")
def quick_compilation(jax_config):
    """Turn most XLA optimizations off, for tests that spend their time compiling."""
    with jax_config(jax_disable_most_optimizations=True):
        yield


@pytest.fixture
def full_compilation(jax_config):
    """Turn XLA's default optimizations back on for one test of a file that uses `quick_compilation`."""
    with jax_config(jax_disable_most_optimizations=False):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Directory of a tiny random Llama with a byte-level tokenizer, in Hugging Face format."""
    from shiq_jax.tasks.tiny import tiny_directory

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return str(tiny_directory(tmp_path_factory.mktemp("tiny") / "model", **sizes))
