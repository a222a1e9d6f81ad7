"""Decoder with additional linear heads: state values, and Q values that can guide sampling."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from shiq_jax.models.model import Model, Params
from shiq_jax.objectives import TokenStats
from shiq_jax.sharding import hosts, named_sharding

HEADS = "heads"  # key in the parameters
FILE = "heads.safetensors"
# Small init breaks the symmetry between two Q heads and leaves the policy almost unchanged.
STD = 1e-3


@dataclasses.dataclass(frozen=True)
class ModelWithHeads(Model):
    """A model with linear heads, whose parameters are stored under "heads" next to the decoder's.

    Attributes:
        heads: (name, kind) pairs; kind "value" gives one scalar per state, "q" one Q value per vocabulary entry.
        q_guidance: factor of the elementwise minimum of all Q heads, added to the sampling logits; 0 disables it.
    """

    heads: tuple[tuple[str, str], ...] = ()
    q_guidance: float = 0.0

    @classmethod
    def of(cls, model: Model, heads: Mapping[str, str], q_guidance: float = 0.0) -> ModelWithHeads:
        """Add heads (name -> kind) to a model; raises ValueError for an unknown kind."""
        for name, kind in heads.items():
            if kind not in ("value", "q"):
                raise ValueError(f"head {name!r} has unknown kind {kind!r}; the kinds are value and q")
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
        return cls(**fields, heads=tuple(sorted(heads.items())), q_guidance=q_guidance)

    def without_heads(self) -> Model:
        """The model without its heads."""
        return Model(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Model)})

    def with_heads(self, params: Params, key: Array) -> dict[str, Any]:
        """A decoder's parameters plus newly initialized heads: zeros for "value", small random kernels for "q".

        key: a jax random key.
        """
        keys, heads = jax.random.split(key, max(len(self.heads), 1)), {}
        for (name, abstract), head_key in zip(self._abstract_heads().items(), keys):
            if dict(self.heads)[name] == "value":
                heads[name] = {part: jnp.zeros(leaf.shape, leaf.dtype) for part, leaf in abstract.items()}
            else:
                kernel = abstract["kernel"]
                heads[name] = {"kernel": STD * jax.random.normal(head_key, kernel.shape, kernel.dtype)}
        if self.mesh is not None:
            heads = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), heads, self._abstract_heads())
        return dict(params) | {HEADS: heads}

    def head_values(
        self, heads: Params, hidden: Float[Array, "*rows features"], tokens: Int[Array, "*rows"]
    ) -> dict[str, Float[Array, "*rows"] | TokenStats]:
        """Outputs of some heads at `hidden`: scalars for "value", token statistics of `tokens` for "q".

        heads: head name -> parameters.
        """
        kinds = dict(self.heads)
        return {name: self._head_output(kinds[name], head, hidden, tokens) for name, head in heads.items()}

    def project(self, params: Params, hidden: Float[Array, "*rows features"]) -> Float[Array, "*rows vocab"]:
        """Sampling logits with Q guidance, in float32 or wider."""
        logits = super().project(params, hidden)
        kernels = [params[HEADS][name]["kernel"] for name, kind in self.heads if kind == "q"]
        if not self.q_guidance or not kernels:
            return logits
        q_values = [jnp.matmul(hidden.astype(logits.dtype), kernel.astype(logits.dtype)) for kernel in kernels]
        return logits + self.q_guidance * functools.reduce(jnp.minimum, q_values)

    def abstract_params(self) -> dict[str, Any]:
        """`Model.abstract_params` including the heads."""
        return super().abstract_params() | {HEADS: self._abstract_heads()}

    def _head_output(self, kind: str, head: Params, hidden, tokens):
        if kind == "q":
            return self._token_stats(hidden, head["kernel"], tokens)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return hidden.astype(wide) @ head["kernel"].astype(wide) + head["bias"].astype(wide)

    def _abstract_heads(self) -> dict[str, Any]:
        hidden_size, vocab_size = self.config.hidden_size, self.config.vocab_size
        declarations = {
            "value": {"kernel": ((hidden_size,), (None,)), "bias": ((), ())},
            "q": {"kernel": ((hidden_size, vocab_size), ("embed", "vocab"))},
        }

        def abstract(shape, axes):
            sharding = None if self.mesh is None else named_sharding(self.mesh, axes, shape)
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

        return {
            name: {part: abstract(shape, axes) for part, (shape, axes) in declarations[kind].items()}
            for name, kind in self.heads
        }

    def save(self, params: Params, directory: Path) -> None:
        """Write the heads to `heads.safetensors` in a model directory, with their configuration in its metadata."""
        arrays = flatten_dict(dict(params[HEADS]), sep=".")
        metadata = {"heads": json.dumps(dict(self.heads)), "q_guidance": json.dumps(self.q_guidance)}
        hosts.on_writer(save_file)(hosts.gather(arrays), directory / FILE, metadata)

    @classmethod
    def load(cls, model: Model, params: Params, directory: Path) -> tuple[Model, Params]:
        """Add the heads that `save` wrote to a model directory; model and params unchanged if there are none."""
        file = Path(directory) / FILE
        if not file.exists():
            return model, params
        with safe_open(file, "numpy") as stored:
            metadata = stored.metadata()
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}
        model = cls.of(model, json.loads(metadata["heads"]), json.loads(metadata["q_guidance"]))
        heads = jax.tree.map(
            lambda leaf, abstract: jax.device_put(leaf.astype(abstract.dtype), abstract.sharding),
            unflatten_dict(arrays, sep="."),
            model._abstract_heads(),
        )
        return model, dict(params) | {HEADS: heads}

    def _decoder(self, params: Params):
        return super()._decoder({name: part for name, part in params.items() if name != HEADS})
