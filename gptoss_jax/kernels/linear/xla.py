"""The readable reference of the dense product. Knows arrays; knows no layers."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.kernels.linear.int8 import Int8


def matmul(x: Float[Array, "M I"], weight: Float[Array, "O I"] | Int8) -> Float[Array, "M O"]:
    """As the door says. 8-bit weights are unpacked to x's dtype, all of them: it is no way to save memory.

    On a CPU a lone bfloat16 row goes twice. For one row XLA makes a matrix-vector product, and widens the whole matrix
    to float32 first (2.3 GB for the unembedding of 20b); for two it reads the bfloat16 as it lies, 4 times as fast.
    """
    matrix = weight.decode(x.dtype) if isinstance(weight, Int8) else weight
    if x.shape[0] != 1 or x.dtype != jnp.bfloat16:
        return _dot(x, matrix)
    return lax.platform_dependent(x, matrix, cpu=lambda x, matrix: _dot(jnp.tile(x, (2, 1)), matrix)[:1], default=_dot)


@jax.custom_vjp
def _dot(x: Float[Array, "M I"], matrix: Float[Array, "O I"]) -> Float[Array, "M O"]:
    return _product(x, matrix, over=(1, 1))


def _forward(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, matrix), (x, matrix)


def _backward(saved: tuple[Array, Array], d_out: Float[Array, "M O"]) -> tuple[Array, Array]:
    """Products of the operands' dtype, as forward: the float32 of what comes back would make all three of float32, for
    which processors that multiply bfloat16 take several times as long."""
    x, matrix = saved
    d_out = d_out.astype(x.dtype)
    d_x, d_matrix = _product(d_out, matrix, over=(1, 0)), _product(d_out, x, over=(0, 0))
    return d_x.astype(x.dtype), d_matrix.astype(matrix.dtype)


_dot.defvjp(_forward, _backward)


def _product(a: Float[Array, "_ _"], b: Float[Array, "_ _"], *, over: tuple[int, int]) -> Float[Array, "_ _"]:
    """The sum over one axis of each, in float32; accelerators would round float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
