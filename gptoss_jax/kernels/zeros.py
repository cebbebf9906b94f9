"""Zeros that a loop fills, and that exist no earlier than what it reads. Knows arrays; knows no loop.

XLA for GPUs makes all zeros of a program in one kernel at its beginning, since they wait for nothing: those of every
layer then lie in memory at once, and with 24 layers take more of it than the experts do.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array


def zeros(shape: tuple[int, ...], dtype: DTypeLike, *, after: Any) -> Array:
    """`after` is an array, or a tree of them; its values do not matter."""
    zero, _ = lax.optimization_barrier((jnp.zeros((), dtype), after))
    return jnp.broadcast_to(zero, shape)
