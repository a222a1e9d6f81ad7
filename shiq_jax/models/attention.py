"""Attention for packed training rows and cached decoding, computed by a selectable engine."""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from shiq_jax.models.attention_mask import AttentionMask
from shiq_jax.models.blockwise import attend
from shiq_jax.sharding import partition_spec


def attention(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "rows keys kv_heads head_dim"],
    mask: AttentionMask,
    *,
    scale: float,
    engine: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "rows queries heads head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, with the softmax in float32 and the result in the dtype of `v`.

    Query head h reads key-value head `h // (heads / kv_heads)`; keys are not repeated in memory. A query with no
    visible key returns a finite, meaningless value. engine: one of `ENGINES`; raises ValueError for any other. mesh:
    device mesh of the arrays, for engines that the compiler cannot partition.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r} is unknown; the engines are {', '.join(ENGINES)}")
    chex.assert_rank((q, k, v), 4)
    chex.assert_equal_shape((k, v))
    chex.assert_is_divisible(q.shape[2], k.shape[2])
    return ENGINES[engine](q, k, v, mask, scale, mesh)


def _xla(q, k, v, mask: AttentionMask, scale: float, mesh: Mesh | None):
    """`blockwise.attend` on head-major arrays."""
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = attend(q, k, v, mask._replace(aligned=None), scale, mask.aligned)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def _flash(q, k, v, mask: AttentionMask, scale: float, mesh: Mesh | None):
    """`flash.flash` on head-major arrays; with a mesh, each device computes its own rows and heads."""
    # Imported here because it pulls in the Pallas GPU and TPU backends.
    from shiq_jax.models.flash import flash

    rows, aligned = len(q), mask.aligned
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    mask_fields = tuple(jnp.broadcast_to(field, (rows, field.shape[1])) for field in mask[:5])

    def local(q, k, v, *mask_fields):
        return flash(q, k, v, AttentionMask(*mask_fields), scale, aligned)

    if mesh is not None and mesh.size > 1:
        # Query heads follow the sharding of their key-value heads, including replication when it does not divide.
        spec = partition_spec(mesh, ("rows", "kv_heads", None, None), k.shape)
        in_specs = (spec, spec, spec, *(PartitionSpec(spec[0]),) * 5)
        local = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return local(q, k, v, *mask_fields).transpose(0, 2, 1, 3)


def branch_attention(
    q: Float[Array, "rows branches heads head_dim"],
    prompt: tuple[Float[Array, "rows kv_heads head_dim keys"], Float[Array, "rows kv_heads keys head_dim"]],
    prompt_mask: Bool[Array, "rows keys"],
    branch: tuple[
        Float[Array, "rows branches kv_heads head_dim slots"], Float[Array, "rows branches kv_heads slots head_dim"]
    ],
    branch_mask: Bool[Array, "rows branches slots"],
    *,
    scale: float,
) -> Float[Array, "rows branches heads head_dim"]:
    """Decode attention for several branches (continuations) of each row, one query per branch.

    A query attends to its row's prompt, read once for all branches, and to its own branch: exactly `attention` over
    their concatenation. prompt, branch: (keys, values). Forward only.
    """
    rows, branches, heads, head_dim = q.shape
    kv_heads = prompt[0].shape[1]
    group = heads // kv_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(rows, branches, kv_heads, group, head_dim)

    # Batched products of [few, many] matrices only: backends have a fast path for this layout.
    def by_row(x):
        return x.swapaxes(1, 2).reshape(rows * kv_heads, branches * group, -1)

    def by_branch(x):
        return x.reshape(rows, kv_heads, branches, group, -1).swapaxes(1, 2)

    def matmul(a, b):
        return jnp.matmul(a, b.reshape(len(a), *b.shape[-2:]), preferred_element_type=wide)

    prompt_scores = matmul(by_row(q), prompt[0]) * scale
    branch_scores = matmul(q.reshape(-1, group, head_dim), branch[0]) * scale
    lowest = jnp.finfo(wide).min
    prompt_mask = jnp.repeat(prompt_mask, kv_heads, axis=0)[:, None]
    branch_mask = jnp.repeat(branch_mask.reshape(rows * branches, -1), kv_heads, axis=0)[:, None]
    prompt_scores = jnp.where(prompt_mask, prompt_scores, lowest)
    branch_scores = jnp.where(branch_mask, branch_scores, lowest)
    # One softmax over both parts; only the small reductions are transposed between the two layouts.
    maximum = by_branch(jnp.max(prompt_scores, axis=-1, keepdims=True))
    maximum = jnp.maximum(maximum, jnp.max(branch_scores, axis=-1, keepdims=True).reshape(maximum.shape))
    prompt_weights = jnp.exp(prompt_scores - by_row(maximum))
    branch_weights = jnp.exp(branch_scores - maximum.reshape(-1, group, 1))
    total = by_branch(jnp.sum(prompt_weights, axis=-1, keepdims=True))
    total += jnp.sum(branch_weights, axis=-1, keepdims=True).reshape(total.shape)
    out = by_branch(matmul(prompt_weights.astype(q.dtype), prompt[1]))
    out += matmul(branch_weights.astype(q.dtype), branch[1]).reshape(out.shape)
    return (out / total).astype(q.dtype).reshape(rows, branches, heads, head_dim)


ENGINES: Mapping[str, Callable] = {"xla": _xla, "flash": _flash}
