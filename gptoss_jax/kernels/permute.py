"""Rows in another order, each perhaps several times over. Knows arrays; knows no experts.

Written out because of the way back. That of a gather adds rows to zeros wherever they belong, on a GPU in any order and
so with other last bits in every run; here it takes the same road back and adds the copies of a row one after the other.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def permuted(x: Float[Array, "M D"], order: Int[Array, " S"], place: Int[Array, " S"]) -> Float[Array, "S D"]:
    """x[order // n] with n = S / M: of every row n copies, which lie together before they are put in order.

    Args:
        x: the rows.
        order: a permutation.
        place: the inverse one, argsort(order).
    """
    return _permuted(x, order, place, len(order) // len(x))


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permuted(x: Array, order: Array, place: Array, copies: int) -> Array:
    return x[order // copies]


def _forward(x: Array, order: Array, place: Array, copies: int) -> tuple[Array, Array]:
    return _permuted(x, order, place, copies), place


def _backward(copies: int, place: Array, d_out: Array) -> tuple[Array, None, None]:
    d_copies = d_out[place].reshape(-1, copies, d_out.shape[-1])
    return jnp.sum(d_copies, axis=1, dtype=jnp.float32).astype(d_out.dtype), None, None


_permuted.defvjp(_forward, _backward)
