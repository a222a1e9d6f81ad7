"""Load and save Hugging Face checkpoints, reading safetensors slices directly to the devices that hold them."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shiq_jax.errors import UserError, check_not_lfs_pointer
from shiq_jax.models.config import DecoderConfig, read_json
from shiq_jax.models.hf_names import Entry, entries
from shiq_jax.models.lora import A, B, merge_adapters
from shiq_jax.models.model import Model
from shiq_jax.progress import track
from shiq_jax.sharding import hosts

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # stored by old exports; here computed from the config


def load_hf(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: str = "none",
    engine: str = "xla",
) -> tuple[Model, dict[str, Any]]:
    """Load a model and its sharded parameters from a Hugging Face directory or hub id.

    Each device's region of each parameter is read, cast and transferred separately, so the host holds the regions of
    one parameter at a time. Supports indexed (sharded) safetensors and mixed float dtypes.

    dtype: of the parameters; the other arguments are those of `Model`.
    Raises UserError, naming file and tensor, for tensors that are missing, damaged, quantized, unexpected or of another
    shape than config.json implies.
    """
    directory = locate(path_or_hub_id)
    config = DecoderConfig.read(directory)
    model = Model.from_config(config, mesh=mesh, dtype=dtype, compute_dtype=compute_dtype, remat=remat, engine=engine)
    generation_config = directory / "generation_config.json"
    if generation_config.exists():
        model = dataclasses.replace(model, generation_config=read_json(generation_config))
    abstract = model.abstract_params()
    plan = entries(abstract, config.num_layers)
    with contextlib.ExitStack() as stack:
        tensors = _CheckpointTensors(directory, stack)
        _check_tensors(plan, tensors, config)
        params: dict[str, Any] = {}
        amount = ("MB", lambda entry: math.prod(entry.shape) * model.dtype.itemsize / 1e6)
        for entry in track(plan, f"loading {directory.name}", len(plan), "parameters", amount=amount):
            sharding = None if mesh is None else _get(abstract, entry.path).sharding
            _set(params, entry.path, _load_parameter(entry, tensors, model.dtype, sharding))
    return model, params


def save_hf(model: Model, params: Mapping[str, Any], path: str | Path) -> Path:
    """Write a checkpoint that transformers and vLLM can load: safetensors, config.json and generation_config.json.

    Tensors keep the dtypes of `params`, adapters are merged into the kernels, and checkpoints above 5 GB are split into
    numbered shards with an index. Files are written under temporary names and renamed, weights first. Tokenizer files
    are not written. In multi-process runs every process must call this; process 0 writes.
    Returns the directory. Raises ValueError, naming the parameter, if `params` do not match `model`.
    """
    directory = Path(path)
    _check_params(model.abstract_params(), params)
    base, base_params = model.without_adapters(params)
    plan = entries(base.abstract_params(), model.config.num_layers)
    total_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(base_params))
    hosts.on_writer(directory.mkdir)(parents=True, exist_ok=True)
    writer = _ShardWriter(directory, SHARD_BYTES, total_bytes)
    amount = ("MB", lambda entry: _get(params, entry.path).nbytes / 1e6)
    for entry in track(plan, f"writing {directory.name}", len(plan), "parameters", amount=amount):
        _save_parameter(entry, _merged_parameter(model, params, entry), writer)
    written = writer.finish()
    dtype = str(_get(params, plan[0].path).dtype)
    dtype_key = "torch_dtype" if "torch_dtype" in model.config.source else "dtype"
    _write_json(directory / "config.json", model.config.to_dict() | {dtype_key: dtype})
    if model.generation_config is not None:
        _write_json(directory / "generation_config.json", dict(model.generation_config))
    _remove_stale_weights(directory, written)
    return directory


def locate(path_or_hub_id: str | Path) -> Path:
    """Local directory of a model; a hub id ("owner/name") is downloaded first.

    Raises UserError if the argument is neither a directory nor a hub id, or if the download fails.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_hub_id)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith("."):
        raise UserError(f"{text}: no such directory; give a Hugging Face model directory or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{text}: neither a local directory nor available from the hub ({reason}); check the name, the network "
            "and, for gated models, the access token"
        ) from error


class _CheckpointTensors(Mapping):
    """Name -> lazily sliced tensor, over all safetensors files of a directory."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.directory = directory
        self._handles, weight_map = {}, self._read_index()
        for file in self._find_files(weight_map):
            check_not_lfs_pointer(file)
            try:
                self._handles[file] = stack.enter_context(safe_open(file, "numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file}: damaged or incomplete safetensors ({error}); download or copy it again"
                ) from error
        # A shard may hold an old copy of a tensor that the index assigns to another one.
        self._files_by_name = {
            name: file
            for file, handle in self._handles.items()
            for name in handle.keys()
            if weight_map.get(name, file.name) == file.name
        }

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name; empty without an index."""
        if not (self.directory / INDEX).exists():
            return {}
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not valid or not weight_map:
            raise UserError(f"{self.directory / INDEX}: has no valid weight_map; provide an undamaged copy of the file")
        return weight_map

    def _find_files(self, weight_map: dict[str, str]) -> list[Path]:
        files = [self.directory / name for name in sorted(set(weight_map.values()) or {SINGLE})]
        partial = sorted(file.name for file in self.directory.glob("*.incomplete"))
        for file in files:
            if not file.is_file() and partial:
                raise UserError(f"{file}: no such file, but found {partial[0]}; finish the download of this model")
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; expected weights in {SINGLE} or in the files listed in {INDEX} "
                    "(convert other formats with transformers' save_pretrained)"
                )
        return files

    def file(self, name: str) -> Path:
        return self._files_by_name[name]

    def __getitem__(self, name: str):
        return self._handles[self._files_by_name[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files_by_name)

    def __len__(self) -> int:
        return len(self._files_by_name)


def _check_tensors(plan: list[Entry], tensors: _CheckpointTensors, config: DecoderConfig) -> None:
    """Raise UserError for tensors that are missing, unexpected, not floats, or of the wrong shape."""
    expected = {name: entry.tensor_shape for entry in plan for name in entry.names}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = " (or set tie_word_embeddings to true)" if missing[0] == "lm_head.weight" else ""
        raise UserError(
            f"{tensors.directory}: tensor {missing[0]} is missing, and {len(missing) - 1} more; provide weights that "
            f"match config.json{hint}"
        )
    for name in tensors:
        if name in expected:
            shape, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
            if shape != expected[name]:
                raise UserError(
                    f"{tensors.file(name)}: tensor {name} has shape {shape}, but config.json implies {expected[name]}; "
                    "provide matching files"
                )
            if dtype not in _FLOATS:
                raise UserError(
                    f"{tensors.file(name)}: tensor {name} has dtype {dtype}; expected one of {', '.join(_FLOATS)}; "
                    "provide a copy that is not quantized"
                )
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            _check_tied_head(tensors)
        elif not _IGNORED.search(name):
            raise UserError(
                f"{tensors.file(name)}: tensor {name} is not part of the model that config.json describes; provide "
                "matching files"
            )


def _check_tied_head(tensors: _CheckpointTensors) -> None:
    """Raise UserError if a tied model stores an LM head that differs from its embedding table."""
    head, table = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    rows = head.get_shape()[0]
    blocks = [slice(row, min(row + 4096, rows)) for row in range(0, rows, 4096)]
    same = tuple(head.get_shape()) == tuple(table.get_shape())
    if not same or any(not np.array_equal(head[block], table[block]) for block in blocks):
        raise UserError(
            f"{tensors.file('lm_head.weight')}: lm_head.weight differs from model.embed_tokens.weight, but config.json "
            "sets tie_word_embeddings; set it to false to use the stored head"
        )


def _load_parameter(entry: Entry, tensors: _CheckpointTensors, dtype: np.dtype, sharding) -> jax.Array:
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    # Grouping devices by region reads a replicated region only once.
    devices_by_region: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, entry.shape, strict=True))
        devices_by_region.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, devices in devices_by_region.items():
        region = _read_region(entry, tensors, dtype, tuple(slice(*axis) for axis in bounds))
        # Blocking frees the host copy before the next region is read.
        shards += jax.block_until_ready([jax.device_put(region, device) for device in devices])
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, shards, dtype=dtype)


def _read_region(entry: Entry, tensors: _CheckpointTensors, dtype: np.dtype, bounds: tuple[slice, ...]) -> np.ndarray:
    if not entry.stacked:
        return np.ascontiguousarray(_read_tensor(entry, tensors, entry.names[0], bounds).astype(dtype, copy=False))
    out = np.empty([axis.stop - axis.start for axis in bounds], dtype)
    for i, layer in enumerate(range(bounds[0].start, bounds[0].stop)):
        out[i] = _read_tensor(entry, tensors, entry.names[layer], bounds[1:])
    return out


def _read_tensor(entry: Entry, tensors: _CheckpointTensors, name: str, bounds: tuple[slice, ...]) -> np.ndarray:
    """Read a region of one checkpoint tensor; UserError for non-finite values."""
    region = entry.read(tensors[name], bounds)
    # Checked in blocks because the boolean mask of a whole embedding table takes hundreds of megabytes.
    if not all(np.isfinite(region[start : start + 1024]).all() for start in range(0, len(region), 1024)):
        raise UserError(
            f"{tensors.file(name)}: tensor {name} holds infinities or NaN; the file is damaged, or the training run "
            "that wrote it diverged"
        )
    return region


class _ShardWriter:
    """Write tensors to one file, or to numbered shards of at most `shard_bytes` bytes."""

    def __init__(self, directory: Path, shard_bytes: int, total_bytes: int):
        self.directory, self.shard_bytes, self.single = directory, shard_bytes, total_bytes <= shard_bytes
        self.pending: dict[str, np.ndarray | None] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self.pending and not self.single and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        # Every process needs the names and sizes for the index; only the writer keeps the data.
        self.pending[name] = tensor if hosts.is_writer() else None
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        temporary = self.directory / f".{SINGLE}.{len(self.shards)}.partial"
        self._write(temporary)
        self.shards.append((temporary, list(self.pending)))
        self.pending, self.pending_bytes = {}, 0

    @hosts.on_writer
    def _write(self, path: Path) -> None:
        save_file(self.pending, path, metadata={"format": "pt"})
        # safetensors creates files readable by their owner only; follow the directory's permissions instead.
        path.chmod(self.directory.stat().st_mode & 0o666)

    def finish(self) -> set[str]:
        """Rename the shards, write the index and return the names of all files."""
        self._flush()
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for (temporary, _), name in zip(self.shards, names, strict=True):
            hosts.on_writer(os.replace)(temporary, self.directory / name)
        if count == 1:
            return set(names)
        weight_map = {tensor: name for (_, tensors), name in zip(self.shards, names, strict=True) for tensor in tensors}
        _write_json(self.directory / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        return {*names, INDEX}


def _merged_parameter(model: Model, params: Mapping[str, Any], entry: Entry) -> jax.Array:
    """A parameter, with its adapter merged if it has one."""
    siblings = _get(params, entry.path[:-1])
    leaf = siblings[entry.path[-1]]
    if entry.path[-1] != "kernel" or A not in siblings:
        return leaf
    return merge_adapters(leaf, siblings[A], siblings[B], model.lora.scale)


def _check_params(abstract: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    shapes, expected = (
        {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, abstract)
    )
    for path in shapes.keys() | expected.keys():
        name, shape, expected_shape = ".".join(path), shapes.get(path), expected.get(path)
        if shape is None:
            raise ValueError(f"parameter {name} is missing; pass the parameters of this model")
        if expected_shape is None:
            raise ValueError(f"parameter {name} does not belong to this model; pass the parameters of this model")
        if shape != expected_shape:
            raise ValueError(
                f"parameter {name} has shape {shape}, but the model expects {expected_shape}; pass the parameters of "
                "this model"
            )


def _save_parameter(entry: Entry, value: jax.Array, writer: _ShardWriter) -> None:
    for layer, name in enumerate(entry.names):
        writer.add(name, entry.to_tensor(hosts.gather(value[layer] if entry.stacked else value)))


@hosts.on_writer
def _remove_stale_weights(directory: Path, written: set[str]) -> None:
    """Remove weight files of an earlier export, which a reader could load instead of the new ones."""
    for file in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if file.name not in written:
            file.unlink(missing_ok=True)


@hosts.on_writer
def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
