"""The writer process, barriers, broadcast, gather and offload, in one process and in two."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shiq_jax.errors import UserError
from shiq_jax.sharding import hosts, make_mesh

RNG = np.random.default_rng(0)
ARRAYS = {
    "sharded": (RNG.normal(size=(8, 4)).astype(np.float32), PartitionSpec("fsdp", "tensor")),
    "partly sharded": (RNG.normal(size=(4, 3)).astype(jnp.bfloat16), PartitionSpec("tensor")),
    "replicated": (RNG.integers(0, 99, 5), PartitionSpec()),
    "scalar": (np.float32(np.nan), PartitionSpec()),
    "empty": (np.zeros((0, 4), np.bool_), PartitionSpec()),
}


@pytest.fixture
def arrays():
    mesh = make_mesh("fsdp=4,tensor=2")
    placed = {name: jax.device_put(value, NamedSharding(mesh, spec)) for name, (value, spec) in ARRAYS.items()}
    return placed | {"nested": [jnp.arange(3.0), None]}


def bitwise_equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reload_inverts_offload(arrays):
    reloaded = hosts.reload(hosts.offload(arrays))
    assert jax.tree.structure(reloaded) == jax.tree.structure(arrays)
    for original, copy in zip(jax.tree.leaves(arrays), jax.tree.leaves(reloaded), strict=True):
        assert bitwise_equal(original, copy) and original.sharding == copy.sharding


def test_offloaded_copy_survives_donation(arrays):
    original = arrays["sharded"]
    offloaded = hosts.offload(original)
    # The result reuses the donated memory.
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(original))
    assert original.is_deleted()
    assert bitwise_equal(ARRAYS["sharded"][0], hosts.reload(offloaded))


def test_gather_in_one_process(arrays):
    gathered = hosts.gather(arrays | {"numpy": np.arange(2), "python": 3})
    assert all(type(gathered[name]) is np.ndarray and bitwise_equal(gathered[name], arrays[name]) for name in ARRAYS)
    assert bitwise_equal(gathered["nested"][0], arrays["nested"][0]) and gathered["nested"][1] is None
    assert bitwise_equal(gathered["numpy"], np.arange(2)) and gathered["python"] == 3


def test_single_process_does_not_wait():
    assert hosts.process_count() == 1 and hosts.is_writer()
    value = object()
    assert hosts.agree(value, "a value") is value
    assert hosts.on_writer(lambda: value)() is value and hosts.on_writer(lambda: value, wait=False)() is value
    hosts.barrier("a barrier", timeout=1)
    with pytest.raises(KeyError):
        hosts.on_writer({}.__getitem__)("missing")


def test_writing_does_not_initialize_devices(tmp_path):
    program = """
import sys
from pathlib import Path
from jax._src import xla_bridge
from shiq_jax.replay.storage import write_atomically
write_atomically(Path(sys.argv[1]), lambda file: file.write(b"x"))
assert not xla_bridge.backends_are_initialized()
"""
    command = [sys.executable, "-c", program, tmp_path / "file"]
    subprocess.run(command, env=environment(), timeout=120, check=True)


PROGRAM = """
import json, os, sys
from pathlib import Path
from shiq_jax.errors import UserError
from shiq_jax.sharding import hosts, make_mesh, named_sharding, start_processes
index = start_processes(timeout=60)
import jax, jax.numpy as jnp, numpy as np

os.chdir(sys.argv[1])
out = {"index": index, "count": hosts.process_count(), "writer": hosts.is_writer()}
out["agreed"] = hosts.agree({"process": index, "text": "ä" * (3 + index)} if index == 0 else object(), "a value")
if index == 0:
    Path("written by process 0").write_text("x")

@hosts.on_writer
def write(name):
    # A nested decorated function must not wait for the other processes, which do not run it.
    hosts.on_writer(Path(name).write_text)("written")
    return [name, index]

out["result"] = write("file")
out["read"] = Path("file").read_text()

@hosts.on_writer
def fail(error):
    raise error

for name, error in {"user error": UserError("no space"), "other error": OSError(28, "No space left on device")}.items():
    try:
        fail(error)
    except Exception as caught:
        out[name] = [type(caught).__name__, str(caught)]
out["without wait"] = hosts.on_writer(lambda: index, wait=False)()

rows = np.arange(12, dtype=np.float32).reshape(4, 3)
mesh = make_mesh()
def shard(axes):
    return jax.make_array_from_callback((4, 3), named_sharding(mesh, axes, (4, 3)), lambda index: rows[index])
tree = {"sharded": shard(("rows", None)), "replicated": shard((None, None)), "local": jnp.arange(2) + index}
assert not tree["sharded"].is_fully_addressable and not tree["sharded"].is_fully_replicated
gathered = hosts.gather(tree)
out["gathered"] = {name: [value.tolist(), str(value.dtype), type(value).__name__] for name, value in gathered.items()}
offloaded = hosts.offload(tree)
out["shards"] = {name: len(leaf.shards) for name, leaf in offloaded.items()}
reloaded = hosts.reload(offloaded)
out["same shardings"] = all(leaf.sharding == reloaded[name].sharding for name, leaf in tree.items())
out["same values"] = all((hosts.gather(reloaded)[name] == gathered[name]).all() for name in gathered)

from shiq_jax.replay import Buffer, Record
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.run_directory import RunDirectory

run = RunDirectory.begin(Path("run"), {"seed": 1}, resume=False)
try:
    RunDirectory.begin(Path("run"), {"seed": 1}, resume=False)
except UserError as error:
    out["second run"] = str(error)
with run.locked():
    buffer = Buffer.create(run.buffer)
    record = Record(tokens=[1, 2], action_mask=[False, True], rewards=[1.0], group="a")
    out["appended"] = [buffer.append([record] * n) for n in (1, 2)]
    out["manifests equal"] = buffer.manifest == Buffer.open(run.buffer).manifest
    log = MetricsLog(run.metrics)
    for step in range(3):
        log.write("update", step, loss=1.0 / (step + 1))
    log.rewind(["update"], 1)
    out["rows"] = log.rows("update")

if index == 0:
    try:
        hosts.barrier("only process 0", timeout=0.5)
    except RuntimeError as error:
        out["timeout"] = str(error)
hosts.barrier("the end", timeout=60)
print(json.dumps(out))
"""


def environment():
    return {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of `PROGRAM` in each of two processes."""
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    directory = tmp_path_factory.mktemp("processes")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, directory], env=environment() | cluster | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    streams = [process.communicate(timeout=180) for process in processes]
    assert all(process.returncode == 0 for process in processes), [err[-2000:] for _, err in streams]
    return [json.loads(out.splitlines()[-1]) for out, _ in streams]


def test_process_0_is_the_writer(outputs):
    assert [(out["index"], out["count"], out["writer"]) for out in outputs] == [(0, 2, True), (1, 2, False)]
    assert [out["without wait"] for out in outputs] == [0, None]


def test_agree_broadcasts_the_value_of_process_0(outputs):
    assert [out["agreed"] for out in outputs] == [{"process": 0, "text": "äää"}] * 2


def test_both_processes_get_the_writers_result_and_file(outputs):
    assert [out["result"] for out in outputs] == [["file", 0]] * 2
    assert [out["read"] for out in outputs] == ["written"] * 2


def test_both_processes_raise_the_writers_error(outputs):
    assert [out["user error"] for out in outputs] == [[UserError.__name__, "no space"]] * 2
    text = "[Errno 28] No space left on device"
    assert [out["other error"] for out in outputs] == [["OSError", text], ["RuntimeError", text]]


def test_gather_in_two_processes(outputs):
    rows = np.arange(12.0).reshape(4, 3).tolist()
    for index, out in enumerate(outputs):
        full, local = [rows, "float32", "ndarray"], [[index, index + 1], "int32", "ndarray"]
        assert out["gathered"] == {"sharded": full, "replicated": full, "local": local}


def test_each_process_offloads_its_own_shards(outputs):
    for out in outputs:
        assert out["shards"] == {"sharded": 2, "replicated": 1, "local": 1}
        assert out["same shardings"] and out["same values"]


def test_two_processes_share_a_run_directory(outputs):
    for out in outputs:
        assert "already holds a run" in out["second run"]
        assert out["appended"] == [1, 2] and out["manifests equal"]
        assert out["rows"] == [{"stage": "update", "step": step, "loss": 1.0 / (step + 1)} for step in range(2)]


def test_barrier_times_out(outputs):
    assert "process 0 of 2" in outputs[0]["timeout"] and "'only process 0'" in outputs[0]["timeout"]
    assert "timeout" not in outputs[1]
