"""Weights in and out in Hugging Face's format: safetensors slices straight to the devices that hold them, and back."""

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
from shiq_jax.models.lora import A, B, merged
from shiq_jax.models.model import Model
from shiq_jax.progress import track
from shiq_jax.sharding import hosts

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that old exports carry; ours comes from the config


def load_hf(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: str = "none",
    engine: str = "xla",
) -> tuple[Model, dict[str, Any]]:
    """The model of a Hugging Face directory, or of a hub id, and its parameters in their shardings.

    Each device's region of each parameter is read, cast and handed over by itself, so that the host holds one
    parameter's regions at a time and never a whole checkpoint. Indexed (sharded) safetensors and mixed float dtypes are
    understood.

    dtype: of the parameters; the other arguments are those of `Model`.
    Raises UserError, naming file and tensor, when something is missing, damaged, quantised, superfluous or of another
    shape than config.json says: nothing is loaded halfway.
    """
    directory = locate(path_or_hub_id)
    config = DecoderConfig.read(directory)
    model = Model.from_config(config, mesh=mesh, dtype=dtype, compute_dtype=compute_dtype, remat=remat, engine=engine)
    generation = directory / "generation_config.json"
    if generation.exists():
        model = dataclasses.replace(model, generation_config=read_json(generation))
    abstract = model.abstract_params()
    plan = entries(abstract, config.num_layers)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(directory, stack)
        _check(plan, tensors, config)
        params: dict[str, Any] = {}
        amount = ("MB", lambda entry: math.prod(entry.shape) * model.dtype.itemsize / 1e6)
        for entry in track(plan, f"loading {directory.name}", len(plan), "parameters", amount=amount):
            sharding = None if mesh is None else _at(abstract, entry.path).sharding
            _put(params, entry.path, _load(entry, tensors, model.dtype, sharding))
    return model, params


def save_hf(model: Model, params: Mapping[str, Any], path: str | Path) -> Path:
    """Writes what transformers and vLLM load: safetensors (in the parameters' dtypes) and the two configs in JSON.

    Adapters are merged into the kernels. Above 5 GB the tensors go to numbered shards with an index. Files are written
    to temporary names and renamed, the weights first; tokenizer files are the caller's to copy. With several processes
    every one calls this, and process 0 writes.
    Returns the directory. Raises ValueError, naming the parameter, when `params` are not those of `model`.
    """
    directory = Path(path)
    _check_params(model.abstract_params(), params)
    base, kept = model.switched_off(params)
    plan = entries(base.abstract_params(), model.config.num_layers)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    hosts.on_writer(directory.mkdir)(parents=True, exist_ok=True)
    writer = _Writer(directory, SHARD_BYTES, total)
    amount = ("MB", lambda entry: _at(params, entry.path).nbytes / 1e6)
    for entry in track(plan, f"writing {directory.name}", len(plan), "parameters", amount=amount):
        _save(entry, _whole(model, params, entry), writer)
    written = writer.finish()
    dtype = str(_at(params, plan[0].path).dtype)
    spelling = "torch_dtype" if "torch_dtype" in model.config.source else "dtype"
    _write_json(directory / "config.json", model.config.to_dict() | {spelling: dtype})
    if model.generation_config is not None:
        _write_json(directory / "generation_config.json", dict(model.generation_config))
    _remove_others(directory, written)
    return directory


def locate(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; a hub id ("owner/name") as the directory that its files were downloaded to.

    Raises UserError when it is neither, or the hub does not give it.
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


class _Tensors(Mapping):
    """Name -> lazily sliceable tensor, over all safetensors files of a directory."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.directory = directory
        self._handles = {}
        for file in self._files():
            check_not_lfs_pointer(file)
            try:
                self._handles[file] = stack.enter_context(safe_open(file, "numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file}: damaged or incomplete safetensors ({error}); download or copy it again"
                ) from error
        self._where = {name: file for file, handle in self._handles.items() for name in handle.keys()}

    def _files(self) -> list[Path]:
        if (self.directory / INDEX).exists():
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{self.directory / INDEX}: lacks weight_map; bring an undamaged copy of the file")
            files = [self.directory / name for name in sorted(set(weight_map.values()))]
        else:
            files = [self.directory / SINGLE]
        partial = sorted(file.name for file in self.directory.glob("*.incomplete"))
        for file in files:
            if not file.is_file() and partial:
                raise UserError(f"{file}: no such file, but {partial[0]} is there: finish the download of this model")
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; weights are expected in {SINGLE}, or in the files that {INDEX} names "
                    "(other formats: load them with transformers and save_pretrained)"
                )
        return files

    def file(self, name: str) -> Path:
        return self._where[name]

    def __getitem__(self, name: str):
        return self._handles[self._where[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _check(plan: list[Entry], tensors: _Tensors, config: DecoderConfig) -> None:
    """Refuses tensors that are missing, superfluous, not floats, or of another shape than the config says."""
    expected = {name: entry.tensor_shape for entry in plan for name in entry.names}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = " (a model without it usually has tie_word_embeddings true)" if missing[0] == "lm_head.weight" else ""
        raise UserError(
            f"{tensors.directory}: tensor {missing[0]} is missing, and {len(missing) - 1} more; config.json and the "
            f"weights must belong to the same model{hint}"
        )
    for name in tensors:
        if name in expected:
            shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
            if shape != expected[name]:
                raise UserError(
                    f"{tensors.file(name)}: tensor {name} has shape {shape}, config.json says {expected[name]}; bring "
                    "matching files"
                )
            if kind not in _FLOATS:
                raise UserError(
                    f"{tensors.file(name)}: tensor {name} holds {kind}; expected one of {', '.join(_FLOATS)}, so bring "
                    "a copy that is not quantised"
                )
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            _check_tied(tensors)
        elif not _IGNORED.search(name):
            raise UserError(
                f"{tensors.file(name)}: tensor {name} is not part of the model that config.json describes; bring "
                "matching files"
            )


def _check_tied(tensors: _Tensors) -> None:
    """A head that is stored although tied must be the embedding table, or one of the two would be dropped silently."""
    head, table = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    rows = head.get_shape()[0]
    blocks = [slice(row, min(row + 4096, rows)) for row in range(0, rows, 4096)]
    same = tuple(head.get_shape()) == tuple(table.get_shape())
    if not same or any(not np.array_equal(head[block], table[block]) for block in blocks):
        raise UserError(
            f"{tensors.file('lm_head.weight')}: lm_head.weight differs from model.embed_tokens.weight although "
            "config.json says tie_word_embeddings; set it to false if the head is meant to be used"
        )


def _load(entry: Entry, tensors: _Tensors, dtype: np.dtype, sharding) -> jax.Array:
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # devices with copies of one region read it once
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, entry.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces: list[jax.Array] = []
    for bounds, devices in holders.items():
        region = _read(entry, tensors, dtype, tuple(slice(*each) for each in bounds))
        # Waiting lets go of the host's copy before the next region is read.
        pieces += jax.block_until_ready([jax.device_put(region, device) for device in devices])
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, pieces, dtype=dtype)


def _read(entry: Entry, tensors: _Tensors, dtype: np.dtype, bounds: tuple[slice, ...]) -> np.ndarray:
    if not entry.stacked:
        return np.ascontiguousarray(_part(entry, tensors, entry.names[0], bounds).astype(dtype, copy=False))
    out = np.empty([each.stop - each.start for each in bounds], dtype)
    for place, layer in enumerate(range(bounds[0].start, bounds[0].stop)):
        out[place] = _part(entry, tensors, entry.names[layer], bounds[1:])
    return out


def _part(entry: Entry, tensors: _Tensors, name: str, bounds: tuple[slice, ...]) -> np.ndarray:
    """The region of one layer's part; UserError when it holds what no weights are, as a damaged file may."""
    part = entry.read(tensors[name], bounds)
    # In blocks, for the answers of a whole embedding table would be hundreds of megabytes themselves.
    if not all(np.isfinite(part[start : start + 1024]).all() for start in range(0, len(part), 1024)):
        raise UserError(
            f"{tensors.file(name)}: tensor {name} holds infinities or NaN, which no usable model has; the file is "
            "damaged, or the training that made it diverged"
        )
    return part


class _Writer:
    """Collects tensors and writes them to one file, or to numbered shards of at most `limit` bytes."""

    def __init__(self, directory: Path, limit: int, total: int):
        self.directory, self.limit, self.single = directory, limit, total <= limit
        self.pending: dict[str, np.ndarray | None] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self.pending and not self.single and self.pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        # The other processes count along, without keeping what they do not write.
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
        # safetensors leaves files to their owner alone; whoever may read the directory may read the model.
        path.chmod(self.directory.stat().st_mode & 0o666)

    def finish(self) -> set[str]:
        """Gives the shards their names and writes the index; returns the names of all files."""
        self._flush()
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for (temporary, _), name in zip(self.shards, names, strict=True):
            hosts.on_writer(os.replace)(temporary, self.directory / name)
        if count == 1:
            return set(names)
        weight_map = {tensor: name for (_, held), name in zip(self.shards, names, strict=True) for tensor in held}
        _write_json(self.directory / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        return {*names, INDEX}


def _whole(model: Model, params: Mapping[str, Any], entry: Entry) -> jax.Array:
    """A parameter as the decoder uses it: a kernel with its adapter."""
    beside, leaf = _at(params, entry.path[:-1]), _at(params, entry.path)
    if entry.path[-1] != "kernel" or A not in beside:
        return leaf
    return merged(leaf, beside[A], beside[B], model.lora.scale)


def _check_params(abstract: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    given, expected = (
        {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, abstract)
    )
    for path in given.keys() | expected.keys():
        if given.get(path) != expected.get(path):
            raise ValueError(
                f"parameter {'.'.join(path)} has shape {given.get(path, 'none: it is missing')}, the model's is "
                f"{expected.get(path, 'none: it has no such parameter')}; pass the parameters of this model"
            )


def _save(entry: Entry, value: jax.Array, writer: _Writer) -> None:
    for layer, name in enumerate(entry.names):
        writer.add(name, entry.to_tensor(hosts.gather(value[layer] if entry.stacked else value)))


@hosts.on_writer
def _remove_others(directory: Path, written: set[str]) -> None:
    """Remove weights of an earlier export under other names, which would be loaded with, or instead of, these."""
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if stale.name not in written:
            stale.unlink(missing_ok=True)


@hosts.on_writer
def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
