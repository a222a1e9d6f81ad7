"""Host memory while loading, beyond the parameters; run as a script, this file is the measured process."""

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
LARGEST_PARAMETER = 4 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"] * CONFIG["intermediate_size"]


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(directory: str, mesh: str) -> dict[str, int]:
    """Load a checkpoint; return the bytes of its parameters, of the largest shard, and of the peak memory growth."""
    import jax

    from shiq_jax.models import load_hf
    from shiq_jax.sharding import make_mesh

    device_mesh = make_mesh(mesh) if mesh else None
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    start = peak = anonymous_bytes()
    finished = threading.Event()

    def watch():
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    params = jax.block_until_ready(load_hf(directory, mesh=device_mesh)[1])
    finished.set()
    watcher.join()
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return {"parameters": sum(shards), "largest shard": max(shards), "peak": max(peak, anonymous_bytes()) - start}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A 2.2 GB checkpoint with a stacked parameter of 670 MB, in files of 300 MB; deleted after the tests."""
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
    weight_map, pending, num_files = {}, {}, 0
    for count, (name, shape) in enumerate(shapes.items(), 1):
        pending[name] = noise[: np.prod(shape)].reshape(shape)
        weight_map[name] = f"model-{num_files}.safetensors"
        if sum(tensor.nbytes for tensor in pending.values()) > 300 * 10**6 or count == len(shapes):
            save_file(pending, directory / weight_map[name])
            pending, num_files = {}, num_files + 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert num_files > 3
    yield directory
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "fsdp=8", "fsdp=4,tensor=2"], ids=["one device", "fsdp=8", "fsdp=4,tensor=2"])
def test_peak_memory_is_the_parameters_plus_one_shard(mesh, directory):
    command = [sys.executable, __file__, str(directory), mesh]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    sizes = json.loads(process.stdout)
    print({name: f"{size / 1e6:.0f} MB" for name, size in sizes.items()})
    overhead = sizes["peak"] - sizes["parameters"]
    assert overhead <= sizes["largest shard"] + MARGIN, sizes
    # The bound is tight enough to detect a second copy of the parameters and, on a mesh, of one whole parameter.
    assert min(sizes["parameters"], LARGEST_PARAMETER if mesh else 2 * LARGEST_PARAMETER) > (
        sizes["largest shard"] + MARGIN
    )
    # The measurement itself must include the parameters.
    assert sizes["peak"] > 0.9 * sizes["parameters"]


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
