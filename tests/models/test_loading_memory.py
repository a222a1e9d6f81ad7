"""What loading costs the host beyond the parameters themselves; run as a program, this file is the process measured."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

MARGIN = 500 * 10**6
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 20480,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "attention_bias": True,
}
LEAF = 4 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"] * CONFIG["intermediate_size"]


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(directory: str, mesh: str) -> dict[str, int]:
    """Loads a directory; bytes of its parameters on all devices, of the largest shard, and by how much memory grew."""
    import jax

    from shiq_jax.models import load_hf
    from shiq_jax.sharding import make_mesh

    chosen = make_mesh(mesh) if mesh else None
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    params = jax.block_until_ready(load_hf(directory, mesh=chosen)[1])
    done.set()
    watcher.join()
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return {"parameters": sum(shards), "largest shard": max(shards), "peak": max(peak, anonymous()) - before}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of 2.2 GB, 670 MB of it in one stacked leaf, in files of 300 MB; deleted again."""
    from safetensors.numpy import save_file

    from shiq_jax.models import DecoderConfig, Model
    from shiq_jax.models.hf_names import entries

    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config = DecoderConfig.from_dict(CONFIG)
    shapes = {
        name: entry.tensor_shape
        for entry in entries(Model.from_config(config).abstract_params(), config.num_layers)
        for name in entry.names
    }
    random = np.random.default_rng(0)
    noise = random.standard_normal(max(map(np.prod, shapes.values())), np.float32)
    weight_map, pending, written = {}, {}, 0
    for number, (name, shape) in enumerate(shapes.items(), 1):
        pending[name] = noise[: np.prod(shape)].reshape(shape)
        weight_map[name] = f"model-{written}.safetensors"
        if sum(tensor.nbytes for tensor in pending.values()) > 300 * 10**6 or number == len(shapes):
            save_file(pending, directory / weight_map[name])
            pending, written = {}, written + 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert written > 3
    yield directory
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "fsdp=8", "fsdp=4,tensor=2"], ids=["one device", "fsdp=8", "fsdp=4,tensor=2"])
def test_the_host_holds_the_parameters_and_one_shard(mesh, directory):
    command = [sys.executable, __file__, str(directory), mesh]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()})
    beyond = found["peak"] - found["parameters"]
    assert beyond <= found["largest shard"] + MARGIN, found
    # A second copy of everything would be noticed, and on a mesh the copy of a whole leaf ...
    assert min(found["parameters"], LEAF if mesh else 2 * LEAF) > found["largest shard"] + MARGIN
    # ... and so would a measurement that misses the parameters themselves.
    assert found["peak"] > 0.9 * found["parameters"]


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
