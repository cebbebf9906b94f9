"""The grouped matmul for TPU, in Pallas: 4-bit weights stay packed until they are in VMEM. Knows tiles, not routing.

Rows are cut into tiles, and an item of work is one expert's rows in one tile. An item's two numbers, its tile and its
expert, are known before the kernel starts (scalar prefetch), so the blocks of weights that are copied from HBM are
those of experts that have rows, and of no other:

    expert        0 0 0 0 0 2 2 3 - - - -        (tile of 4 rows; the last rows belong to nobody)
    tile          0 0 0 0|1 1 1 1|2 2 2 2
    items         (0,0)  (1,0) (1,2) (1,3)  (2,-)

The grid runs over the items for each block of outputs. Items follow each other by expert: its block of weights is
copied once, unpacked once, and multiplies all of its tiles. Items of one tile follow each other too, and each fills its
own rows of the result. K, at 2880 the inputs of a whole row, is never cut: the MXU sums it in float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.columns import BLOCK_BYTES, Columns
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.mxfp4 import BLOCK

_FEWEST_ROWS = 16  # of bfloat16 in one register
_VMEM_BYTES = 48 << 20  # that one call may take of 128 MiB, or of 64 on v7x


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one step of the grid. Any are right; which are fast depends on the device: see kernels/tuned."""

    rows: int = 128  # of a tile, where there are as many: the depth of the matrix unit
    outputs: int = 512  # a multiple of 128 lanes; gate and up take as many each
    float4: bool = False  # unpack with the chip's own conversion from E2M1, which of all kinds only v7x has


def moe_matmul(
    x: Float[Array, "M I"],
    weight: Any,
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """As the door says; weight is Columns or plain, [E, I, O], or with swiglu [E, 2, I, F].

    Packed weights become bfloat16, exactly under scale bytes from 1 to 252, but for values below 2^-126, which a TPU
    takes for zero. 0 counts as 1, which is wrong by 6 * 2^-127 at most. Past 252, where codes overflow, and at 255,
    which is NaN, every output that the block enters is NaN.
    """
    del expected_rows  # a step waits for an expert's weights, however few of the tile's rows they multiply
    blocks = blocks or Blocks()
    num_rows, num_inputs = x.shape
    num_outputs = bias.shape[1]
    # [E, matrices, I, O] and [E, matrices, O]: gate and up come apart in the bias as they lie in the weight.
    weights = [part if part.ndim == 4 else part[:, None] for part in jax.tree.leaves(weight)]
    bias = bias[:, None] if swiglu_limit is None else jnp.swapaxes(bias, 1, 2)
    num_matrices = bias.shape[1]

    rows = min(max(_FEWEST_ROWS, pl.next_power_of_2(num_rows)), blocks.rows)
    outputs = min(blocks.outputs, num_outputs)
    items = _items(group_sizes, num_rows=num_rows, tile=rows)
    unpacked = [
        pltpu.VMEM((num_matrices, num_inputs // 2, outputs), jnp.int32),
        pltpu.VMEM((num_matrices, num_inputs // BLOCK, outputs), jnp.int32),
        pltpu.VMEM((num_matrices, 1, outputs), jnp.float32),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, limit=swiglu_limit, float4=blocks.float4),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), jnp.float32 if swiglu_limit is None else x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(num_outputs, outputs), items.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((rows, num_inputs), lambda n, i, items: (items.x_tile[i], 0)),
                [
                    pl.BlockSpec(
                        (None, num_matrices, part.shape[2], outputs), lambda n, i, items: (items.expert[i], 0, 0, n)
                    )
                    for part in weights
                ],
                pl.BlockSpec((None, num_matrices, outputs), lambda n, i, items: (items.expert[i], 0, n)),
            ],
            out_specs=pl.BlockSpec((rows, outputs), lambda n, i, items: (items.tile[i], n)),
            scratch_shapes=unpacked if isinstance(weight, Columns) else [],
        ),
        compiler_params=pltpu.CompilerParams(
            # Blocks of outputs may go to different cores; the items of one go in their order.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpret,
        name="moe_matmul",
    )(items, x, weights, bias)


# ---- items of work ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Items:
    """For each item its tile and its expert, whose rows are [start, end) and may reach past the tile.

    Behind the items with rows come the tiles of nobody, to be zeroed (start = end), then repetitions of the last tile,
    which do nothing. These name the last expert, and as x_tile the last tile, that had rows: they are in VMEM already,
    and nothing is copied.
    """

    __no_type_check__ = True  # Pallas rebuilds it of references, which are no arrays: see `MXFP4`

    tile: Int[Array, " items"]
    x_tile: Int[Array, " items"]
    expert: Int[Array, " items"]
    start: Int[Array, " items"]
    end: Int[Array, " items"]


def _items(group_sizes: Int[Array, " E"], *, num_rows: int, tile: int) -> _Items:
    """As many as there can be: each expert with rows adds at most one item to that of its first tile."""
    num_tiles, num_experts = pl.cdiv(num_rows, tile), group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first_tiles = starts // tile
    visits = jnp.where(sizes > 0, pl.cdiv(ends, tile) - first_tiles, 0)
    visit_ends = jnp.cumsum(visits)
    num_visits, tiles_with_rows = visit_ends[-1], pl.cdiv(ends[-1], tile)

    item = jnp.arange(num_tiles + min(num_experts, num_rows) - 1, dtype=jnp.int32)
    visit = jnp.minimum(item, jnp.maximum(num_visits - 1, 0))
    expert = jnp.sum(visit_ends <= visit[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)  # where no expert has rows
    x_tile = jnp.where(num_visits > 0, first_tiles[expert] + visit - (visit_ends - visits)[expert], 0)
    has_rows = item < num_visits
    nobodys = jnp.minimum(tiles_with_rows + item - num_visits, num_tiles - 1)
    return _Items(
        tile=jnp.where(has_rows, x_tile, nobodys),
        x_tile=x_tile,
        expert=expert,
        start=jnp.where(has_rows, starts[expert], 0),
        end=jnp.where(has_rows, ends[expert], 0),
    )


# ---- the kernel ------------------------------------------------------------------------------------------------------


def _kernel(
    items: Any, x: Any, weights: Any, bias: Any, out: Any, *unpacked: Any, limit: float | None, float4: bool
) -> None:
    """One item. In its tile's block of the result it writes its rows; a tile's first item zeroes the others."""
    i = pl.program_id(1)
    before = jnp.maximum(i - 1, 0)
    start, end = items.start[i], items.end[i]
    has_rows = start < end
    new_tile = (i == 0) | (items.tile[i] != items.tile[before])
    new_expert = (i == 0) | (items.expert[i] != items.expert[before])
    matrices = range(bias.shape[0])

    if unpacked:

        @pl.when(has_rows & new_expert)
        def _() -> None:
            for matrix in matrices:
                _unpack(*(ref.at[matrix] for ref in (*weights, *unpacked)), float4=float4)

    @pl.when(has_rows)
    def _() -> None:
        def product(matrix: int) -> Array:
            if not unpacked:
                return _dot(x[...], weights[0][matrix])
            words, _, faults = unpacked
            return _dot(x[...], words.bitcast(jnp.bfloat16)[matrix]) + faults[matrix]

        sums = [product(matrix) + bias[matrix : matrix + 1, :].astype(jnp.float32) for matrix in matrices]
        result = sums[0] if limit is None else swiglu(sums[0], sums[1], limit)
        row = items.tile[i] * out.shape[0] + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        others = jnp.where(new_tile, jnp.zeros_like(out), out[...])
        out[...] = jnp.where((row >= start) & (row < end), result.astype(out.dtype), others)

    @pl.when(new_tile & ~has_rows)
    def _() -> None:
        out[...] = jnp.zeros_like(out)


def _dot(x: Array, weight: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, weight.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


# ---- unpacking -------------------------------------------------------------------------------------------------------

# A word of 32 bits holds two bfloat16 of one output, that of the input before in the lower half. They are a sign, eight
# bits of exponent and seven of fraction; the highest bit of the fraction is all that E2M1 has.
_EXPONENT, _HALF = 7, 16
_SIGNS = -0x7FFF_8000  # 0x8000_8000
_LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is a bfloat16, 6 * 2^(253 - 127) is not
_SUBLANES = 8  # words of one output in a register
_AT_ONCE = 8  # blocks, whose exponents fill a register: then it is known beforehand which row is whose


def _unpack(codes: Any, scales: Any, words: Any, exponents: Any, faults: Any, *, float4: bool) -> None:
    """One matrix of one expert, eight blocks at a time. `faults` is what is to be added to each output's sums."""
    num_blocks = scales.shape[0]
    scale = scales[...].astype(jnp.int32)
    exponents[...] = jnp.clip(scale, 1, _LARGEST_SCALE) << _EXPONENT
    faults[...] = jnp.where(scale.max(axis=0, keepdims=True) > _LARGEST_SCALE, jnp.nan, 0.0)

    def unpack(first: Any, count: int) -> None:
        rows = pl.ds(first * BLOCK_BYTES, count * BLOCK_BYTES)
        words_of = _words_by_float4 if float4 else _words_by_table
        words[rows, :] = words_of(codes[rows, :], exponents[pl.ds(first, count), :])

    whole, rest = divmod(num_blocks, _AT_ONCE)
    if whole:
        lax.fori_loop(0, whole, lambda i, _: unpack(pl.multiple_of(_AT_ONCE * i, _AT_ONCE), _AT_ONCE), None)
    if rest:
        unpack(num_blocks - rest, rest)


def _words_by_float4(bytes_: Array, exponents: Array) -> Array:
    """For chips that know E2M1. A byte's low nibble counts as the row before that of its high one."""
    values = pltpu.bitcast(bytes_, jnp.float4_e2m1fn).astype(jnp.bfloat16)
    scales = pltpu.bitcast(exponents << _HALF, jnp.float32).astype(jnp.bfloat16)
    blocks = [values[k * BLOCK : (k + 1) * BLOCK] * scales[k : k + 1] for k in range(scales.shape[0])]
    return pltpu.bitcast(jnp.concatenate(blocks), jnp.int32)


def _words_by_table(bytes_: Array, exponents: Array) -> Array:
    """For other chips. Eight magnitudes are the eight sublanes of a register, in which one instruction looks up.

    A byte's bits 3 and 7 are signs. Shifted by 12, bit 3 is on bit 15; and on bit 31 is a copy of bit 7, with which the
    conversion from signed bytes has filled the word.
    """
    bytes_ = pltpu.bitcast(bytes_, jnp.int8).astype(jnp.int32)
    tables = [_table(exponents[block : block + 1]) for block in range(exponents.shape[0])]
    tables = [(low, low << _HALF) for low in tables]
    words = []
    for first in range(0, bytes_.shape[0], _SUBLANES):
        part = bytes_[first : first + _SUBLANES]
        low, high = tables[first // BLOCK_BYTES]
        magnitudes = _look_up(low, part & 7) | _look_up(high, part >> 4 & 7)
        words.append(magnitudes | part << 12 & _SIGNS)
    return jnp.concatenate(words)


def _table(exponent: Array) -> Array:
    """[8, O]: the bits of 0 .5 1 1.5 2 3 4 6 times each output's scale, whose exponent is given.

    E2M1's codes in their order are bfloat16's bits in their order but for its denormals: 0, and .5 = 1.0 * 2^-1.
    """
    magnitude = lax.broadcasted_iota(jnp.int32, (_SUBLANES, exponent.shape[1]), 0)
    bits = jnp.where(magnitude == 1, 0, magnitude << (_EXPONENT - 1)) - (1 << _EXPONENT)
    return jnp.where(magnitude == 0, 0, exponent + bits)


def _look_up(table: Array, row: Array) -> Array:
    """table[row[i, j], j]. jnp.take_along_axis looks for negative rows first, which takes as long again."""
    across = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    return lax.gather(table, row[..., None], across, (1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
