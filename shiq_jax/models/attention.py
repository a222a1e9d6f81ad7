"""The one seam through which every layer attends: training on packed rows and decoding with a cache alike."""

from collections.abc import Callable, Mapping

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
    """softmax(scale * q k^T) v over the visible keys, the softmax in float32; the result has the dtype of `v`.

    Query head h reads key-value head `h // (heads / kv_heads)`; keys are not repeated in memory. The result of a query
    that sees no key is finite and means nothing. engine: one of `ENGINES`; raises ValueError for any other. mesh: where
    the arrays lie, for engines that the compiler cannot cut into parts by itself.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r} is unknown; the engines are {', '.join(ENGINES)}")
    return ENGINES[engine](q, k, v, mask, scale, mesh)


def _xla(q, k, v, mask: AttentionMask, scale: float, mesh: Mesh | None):
    """`blockwise.attend`, heads first."""
    rows, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (each.transpose(0, 2, 1, 3) for each in (k, v))
    mixed = attend(q, k, v, mask._replace(aligned=None), scale, mask.aligned)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def _flash(q, k, v, mask: AttentionMask, scale: float, mesh: Mesh | None):
    """`flash.flash`, heads first, on every device its own rows and heads."""
    # Here, for it imports the compilers of accelerators, which nobody else needs.
    from shiq_jax.models.flash import flash

    rows, aligned = len(q), mask.aligned
    q, k, v = (each.transpose(0, 2, 1, 3) for each in (q, k, v))
    marks = tuple(jnp.broadcast_to(mark, (rows, mark.shape[1])) for mark in mask[:5])

    def local(q, k, v, *marks):
        return flash(q, k, v, AttentionMask(*marks), scale, aligned)

    if mesh is not None and mesh.size > 1:
        # A device has the heads of its own groups; groups that cannot be dealt out are everywhere, and so their heads.
        own = partition_spec(mesh, ("rows", "kv_heads", None, None), k.shape)
        of_marks = (PartitionSpec(own[0]),) * 5
        local = jax.shard_map(local, mesh=mesh, in_specs=(own, own, own, *of_marks), out_specs=own, check_vma=False)
    return local(q, k, v, *marks).transpose(0, 2, 1, 3)


def branching(
    q: Float[Array, "rows branches heads head_dim"],
    trunk: tuple[Float[Array, "rows kv_heads head_dim keys"], Float[Array, "rows kv_heads keys head_dim"]],
    seen: Bool[Array, "rows keys"],
    own: tuple[
        Float[Array, "rows branches kv_heads head_dim slots"], Float[Array, "rows branches kv_heads slots head_dim"]
    ],
    own_seen: Bool[Array, "rows branches slots"],
    *,
    scale: float,
) -> Float[Array, "rows branches heads head_dim"]:
    """One query of each of several sequences that continue their row: over the row's keys, which are read once for
    all of them, and over the sequence's own. Exactly `attention` over both together; for decoding, forward only.
    """
    rows, branches, heads, head_dim = q.shape
    groups = trunk[0].shape[1]
    together = heads // groups
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(rows, branches, groups, together, head_dim)

    # Products of [batch, few, many] and no other layout: that is what backends have a fast path for.
    def by_row(x):
        return x.swapaxes(1, 2).reshape(rows * groups, branches * together, -1)

    def by_branch(x):
        return x.reshape(rows, groups, branches, together, -1).swapaxes(1, 2)

    def product(a, b):
        return jnp.matmul(a, b.reshape(len(a), *b.shape[-2:]), preferred_element_type=precise)

    shared = product(by_row(q), trunk[0]) * scale
    alone = product(q.reshape(-1, together, head_dim), own[0]) * scale
    lowest = jnp.finfo(precise).min
    shared = jnp.where(jnp.repeat(seen, groups, axis=0)[:, None], shared, lowest)
    alone = jnp.where(jnp.repeat(own_seen.reshape(rows * branches, -1), groups, axis=0)[:, None], alone, lowest)
    # Two parts of one softmax; each stays in the order of its product, and only the sums are turned.
    top = by_branch(jnp.max(shared, axis=-1, keepdims=True))
    top = jnp.maximum(top, jnp.max(alone, axis=-1, keepdims=True).reshape(top.shape))
    shared = jnp.exp(shared - by_row(top))
    alone = jnp.exp(alone - top.reshape(-1, together, 1))
    total = by_branch(jnp.sum(shared, axis=-1, keepdims=True))
    total += jnp.sum(alone, axis=-1, keepdims=True).reshape(total.shape)
    mixed = by_branch(product(shared.astype(q.dtype), trunk[1]))
    mixed += product(alone.astype(q.dtype), own[1]).reshape(mixed.shape)
    return (mixed / total).astype(q.dtype).reshape(rows, branches, heads, head_dim)


ENGINES: Mapping[str, Callable] = {"xla": _xla, "flash": _flash}
