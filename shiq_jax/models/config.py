"""Decoder configuration, read from and written to Hugging Face's `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError, check_not_lfs_pointer

# Model type -> (whether queries and keys are normalized, defaults of omitted fields that differ from Llama's).
SUPPORTED_MODELS: Mapping[str, tuple[bool, Mapping[str, int]]] = {
    "llama": (False, {}),
    "qwen3": (True, {"num_key_value_heads": 32, "head_dim": 128}),
}
_ARCHITECTURES = {False: ("llama", "LlamaForCausalLM"), True: ("qwen3", "Qwen3ForCausalLM")}
SUPPORTED_ROPES = ("default", "linear", "llama3")

# Field of `DecoderConfig` -> field of config.json.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_OPTIONAL = {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "initializer_range",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies: "linear" divides all of them by `factor`, "llama3" only the low ones.

    "llama3" divides frequencies with wavelengths above `original_max_positions / low_freq_factor`, keeps those with
    wavelengths below `original_max_positions / high_freq_factor`, and interpolates between them. "linear" ignores the
    last three fields.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a Llama-family decoder; hashable, so a jitted function may close over it.

    `num_kv_heads` and `head_dim` default to `num_heads` and `hidden_size // num_heads`. `qk_norm`: RMS-normalize
    queries and keys over head_dim before the rotary embedding (arXiv 2010.04245), as in Qwen3. `source`: the parsed
    config.json, kept so that an export preserves fields that this class ignores; excluded from comparison.
    Raises ValueError for invalid or inconsistent sizes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        self._check_sizes(*_REQUIRED)
        object.__setattr__(self, "num_kv_heads", self.num_heads if self.num_kv_heads is None else self.num_kv_heads)
        object.__setattr__(
            self, "head_dim", self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        )
        self._check_sizes("num_kv_heads", "head_dim", "max_positions")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly; "
                "num_kv_heads must divide num_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}; rotary embeddings need an even number")

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"model config: {name} is {size!r}; it must be a positive integer")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], name: str = "config.json") -> "DecoderConfig":
        """Build the config from a parsed config.json, with the rope settings of transformers 4 or 5.

        name: file name for error messages.
        Raises UserError for an unsupported model type, activation, quantization or rope type, and for a missing or
        invalid field.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in SUPPORTED_MODELS:
            raise UserError(f"{name}: model_type is {model_type!r}; supported: {', '.join(SUPPORTED_MODELS)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{name}: hidden_act is {raw['hidden_act']!r}; supported: silu")
        if raw.get("quantization_config"):
            raise UserError(
                f"{name}: the weights are quantized (quantization_config); provide a full-precision copy of the model"
            )
        missing = [field for field in _REQUIRED.values() if raw.get(field) is None]
        if missing:
            raise UserError(
                f"{name}: field {missing[0]} is missing; the file must be the config.json of a {model_type} model"
            )
        if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
            raise UserError(
                f"{name}: the model uses sliding-window attention; supported: full causal attention in every layer"
            )
        _check_types(raw, name)
        qk_norm, defaults = SUPPORTED_MODELS[model_type]
        optional = defaults | {key: raw[key] for key in _OPTIONAL.values() if raw.get(key) is not None}
        values = {field: raw[key] for field, key in _REQUIRED.items()} | {"qk_norm": qk_norm}
        values |= {field: optional[key] for field, key in _OPTIONAL.items() if key in optional}
        theta, scaling = _read_rope(raw, values.get("max_positions", cls.max_positions), name)
        try:
            return cls(**values, rope_theta=theta, rope_scaling=scaling, source=dict(raw))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    @classmethod
    def read(cls, directory: str | Path) -> "DecoderConfig":
        """Read the config of a Hugging Face model directory; UserError for a missing or invalid config.json."""
        path = Path(directory) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json for transformers: the fields of `source`, updated from this config."""
        model_type, architecture = _ARCHITECTURES[self.qk_norm]
        out = dict(self.source) or {"hidden_act": "silu"}
        out |= {key: getattr(self, field) for field, key in (_REQUIRED | _OPTIONAL).items()}
        out |= {"model_type": model_type, "architectures": [architecture]}
        return _write_rope(out, self)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError when the file is missing or holds something else."""
    check_not_lfs_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model directory with {path.name} is expected") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); provide an undamaged copy of the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}; an object with named fields is expected")
    return content


def _check_types(raw: Mapping[str, Any], name: str) -> None:
    """Check the types of optional booleans and floats; `DecoderConfig` checks the sizes itself."""
    defaults = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    for field, key in _OPTIONAL.items():
        value, default = raw.get(key), defaults[field]
        if value is not None and isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{name}: {key} is {value!r}; expected true or false")
        if value is not None and isinstance(default, float):
            _positive(value, key, name)


def _positive(value: Any, field: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name}: {field} is {value!r}; expected a positive number")
    return float(value)


def _read_rope(raw: Mapping[str, Any], max_positions: int, name: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    rope: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(field) or {}, Mapping):
            raise UserError(f"{name}: {field} is {raw[field]!r}; expected an object with named fields")
        rope |= raw.get(field) or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or DecoderConfig.rope_theta
    theta = _positive(theta, "rope_theta", name)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SUPPORTED_ROPES:
        raise UserError(f"{name}: rope type is {kind!r}; supported: {', '.join(SUPPORTED_ROPES)}")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{name}: partial_rotary_factor is set; supported: rotary embeddings over the whole head")
    if kind == "default":
        return theta, None
    required = ["factor"] if kind == "linear" else ["factor", "low_freq_factor", "high_freq_factor"]
    missing = [field for field in required if rope.get(field) is None]
    if missing:
        raise UserError(f"{name}: rope type {kind} lacks {missing[0]}; required: {', '.join(required)}")
    factors = [_positive(rope[field], field, name) for field in required]
    if kind == "linear":
        return theta, RopeScaling(kind, *factors)
    field = "original_max_position_embeddings"
    original = int(_positive(rope.get(field) or max_positions, field, name))
    return theta, RopeScaling(kind, *factors, original_max_positions=original)


def _write_rope(out: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Write rope settings in the format that `out` already uses, by default that of transformers 4 (read by all)."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default"}
    if scaling:
        rope["factor"] = scaling.factor
    if scaling and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    transformers_5 = "rope_parameters" in out
    for field in ("rope_parameters", "rope_theta", "rope_scaling"):
        out.pop(field, None)
    if transformers_5:
        return out | {"rope_parameters": rope | {"rope_theta": config.rope_theta}}
    return out | {"rope_theta": config.rope_theta, "rope_scaling": rope if scaling else None}
