"""Token statistics with sharded rows and a vocabulary-sharded LM head."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import partition_spec

# Mesh axes that shard the first and the second dimension of the tokens.
_ROW_AXES = (("replica", "fsdp"), ("sequence",))


def sharded_token_stats(
    hidden: Float[Array, "*rows features"],
    unembedding: Float[Array, "features vocab"],
    tokens: Int[Array, "*rows"],
    *,
    mesh: Mesh,
    extra: tuple[str, ...] = (),
) -> TokenStats:
    """`objectives.token_stats` under `shard_map`, with the vocabulary sharded over the mesh axis `tensor`.

    The first dimension is sharded over `replica` and `fsdp`, the second over `sequence`; both are padded to a divisible
    size and sliced back. The unembedding is gathered over `fsdp` once, so that its gradient needs one reduce-scatter. A
    vocabulary that `tensor` does not divide is replicated over `tensor`.
    """
    if mesh.size == 1:
        return token_stats(hidden, unembedding, tokens, extra=extra)
    shape = tokens.shape
    if tokens.ndim == 0:
        hidden, tokens = hidden[None], tokens[None]
    mesh_axes = [tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in _ROW_AXES[: tokens.ndim]]
    padding = [
        (0, -size % math.prod(mesh.shape[axis] for axis in axes))
        for size, axes in zip(tokens.shape, mesh_axes, strict=False)
    ]
    padding += [(0, 0)] * (tokens.ndim - len(mesh_axes))
    row_spec = PartitionSpec(*(axes or None for axes in mesh_axes))
    unembedding_spec = partition_spec(mesh, ("embed", "vocab"), unembedding.shape)

    def local(hidden, unembedding, tokens):
        embed_axes, vocab_axis = unembedding_spec
        if embed_axes is not None:
            unembedding = jax.lax.all_gather(unembedding, embed_axes, axis=0, tiled=True)
        return token_stats(hidden, unembedding, tokens, axis_name=vocab_axis, extra=extra)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(row_spec, unembedding_spec, row_spec), out_specs=row_spec)
    stats = sharded(jnp.pad(hidden, [*padding, (0, 0)]), unembedding, jnp.pad(tokens, padding))
    unpad = tuple(slice(size) for size in tokens.shape)
    return jax.tree.map(lambda x: x[unpad].reshape(shape), stats)
