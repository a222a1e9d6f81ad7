"""Eight virtual devices on the CPU, set before jax starts, so that every sharding test runs on any machine."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every test compiles its own programs, whatever another run has left in the home directory.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""


# Linux lets a process have 65,530 mappings, of which every compiled program holds several; one more aborts it.
MAPPINGS = 25_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Lets go of all compiled programs when they have become many."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose programs run for milliseconds and compile for seconds."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Directory of a microscopic random Llama with a byte-level tokenizer, in Hugging Face format."""
    from shiq_jax.tasks.tiny import tiny_directory

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return str(tiny_directory(tmp_path_factory.mktemp("tiny") / "model", **sizes))
