"""How the parameters of a decoder are called and laid out in a Llama checkpoint of Hugging Face."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Path in our nested dict -> name in the checkpoint; "{}" is the number of the layer.
_NAMES = {
    "embed.table": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
}
_PROJECTIONS = {
    "layers.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.attention.key": "model.layers.{}.self_attn.k_proj",
    "layers.attention.value": "model.layers.{}.self_attn.v_proj",
    "layers.attention.output": "model.layers.{}.self_attn.o_proj",
    "layers.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.mlp.down": "model.layers.{}.mlp.down_proj",
}
_NAMES |= {
    f"{ours}.{kind}": f"{theirs}.{suffix}"
    for ours, theirs in _PROJECTIONS.items()
    for kind, suffix in (("kernel", "weight"), ("bias", "bias"))
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors of a checkpoint that it is made of.

    path: in the nested dict. shape: ours. names: one tensor per layer, or a single one. stacked: the first dimension of
    `shape` is the layer. inputs: number of leading dimensions of one layer's part that are inputs of a linear map,
    whose tensor is [outputs, inputs]; 0 when the tensor has our layout.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    inputs: int

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of one layer's part."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint."""
        if self.inputs:
            return math.prod(self.part[self.inputs :]), math.prod(self.part[: self.inputs])
        # A bias of [heads, head_dim] is one vector in the checkpoint; the embedding table is as it is.
        return self.part if self.path == ("embed", "table") else (math.prod(self.part),)

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """One layer's part in the checkpoint's layout."""
        if self.inputs:
            return np.ascontiguousarray(part.reshape(self.tensor_shape[::-1]).T)
        return np.ascontiguousarray(part.reshape(self.tensor_shape))

    def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """The region `index` of one layer's part, reading no more of the tensor than the rows and columns that hold it.

        tensor: anything that has the checkpoint's layout and can be sliced. index: slices with step 1 over `part`.
        """
        if not self.inputs:
            if len(self.part) == len(self.tensor_shape):
                return np.asarray(tensor[index])
            return np.asarray(tensor[:]).reshape(self.part)[index]
        rows, inner_rows = _merged(self.part[self.inputs :], index[self.inputs :])
        columns, inner_columns = _merged(self.part[: self.inputs], index[: self.inputs])
        read = np.asarray(tensor[rows, columns]).T
        sizes = [bounds.stop - bounds.start for bounds in (index[0], index[self.inputs])]
        shape = (sizes[0], *self.part[1 : self.inputs], sizes[1], *self.part[self.inputs + 1 :])
        return read.reshape(shape)[(slice(None), *inner_columns, slice(None), *inner_rows)]


def entries(abstract_params: Mapping[str, Any], num_layers: int) -> list[Entry]:
    """One entry per parameter of a nested dict of things with a shape."""
    out = []
    for path, shape in _flatten(abstract_params):
        name = _NAMES[".".join(path)]
        stacked = path[0] == "layers"
        # The output projection of attention reads (heads, head_dim); every other kernel reads one dimension.
        inputs = 0 if path[-1] != "kernel" else 2 if path[-2] == "output" else 1
        names = tuple(name.format(layer) for layer in range(num_layers)) if stacked else (name,)
        out.append(Entry(path, tuple(shape), names, stacked, inputs))
    return out


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _flatten(child, (*path, name))
        else:
            yield (*path, name), child.shape


def _merged(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, tuple[slice, ...]]:
    """A region of dimensions that are one dimension in the checkpoint: what to read of it, and what to keep inside."""
    inner = math.prod(shape[1:])
    return slice(index[0].start * inner, index[0].stop * inner), index[1:]
