"""Llama-family decoder: token embedding, a scanned stack of layers, final norm, and an optional untied LM head."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from shiq_jax.models import accumulation, blockwise, rope
from shiq_jax.models import cache as caches
from shiq_jax.models.attention import attention, branch_attention
from shiq_jax.models.attention_mask import NEVER, AttentionMask, cache_mask
from shiq_jax.models.cache import Branches, Cache
from shiq_jax.models.config import DecoderConfig
from shiq_jax.models.ghost_norms import COTANGENT
from shiq_jax.models.layers import LINEAR_OUTPUT, Embedding, ForwardSettings, Layer, Linear, Norm, StackInit
from shiq_jax.models.lora import Lora

# Rematerialization policy per layer. "none": save all residuals except attention scores, which are always recomputed.
# "dots": save the outputs of linear layers and of attention, and recompute activation functions and norms.
# "full": save only the layer's input. Every policy saves the cotangents that the book-keeping method needs.
REMAT: Mapping[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT, blockwise.SAVED, COTANGENT),
    "full": jax.checkpoint_policies.save_only_these_names(COTANGENT),
}


class Decoder(nnx.Module):
    """Decoder with layer parameters stacked along a leading axis, so that program size is independent of depth."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None = None):
        unstacked = StackInit(rngs, dtype)
        self.config = config
        self.embed = Embedding(unstacked, config.vocab_size, config.hidden_size, config.initializer_range)
        self.layers = Layer(StackInit(rngs, dtype, config.num_layers, lora), config)
        self.norm = Norm(unstacked, config.hidden_size, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.head = None
        else:
            features, vocabulary = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
            self.head = Linear(unstacked, features, vocabulary, bias=False, std=config.initializer_range)

    def unembedding(self) -> Float[Array, "features vocab"]:
        """The LM head matrix; the transposed embedding table when tied."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def hidden(
        self,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "#rows length"],
        mask: AttentionMask,
        settings: ForwardSettings,
    ) -> Float[Array, "rows length features"]:
        """Hidden states after the final norm."""
        attend, rotation = self._attention(settings), self._rotation(positions)
        graphdef, stack = nnx.split(self.layers)

        def layer(x, weights):
            return nnx.merge(graphdef, weights)(x, rotation, lambda q, k, v: (attend(q, k, v, mask), None), settings)

        if REMAT[settings.remat] is not None:
            # A scan already prevents CSE across iterations, so the extra barrier would only cost time.
            layer = jax.checkpoint(layer, policy=REMAT[settings.remat], prevent_cse=False)
        x = self.embed(tokens, settings)
        x, _ = accumulation.scan_layers(layer, x, nnx.to_pure_dict(stack), settings.sums)
        return self._final_norm(x, settings)

    def extend(
        self,
        cache: Cache,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        intervals: Int[Array, "batch new 2"],
        start: Int[Array, ""] | int,
        settings: ForwardSettings,
    ) -> tuple[Float[Array, "batch new features"], Cache]:
        """Hidden states of new tokens after the final norm, and the cache extended at slots start, start + 1, ..."""
        attend, rotation = self._attention(settings), self._rotation(positions)
        cache = caches.write_intervals(cache, intervals, start)
        mask = cache_mask(cache.enter, cache.exit, intervals[..., 0], start)
        graphdef, stack = nnx.split(self.layers)

        def body(carry, scanned):
            x, cache = carry
            index, weights = scanned

            def attend_and_write(q, k, v):
                updated = caches.write_layer(cache, index, k, v, start)
                return attend(q, *caches.read_layer(updated, index), mask), updated

            x, cache = nnx.merge(graphdef, weights)(x, rotation, attend_and_write, settings)
            return (x, cache), None

        # Carrying the cache lets XLA write the new slots in place; scanning over it would copy every slot.
        carry = (self.embed(tokens, settings), cache)
        (x, cache), _ = jax.lax.scan(body, carry, (jnp.arange(self.config.num_layers), stack))
        return self._final_norm(x, settings), cache

    def extend_branches(
        self,
        cache: Cache,
        branches: Branches,
        tokens: Int[Array, "batch branches"],
        positions: Int[Array, "batch branches"],
        count: Int[Array, "batch branches"],
        slot: Int[Array, ""],
        settings: ForwardSettings,
    ) -> tuple[Float[Array, "batch branches features"], Branches]:
        """Hidden states of one new token per branch after the final norm, and the extended branches."""
        rotation, slots = self._rotation(positions), branches.values.shape[-2]
        branch_mask = (slot - jnp.arange(slots)) % slots < count[..., None]
        graphdef, stack = nnx.split(self.layers)

        def body(carry, scanned):
            x, branches = carry
            index, weights = scanned

            def attend_and_write(q, k, v):
                updated = caches.write_branches(branches, index, k, v, slot)
                branch = tuple(jax.lax.dynamic_index_in_dim(x, index, 0, False) for x in updated)
                prompt = tuple(jax.lax.dynamic_index_in_dim(x, index, 0, False) for x in cache[:2])
                scale = self.config.head_dim**-0.5
                return branch_attention(q, prompt, cache.enter != NEVER, branch, branch_mask, scale=scale), updated

            x, branches = nnx.merge(graphdef, weights)(x, rotation, attend_and_write, settings)
            return (x, branches), None

        carry = (self.embed(tokens, settings), branches)
        (x, branches), _ = jax.lax.scan(body, carry, (jnp.arange(self.config.num_layers), stack))
        return self._final_norm(x, settings), branches

    @jax.named_scope("final_norm")
    def _final_norm(self, x, settings: ForwardSettings):
        return self.norm(x, settings)

    def _attention(self, settings: ForwardSettings) -> Callable:
        scale = self.config.head_dim**-0.5
        return functools.partial(attention, scale=scale, engine=settings.engine, mesh=settings.mesh)

    def _rotation(self, positions):
        return rope.rotation(positions, rope.frequencies(self.config))
