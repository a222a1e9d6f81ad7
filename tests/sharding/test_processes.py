"""Start-up of multi-process runs, and its errors."""

import os
import socket
import subprocess
import sys

import pytest

from shiq_jax.sharding import start_processes

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_single_process_does_nothing(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: pytest.fail("must not be called"))
    assert start_processes() == 0
    assert start_processes("nowhere:1", processes=1, process=0) == 0
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert start_processes() == 0


def test_launcher_is_detected(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert start_processes(timeout=7) == 0
    assert calls == [((None, None, None), {"initialization_timeout": 67})]


def test_invalid_settings_are_rejected(monkeypatch):
    with pytest.raises(ValueError, match="process index 2 of 2 processes"):
        start_processes("localhost:1", 2, 2)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        start_processes()


def test_error_says_what_to_run(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(
        RuntimeError, match="process 0 of 2 .*DEADLINE_EXCEEDED: Barrier timed out.*JAX_PROCESS_ID=0"
    ) as error:
        start_processes("localhost:1", 2, 0, timeout=1)
    assert "\n" not in str(error.value)


PROGRAM = """
from shiq_jax.sharding import make_mesh, named_sharding, start_processes
index = start_processes(timeout={timeout})
import jax, jax.numpy as jnp
mesh = make_mesh()
rows = jax.make_array_from_callback((4,), named_sharding(mesh, ("rows",), (4,)), lambda index: jnp.arange(4.0)[index])
print("total", index, mesh.size, float(jax.jit(jnp.sum)(rows)))
"""


def _start(processes: int, process: int, port: int, timeout: int) -> subprocess.Popen:
    # XLA uses the last occurrence of a flag.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    command = [sys.executable, "-c", PROGRAM.format(timeout=timeout)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_share_a_mesh():
    port = _free_port()
    processes = [_start(2, index, port, 240) for index in range(2)]
    for index, process in enumerate(processes):
        out, err = process.communicate(timeout=300)
        assert f"total {index} 4 6.0" in out, err[-2000:]


def test_timeout_exits_with_a_message():
    process = _start(2, 0, _free_port(), 2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("start the same command on every host") == 1
    assert "stack trace" not in err
