"""The whole decoder: embedding, a scanned stack of layers, the final norm and, when it is not tied, the head."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from shiq_jax.models import accumulation, blockwise, rope
from shiq_jax.models import cache as caches
from shiq_jax.models.attention import attention, branching
from shiq_jax.models.attention_mask import NEVER, AttentionMask, cache_mask
from shiq_jax.models.cache import Branches, Cache
from shiq_jax.models.config import DecoderConfig
from shiq_jax.models.ghost_norms import BOOKED
from shiq_jax.models.layers import PROJECTED, Embedding, ForwardSettings, Layer, Norm, Projection, StackInit
from shiq_jax.models.lora import Lora

# What the backward pass keeps of a layer. "none": nothing is recomputed but attention scores, which are never kept.
# "dots": results of the weight matrices and of attention are kept, the rest (activations, norms) is recomputed.
# "full": only the layer's input is kept. What book-keeping needs is kept besides, where it is asked for.
REMAT: Mapping[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED, blockwise.SAVED, BOOKED),
    "full": jax.checkpoint_policies.save_only_these_names(BOOKED),
}


class Decoder(nnx.Module):
    """A Llama-family decoder; its layers are stacked along a leading axis, so its program does not grow with depth."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None = None):
        single = StackInit(rngs, dtype)
        self.config = config
        self.embed = Embedding(single, config.vocab_size, config.hidden_size, config.initializer_range)
        self.layers = Layer(StackInit(rngs, dtype, config.num_layers, lora), config)
        self.norm = Norm(single, config.hidden_size, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.head = None
        else:
            features, vocabulary = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
            self.head = Projection(single, features, vocabulary, bias=False, std=config.initializer_range)

    def unembedding(self) -> Float[Array, "features vocab"]:
        """The matrix from hidden states to logits; the transposed embedding table when they are tied."""
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
        definition, stack = nnx.split(self.layers)

        def layer(x, weights):
            return nnx.merge(definition, weights)(x, rotation, lambda q, k, v: (attend(q, k, v, mask), None), settings)

        if REMAT[settings.remat] is not None:
            # Inside a scan nothing can be merged across iterations, so the barrier against it would only cost.
            layer = jax.checkpoint(layer, policy=REMAT[settings.remat], prevent_cse=False)
        x = self.embed(tokens, settings)
        x, _ = accumulation.scan(layer, x, nnx.to_pure_dict(stack), settings.sums)
        return self.norm(x, settings)

    def extend(
        self,
        cache: Cache,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        intervals: Int[Array, "batch new 2"],
        start: Int[Array, ""] | int,
        settings: ForwardSettings,
    ) -> tuple[Float[Array, "batch new features"], Cache]:
        """Hidden states of new tokens after the final norm, and the cache with them at slots start, start + 1, ..."""
        attend, rotation = self._attention(settings), self._rotation(positions)
        cache = caches.note(cache, intervals, start)
        mask = cache_mask(cache.enter, cache.exit, intervals[..., 0], start)
        definition, stack = nnx.split(self.layers)

        def body(carry, scanned):
            x, cache = carry
            index, weights = scanned

            def remember(q, k, v):
                grown = caches.write(cache, index, k, v, start)
                return attend(q, *caches.read(grown, index), mask), grown

            x, cache = nnx.merge(definition, weights)(x, rotation, remember, settings)
            return (x, cache), None

        # The cache is carried, not scanned over, so that each write happens in place and copies no other slot.
        carry = (self.embed(tokens, settings), cache)
        (x, cache), _ = jax.lax.scan(body, carry, (jnp.arange(self.config.num_layers), stack))
        return self.norm(x, settings), cache

    def branch(
        self,
        cache: Cache,
        branches: Branches,
        tokens: Int[Array, "batch branches"],
        positions: Int[Array, "batch branches"],
        count: Int[Array, "batch branches"],
        slot: Int[Array, ""],
        settings: ForwardSettings,
    ) -> tuple[Float[Array, "batch branches features"], Branches]:
        """Hidden states of one further token of every branch after the final norm, and the branches with it."""
        rotation, slots = self._rotation(positions), branches.values.shape[-2]
        own_seen = (slot - jnp.arange(slots)) % slots < count[..., None]
        definition, stack = nnx.split(self.layers)

        def body(carry, scanned):
            x, branches = carry
            index, weights = scanned

            def remember(q, k, v):
                grown = caches.grow(branches, index, k, v, slot)
                own = tuple(jax.lax.dynamic_index_in_dim(each, index, 0, False) for each in grown)
                trunk = tuple(jax.lax.dynamic_index_in_dim(each, index, 0, False) for each in cache[:2])
                scale = self.config.head_dim**-0.5
                return branching(q, trunk, cache.enter != NEVER, own, own_seen, scale=scale), grown

            x, branches = nnx.merge(definition, weights)(x, rotation, remember, settings)
            return (x, branches), None

        carry = (self.embed(tokens, settings), branches)
        (x, branches), _ = jax.lax.scan(body, carry, (jnp.arange(self.config.num_layers), stack))
        return self.norm(x, settings), branches

    def _attention(self, settings: ForwardSettings) -> Callable:
        scale = self.config.head_dim**-0.5
        return functools.partial(attention, scale=scale, engine=settings.engine, mesh=settings.mesh)

    def _rotation(self, positions):
        return rope.rotation(positions, rope.frequencies(self.config))
