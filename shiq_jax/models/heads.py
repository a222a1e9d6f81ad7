"""A decoder with small heads beside the vocabulary's: the value of a state, and rows of Q-values that steer it."""

from __future__ import annotations

import dataclasses
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

HEADS = "heads"  # their place among the parameters
FILE = "heads.safetensors"
# So small that the heads are unlike, as two estimates of one value should be, and the policy begins as the decoder's.
STD = 1e-3


@dataclasses.dataclass(frozen=True)
class ModelWithHeads(Model):
    """A model whose parameters hold, beside the decoder's, those of linear heads under "heads".

    heads: (name, kind) of each; a "value" gives a number per state, a "q" a row of the vocabulary's size. q_guidance:
    what the smaller of the Q-heads' rows is multiplied with before it is added to the logits that are sampled from; 0
    for none.
    """

    heads: tuple[tuple[str, str], ...] = ()
    q_guidance: float = 0.0

    @classmethod
    def of(cls, model: Model, heads: Mapping[str, str], q_guidance: float = 0.0) -> ModelWithHeads:
        """A model with heads; raises ValueError for a kind that there is not."""
        for name, kind in heads.items():
            if kind not in ("value", "q"):
                raise ValueError(f"head {name!r} is of kind {kind!r}; the kinds are value and q")
        own = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
        return cls(**own, heads=tuple(sorted(heads.items())), q_guidance=q_guidance)

    def plain(self) -> Model:
        """The model without its heads."""
        return Model(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Model)})

    def with_heads(self, params: Params, key: Array) -> dict[str, Any]:
        """A decoder's parameters with those of fresh heads: values are 0, rows of Q small random numbers.

        key: a jax random key.
        """
        keys, found = jax.random.split(key, max(len(self.heads), 1)), {}
        for (name, leaf), own in zip(self._declared_heads().items(), keys):
            if dict(self.heads)[name] == "value":
                found[name] = {part: jnp.zeros(each.shape, each.dtype) for part, each in leaf.items()}
            else:
                shape = leaf["kernel"]
                found[name] = {"kernel": STD * jax.random.normal(own, shape.shape, shape.dtype)}
        if self.mesh is not None:
            found = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), found, self._declared_heads())
        return dict(params) | {HEADS: found}

    def head_values(
        self, heads: Params, hidden: Float[Array, "*rows features"], tokens: Int[Array, "*rows"]
    ) -> dict[str, Float[Array, "*rows"] | TokenStats]:
        """What each of some heads says where hidden states predict tokens: numbers, or statistics of rows of Q.

        heads: parameters by the names of heads of this model.
        """
        return {name: self._says(dict(self.heads)[name], head, hidden, tokens) for name, head in heads.items()}

    def project(self, params: Params, hidden: Float[Array, "*rows features"]) -> Float[Array, "*rows vocab"]:
        """Raw logits of hidden states, in float32, for sampling, with what the heads add to them."""
        logits = super().project(params, hidden)
        kernels = [params[HEADS][name]["kernel"] for name, kind in self.heads if kind == "q"]
        if not self.q_guidance or not kernels:
            return logits
        rows = [jnp.matmul(hidden.astype(logits.dtype), kernel.astype(logits.dtype)) for kernel in kernels]
        smaller = rows[0]
        for row in rows[1:]:
            smaller = jnp.minimum(smaller, row)
        return logits + self.q_guidance * smaller

    def abstract_params(self) -> dict[str, Any]:
        """As `Model.abstract_params`, with the heads."""
        return super().abstract_params() | {HEADS: self._declared_heads()}

    def _says(self, kind: str, head: Params, hidden, tokens):
        if kind == "q":
            return self._statistics(hidden, head["kernel"], tokens)
        precise = jnp.promote_types(hidden.dtype, jnp.float32)
        return hidden.astype(precise) @ head["kernel"].astype(precise) + head["bias"].astype(precise)

    def _declared_heads(self) -> dict[str, Any]:
        size, words = self.config.hidden_size, self.config.vocab_size
        kinds = {
            "value": {"kernel": ((size,), (None,)), "bias": ((), ())},
            "q": {"kernel": ((size, words), ("embed", "vocab"))},
        }

        def declare(shape, axes):
            where = None if self.mesh is None else named_sharding(self.mesh, axes, shape)
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=where)

        return {name: {part: declare(*what) for part, what in kinds[kind].items()} for name, kind in self.heads}

    def save(self, params: Params, directory: Path) -> None:
        """Writes the heads beside a decoder's files, as `heads.safetensors`, with what they are in its metadata."""
        arrays = flatten_dict(dict(params[HEADS]), sep=".")
        about = {"heads": json.dumps(dict(self.heads)), "q_guidance": json.dumps(self.q_guidance)}
        hosts.on_writer(save_file)(hosts.gather(arrays), directory / FILE, about)

    @classmethod
    def load(cls, model: Model, params: Params, directory: Path) -> tuple[Model, Params]:
        """A decoder of a directory with the heads that `save` wrote there; as it is where there are none."""
        file = Path(directory) / FILE
        if not file.exists():
            return model, params
        with safe_open(file, "numpy") as stored:
            about = stored.metadata()
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}
        headed = cls.of(model, json.loads(about["heads"]), json.loads(about["q_guidance"]))
        leaves = unflatten_dict(arrays, sep=".")
        declared = headed._declared_heads()
        placed = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), leaves, declared
        )
        return headed, dict(params) | {HEADS: placed}

    def _decoder(self, params: Params):
        return super()._decoder({name: part for name, part in params.items() if name != HEADS})
