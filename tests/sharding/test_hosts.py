"""Who writes, who waits for whom, and what sharded arrays hold, in one process and in two."""

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

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "over axes": (RANDOM.normal(size=(8, 4)).astype(np.float32), PartitionSpec("fsdp", "tensor")),
    "over some": (RANDOM.normal(size=(4, 3)).astype(jnp.bfloat16), PartitionSpec("tensor")),
    "replicated": (RANDOM.integers(0, 99, 5), PartitionSpec()),
    "scalar": (np.float32(np.nan), PartitionSpec()),
    "empty": (np.zeros((0, 4), np.bool_), PartitionSpec()),
}


@pytest.fixture
def arrays():
    mesh = make_mesh("fsdp=4,tensor=2")
    placed = {name: jax.device_put(value, NamedSharding(mesh, spec)) for name, (value, spec) in ARRAYS.items()}
    return placed | {"nested": [jnp.arange(3.0), None]}


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_what_was_offloaded_comes_back(arrays):
    back = hosts.reload(hosts.offload(arrays))
    assert jax.tree.structure(back) == jax.tree.structure(arrays)
    for before, after in zip(jax.tree.leaves(arrays), jax.tree.leaves(back), strict=True):
        assert same_bits(before, after) and before.sharding == after.sharding


def test_an_offloaded_copy_outlives_the_donated_original(arrays):
    original = arrays["over axes"]
    there = hosts.offload(original)
    # The result overwrites the donated memory.
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(original))
    assert original.is_deleted()
    assert same_bits(ARRAYS["over axes"][0], hosts.reload(there))


def test_gather_in_one_process(arrays):
    found = hosts.gather(arrays | {"host": np.arange(2), "number": 3})
    assert all(type(found[name]) is np.ndarray and same_bits(found[name], arrays[name]) for name in ARRAYS)
    assert same_bits(found["nested"][0], arrays["nested"][0]) and found["nested"][1] is None
    assert same_bits(found["host"], np.arange(2)) and found["number"] == 3


def test_alone_nobody_is_waited_for():
    assert hosts.process_count() == 1 and hosts.is_writer()
    value = object()
    assert hosts.agree(value, "anything") is value
    assert hosts.on_writer(lambda: value)() is value and hosts.on_writer(lambda: value, wait=False)() is value
    hosts.barrier("nobody else", timeout=1)
    with pytest.raises(KeyError):
        hosts.on_writer({}.__getitem__)("missing")


def test_writing_does_not_start_the_devices(tmp_path):
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
out = {"index": index, "count": hosts.count(), "writer": hosts.is_writer()}
out["agreed"] = hosts.agree({"from": index, "text": "ä" * (3 + index)} if index == 0 else object(), "a value")
if index == 0:
    Path("only by the writer").write_text("x")

@hosts.on_writer
def write(name):
    # A decorated function within another: nobody waits, because the others are elsewhere.
    hosts.on_writer(Path(name).write_text)("written")
    return [name, index]

out["result"] = write("file")
out["read"] = Path("file").read_text()

@hosts.on_writer
def fail(error):
    raise error

for name, error in {"refusal": UserError("no room"), "error": OSError(28, "No space left on device")}.items():
    try:
        fail(error)
    except Exception as caught:
        out[name] = [type(caught).__name__, str(caught)]
out["unwaited"] = hosts.on_writer(lambda: index, wait=False)()

rows = np.arange(12, dtype=np.float32).reshape(4, 3)
mesh = make_mesh()
def place(axes):
    return jax.make_array_from_callback((4, 3), named_sharding(mesh, axes, (4, 3)), lambda where: rows[where])
tree = {"spread": place(("rows", None)), "whole": place((None, None)), "own": jnp.arange(2) + index}
assert not tree["spread"].is_fully_addressable and not tree["spread"].is_fully_replicated
gathered = hosts.gather(tree)
out["gathered"] = {name: [value.tolist(), str(value.dtype), type(value).__name__] for name, value in gathered.items()}
there = hosts.offload(tree)
out["parts"] = {name: len(leaf.parts) for name, leaf in there.items()}
back = hosts.reload(there)
out["kept"] = all(leaf.sharding == back[name].sharding for name, leaf in tree.items())
out["same"] = all((hosts.gather(back)[name] == gathered[name]).all() for name in gathered)

from shiq_jax.replay import Buffer, Record
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.run_directory import RunDirectory

run = RunDirectory.begin(Path("run"), {"seed": 1}, resume=False)
try:
    RunDirectory.begin(Path("run"), {"seed": 1}, resume=False)
except UserError as refusal:
    out["second run"] = str(refusal)
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
        hosts.barrier("where the other never comes", timeout=0.5)
    except RuntimeError as error:
        out["alone"] = str(error)
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
def two(tmp_path_factory):
    """What `PROGRAM` printed in each of two processes."""
    joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    directory = tmp_path_factory.mktemp("two")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, directory], env=environment() | joined | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [each.communicate(timeout=180) for each in running]
    assert all(each.returncode == 0 for each in running), [err[-2000:] for _, err in said]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_one_of_two_writes(two):
    assert [(each["index"], each["count"], each["writer"]) for each in two] == [(0, 2, True), (1, 2, False)]
    assert [each["unwaited"] for each in two] == [0, None]


def test_two_agree_on_the_value_of_the_first(two):
    assert [each["agreed"] for each in two] == [{"from": 0, "text": "äää"}] * 2


def test_what_the_writer_wrote_and_returned_reaches_both(two):
    assert [each["result"] for each in two] == [["file", 0]] * 2
    assert [each["read"] for each in two] == ["written"] * 2


def test_an_error_of_the_writer_reaches_both(two):
    assert [each["refusal"] for each in two] == [[UserError.__name__, "no room"]] * 2
    text = "[Errno 28] No space left on device"
    assert [each["error"] for each in two] == [["OSError", text], ["RuntimeError", text]]


def test_two_gather_what_they_share(two):
    rows = np.arange(12.0).reshape(4, 3).tolist()
    for index, each in enumerate(two):
        whole = [rows, "float32", "ndarray"]
        assert each["gathered"] == {"spread": whole, "whole": whole, "own": [[index, index + 1], "int32", "ndarray"]}


def test_each_of_two_offloads_its_own_parts(two):
    for each in two:
        assert each["parts"] == {"spread": 2, "whole": 1, "own": 1}
        assert each["kept"] and each["same"]


def test_two_share_one_run_directory(two):
    for each in two:
        assert "run already holds a run" in each["second run"]
        assert each["appended"] == [1, 2] and each["manifests equal"]
        assert each["rows"] == [{"stage": "update", "step": step, "loss": 1.0 / (step + 1)} for step in range(2)]


def test_a_barrier_ends_in_time(two):
    assert "process 0 of 2" in two[0]["alone"] and "'where the other never comes'" in two[0]["alone"]
    assert "alone" not in two[1]
