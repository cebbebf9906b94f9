"""The readable reference of attention with sinks, windows and grouped heads. Knows arrays; knows no cache and no mesh.

Queries are taken in blocks, so that the scores of one block, not [T, S] of them, are in memory at a time.

      full: key index = position              sliding, window 4: key 0 is position first_query - 4

      keys     0 1 2 3 4 5                     keys     0 1 2 3 | 4 5 6
      query 3  x x x x . .                     query 0  . x x x | x . .
      query 4  x x x x x .                     query 1  . . x x | x x .
      query 5  x x x x x x                     query 2  . . . x | x x x
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.zeros import zeros

SCORES_AT_ONCE = 1 << 26  # float32 scores of one block of queries: 256 MiB
_MOST_QUERIES = 512

Index = Int[Array, ""] | int
# index of a block's first query -> (index of its first key, which query sees which key from there on)
Sight = Callable[[Index], tuple[Index, Bool[Array, "B t s"]]]


def full(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    first_key: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Query t of row b stands at position first_query[b] + t and sees the keys up to there, from first_key[b, t] on.

    Softmax in float32.
    """
    return _in_blocks(q, k, v, sinks, full_blocks(q, k, first_query=first_query, first_key=first_key))


def sliding(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B {window}+T K H"],
    v: Float[Array, "B {window}+T K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    window: int,
    first_key: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Query t sees `window` keys, its own included. The keys: the `window` positions before the first query, then T."""
    return _in_blocks(q, k, v, sinks, sliding_blocks(q, first_query=first_query, window=window, first_key=first_key))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries in blocks of `size`. The last block begins early rather than reach past the last query."""

    num_queries: int
    size: int
    sight: Sight

    @property
    def count(self) -> int:
        return -(-self.num_queries // self.size)

    def start(self, i: Index) -> Int[Array, ""]:
        """The first query of block i; those before i * size have had their turn."""
        return jnp.minimum(i * self.size, self.num_queries - self.size)


def full_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    first_query: Int[Array, " B"],
    first_key: Int[Array, "B T"] | None,
    copies: int = 1,
) -> Blocks:
    """`copies` of the scores are in memory at a time."""
    rows, num_queries, heads, _ = q.shape
    num_keys = k.shape[1]
    size = block_size(num_queries, scores_per_query=rows * heads * num_keys * copies)

    def sight(start: Index) -> tuple[Index, Bool[Array, "B t S"]]:
        positions = first_query[:, None] + start + jnp.arange(size)
        key = jnp.arange(num_keys)
        return 0, (key <= positions[:, :, None]) & _is_own(key[None], first_key, start, size)

    return Blocks(num_queries, size, sight)


def sliding_blocks(
    q: Float[Array, "B T N H"],
    *,
    first_query: Int[Array, " B"],
    window: int,
    first_key: Int[Array, "B T"] | None,
    copies: int = 1,
) -> Blocks:
    """`copies` of the scores are in memory at a time."""
    rows, num_queries, heads, _ = q.shape
    size = block_size(num_queries, scores_per_query=rows * heads * (window + _MOST_QUERIES) * copies)
    query, key = jnp.arange(size)[:, None], jnp.arange(window + size)
    in_window = (key > query) & (key <= query + window)  # key i of a block stands `window` before its query i

    def sight(start: Index) -> tuple[Index, Bool[Array, "B t s"]]:
        position = first_query[:, None] - window + start + key
        exists = position >= 0
        return start, in_window & exists[:, None, :] & _is_own(position, first_key, start, size)

    return Blocks(num_queries, size, sight)


def _is_own(
    key: Int[Array, "_ s"], first_key: Int[Array, "B T"] | None, start: Index, size: int
) -> Bool[Array, "B t s"] | bool:
    """Whether the key at a position belongs to the query's own text, of the block from `start` on."""
    if first_key is None:
        return True
    return key[:, None, :] >= cut_axis1(first_key, start, size)[:, :, None]


def softmax(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    sinks: Float[Array, " N"],
    visible: Bool[Array, "B t s"],
) -> tuple[Float[Array, "B K G t s"], Float[Array, "B K G t 1"]]:
    """How much each query takes of the keys it sees, and how much its head's sink takes. Query head h uses h // G."""
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped(q, k),
        k,
        precision=product_precision(q),
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(k.shape[2], -1)[None, :, :, None, None]
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)  # finite, since the sink is: a padded query is no NaN
    weights, sink_weight = jnp.exp(scores - top), jnp.exp(sink - top)
    total = weights.sum(axis=-1, keepdims=True) + sink_weight
    return weights / total, sink_weight / total


def grouped(q: Float[Array, "B t N H"], k: Float[Array, "B s K H"]) -> Float[Array, "B t K G H"]:
    """Query heads beside the key head they use: head h uses h // G."""
    rows, t, heads, head_dim = q.shape
    return q.reshape(rows, t, k.shape[2], heads // k.shape[2], head_dim)


def product_precision(x: Array) -> lax.Precision | None:
    """Accelerators would round float32 operands."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def cut_axis1(x: Array, start: Index, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _attend(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    sinks: Float[Array, " N"],
    visible: Bool[Array, "B t s"],
) -> Float[Array, "B t N H"]:
    """Values mixed by the softmax over the visible keys and one sink per head, which has no value."""
    weights, _ = softmax(q, k, sinks, visible)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights.astype(v.dtype),
        v,
        precision=product_precision(q),
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(q.shape).astype(q.dtype)


def block_size(num_queries: int, *, scores_per_query: int) -> int:
    """The largest power of two of queries whose scores fit, at most `_MOST_QUERIES`; or all of them."""
    fits = max(1, min(SCORES_AT_ONCE // scores_per_query, _MOST_QUERIES, num_queries))
    return 1 << (fits.bit_length() - 1) if fits < num_queries else num_queries


def _in_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B keys K H"],
    v: Float[Array, "B keys K H"],
    sinks: Float[Array, " N"],
    blocks: Blocks,
) -> Float[Array, "B T N H"]:
    def step(i: Int[Array, ""], out: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        start = blocks.start(i)
        first_key, visible = blocks.sight(start)
        near_k, near_v = (cut_axis1(x, first_key, visible.shape[-1]) for x in (k, v))
        done = _attend(cut_axis1(q, start, blocks.size), near_k, near_v, sinks, visible)
        return lax.dynamic_update_slice_in_dim(out, done, start, axis=1)

    return lax.fori_loop(0, blocks.count, step, zeros(q.shape, q.dtype, after=q))
