"""A number that changes when a bit of an array does, wherever the array lies. Knows arrays; knows no files.

    digest = sum over i of word[i] * weight(i)     modulo 2^32, with odd weights drawn from i

Sums of integers know no order, so every mesh gives the same digest and no process gathers anything. One flipped bit
changes the sum by 2^k times an odd number, which is never 0; two sums with other weights leave 2^-62 for the rest.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Of each array, as 16 hexadecimal digits; all processes that hold a part of them must ask."""
    found = jax.device_get(_digests(dict(arrays)))
    return {name: "".join(f"{int(half):08x}" for half in np.asarray(pair)) for name, pair in found.items()}


@jax.jit
def _digests(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: _digest(array) for name, array in arrays.items()}


def _digest(array: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for dimension, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
    return jnp.stack([jnp.sum(words * _weights(index, seed), dtype=jnp.uint32) for seed in _SEEDS])


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of each entry; of a wider one, a last axis of words."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = min(array.dtype.itemsize, 4)
    return lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)


def _weights(index: UInt32[Array, "..."], seed: int) -> UInt32[Array, "..."]:
    """Odd, and spread over all 32 bits: the finaliser of MurmurHash3."""
    mixed = index ^ jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)) | jnp.uint32(1)
