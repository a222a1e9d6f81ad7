"""Fingerprint of weights, independent of their sharding."""

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
    """Hex digest (64 characters) of the names, shapes, dtypes and bits of all arrays in a nested dict.

    Each array contributes two 32-bit sums of hashed (bits, index), computed on the devices that hold it. Wraparound
    addition is independent of order and therefore of sharding. Detects accidents, not deliberate collisions.
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    digest = hashlib.sha256()
    checksums = hosts.gather(_checksums([leaf for _, leaf in leaves])) if leaves else np.zeros((0, 2), np.uint32)
    for (name, leaf), (first, second) in zip(leaves, checksums, strict=True):
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {first:08x}{second:08x}\n".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: jax.Array) -> jax.Array:
    """uint32[2]; indices beyond 2^32 wrap."""
    bits = _as_uint32(leaf)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(seed))), dtype=jnp.uint32) for seed in _SEEDS])


def _as_uint32(leaf: jax.Array) -> jax.Array:
    """The bits of an array as uint32; 8-byte elements become two, along a new last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}[leaf.dtype.itemsize]).astype(jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer (Appleby), a bijection in which every input bit affects every output bit."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
