"""The way back through attention, whichever implementation went forward. Knows arrays; knows no optimiser.

Saved are the operands alone. The softmax of one block of queries at a time is computed again, so that no [T, S] scores
are ever in memory; blocks and sight are those of xla.py. Of the softmax P with values V, out = P V, a row of it gives

    dP = dout V^T      dS = P (dP - sum(P dP))      dsink = - P_sink sum(P dP)      (the sink has no value: its dP is 0)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.attention.xla import (
    Blocks,
    cut_axis1,
    full_blocks,
    grouped,
    product_precision,
    sliding_blocks,
    softmax,
)
from gptoss_jax.kernels.zeros import zeros

_COPIES = 4  # of a block's scores: weights and gradients of both, in float32 and as operands of products

# Of q, k, v and sinks, in float32 but for q.
Gradients = tuple[Float[Array, "B T N H"], Float[Array, "B keys K H"], Float[Array, "B keys K H"], Float[Array, " N"]]


def full(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"],
    d_out: Float[Array, "B T N H"],
    *,
    first_query: Int[Array, " B"],
    first_key: Int[Array, "B T"] | None = None,
) -> Gradients:
    """The gradients of q, k, v and sinks, in their dtypes; what was invisible has gradient zero."""
    blocks = full_blocks(q, k, first_query=first_query, first_key=first_key, copies=_COPIES)
    return _in_blocks(q, k, v, sinks, d_out, blocks)


def sliding(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B {window}+T K H"],
    v: Float[Array, "B {window}+T K H"],
    sinks: Float[Array, " N"],
    d_out: Float[Array, "B T N H"],
    *,
    first_query: Int[Array, " B"],
    window: int,
    first_key: Int[Array, "B T"] | None = None,
) -> Gradients:
    """As `full`, for keys that lie as `sliding` wants them."""
    blocks = sliding_blocks(q, first_query=first_query, window=window, first_key=first_key, copies=_COPIES)
    return _in_blocks(q, k, v, sinks, d_out, blocks)


def _in_blocks(q: Array, k: Array, v: Array, sinks: Array, d_out: Array, blocks: Blocks) -> Gradients:
    """Keys and values collect what every block of queries adds, in float32."""

    def step(i: Int[Array, ""], sums: Gradients) -> Gradients:
        d_q, d_k, d_v, d_sinks = sums
        start = blocks.start(i)
        first_key, visible = blocks.sight(start)
        near_k, near_v = (cut_axis1(x, first_key, visible.shape[-1]) for x in (k, v))
        had_its_turn = (start + jnp.arange(blocks.size) < i * blocks.size)[:, None, None]
        d_block = jnp.where(had_its_turn, 0, cut_axis1(d_out, start, blocks.size))
        adds = _attend(cut_axis1(q, start, blocks.size), near_k, near_v, sinks, d_block, visible)
        return (
            _add_axis1(d_q, adds[0], start),
            _add_axis1(d_k, adds[1], first_key),
            _add_axis1(d_v, adds[2], first_key),
            d_sinks + adds[3],
        )

    dtypes = (q.dtype, *[jnp.float32] * 3)
    nothing = tuple(zeros(x.shape, dtype, after=d_out) for x, dtype in zip((q, k, v, sinks), dtypes, strict=True))
    d_q, d_k, d_v, d_sinks = lax.fori_loop(0, blocks.count, step, nothing)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks.astype(sinks.dtype)


def _attend(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    sinks: Float[Array, " N"],
    d_out: Float[Array, "B t N H"],
    visible: Bool[Array, "B t s"],
) -> Gradients:
    """One block's; its products take operands in q's dtype, as forward."""

    def einsum(letters: str, a: Array, b: Array) -> Array:
        operands = a.astype(q.dtype), b.astype(q.dtype)
        return jnp.einsum(letters, *operands, precision=product_precision(q), preferred_element_type=jnp.float32)

    weights, sink_weight = softmax(q, k, sinks, visible)
    d_mixed = grouped(d_out, k)
    d_v = einsum("bkgts,btkgh->bskh", weights, d_mixed)
    d_weights = einsum("btkgh,bskh->bkgts", d_mixed, v)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_scores = weights * (d_weights - mean) * q.shape[-1] ** -0.5
    d_q = einsum("bkgts,bskh->btkgh", d_scores, k).reshape(q.shape).astype(q.dtype)
    d_k = einsum("bkgts,btkgh->bskh", d_scores, grouped(q, k))
    d_sinks = -jnp.sum(sink_weight * mean, axis=(0, 3, 4)).reshape(sinks.shape)
    return d_q, d_k, d_v, d_sinks


def _add_axis1(whole: Array, part: Array, start: Int[Array, ""] | int) -> Array:
    return lax.dynamic_update_slice_in_dim(
        whole, cut_axis1(whole, start, part.shape[1]) + part.astype(whole.dtype), start, axis=1
    )
