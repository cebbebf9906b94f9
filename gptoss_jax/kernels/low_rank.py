"""The product with two thin matrices, b · (a · x), that an adapter adds to a weight's. Knows arrays; knows no model.

Several adapters lie in a row along the rank, and each token takes the ranks of its own:

    ranks (2, 3)        a, b      0 0 1 1 1
    a token of 1                  . . x x x
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.linear.xla import matmul


def low_rank(
    x: Float[Array, "M I"],
    a: Float[Array, "R I"],
    b: Float[Array, "O R"],
    *,
    ranks: Sequence[int],
    adapter: Int[Array, " M"] | None = None,
) -> Float[Array, "M O"]:
    """b · (a · x) in float32; between the two it is rounded to x's dtype.

    Args:
        x: the rows.
        a: of x's dtype, as b.
        b: see a.
        ranks: how many of R each adapter has.
        adapter: which of them each row takes, -1 none; None is all ranks for every row.
    """
    return matmul(only_own(matmul(x, a), ranks, adapter).astype(x.dtype), b)


def only_own(h: Float[Array, "M R"], ranks: Sequence[int], adapter: Int[Array, " M"] | None) -> Float[Array, "M R"]:
    """Zeros where a rank is not of the row's adapter."""
    if adapter is None:
        return h
    owner = np.repeat(np.arange(len(ranks)), ranks)
    return jnp.where(owner == adapter[:, None], h, 0)
