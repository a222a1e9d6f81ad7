"""The model as everything else sees it: a frozen description with pure methods over a plain nested dict of arrays."""

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
from shiq_jax.models.attention import ENGINES
from shiq_jax.models.attention_mask import forest_mask
from shiq_jax.models.cache import Branches, Cache
from shiq_jax.models.config import DecoderConfig
from shiq_jax.models.decoder import REMAT, Decoder
from shiq_jax.models.ghost_norms import NormTracker
from shiq_jax.models.ghost_vocabulary import statistics as tracked_statistics
from shiq_jax.models.ghost_vocabulary import tied
from shiq_jax.models.layers import ForwardSettings
from shiq_jax.models.lora import Lora, only_adapters, without_adapters
from shiq_jax.models.sharded_statistics import sharded_token_stats
from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import constrain, named_sharding

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its weights; hashable, so a jitted function may close over it.

    config: sizes and constants. mesh: where arrays live (None: on one device). dtype: of the parameters. compute_dtype:
    of activations and matrix products; None takes `dtype`. remat: what the backward pass keeps, one of "none", "dots",
    "full" (`decoder.REMAT`). engine: of attention (`attention.ENGINES`). lora: the adapters that its parameters hold,
    see `with_adapters`. generation_config: the source's generation_config.json, when there was one; it takes no part in
    comparison. tracker, sums: what a backward pass reports to and adds to; set by `tracking` and `accumulating`, whose
    result belongs to one traced function. Change a copy with `dataclasses.replace(model, remat="full")`. Raises
    ValueError for an unknown remat or engine.
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
        """The model of a config; the arguments are the fields of the class."""
        return cls(config, mesh, dtype, compute_dtype, remat, engine, lora)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        intervals: Int[Array, "rows length 2"] | None = None,
    ) -> Float[Array, "rows length features"]:
        """Hidden states after the final norm, in `compute_dtype`; the one at index i predicts what follows token i.

        positions: of each token on its own path (default 0, 1, 2, ...). intervals: `[enter, exit)` of each token's node
        in a depth-first forest; token k is seen by token q iff k comes not later and enter[k] <= enter[q] < exit[k]
        (default: all earlier tokens of the row are seen). Token ids outside the vocabulary are the caller's fault and
        are not detected. Raises ValueError when the model tracks a pass over other tokens.
        """
        if self.tracker is not None and self.tracker.tie is not None and tokens is not self.tracker.tie.tokens:
            raise ValueError("the model tracks a pass over other tokens: give `tracking` and `hidden` the same array")
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
        """`objectives.token_stats` of `tokens` under this head: hidden [..., D] predicts tokens [...].

        With a mesh the rows (first dimension) and the vocabulary are computed where they live; no logits array is ever
        whole. A model that tracks norms takes hidden states `[rows, A, features]` and raises ValueError for `extra`.
        """
        unembedding = self._decoder(params).unembedding()
        if self.tracker is not None:
            if extra:
                raise ValueError(f"extra is {extra}, which a model that tracks gradient norms does not compute")
            return tracked_statistics(hidden, unembedding, tokens, self.tracker, self.mesh)
        return self._statistics(hidden, unembedding, tokens, extra)

    def project(self, params: Params, hidden: Float[Array, "*rows features"]) -> Float[Array, "*rows vocab"]:
        """Raw logits of hidden states, in float32, for sampling."""
        precise = jnp.promote_types(self.compute_dtype, jnp.float32)
        unembedding = self._decoder(params).unembedding().astype(self.compute_dtype)
        return jnp.matmul(hidden.astype(self.compute_dtype), unembedding, preferred_element_type=precise)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        intervals: Int[Array, "rows length 2"] | None = None,
    ) -> Float[Array, "rows length vocab"]:
        """Raw logits of whole rows, in float32; an array of rows * length * vocab_size, for tests and small models."""
        return self.project(params, self.hidden(params, tokens, positions, intervals))

    def tracking(self, tracker: NormTracker, tokens: Int[Array, "rows length"]) -> "Model":
        """This model, reporting to `tracker` the gradient norm of each row of one pass over `tokens`.

        `hidden` and `token_stats` of the result are those of that pass: each is called once, `hidden` with this very
        array of tokens.
        """
        if self.config.tie_word_embeddings:
            precise = jnp.promote_types(self.dtype, jnp.float32)
            tracker = tied(tracker, tokens, self.config.hidden_size, precise)
        return dataclasses.replace(self, tracker=tracker)

    def accumulating(self, sums: Params) -> "Model":
        """This model, whose layers' gradients are added in place to `sums`, and become the sums.

        sums: nested dict, some leaves of `params["layers"]` by the same names; the other layers' leaves then have no
        gradient.
        """
        return dataclasses.replace(self, sums=sums)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` tokens, left padding and all continuations included."""
        return self._placed(caches.empty(self.config, batch, length, self.compute_dtype), caches.LOGICAL_AXES)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        start: Int[Array, ""] | int,
        intervals: Int[Array, "batch new 2"] | None = None,
    ) -> tuple[Float[Array, "batch new features"], Cache]:
        """Hidden states of `new` further tokens per row, and the cache that holds them too.

        Their keys and values go to slots start, start + 1, ... of every row; each token attends to the slots up to its
        own that the rule of `attention.Visibility` lets it see: by default to all. `cache.intervals_of` makes intervals
        for left padding, which is never seen, and for several continuations of one prompt, which do not see each other,
        so that a row holds the prompt once. positions: of each token in its sequence. `start` may be traced.
        Raises ValueError when the tokens do not fit into the cache and `start` is a Python number; a traced `start` is
        the caller's to keep in bounds.
        """
        slots, new = cache.enter.shape[1], tokens.shape[1]
        if isinstance(start, int) and not 0 <= start <= slots - new:
            raise ValueError(f"start is {start}: {new} tokens from there do not fit into a cache of {slots} slots")
        if intervals is None:
            intervals = caches.intervals_of(jnp.ones(tokens.shape, bool))
        return self._decoder(params).extend(cache, tokens, positions, intervals, start, self._settings)

    def init_branches(self, batch: int, branches: int, length: int) -> Branches:
        """Empty rings of `length` slots for `branches` continuations of each of `batch` rows."""
        empty = caches.empty_branches(self.config, batch, branches, length, self.compute_dtype)
        return self._placed(empty, caches.BRANCH_AXES)

    def branch(
        self,
        params: Params,
        cache: Cache,
        branches: Branches,
        tokens: Int[Array, "batch branches"],
        positions: Int[Array, "batch branches"],
        count: Int[Array, "batch branches"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "batch branches features"], Branches]:
        """Hidden states of one further token for each of several continuations of every row, and the branches with it.

        A token sees all that `cache` holds of its row and the last `count` tokens of its own branch, itself included.
        Its keys and values go to ring slot `slot`: step s of decoding writes to slot s modulo the ring's length, which
        must not be less than the largest `count`. positions: of each token in its sequence.
        """
        return self._decoder(params).branch(cache, branches, tokens, positions, count, slot, self._settings)

    def with_adapters(self, params: Params, key: Array) -> dict[str, Any]:
        """The parameters of the model without adapters, and fresh adapters that change nothing yet: B is 0, A uniform.

        key: a jax random key. Raises ValueError for a model without `lora`.
        """
        if self.lora is None:
            raise ValueError("the model has no lora: give it one, dataclasses.replace(model, lora=Lora(rank, alpha))")
        fresh = flatten_dict(_fresh(self, key, only_adapters))
        return unflatten_dict(flatten_dict(dict(params)) | fresh)

    def switched_off(self, params: Params) -> tuple["Model", dict[str, Any]]:
        """The model as it was before its adapters, and its parameters; no array is copied."""
        return dataclasses.replace(self, lora=None), without_adapters(params)

    def abstract_params(self) -> dict[str, Any]:
        """Shape, dtype and (with a mesh) sharding of every parameter, as a nested dict of `jax.ShapeDtypeStruct`."""
        _, shapes, axes = _declared(self.config, self.dtype, self.lora)
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
        """The logical axes of every parameter, as a nested dict of tuples of names (`sharding.RULES`)."""
        axes = _declared(self.config, self.dtype, self.lora)[2]
        return jax.tree.map(lambda names: names, axes, is_leaf=lambda node: isinstance(node, tuple))

    def _statistics(self, hidden, unembedding, tokens, extra: tuple[str, ...] = ()) -> TokenStats:
        if self.mesh is None:
            return token_stats(hidden, unembedding, tokens, extra=extra)
        return sharded_token_stats(hidden, unembedding, tokens, mesh=self.mesh, extra=extra)

    @property
    def _settings(self) -> ForwardSettings:
        return ForwardSettings(self.compute_dtype, self.mesh, self.remat, self.engine, self.tracker, self.sums)

    def _decoder(self, params: Params) -> Decoder:
        definition, _, axes = _declared(self.config, self.dtype, self.lora)
        if self.mesh is not None:
            # Says nothing new of the parameters, but pins their gradients, which are born in the same shardings.
            params = jax.tree.map(lambda leaf, names: constrain(leaf, names, self.mesh), dict(params), axes)
        return nnx.merge(definition, params)

    def _placed(self, arrays, logical_axes):
        placed = (constrain(each, axes, self.mesh) for each, axes in zip(arrays, logical_axes, strict=True))
        return type(arrays)(*placed)


@functools.lru_cache(maxsize=64)
def _declared(config: DecoderConfig, dtype: np.dtype, lora: Lora | None) -> tuple[nnx.GraphDef, dict, dict]:
    """The decoder's structure, and its parameters' shapes and logical axes as nested dicts; nothing is allocated."""
    definition, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype, lora)))
    axes = jax.tree.map(
        lambda variable: variable.get_metadata("logical"), state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return definition, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init_params(model: Model, key: Array) -> dict[str, Any]:
    """Fresh parameters, each born in its sharding; the same numbers on every mesh.

    key: a jax random key. Kernels and the embedding are normal with the config's `initializer_range`, norms 1, biases
    0.
    """
    return _fresh(model, key, lambda params: params)


def _fresh(model: Model, key: Array, pick) -> dict[str, Any]:
    """What `pick` chooses of fresh parameters, of which the others are never made."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, pick(Model.abstract_params(model)))

    def make(key):
        return pick(nnx.to_pure_dict(nnx.state(Decoder(model.config, nnx.Rngs(key), model.dtype, model.lora))))

    return jax.jit(make, out_shardings=None if model.mesh is None else shardings)(key)
