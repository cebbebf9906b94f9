"""The readable reference of attention with sinks, windows and grouped heads. Knows arrays; knows no cache and no mesh.

Queries are taken in blocks, so that the scores of one block, not [T, S] of them, are in memory at a time.

      full: key index = position              sliding, window 4: key 0 is position first_query - 4

      keys     0 1 2 3 4 5                     keys     0 1 2 3 | 4 5 6
      query 3  x x x x . .                     query 0  . x x x | x . .
      query 4  x x x x x .                     query 1  . . x x | x x .
      query 5  x x x x x x                     query 2  . . . x | x x x
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_SCORES_AT_ONCE = 1 << 26  # float32 scores of one block of queries: 256 MiB
_MOST_QUERIES = 512


def full(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Query t of row b stands at position first_query[b] + t and sees the keys up to there. Softmax in float32."""
    rows, num_queries, heads, _ = q.shape
    key_positions = jnp.arange(k.shape[1])

    def block(q: Float[Array, "B t N H"], start: Int[Array, ""] | int) -> Float[Array, "B t N H"]:
        positions = first_query[:, None] + start + jnp.arange(q.shape[1])
        return _attend(q, k, v, sinks, key_positions <= positions[:, :, None])

    return _in_blocks(block, q, _block_size(rows * heads * k.shape[1], num_queries))


def sliding(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B {window}+T K H"],
    v: Float[Array, "B {window}+T K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    window: int,
) -> Float[Array, "B T N H"]:
    """Query t sees `window` keys, its own included. The keys: the `window` positions before the first query, then T."""
    rows, num_queries, heads, _ = q.shape
    size = _block_size(rows * heads * (window + _MOST_QUERIES), num_queries)
    num_keys = min(size, num_queries) + window
    k, v = (_pad_axis1(x, -num_queries % size if num_queries > size else 0) for x in (k, v))

    def block(q: Float[Array, "B t N H"], start: Int[Array, ""] | int) -> Float[Array, "B t N H"]:
        near_k = lax.dynamic_slice_in_dim(k, start, num_keys, axis=1)
        near_v = lax.dynamic_slice_in_dim(v, start, num_keys, axis=1)
        query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(num_keys)
        in_window = (key > query) & (key <= query + window)  # key i of the block stands `window` before query i
        exists = first_query[:, None] - window + start + key >= 0
        return _attend(q, near_k, near_v, sinks, in_window & exists[:, None, :])

    return _in_blocks(block, q, size)


def _attend(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    sinks: Float[Array, " N"],
    visible: Bool[Array, "B t s"],
) -> Float[Array, "B t N H"]:
    """Softmax over the visible keys and one sink per head, which has no value. Query head h uses key head h // G."""
    rows, t, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, t, kv_heads, heads // kv_heads, head_dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)  # finite, since the sink is: a padded query is no NaN
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh",
        (weights / total).astype(v.dtype),
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(q.shape).astype(q.dtype)


def _block_size(scores_per_query: int, num_queries: int) -> int:
    """The largest power of two of queries whose scores fit, at most `_MOST_QUERIES`."""
    fits = max(1, min(_SCORES_AT_ONCE // scores_per_query, _MOST_QUERIES, num_queries))
    return 1 << (fits.bit_length() - 1) if fits < num_queries else num_queries


def _in_blocks(block: Callable[..., Array], q: Float[Array, "B T N H"], size: int) -> Float[Array, "B T N H"]:
    """block(queries, index of the first) over T in steps of `size`; the last step is padded and cut again."""
    num_queries = q.shape[1]
    if size >= num_queries:
        return block(q, 0)
    padded = _pad_axis1(q, -num_queries % size)
    steps = padded.shape[1] // size

    def step(i: Int[Array, ""]) -> Float[Array, "B t N H"]:
        return block(lax.dynamic_slice_in_dim(padded, i * size, size, axis=1), i * size)

    done = lax.map(step, jnp.arange(steps))
    return jnp.moveaxis(done, 0, 1).reshape(padded.shape)[:, :num_queries]


def _pad_axis1(x: jax.Array, amount: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2))
