"""The readable reference of the grouped matmul: one expert is unpacked at a time. Knows arrays; knows no routing.

Rows are sorted by expert. They are taken in tiles that never straddle two experts; only experts with rows have tiles:

    expert        0 0 0 0 0 | 2 2 | 3          (tile of 4 rows)
    tiles         [0 0 0 0][0 . . .][2 2 . .][3 . . .]
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.choose import Layout
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.linear.xla import matmul
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.mxfp4 import MXFP4, decode_planes
from gptoss_jax.kernels.zeros import zeros

_MOST_ROWS = 256  # in a tile: a longer one would pad small groups without making the product faster

Carry = TypeVar("Carry")

Weight = MXFP4 | Columns | Float[Array, "..."]

# Which of the inputs, and the part [*outputs, those] of one expert's matrix that multiplies them.
Plane = tuple[slice, Array]


def moe_matmul(
    x: Float[Array, "M I"],
    weight: Weight,
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
    plain: Layout = "rows",
) -> Float[Array, "M O"]:
    """As the door says; weights may be packed in any layout, which makes this the slow twin of every implementation.

    `plain` says how those lie that are not packed.
    """

    def one_tile(tile: "Tile", out: Float[Array, "M O"]) -> Float[Array, "M O"]:
        planes = unpack(one_expert(weight, tile.expert), x.dtype, plain=plain)
        return tile.put(out, expert_output(tile.of(x), planes, bias[tile.expert], limit=swiglu_limit))

    out = zeros((x.shape[0], bias.shape[1]), jnp.float32 if swiglu_limit is None else x.dtype, after=x)
    size = tile_rows(x.shape[0], group_sizes.shape[0], expected_rows=expected_rows)
    return for_each_tile(one_tile, out, group_sizes, num_rows=x.shape[0], size=size)


def expert_output(
    rows: Float[Array, "tile I"], planes: list[Plane], bias: Float[Array, "*outputs"], *, limit: float | None
) -> Float[Array, "tile O"]:
    """What one expert makes of its rows: float32 sums, or with a limit their swiglu in the rows' dtype."""
    products = [matmul(rows[:, inputs], part.reshape(-1, part.shape[-1])) for inputs, part in planes]
    sums = sum(products[1:], products[0]).reshape(-1, *bias.shape) + bias.astype(jnp.float32)
    return sums if limit is None else swiglu(sums[..., 0], sums[..., 1], limit).astype(rows.dtype)


def one_expert(weight: Weight, expert: Int[Array, ""]) -> Weight:
    """Its matrix, packed as it was.

    Without the barrier XLA on CPU, whose products are of float32, widens all experts' bfloat16 once before the loop.
    """
    weight, expert = lax.optimization_barrier((weight, expert))
    return weight[expert]


def unpack(matrix: Weight, dtype: DTypeLike, *, plain: Layout) -> list[Plane]:
    """One expert's matrix. Of MXFP4 its even inputs and its odd ones: to interleave them costs as much as to decode."""
    if isinstance(matrix, MXFP4):
        even, odd = decode_planes(matrix.blocks, matrix.scales, dtype)
        return [(slice(0, None, 2), even), (slice(1, None, 2), odd)]
    if isinstance(matrix, Columns):
        return [(slice(None), _by_output(matrix.decode(dtype)))]
    matrix = matrix.astype(dtype)
    return [(slice(None), matrix if plain == "rows" else _by_output(matrix))]


def _by_output(matrix: Float[Array, "*gate_up I O"]) -> Float[Array, "O *gate_up I"]:
    """Columns turned into rows: [I, O] is [O, I], and [2, I, F], where gate and up lie apart, [F, 2, I]."""
    return jnp.moveaxis(matrix, (-1, -2), (0, -1))


# ---- tiles -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tile:
    """Neighbouring rows, of which `mine` belong to the expert. The last tiles begin early rather than reach too far."""

    expert: Int[Array, ""]
    start: Int[Array, ""]
    mine: Bool[Array, " tile"]

    def of(self, rows: Float[Array, "M I"]) -> Float[Array, "tile I"]:
        """The tile's rows, zero where they are not mine: they may hold anything."""
        found = lax.dynamic_slice_in_dim(rows, self.start, self.mine.shape[0])
        return jnp.where(self.mine[:, None], found, jnp.zeros_like(found))

    def put(self, rows: Float[Array, "M I"], new: Float[Array, "tile I"]) -> Float[Array, "M I"]:
        """`rows` with mine replaced."""
        old = lax.dynamic_slice_in_dim(rows, self.start, self.mine.shape[0])
        kept = jnp.where(self.mine[:, None], new.astype(rows.dtype), old)
        return lax.dynamic_update_slice_in_dim(rows, kept, self.start, axis=0)


def for_each_tile(
    body: Callable[[Tile, Carry], Carry], carry: Carry, group_sizes: Int[Array, " E"], *, num_rows: int, size: int
) -> Carry:
    """carry = body(tile, carry) for every tile, of `size` rows, of every expert that has rows."""
    row_ends = jnp.cumsum(group_sizes)
    tile_ends = jnp.cumsum(-(-group_sizes // size))

    def step(i: Int[Array, ""], carry: Carry) -> Carry:
        expert = jnp.searchsorted(tile_ends, i, side="right")
        group_start = row_ends[expert] - group_sizes[expert]
        first_tile = tile_ends[expert] - -(-group_sizes[expert] // size)
        first_row = group_start + (i - first_tile) * size
        start = jnp.minimum(first_row, num_rows - size)
        row = start + jnp.arange(size)
        return body(Tile(expert, start, (row >= first_row) & (row < row_ends[expert])), carry)

    return lax.fori_loop(0, tile_ends[-1], step, carry)


def tile_rows(num_rows: int, num_experts: int, *, expected_rows: int | None) -> int:
    """The power of two next above the mean group, so that a mean group is one tile and one unpacking."""
    mean = -(-(num_rows if expected_rows is None else expected_rows) // num_experts)
    return min(1 << (mean - 1).bit_length() if mean > 1 else 1, _MOST_ROWS, num_rows)
