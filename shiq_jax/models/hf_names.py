"""Names and layouts of the decoder's parameters in Hugging Face Llama checkpoints."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Path in the nested dict of parameters -> tensor name in the checkpoint; "{}" is the layer index.
_NAMES = {
    "embed.table": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
}
_LINEAR_LAYERS = {
    "layers.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.attention.key": "model.layers.{}.self_attn.k_proj",
    "layers.attention.value": "model.layers.{}.self_attn.v_proj",
    "layers.attention.output": "model.layers.{}.self_attn.o_proj",
    "layers.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.mlp.down": "model.layers.{}.mlp.down_proj",
}
_NAMES |= {
    f"{path}.{kind}": f"{prefix}.{suffix}"
    for path, prefix in _LINEAR_LAYERS.items()
    for kind, suffix in (("kernel", "weight"), ("bias", "bias"))
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Mapping of one parameter to its checkpoint tensors.

    Attributes:
        path: in the nested dict of parameters.
        shape: of the parameter.
        names: of the checkpoint tensors, one per layer if stacked.
        stacked: whether the first dimension of `shape` is the layer.
        num_inputs: number of leading input dimensions of one layer's kernel, whose tensor is [outputs, inputs]; 0 for
            parameters that the checkpoint stores in the same order.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    num_inputs: int

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's slice."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint."""
        if self.num_inputs:
            return math.prod(self.layer_shape[self.num_inputs :]), math.prod(self.layer_shape[: self.num_inputs])
        # Biases of [heads, head_dim] are flat in the checkpoint; the embedding table has the same shape.
        return self.layer_shape if self.path == ("embed", "table") else (math.prod(self.layer_shape),)

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """Convert one layer's slice to the checkpoint layout."""
        if self.num_inputs:
            return np.ascontiguousarray(array.reshape(self.tensor_shape[::-1]).T)
        return np.ascontiguousarray(array.reshape(self.tensor_shape))

    def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Read the region `index` of one layer's slice, touching only the needed rows and columns of the tensor.

        tensor: a sliceable object in the checkpoint layout. index: slices with step 1 over `layer_shape`.
        """
        if not self.num_inputs:
            if len(self.layer_shape) == len(self.tensor_shape):
                return np.asarray(tensor[index])
            return np.asarray(tensor[:]).reshape(self.layer_shape)[index]
        rows, inner_rows = _merge_dims(self.layer_shape[self.num_inputs :], index[self.num_inputs :])
        columns, inner_columns = _merge_dims(self.layer_shape[: self.num_inputs], index[: self.num_inputs])
        region = np.asarray(tensor[rows, columns]).T
        sizes = [bounds.stop - bounds.start for bounds in (index[0], index[self.num_inputs])]
        shape = (sizes[0], *self.layer_shape[1 : self.num_inputs], sizes[1], *self.layer_shape[self.num_inputs + 1 :])
        return region.reshape(shape)[(slice(None), *inner_columns, slice(None), *inner_rows)]


def entries(abstract_params: Mapping[str, Any], num_layers: int) -> list[Entry]:
    """One entry per leaf of a nested dict of arrays or abstract arrays."""
    out = []
    for path, shape in _flatten(abstract_params):
        name = _NAMES[".".join(path)]
        stacked = path[0] == "layers"
        # Attention's output projection has inputs (heads, head_dim); every other kernel has one input dimension.
        num_inputs = 0 if path[-1] != "kernel" else 2 if path[-2] == "output" else 1
        names = tuple(name.format(layer) for layer in range(num_layers)) if stacked else (name,)
        out.append(Entry(path, tuple(shape), names, stacked, num_inputs))
    return out


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _flatten(child, (*path, name))
        else:
            yield (*path, name), child.shape


def _merge_dims(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, tuple[slice, ...]]:
    """Slice of the flattened dimension that covers a region, and the slices of the remaining inner dimensions."""
    inner = math.prod(shape[1:])
    return slice(index[0].start * inner, index[0].stop * inner), index[1:]
