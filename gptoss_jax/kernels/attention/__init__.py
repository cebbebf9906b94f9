"""Attention with sinks over cached keys: `full` sees every earlier position, `sliding` the last `window`.

`paged` is either of the two over keys that lie in pages: what an engine runs, and nobody trains.

One door to every implementation, and the place where they are differentiated: whatever ran forward, backward.py goes
back. xla.py is the readable reference that the others are judged by; choose.py lists them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels.attention import backward
from gptoss_jax.kernels.attention.quantized import Pages, QuantizedPages, quantize
from gptoss_jax.kernels.choose import function

__all__ = ["Pages", "QuantizedPages", "full", "paged", "quantize", "sliding"]


def full(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    first_key: Int[Array, "B T"] | None = None,
    impl: str = "xla",
    device_kind: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of each query to every key up to its own position.

    Args:
        q: the query t of row b stands at position first_query[b] + t.
        k: the key at index i stands at position i; those past the query are invisible, and may be anything finite.
        v: as k.
        sinks: one more logit per head in its softmax, which has no value.
        first_query: see q.
        first_key: the first position that each query sees, where rows hold several texts; None is all from 0 on.
        impl: a name of `choose`, resolved.
        device_kind: whose block sizes are taken, where kernels/tuned has them.

    Raises:
        Unsupported: first_key is given to another implementation than "xla".
    """
    _check_first_key(first_key, impl)
    if not q.size:  # no kernel has a grid of nothing
        return jnp.zeros_like(q)
    return _full(q, k, v, sinks, first_query, first_key, impl, device_kind)


def sliding(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B {window}+T K H"],
    v: Float[Array, "B {window}+T K H"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    window: int,
    first_key: Int[Array, "B T"] | None = None,
    impl: str = "xla",
    device_kind: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of each query to `window` keys, its own included.

    Args as for `full`, but the key at index i of row b stands at position first_query[b] - window + i: the `window`
    positions before the first query, then one key per query. What stands before position 0 is invisible.
    """
    _check_first_key(first_key, impl)
    if not q.size:
        return jnp.zeros_like(q)
    return _sliding(q, k, v, sinks, first_query, first_key, window, impl, device_kind)


def _check_first_key(first_key: Array | None, impl: str) -> None:
    if first_key is not None and impl != "xla":
        raise Unsupported(
            f"attention's implementation {impl!r} takes rows of one text each, these hold several: choose attention=xla"
        )


def paged(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    table: Int[Array, "B J"],
    sinks: Float[Array, " N"],
    *,
    first_query: Int[Array, " B"],
    count: Int[Array, " B"],
    window: int | None = None,
    impl: str = "xla",
    device_kind: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of each query to every key up to its own position, or to the last `window` of them. No gradient.

    Args:
        q: the query t of row b stands at position first_query[b] + t. Its own key is in its page already.
        k_pages: [P, Z, K, H], or of 8 bits: pages of Z positions, which rows may share.
        v_pages: as k_pages.
        table: position p of row b lies in page table[b, p // Z] at offset p % Z. Of pages that no query sees, entries
            may be anything.
        sinks: one more logit per head in its softmax, which has no value.
        first_query: see q.
        count: how many of a row's queries are real; what the others give is finite, and nothing else. What lies in
            pages behind the last real query is seen by nobody, and may be anything finite.
        window: how many keys a query sees, its own included; None: all.
        impl: a name of `choose`, resolved.
        device_kind: whose block sizes are taken, where kernels/tuned has them.

    Raises:
        Unsupported: it is differentiated; or the implementation does not take such arrays.
    """
    if not q.size:
        return jnp.zeros_like(q)
    return _paged(q, k_pages, v_pages, table, sinks, first_query, count, window, impl, device_kind)


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _full(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array,
    first_query: Array,
    first_key: Array | None,
    impl: str,
    device_kind: str | None,
) -> Array:
    found = function("attention", "full", impl, device_kind=device_kind)
    return found(q, k, v, sinks, first_query=first_query, **_given(first_key))


def _given(first_key: Array | None) -> dict[str, Array]:
    """What only xla.py takes is told to nobody else."""
    return {} if first_key is None else {"first_key": first_key}


def _full_forward(*operands: Any) -> tuple[Array, tuple[Array | None, ...]]:
    return _full(*operands), operands[:6]


def _full_backward(impl: str, device_kind: str | None, saved: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    q, k, v, sinks, first_query, first_key = saved
    return (*backward.full(q, k, v, sinks, d_out, first_query=first_query, first_key=first_key), None, None)


_full.defvjp(_full_forward, _full_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _sliding(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array,
    first_query: Array,
    first_key: Array | None,
    window: int,
    impl: str,
    device_kind: str | None,
) -> Array:
    found = function("attention", "sliding", impl, device_kind=device_kind)
    return found(q, k, v, sinks, first_query=first_query, window=window, **_given(first_key))


def _sliding_forward(*operands: Any) -> tuple[Array, tuple[Array | None, ...]]:
    return _sliding(*operands), operands[:6]


def _sliding_backward(
    window: int, impl: str, device_kind: str | None, saved: tuple[Any, ...], d_out: Array
) -> tuple[Any, ...]:
    q, k, v, sinks, first_query, first_key = saved
    found = backward.sliding(q, k, v, sinks, d_out, first_query=first_query, first_key=first_key, window=window)
    return (*found, None, None)


_sliding.defvjp(_sliding_forward, _sliding_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _paged(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: Array,
    sinks: Array,
    first_query: Array,
    count: Array,
    window: int | None,
    impl: str,
    device_kind: str | None,
) -> Array:
    found = function("attention.pages", "paged", impl, device_kind=device_kind)
    return found(q, k_pages, v_pages, table, sinks, first_query=first_query, count=count, window=window)


def _paged_forward(*operands: Any) -> Any:
    raise Unsupported("attention over pages has no gradient, an engine needs none: train with `full` and `sliding`")


def _paged_backward(*saved: Any) -> Any:
    raise AssertionError("unreachable: _paged_forward raises")


_paged.defvjp(_paged_forward, _paged_backward)
