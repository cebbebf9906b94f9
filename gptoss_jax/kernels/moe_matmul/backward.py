"""The way back through the grouped matmul, whichever implementation went forward. Knows arrays; knows no optimiser.

Saved are the operands alone: weights stay packed, and each tile unpacks its expert and computes its sums again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.choose import Layout
from gptoss_jax.kernels.moe_matmul.xla import Tile, Weight, expert_output, for_each_tile, one_expert, tile_rows, unpack
from gptoss_jax.kernels.zeros import zeros

# Of x, of a plain weight, of the bias.
Gradients = tuple[Float[Array, "M I"], Float[Array, "..."] | None, Float[Array, "E *outputs"]]


def moe_matmul(
    x: Float[Array, "M I"],
    weight: Weight,
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    d_out: Float[Array, "M O"],
    *,
    swiglu_limit: float | None,
    expected_rows: int | None,
    plain: Layout,
) -> Gradients:
    """The gradients of x, weight and bias, in their dtypes; packed codes are no numbers and have none (None).

    Gradients of weight and bias add up in float32. Rows past the last group have gradient zero.
    """
    plain_dtype = weight.dtype if isinstance(weight, jax.Array) else None
    d_weight = None if plain_dtype is None else zeros(weight.shape, jnp.float32, after=d_out)
    start: Gradients = (zeros(x.shape, x.dtype, after=d_out), d_weight, zeros(bias.shape, jnp.float32, after=d_out))

    def one_tile(tile: Tile, sums: Gradients) -> Gradients:
        d_x, d_weight, d_bias = sums
        matrix = one_expert(weight, tile.expert)

        def output(rows: Array, variable: Array | None, bias: Array) -> Array:
            planes = unpack(matrix if variable is None else variable, x.dtype, plain=plain)
            return expert_output(rows, planes, bias, limit=swiglu_limit)

        _, back = jax.vjp(
            output, tile.of(x), None if plain_dtype is None else matrix, bias[tile.expert].astype(jnp.float32)
        )
        d_rows, d_matrix, d_expert_bias = back(tile.of(d_out))
        if d_weight is not None:
            d_weight = d_weight.at[tile.expert].add(d_matrix.astype(jnp.float32))
        return tile.put(d_x, d_rows), d_weight, d_bias.at[tile.expert].add(d_expert_bias)

    size = tile_rows(x.shape[0], group_sizes.shape[0], expected_rows=expected_rows)
    d_x, d_weight, d_bias = for_each_tile(one_tile, start, group_sizes, num_rows=x.shape[0], size=size)
    return d_x, None if d_weight is None else d_weight.astype(plain_dtype), d_bias.astype(bias.dtype)
