"""x · wᵀ with sums in float32: the dense product under every layer. Knows arrays; knows no layers and no packing."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def matmul(x: Float[Array, "M I"], weight: Float[Array, "O I"]) -> Float[Array, "M O"]:
    """Products of bfloat16 or float32; on accelerators that would round float32 operands these stay whole.

    On a CPU a lone bfloat16 row goes twice. For one row XLA makes a matrix-vector product, and widens the whole matrix
    to float32 first (2.3 GB for the unembedding of 20b); for two it reads the bfloat16 as it lies, 4 times as fast.
    """
    if x.shape[0] != 1 or x.dtype != jnp.bfloat16:
        return _dot(x, weight)
    return lax.platform_dependent(x, weight, cpu=lambda x, weight: _dot(jnp.tile(x, (2, 1)), weight)[:1], default=_dot)


def _dot(x: Float[Array, "M I"], weight: Float[Array, "O I"]) -> Float[Array, "M O"]:
    return lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
