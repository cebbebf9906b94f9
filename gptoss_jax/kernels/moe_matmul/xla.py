"""The readable reference of the grouped matmul: one expert is unpacked at a time. Knows arrays; knows no routing.

Rows are sorted by expert. They are taken in tiles that never straddle two experts; only experts with rows have tiles:

    expert        0 0 0 0 0 | 2 2 | 3          (tile of 4 rows)
    tiles         [0 0 0 0][0 . . .][2 2 . .][3 . . .]
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.mxfp4 import MXFP4, decode_planes
from gptoss_jax.kernels.product import matmul

_MOST_ROWS = 256  # in a tile: a longer one would pad small groups without making the product faster


def moe_matmul(
    x: Float[Array, "M I"],
    weight: MXFP4 | Float[Array, "E O I"],
    bias: Float[Array, "E O"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M O"]:
    """x[rows of group e] · weight[e]^T + bias[e] for each expert e, accumulated in float32.

    Args:
        x: rows sorted by expert; the first group_sizes[0] belong to expert 0, and so on.
        weight: one matrix [O, I] for each expert, packed or not; only those of experts with rows are read.
        bias: added once to each row.
        group_sizes: rows of each expert; their sum may be less than M.

    Returns:
        float32; rows past the last group are zero.
    """
    num_rows, num_outputs = x.shape[0], weight.shape[1]
    tile = _tile_rows(num_rows, weight.shape[0])
    row_ends = jnp.cumsum(group_sizes)
    tile_ends = jnp.cumsum(-(-group_sizes // tile))
    padded = jnp.pad(x, ((0, tile), (0, 0)))  # a last tile may reach past the last row

    def one_tile(i: Int[Array, ""], out: Float[Array, "padded O"]) -> Float[Array, "padded O"]:
        expert = jnp.searchsorted(tile_ends, i, side="right")
        tiles_left = tile_ends[expert] - i
        size = group_sizes[expert]
        start = row_ends[expert] - size + (-(-size // tile) - tiles_left) * tile
        rows = lax.dynamic_slice_in_dim(padded, start, tile)
        product = _product(rows, weight, expert) + bias[expert].astype(jnp.float32)
        mine = (start + jnp.arange(tile) < row_ends[expert])[:, None]
        kept = lax.dynamic_slice_in_dim(out, start, tile)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product, kept), start, axis=0)

    out = jnp.zeros((num_rows + tile, num_outputs), jnp.float32)
    return lax.fori_loop(0, tile_ends[-1], one_tile, out)[:num_rows]


def _product(
    rows: Float[Array, "tile I"], weight: MXFP4 | Float[Array, "E O I"], expert: Int[Array, ""]
) -> Float[Array, "tile O"]:
    """rows · weight[expert]ᵀ; of packed weights the sum over even inputs, then that over odd ones."""
    # Without the barrier XLA on CPU, whose products are of float32, widens all experts' bfloat16 once before the loop.
    weight, expert = lax.optimization_barrier((weight, expert))
    chosen = weight[expert]
    if not isinstance(chosen, MXFP4):
        return matmul(rows, chosen.astype(rows.dtype))
    even, odd = decode_planes(chosen.blocks, chosen.scales, rows.dtype)
    return matmul(rows[:, 0::2], even) + matmul(rows[:, 1::2], odd)


def _tile_rows(num_rows: int, num_experts: int) -> int:
    """The power of two next above the mean group, so that a mean group is one tile and one unpacking."""
    mean = -(-num_rows // num_experts)
    return min(1 << (mean - 1).bit_length() if mean > 1 else 1, _MOST_ROWS)
