"""Token statistics under a sharded head: rows stay where they are, and so does the vocabulary."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import partition_spec

# The mesh axes over which the first and the second dimension of the tokens are cut.
_ROW_AXES = (("replica", "fsdp"), ("sequence",))


def sharded_token_stats(
    hidden: Float[Array, "*rows features"],
    unembedding: Float[Array, "features vocab"],
    tokens: Int[Array, "*rows"],
    *,
    mesh: Mesh,
    extra: tuple[str, ...] = (),
) -> TokenStats:
    """`objectives.token_stats` computed where the rows are, the vocabulary cut over the mesh axis `tensor`.

    The first dimension is cut over `replica` and `fsdp`, the second over `sequence`; both are padded to what divides
    and cut back. The matrix is gathered over `fsdp` once, so its gradient comes back in one reduce-scatter. A
    vocabulary that `tensor` does not divide is computed whole on each of its devices.
    """
    if mesh.size == 1:
        return token_stats(hidden, unembedding, tokens, extra=extra)
    shape = tokens.shape
    if tokens.ndim == 0:
        hidden, tokens = hidden[None], tokens[None]
    axes = [tuple(axis for axis in each if mesh.shape[axis] > 1) for each in _ROW_AXES[: tokens.ndim]]
    padding = [
        (0, -size % math.prod(mesh.shape[axis] for axis in cut)) for size, cut in zip(tokens.shape, axes, strict=False)
    ]
    padding += [(0, 0)] * (tokens.ndim - len(axes))
    rows = PartitionSpec(*(cut or None for cut in axes))
    matrix = partition_spec(mesh, ("embed", "vocab"), unembedding.shape)

    def local(hidden, unembedding, tokens):
        features, vocabulary = matrix
        if features is not None:
            unembedding = jax.lax.all_gather(unembedding, features, axis=0, tiled=True)
        return token_stats(hidden, unembedding, tokens, axis_name=vocabulary, extra=extra)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, matrix, rows), out_specs=rows)
    stats = sharded(jnp.pad(hidden, [*padding, (0, 0)]), unembedding, jnp.pad(tokens, padding))
    real = tuple(slice(size) for size in tokens.shape)
    return jax.tree.map(lambda each: each[real].reshape(shape), stats)
