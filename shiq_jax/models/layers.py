"""Building blocks of a decoder as Flax NNX modules.

`_parameter` declares the shape, dtype, initializer and logical axes of every parameter. This one declaration drives
initialization, abstract shapes, sharding, loading and saving.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from shiq_jax.models import ghost_norms, rope
from shiq_jax.models.config import DecoderConfig
from shiq_jax.models.ghost_norms import NormTracker
from shiq_jax.models.ghost_vocabulary import lookup
from shiq_jax.models.lora import Lora
from shiq_jax.sharding import constrain

# `checkpoint_name` of the outputs of linear layers, for rematerialization policies.
LINEAR_OUTPUT = "linear output"

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class ForwardSettings(NamedTuple):
    """Settings of one forward pass, shared by all modules.

    Attributes:
        dtype: dtype of the activations.
        remat: rematerialization policy, a key of `decoder.REMAT`.
        engine: attention engine, a key of `attention.ENGINES`.
        tracker: per-row gradient norms, see `ghost_norms`.
        sums: running sums of the layers' gradients, see `accumulation`.
    """

    dtype: jnp.dtype
    mesh: Mesh | None
    remat: str
    engine: str
    tracker: NormTracker | None = None
    sums: Mapping[str, Any] | None = None


class StackInit(NamedTuple):
    """Settings shared by the parameters of a stack of layers; num_layers None means unstacked parameters."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    num_layers: int | None = None
    lora: Lora | None = None


def _parameter(stack: StackInit, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    if stack.num_layers is not None:
        shape, axes = (stack.num_layers, *shape), ("layers", *axes)
    return nnx.Param(init(stack.rngs.params(), shape, stack.dtype), logical=axes)


class Linear(nnx.Module):
    """Linear layer over several input and output dimensions: `x @ kernel + bias`, with an optional LoRA adapter.

    inputs, outputs: logical axis -> size. name: name in Hugging Face checkpoints, matched against `Lora.targets`.
    Parameters: kernel [*inputs, *outputs]; optionally bias [*outputs]; with an adapter lora_a [*inputs, rank] and
    lora_b [rank, *outputs].
    """

    def __init__(
        self, stack: StackInit, inputs: dict[str, int], outputs: dict[str, int], bias: bool, std: float,
        name: str = "",
    ):  # fmt: skip
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = _parameter(stack, nnx.initializers.normal(std), shape, axes)
        self.bias = _parameter(stack, nnx.initializers.zeros, tuple(outputs.values()), tuple(outputs)) if bias else None
        self.num_inputs = len(inputs)
        self.lora = stack.lora if stack.lora and name in stack.lora.targets else None
        if self.lora is not None:
            rank, bound = self.lora.rank, math.prod(inputs.values()) ** -0.5

            def uniform(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            self.lora_a = _parameter(stack, uniform, (*inputs.values(), rank), (*inputs, "rank"))
            self.lora_b = _parameter(stack, nnx.initializers.zeros, (rank, *outputs.values()), ("rank", *outputs))

    def __call__(self, x: jax.Array, settings: ForwardSettings) -> jax.Array:
        x, product, tracker = x.astype(settings.dtype), ghost_norms.product(self.num_inputs), settings.tracker
        out = ghost_norms.apply(product, x, self.kernel[...], tracker)
        if self.lora is not None:
            inner = ghost_norms.apply(product, x, self.lora_a[...], tracker)
            out = out + self.lora.scale * ghost_norms.apply(ghost_norms.product(1), inner, self.lora_b[...], tracker)
        out = checkpoint_name(out, LINEAR_OUTPUT)
        return out if self.bias is None else ghost_norms.apply(ghost_norms.BIAS, out, self.bias[...], tracker)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019), computed in float32 or wider and returned in the dtype of `x`."""

    def __init__(self, stack: StackInit, size: int, epsilon: float):
        self.scale = _parameter(stack, nnx.initializers.ones, (size,), ("norm",))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*rows features"], settings: ForwardSettings) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        out = ghost_norms.apply(ghost_norms.SCALE, wide * inverse_rms, self.scale[...], settings.tracker)
        return out.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding table [vocab_size, hidden_size]."""

    def __init__(self, stack: StackInit, vocabulary: int, size: int, std: float):
        self.table = _parameter(stack, nnx.initializers.normal(std), (vocabulary, size), ("vocab", "embed"))

    @jax.named_scope("embed")
    def __call__(
        self, tokens: Int[Array, "rows length"], settings: ForwardSettings
    ) -> Float[Array, "rows length features"]:
        """Embeddings of the tokens."""
        # Gather the features first: the result is sharded along rows, which a lookup in a table sharded along features
        # would reach only through another reshard.
        table = constrain(self.table[...], ("vocab", "features"), settings.mesh)
        embeddings = table[tokens] if settings.tracker is None else lookup(table, tokens, settings.tracker)
        return constrain(embeddings.astype(settings.dtype), ("rows", "length", "features"), settings.mesh)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings and, with `qk_norm`, RMS-normalized queries and keys.

    The caller's `attend(q, k, v)` computes the attention itself and may return a second value, such as a cache.
    """

    def __init__(self, stack: StackInit, config: DecoderConfig):
        std, bias, embed = config.initializer_range, config.attention_bias, {"embed": config.hidden_size}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.query = Linear(stack, embed, heads, bias, std, "q_proj")
        self.key = Linear(stack, embed, kv_heads, bias, std, "k_proj")
        self.value = Linear(stack, embed, kv_heads, bias, std, "v_proj")
        self.output = Linear(stack, heads, embed, bias, std, "o_proj")
        self.query_norm, self.key_norm = (
            Norm(stack, config.head_dim, config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )

    @jax.named_scope("attention")
    def __call__(self, x, rotation: tuple[jax.Array, jax.Array], attend: Attend, settings: ForwardSettings):
        q, k, v = self.query(x, settings), self.key(x, settings), self.value(x, settings)
        if self.query_norm is not None:
            q, k = self.query_norm(q, settings), self.key_norm(k, settings)
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        q = constrain(q, ("rows", "length", "heads", "head_dim"), settings.mesh)
        k = constrain(k, ("rows", None, "kv_heads", "head_dim"), settings.mesh)
        v = constrain(v, ("rows", None, "kv_heads", "head_dim"), settings.mesh)
        out, aux = attend(q, k, v)
        return self.output(out, settings), aux


class GatedMlp(nnx.Module):
    """SwiGLU MLP: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, stack: StackInit, config: DecoderConfig):
        std, bias = config.initializer_range, config.mlp_bias
        embed, hidden = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        self.gate = Linear(stack, embed, hidden, bias, std, "gate_proj")
        self.up = Linear(stack, embed, hidden, bias, std, "up_proj")
        self.down = Linear(stack, hidden, embed, bias, std, "down_proj")

    @jax.named_scope("mlp")
    def __call__(self, x, settings: ForwardSettings):
        inner = jax.nn.silu(self.gate(x, settings)) * self.up(x, settings)
        return self.down(constrain(inner, ("rows", "length", "mlp"), settings.mesh), settings)


class Layer(nnx.Module):
    """Pre-norm decoder layer: attention and gated MLP, each with a residual connection."""

    def __init__(self, stack: StackInit, config: DecoderConfig):
        self.attention_norm = Norm(stack, config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(stack, config)
        self.mlp_norm = Norm(stack, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(stack, config)

    def __call__(self, x, rotation: tuple[jax.Array, jax.Array], attend: Attend, settings: ForwardSettings):
        """`x` [rows, length, features] after this layer, and the second value that `attend` returned."""
        out, aux = self.attention(self.attention_norm(x, settings), rotation, attend, settings)
        x = constrain(x + out, ("rows", "length", "features"), settings.mesh)
        x = x + self.mlp(self.mlp_norm(x, settings), settings)
        return constrain(x, ("rows", "length", "features"), settings.mesh), aux
