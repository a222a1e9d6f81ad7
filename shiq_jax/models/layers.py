"""The building blocks of a decoder, as Flax NNX modules.

Every parameter is declared in one place, by `_parameter`: shape, dtype, initialiser and logical axes. Those four drive
initialisation, abstract shapes, shardings, loading and saving; nothing else repeats them.
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

# What a rematerialisation policy may keep: the products of activations and weights.
PROJECTED = "projection"

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class ForwardSettings(NamedTuple):
    """How a forward pass is run, for all its modules.

    dtype: of activations. remat: see `decoder.REMAT`. engine: of attention. tracker: of the rows' gradient norms, see
    `tracked`. sums: what the layers' gradients are added to, see `accumulation`.
    """

    dtype: jnp.dtype
    mesh: Mesh | None
    remat: str
    engine: str
    tracker: NormTracker | None = None
    sums: Mapping[str, Any] | None = None


class StackInit(NamedTuple):
    """What the parameters of one stack have in common: random keys, dtype, how many layers there are, adapters."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    stack: int | None = None
    lora: Lora | None = None


def _parameter(declaring: StackInit, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    if declaring.stack is not None:
        shape, axes = (declaring.stack, *shape), ("layers", *axes)
    return nnx.Param(init(declaring.rngs.params(), shape, declaring.dtype), logical=axes)


class Projection(nnx.Module):
    """A linear map from all `inputs` dimensions to all `outputs` dimensions: `x @ kernel + bias`.

    inputs, outputs: logical axis -> size. name: in a checkpoint, by which adapters are asked for. kernel [*inputs,
    *outputs]; bias [*outputs], when asked for; of an adapter lora_a [*inputs, rank] and lora_b [rank, *outputs].
    """

    def __init__(
        self, declaring: StackInit, inputs: dict[str, int], outputs: dict[str, int], bias: bool, std: float,
        name: str = "",
    ):  # fmt: skip
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = _parameter(declaring, nnx.initializers.normal(std), shape, axes)
        self.bias = (
            _parameter(declaring, nnx.initializers.zeros, tuple(outputs.values()), tuple(outputs)) if bias else None
        )
        self.contracted = len(inputs)
        self.lora = declaring.lora if declaring.lora and name in declaring.lora.targets else None
        if self.lora is not None:
            rank, bound = self.lora.rank, math.prod(inputs.values()) ** -0.5

            def uniform(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            self.lora_a = _parameter(declaring, uniform, (*inputs.values(), rank), (*inputs, "rank"))
            self.lora_b = _parameter(declaring, nnx.initializers.zeros, (rank, *outputs.values()), ("rank", *outputs))

    def __call__(self, x: jax.Array, settings: ForwardSettings) -> jax.Array:
        x, product, tracker = x.astype(settings.dtype), ghost_norms.product(self.contracted), settings.tracker
        out = ghost_norms.apply(product, x, self.kernel[...], tracker)
        if self.lora is not None:
            inner = ghost_norms.apply(product, x, self.lora_a[...], tracker)
            out = out + self.lora.scale * ghost_norms.apply(ghost_norms.product(1), inner, self.lora_b[...], tracker)
        out = checkpoint_name(out, PROJECTED)
        return out if self.bias is None else ghost_norms.apply(ghost_norms.SHIFT, out, self.bias[...], tracker)


class Norm(nnx.Module):
    """x / rms(x) * scale over the features, in float32, returned in the dtype of `x` (Zhang and Sennrich, 2019)."""

    def __init__(self, declaring: StackInit, size: int, epsilon: float):
        self.scale = _parameter(declaring, nnx.initializers.ones, (size,), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"], settings: ForwardSettings) -> Float[Array, "*rows features"]:
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(precise), axis=-1, keepdims=True) + self.epsilon)
        return ghost_norms.apply(ghost_norms.SCALE, precise * inverse, self.scale[...], settings.tracker).astype(
            x.dtype
        )


class Embedding(nnx.Module):
    """The table of token vectors, [vocab_size, hidden_size]."""

    def __init__(self, declaring: StackInit, vocabulary: int, size: int, std: float):
        self.table = _parameter(declaring, nnx.initializers.normal(std), (vocabulary, size), ("vocab", "embed"))

    @jax.named_scope("embed")
    def __call__(
        self, tokens: Int[Array, "rows length"], settings: ForwardSettings
    ) -> Float[Array, "rows length features"]:
        """The tokens' vectors."""
        # Whole vectors on every device: the result is cut along rows, and a lookup in a table that is cut along
        # features would first be cut the wrong way.
        table = constrain(self.table[...], ("vocab", "features"), settings.mesh)
        vectors = table[tokens] if settings.tracker is None else lookup(table, tokens, settings.tracker)
        return constrain(vectors.astype(settings.dtype), ("rows", "length", "features"), settings.mesh)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; what is attended to is the caller's to say.

    Queries and keys are normalised over head_dim, by one scale for all heads, where the config has it so.
    """

    def __init__(self, declaring: StackInit, config: DecoderConfig):
        std, bias, embed = config.initializer_range, config.attention_bias, {"embed": config.hidden_size}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.query = Projection(declaring, embed, heads, bias, std, "q_proj")
        self.key = Projection(declaring, embed, kv_heads, bias, std, "k_proj")
        self.value = Projection(declaring, embed, kv_heads, bias, std, "v_proj")
        self.output = Projection(declaring, heads, embed, bias, std, "o_proj")
        self.query_norm, self.key_norm = (
            Norm(declaring, config.head_dim, config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )

    @jax.named_scope("attention")
    def __call__(self, x, rotation: tuple[jax.Array, jax.Array], attend: Attend, settings: ForwardSettings):
        q, k, v = (project(x, settings) for project in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q, k = self.query_norm(q, settings), self.key_norm(k, settings)
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        q = constrain(q, ("rows", "length", "heads", "head_dim"), settings.mesh)
        k, v = (constrain(each, ("rows", None, "kv_heads", "head_dim"), settings.mesh) for each in (k, v))
        mixed, memory = attend(q, k, v)
        return self.output(mixed, settings), memory


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, declaring: StackInit, config: DecoderConfig):
        std, bias = config.initializer_range, config.mlp_bias
        embed, hidden = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        self.gate = Projection(declaring, embed, hidden, bias, std, "gate_proj")
        self.up = Projection(declaring, embed, hidden, bias, std, "up_proj")
        self.down = Projection(declaring, hidden, embed, bias, std, "down_proj")

    @jax.named_scope("mlp")
    def __call__(self, x, settings: ForwardSettings):
        inner = jax.nn.silu(self.gate(x, settings)) * self.up(x, settings)
        return self.down(constrain(inner, ("rows", "length", "mlp"), settings.mesh), settings)


class Layer(nnx.Module):
    """One decoder layer: attention and gated MLP, each behind its norm and around its residual."""

    def __init__(self, declaring: StackInit, config: DecoderConfig):
        self.attention_norm = Norm(declaring, config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(declaring, config)
        self.mlp_norm = Norm(declaring, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(declaring, config)

    def __call__(self, x, rotation: tuple[jax.Array, jax.Array], attend: Attend, settings: ForwardSettings):
        """`x` [rows, length, features] after this layer, and whatever `attend` returned beside its result."""
        mixed, memory = self.attention(self.attention_norm(x, settings), rotation, attend, settings)
        x = constrain(x + mixed, ("rows", "length", "features"), settings.mesh)
        x = x + self.mlp(self.mlp_norm(x, settings), settings)
        return constrain(x, ("rows", "length", "features"), settings.mesh), memory
