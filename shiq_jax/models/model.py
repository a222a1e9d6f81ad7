"""Public model API: a frozen description of a decoder with pure methods over a nested dict of parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from shiq_jax.models import cache as caches
from shiq_jax.models import lora as adapters
from shiq_jax.models.attention import ENGINES
from shiq_jax.models.attention_mask import forest_mask
from shiq_jax.models.cache import Branches, Cache
from shiq_jax.models.config import DecoderConfig
from shiq_jax.models.decoder import REMAT, Decoder
from shiq_jax.models.ghost_norms import NormTracker
from shiq_jax.models.ghost_vocabulary import tracked_token_stats, with_tie
from shiq_jax.models.layers import ForwardSettings
from shiq_jax.models.lora import Lora
from shiq_jax.models.sharded_statistics import sharded_token_stats
from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import constrain, named_sharding

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its weights; hashable, so a jitted function may close over it.

    Change settings with `dataclasses.replace(model, remat="full")`. Raises ValueError for an unknown remat or engine.

    Attributes:
        config: hyperparameters.
        mesh: device mesh of all arrays; None for a single device.
        dtype: of the parameters.
        compute_dtype: of activations and matrix products; None means `dtype`.
        remat: rematerialization policy, "none", "dots" or "full" (`decoder.REMAT`).
        engine: attention engine (`attention.ENGINES`).
        lora: configuration of the adapters among the parameters, see `with_adapters`.
        generation_config: content of the checkpoint's generation_config.json; excluded from comparison.
        tracker: set by `tracking`, valid within one traced function.
        sums: set by `accumulating`, valid within one traced function.
    """

    config: DecoderConfig
    mesh: Mesh | None = None
    dtype: Any = jnp.float32
    compute_dtype: Any = None
    remat: str = "none"
    engine: str = "xla"
    lora: Lora | None = None
    generation_config: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    tracker: NormTracker | None = dataclasses.field(default=None, repr=False)
    sums: Params | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(
            self, "compute_dtype", self.dtype if self.compute_dtype is None else np.dtype(self.compute_dtype)
        )
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is unknown; the policies are {', '.join(REMAT)}")
        if self.engine not in ENGINES:
            raise ValueError(f"attention engine {self.engine!r} is unknown; the engines are {', '.join(ENGINES)}")

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig,
        *,
        mesh: Mesh | None = None,
        dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        remat: str = "none",
        engine: str = "xla",
        lora: Lora | None = None,
    ) -> "Model":
        """Build a model; the arguments are the fields of the class."""
        return cls(config, mesh, dtype, compute_dtype, remat, engine, lora)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        intervals: Int[Array, "rows length 2"] | None = None,
    ) -> Float[Array, "rows length features"]:
        """Hidden states after the final norm, in `compute_dtype`; the one at index i predicts the successor of token i.

        positions: position of each token in its sequence (default 0, 1, 2, ...). intervals: `[enter, exit)` of each
        token's node in a depth-first forest; key k is visible to query q iff k <= q and
        enter[k] <= enter[q] < exit[k] (default: causal attention over the row). Token ids are not checked against the
        vocabulary. Raises ValueError if `tracking` was called with a different array of tokens.
        """
        if self.tracker is not None and self.tracker.tie is not None and tokens is not self.tracker.tie.tokens:
            raise ValueError("`tracking` was called with different tokens; pass the same array to `hidden`")
        length = tokens.shape[-1]
        tokens = constrain(tokens, ("rows", "length"), self.mesh)
        positions = jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
        return self._decoder(params).hidden(tokens, positions, forest_mask(intervals, length), self._settings)

    @jax.named_scope("statistics")
    def token_stats(
        self,
        params: Params,
        hidden: Float[Array, "*rows features"],
        tokens: Int[Array, "*rows"],
        *,
        extra: tuple[str, ...] = (),
    ) -> TokenStats:
        """`objectives.token_stats` of `tokens` [...] predicted from `hidden` [..., D] by this model's LM head.

        With a mesh, rows (first dimension) and vocabulary stay sharded and no full logits array exists. A model with a
        tracker requires hidden states `[rows, A, features]` and raises ValueError for `extra`.
        """
        unembedding = self._decoder(params).unembedding()
        if self.tracker is not None:
            if extra:
                raise ValueError(f"extra is {extra}; a model that tracks gradient norms supports no extra statistics")
            return tracked_token_stats(hidden, unembedding, tokens, self.tracker, self.mesh)
        return self._token_stats(hidden, unembedding, tokens, extra)

    @jax.named_scope("unembedding")
    def project(self, params: Params, hidden: Float[Array, "*rows features"]) -> Float[Array, "*rows vocab"]:
        """Raw logits of hidden states, in float32 or wider, for sampling."""
        wide = jnp.promote_types(self.compute_dtype, jnp.float32)
        unembedding = self._decoder(params).unembedding().astype(self.compute_dtype)
        return jnp.matmul(hidden.astype(self.compute_dtype), unembedding, preferred_element_type=wide)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        intervals: Int[Array, "rows length 2"] | None = None,
    ) -> Float[Array, "rows length vocab"]:
        """Raw logits of whole rows, in float32 or wider; the full array limits this to small models and tests."""
        return self.project(params, self.hidden(params, tokens, positions, intervals))

    def tracking(self, tracker: NormTracker, tokens: Int[Array, "rows length"]) -> "Model":
        """This model with per-row gradient norms reported to `tracker`, for one forward pass over `tokens`.

        Call `hidden` and `token_stats` of the result once each, and `hidden` with this same array of tokens.
        """
        if self.config.tie_word_embeddings:
            wide = jnp.promote_types(self.dtype, jnp.float32)
            tracker = with_tie(tracker, tokens, self.config.hidden_size, wide)
        return dataclasses.replace(self, tracker=tracker)

    def accumulating(self, sums: Params) -> "Model":
        """This model with the gradients of its layers added in place to `sums`; the VJP returns the updated sums.

        sums: nested dict with a subset of the leaves of `params["layers"]`; leaves without a sum get a zero gradient.
        """
        return dataclasses.replace(self, sums=sums)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` tokens, including left padding and all continuations."""
        return self._constrain(caches.empty(self.config, batch, length, self.compute_dtype), caches.LOGICAL_AXES)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        start: Int[Array, ""] | int,
        intervals: Int[Array, "batch new 2"] | None = None,
    ) -> tuple[Float[Array, "batch new features"], Cache]:
        """Hidden states of `new` tokens per row, and the cache extended with their keys and values.

        The tokens are written to slots start, start + 1, ... of every row. Each attends to the visible slots up to its
        own, following the interval rule of `AttentionMask`; by default all of them are visible. `cache.slot_intervals`
        computes intervals that hide left padding, or that let several continuations share one prompt without seeing
        each other. positions: position of each token in its sequence.
        Raises ValueError if `start` is a Python int and the tokens do not fit; a traced `start` is not checked.
        """
        slots, new = cache.enter.shape[1], tokens.shape[1]
        if isinstance(start, int) and not 0 <= start <= slots - new:
            raise ValueError(f"{new} tokens starting at slot {start} do not fit into a cache of {slots} slots")
        if intervals is None:
            intervals = caches.slot_intervals(jnp.ones(tokens.shape, bool))
        return self._decoder(params).extend(cache, tokens, positions, intervals, start, self._settings)

    def init_branches(self, batch: int, branches: int, length: int) -> Branches:
        """An empty ring of `length` slots for each of `branches` continuations of `batch` rows."""
        empty = caches.empty_branches(self.config, batch, branches, length, self.compute_dtype)
        return self._constrain(empty, caches.BRANCH_AXES)

    def extend_branches(
        self,
        params: Params,
        cache: Cache,
        branches: Branches,
        tokens: Int[Array, "batch branches"],
        positions: Int[Array, "batch branches"],
        count: Int[Array, "batch branches"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "batch branches features"], Branches]:
        """Hidden states of one new token per branch, and the branches extended with its keys and values.

        A token attends to the visible slots of its row in `cache` and to the last `count` tokens of its own branch,
        including itself. It is written to ring slot `slot`: decoding step s uses slot s modulo the ring length, which
        must be at least the largest `count`. positions: position of each token in its sequence.
        """
        return self._decoder(params).extend_branches(cache, branches, tokens, positions, count, slot, self._settings)

    def with_adapters(self, params: Params, key: Array) -> dict[str, Any]:
        """Base parameters plus newly initialized adapters: A uniform and B zero, so the model's outputs do not change.

        key: a jax random key. Raises ValueError for a model without `lora`.
        """
        if self.lora is None:
            raise ValueError("the model has no lora; set one with dataclasses.replace(model, lora=Lora(rank, alpha))")
        initialized = flatten_dict(_init(self, key, adapters.only_adapters))
        return unflatten_dict(flatten_dict(dict(params)) | initialized)

    def without_adapters(self, params: Params) -> tuple["Model", dict[str, Any]]:
        """The base model and its parameters; no array is copied."""
        return dataclasses.replace(self, lora=None), adapters.without_adapters(params)

    def abstract_params(self) -> dict[str, Any]:
        """Shape, dtype and (with a mesh) sharding of every parameter, as a nested dict of `jax.ShapeDtypeStruct`."""
        _, shapes, axes = _declare(self.config, self.dtype, self.lora)
        if self.mesh is None:
            return jax.tree.map(lambda leaf: leaf, shapes)
        return jax.tree.map(
            lambda leaf, names: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=named_sharding(self.mesh, names, leaf.shape)
            ),
            shapes,
            axes,
        )

    def logical_axes(self) -> dict[str, Any]:
        """Logical axis names of every parameter (see `sharding.RULES`), as a nested dict of tuples."""
        axes = _declare(self.config, self.dtype, self.lora)[2]
        return jax.tree.map(lambda names: names, axes, is_leaf=lambda node: isinstance(node, tuple))

    def _token_stats(self, hidden, unembedding, tokens, extra: tuple[str, ...] = ()) -> TokenStats:
        if self.mesh is None:
            return token_stats(hidden, unembedding, tokens, extra=extra)
        return sharded_token_stats(hidden, unembedding, tokens, mesh=self.mesh, extra=extra)

    @property
    def _settings(self) -> ForwardSettings:
        return ForwardSettings(self.compute_dtype, self.mesh, self.remat, self.engine, self.tracker, self.sums)

    def _decoder(self, params: Params) -> Decoder:
        graphdef, _, axes = _declare(self.config, self.dtype, self.lora)
        if self.mesh is not None:
            # A no-op on the parameters; its transpose constrains their gradients to the same shardings.
            params = jax.tree.map(lambda leaf, names: constrain(leaf, names, self.mesh), dict(params), axes)
        return nnx.merge(graphdef, params)

    def _constrain(self, arrays, logical_axes):
        constrained = (constrain(x, axes, self.mesh) for x, axes in zip(arrays, logical_axes, strict=True))
        return type(arrays)(*constrained)


@functools.lru_cache(maxsize=64)
def _declare(config: DecoderConfig, dtype: np.dtype, lora: Lora | None) -> tuple[nnx.GraphDef, dict, dict]:
    """Graph definition, parameter shapes and logical axes of a decoder, without allocating arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype, lora)))
    axes = jax.tree.map(
        lambda variable: variable.get_metadata("logical"), state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init_params(model: Model, key: Array) -> dict[str, Any]:
    """Initialize parameters directly in their shardings, with the same values on every mesh.

    key: a jax random key. Kernels and embeddings are normal with standard deviation `initializer_range`, norm scales
    are one and biases zero.
    """
    return _init(model, key, lambda params: params)


def _init(model: Model, key: Array, select) -> dict[str, Any]:
    """Initialize the parameters that `select` picks from the nested dict; XLA eliminates the others."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, select(Model.abstract_params(model)))

    def init(key):
        return select(nnx.to_pure_dict(nnx.state(Decoder(model.config, nnx.Rngs(key), model.dtype, model.lora))))

    return jax.jit(init, out_shardings=None if model.mesh is None else shardings)(key)
