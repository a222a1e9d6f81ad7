"""A fingerprint of weights: the same bits give the same text, wherever the arrays live."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiq_jax.sharding import hosts

_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Hex digest (64 characters) of names, shapes, dtypes and bits of all arrays in a nested dict.

    Two 32-bit sums of hashed (bits, index) per array are computed on the devices that hold it; wraparound integer
    addition gives the same sum in any order, so the digest does not depend on sharding, and the index makes it depend
    on position. Guards against accidents, not against an adversary.
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    digest = hashlib.sha256()
    sums = hosts.gather(_checksums([leaf for _, leaf in leaves])) if leaves else np.zeros((0, 2), np.uint32)
    for (name, leaf), pair in zip(leaves, sums, strict=True):
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {pair[0]:08x}{pair[1]:08x}\n".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: jax.Array) -> jax.Array:
    """uint32[2]; indices beyond 2^32 wrap."""
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.stack([jnp.sum(_mix(words ^ _mix(index + jnp.uint32(seed))), dtype=jnp.uint32) for seed in _SEEDS])


def _words(leaf: jax.Array) -> jax.Array:
    """The bits as uint32; 8-byte elements become two, along a new last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}[leaf.dtype.itemsize]).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of 32-bit words: every input bit reaches every output bit (MurmurHash3's finaliser, Appleby)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
