"""What every test process needs: devices, threads and a cache of compiled programs, set before jax starts."""

import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers run side by side, so each computes and compiles on one thread. Eight virtual devices let every sharding test
# run on any machine. A collective among them waits for threads that a busy machine may not run for minutes; the default
# limit of 40 s aborts the process. Most of the suite's time is compilation, and XLA's older emitters of CPU loops
# compile in half the time of its newer ones; tests/test_wheel.py compiles as users do.
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
# Threads of XLA's pool. A collective holds one thread per device until all devices have come; eight devices that enter
# two collectives in unlike order take all threads of a pool of eight, and nobody can come any more.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Linux lets a process have 65,530 mappings, of which every compiled program holds several; one more aborts it.
MAPPINGS = 25_000
# Counting them takes up to 30 ms.
TESTS_BETWEEN_COUNTS = 10


def pytest_configure(config):
    """Share compiled programs among the workers and subprocesses of this run, and with no other run.

    `JAX_COMPILATION_CACHE_DIR=DIR` keeps them for the next run too.
    """
    if hasattr(config, "workerinput") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    directory = tempfile.mkdtemp(prefix="compiled-programs-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that the workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Drop all compiled programs when there are many."""
    session = item.session
    session.tests_since_count = getattr(session, "tests_since_count", 0) + 1
    maps = Path("/proc/self/maps")
    if session.tests_since_count < TESTS_BETWEEN_COUNTS or not maps.exists():
        return
    session.tests_since_count = 0
    if maps.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _jax_config(**values) -> Iterator[None]:
    import jax

    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="session")
def jax_config():
    """`with jax_config(name=value)` sets options of jax and restores what they were."""
    return _jax_config


@pytest.fixture(scope="module")
def quick_compilation(jax_config):
    """For tests whose programs run for milliseconds and compile for seconds."""
    with jax_config(jax_disable_most_optimizations=True):
        yield


@pytest.fixture
def full_compilation(jax_config):
    """Compile with the optimizations that users get, in a file that otherwise compiles quickly."""
    with jax_config(jax_disable_most_optimizations=False):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Directory of a microscopic random Llama with a byte-level tokenizer, in Hugging Face format."""
    from shiq_jax.tasks.tiny import tiny_directory

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return str(tiny_directory(tmp_path_factory.mktemp("tiny") / "model", **sizes))
