"""The grouped matmul on GPUs, written for Triton: weights stay MXFP4 until they are in registers. Knows no layers.

The grid is (blocks of outputs) x (tiles of rows); a tile never straddles two experts, and each program finds its own
from the group sizes. What a program computes lies the other way round, outputs x rows: the weight is the left operand,
which tensor cores take from registers, so that unpacked weights are never written anywhere.

A word is 4 bytes of a block, 8 codes of 4 bits, the first in the lowest bits. Codes 4 apart sit at the same place in
the word's halves, and become a pair of bfloat16 with a few instructions for both. A pair is a plane's next two inputs:

    codes of word j        7 6 5 4 | 3 2 1 0        inputs 8j + (0 ... 7)
    plane 0, 1, 2, 3       codes (0, 4), (1, 5), (2, 6), (3, 7)

x is laid out in the same four planes before, and a product is the sum of four.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32

from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.mxfp4 import BLOCK, MXFP4

_CODES = 8  # in a word
_PLANES = 4
_BLOCK_WORDS = BLOCK // _CODES

_UNIT = 2.0**64  # see scale_bits

# For both halves of a word; jnp would take such numbers for int32.
_CODE, _SHIFT_12_AND_6, _SIGN_AND_MAGNITUDE = (
    np.uint32(0x000F_000F),
    np.uint32(1 << 12 | 1 << 6),
    np.uint32(0x81C0_81C0),
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program does, which changes its time and not its result. All but `stages` are powers of two."""

    rows: int  # of a tile, at most
    outputs: int
    words: int  # of each output's weights that are unpacked at once
    warps: int
    stages: int  # steps, of which all but one are loaded ahead


# The same in kernels/tuned/moe_matmul.gpu.json, where devices may have their own. `few` waits for memory: small
# programs, so that 4 experts' matrices keep every multiprocessor loading. `many` waits for the tensor cores: the more
# rows share an unpacked weight, the better. Float32 products run without tensor cores, and hold more registers.
DEFAULTS: Mapping[str, Blocks] = {
    "few": Blocks(rows=16, outputs=32, words=32, warps=2, stages=4),
    "many": Blocks(rows=64, outputs=64, words=16, warps=4, stages=3),
    "float32": Blocks(rows=16, outputs=32, words=8, warps=4, stages=2),
}


def moe_matmul(
    x: Float[Array, "M I"],
    weight: MXFP4 | Float[Array, "E *outputs I"],
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
    blocks: Mapping[str, Blocks] = DEFAULTS,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """See the door, `kernels.moe_matmul`. Packed weights lie in rows, as released.

    Float32 rows meet every weight exactly; bfloat16 rows those of usual size, see `scale_bits`.
    """
    num_experts = group_sizes.shape[0]
    outputs = bias.size // num_experts
    operands = (x, weight, bias.reshape(num_experts, outputs), group_sizes.astype(jnp.int32))
    num_rows = x.shape[0] if expected_rows is None else expected_rows
    chosen = _choose_blocks(blocks, num_rows=num_rows, num_experts=num_experts, dtype=x.dtype)
    call = functools.partial(_call, blocks=chosen, swiglu_limit=swiglu_limit)
    if interpret:
        return call(*operands, ptx=False, interpret=True)
    # PTX is for NVIDIA's chips alone.
    return lax.platform_dependent(
        *operands, cuda=functools.partial(call, ptx=True), default=functools.partial(call, ptx=False)
    )


def _choose_blocks(blocks: Mapping[str, Blocks], *, num_rows: int, num_experts: int, dtype: DTypeLike) -> Blocks:
    """Tiles of twice the mean group, since groups are not even and one tile reads its weights once; 8 rows at least."""
    twice_mean = -(-2 * num_rows // num_experts)
    name = "float32" if dtype == jnp.float32 else "few" if twice_mean <= blocks["few"].rows else "many"
    form = blocks[name]
    return dataclasses.replace(form, rows=min(max(8, pl.next_power_of_2(twice_mean)), form.rows))


def _call(
    x: Array,
    weight: Any,
    bias: Array,
    group_sizes: Array,
    *,
    blocks: Blocks,
    swiglu_limit: float | None,
    ptx: bool,
    interpret: bool = False,
) -> Array:
    """The kernel over the whole grid; `ptx` where it may use NVIDIA's instructions."""
    num_rows, (num_experts, outputs) = x.shape[0], bias.shape
    if isinstance(weight, MXFP4):
        weight = weight.reshape_rows(num_experts, outputs)
        if ptx and x.dtype == jnp.bfloat16:
            product = functools.partial(_packed_product, planes=_planes_ptx, unit=_UNIT)
        else:
            product = functools.partial(_packed_product, planes=functools.partial(_planes, dtype=x.dtype), unit=1.0)
        operands = (_in_planes(x), _words(weight.blocks), weight.scales)
    else:
        product = _plain_product
        operands = (x, weight.reshape(num_experts, outputs, -1))
    out_shape, out_dtype = (
        ((num_rows, outputs), jnp.float32) if swiglu_limit is None else ((num_rows, outputs // 2), x.dtype)
    )
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, swiglu_limit=swiglu_limit, product=product),
        out_shape=jax.ShapeDtypeStruct(out_shape, out_dtype),
        grid=(pl.cdiv(outputs, blocks.outputs), _most_tiles(num_rows, num_experts, rows=blocks.rows)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="moe_matmul",
    )(*operands, bias, group_sizes)


def _most_tiles(num_rows: int, num_experts: int, *, rows: int) -> int:
    """Each group, the rows of nobody among them, begins a tile; all other rows fill whole tiles at best."""
    groups = min(num_experts + 1, num_rows)
    return groups + (num_rows - groups) // rows


def _in_planes(x: Float[Array, "M I"]) -> Float[Array, "planes M I/4"]:
    num_rows, inputs = x.shape
    pairs = x.reshape(num_rows, inputs // _CODES, 2, _PLANES)
    return pairs.transpose(3, 0, 1, 2).reshape(_PLANES, num_rows, inputs // _PLANES)


def _words(blocks: UInt8[Array, "E O C 16"]) -> UInt32[Array, "E O 4*C"]:
    """The same bytes: XLA for GPUs makes no copy."""
    num_experts, outputs, num_blocks, _ = blocks.shape
    return lax.bitcast_convert_type(blocks.reshape(num_experts, outputs, num_blocks * _BLOCK_WORDS, 4), jnp.uint32)


# ---- in the kernel ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The rows [start, end) of x; the expert past the last stands for rows of nobody, a later one for no tile."""

    expert: Array
    start: Array
    end: Array


def _kernel(*refs: Any, blocks: Blocks, swiglu_limit: float | None, product: Callable[..., Array]) -> None:
    *operands, bias_ref, sizes_ref, out_ref = refs
    num_experts, num_outputs = bias_ref.shape
    tile = _find_tile(sizes_ref, pl.program_id(1), rows=blocks.rows, num_rows=out_ref.shape[0])
    first = pl.program_id(0) * blocks.outputs
    per_unit = 1 if swiglu_limit is None else 2
    columns = first // per_unit + jnp.arange(blocks.outputs // per_unit)
    rows = tile.start + jnp.arange(blocks.rows)
    kept = (rows < tile.end)[:, None] & (columns < num_outputs // per_unit)[None, :]

    @pl.when(tile.expert < num_experts)
    def _matmul() -> None:
        outputs = jnp.minimum(first + jnp.arange(blocks.outputs), num_outputs - 1)  # those past the last go nowhere
        sums = product(*operands, tile.expert, outputs, rows, rows < tile.end, blocks=blocks)
        sums += plgpu.load(bias_ref.at[tile.expert, outputs]).astype(jnp.float32)[:, None]
        out = sums.T if swiglu_limit is None else swiglu(*_gate_and_up(sums.T), swiglu_limit)
        plgpu.store(out_ref.at[rows[:, None], columns[None, :]], out.astype(out_ref.dtype), mask=kept)

    @pl.when(tile.expert == num_experts)
    def _zero() -> None:
        plgpu.store(out_ref.at[rows[:, None], columns[None, :]], jnp.zeros(kept.shape, out_ref.dtype), mask=kept)


def _find_tile(sizes_ref: Any, index: Array, *, rows: int, num_rows: int) -> _Tile:
    """Where the tile of that index lies. Counting experts here spares XLA the small kernels of a table of tiles."""
    num_experts = sizes_ref.shape[0]
    experts = jnp.arange(1 << num_experts.bit_length())  # Triton's arrays are powers of two; one more than the experts
    sizes = plgpu.load(sizes_ref.at[experts], mask=experts < num_experts, other=0)
    row_starts = jnp.cumsum(sizes) - sizes
    row_ends = jnp.where(experts < num_experts, row_starts + sizes, num_rows)
    tiles = jnp.where(experts <= num_experts, (row_ends - row_starts + rows - 1) // rows, 0)
    tile_ends = jnp.cumsum(tiles)
    before = tile_ends <= index
    first = index - jnp.max(jnp.where(before, tile_ends, 0))
    start = jnp.max(jnp.where(before, row_ends, 0)) + first * rows
    return _Tile(jnp.sum(before.astype(jnp.int32)), start, jnp.min(jnp.where(before, num_rows, row_ends)))


def _packed_product(
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    expert: Array,
    outputs: Array,
    rows: Array,
    real: Array,
    *,
    blocks: Blocks,
    planes: Callable[[Array, Array], Iterator[Array]],
    unit: float,
) -> Array:
    """The sums [outputs, rows] over all inputs; a one in the planes stands for `unit`."""
    num_words, num_blocks = words_ref.shape[-1], scales_ref.shape[-1]
    step_blocks, step_inputs = blocks.words // _BLOCK_WORDS, blocks.words * 2

    def scales_of(step: Array | int) -> Array:
        columns = step * step_blocks + jnp.arange(step_blocks)
        mask = (columns < num_blocks)[None, :]
        return plgpu.load(scales_ref.at[expert, outputs[:, None], columns[None, :]], mask=mask, other=0)

    def add(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, scales = carry
        next_scales = scales_of(step + 1)  # single bytes: Triton loads nothing ahead that is so small
        columns = step * blocks.words + jnp.arange(blocks.words)
        mask = (columns < num_words)[None, :]
        words = plgpu.load(words_ref.at[expert, outputs[:, None], columns[None, :]], mask=mask, other=0)
        inputs = step * step_inputs + jnp.arange(step_inputs)
        mask = real[:, None] & (inputs < num_words * 2)[None, :]
        for index, plane in enumerate(planes(words, scales)):
            part = plgpu.load(x_ref.at[index, rows[:, None], inputs[None, :]], mask=mask, other=0)
            sums = _add_dot(sums, plane, part)
        return sums, next_scales

    zeros = jnp.zeros((blocks.outputs, blocks.rows), jnp.float32)
    sums, _ = lax.fori_loop(0, pl.cdiv(num_words, blocks.words), add, (zeros, scales_of(0)))
    return sums * unit


def _plain_product(
    x_ref: Any, weight_ref: Any, expert: Array, outputs: Array, rows: Array, real: Array, *, blocks: Blocks
) -> Array:
    """The sums [outputs, rows] over all inputs."""
    num_inputs, step_inputs = weight_ref.shape[-1], blocks.words * 4

    def add(step: Array, sums: Array) -> Array:
        inputs = step * step_inputs + jnp.arange(step_inputs)
        inside = (inputs < num_inputs)[None, :]
        weight = plgpu.load(weight_ref.at[expert, outputs[:, None], inputs[None, :]], mask=inside, other=0)
        part = plgpu.load(x_ref.at[rows[:, None], inputs[None, :]], mask=real[:, None] & inside, other=0)
        return _add_dot(sums, weight.astype(part.dtype), part)

    zeros = jnp.zeros((blocks.outputs, blocks.rows), jnp.float32)
    return lax.fori_loop(0, pl.cdiv(num_inputs, step_inputs), add, zeros)


def _add_dot(sums: Array, weight: Array, x: Array) -> Array:
    """sums + weight · xᵀ; float32 operands stay whole."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return sums + jnp.dot(weight, x.T, precision=precision, preferred_element_type=jnp.float32)


def _gate_and_up(sums: Array) -> tuple[Array, Array]:
    """Gate and up of each unit, which stand side by side."""
    rows, outputs = sums.shape
    gate, up = lax.split(sums.reshape(rows, outputs // 2, 2), (1, 1), axis=2)
    return gate.reshape(rows, outputs // 2), up.reshape(rows, outputs // 2)


# ---- codes to floats -------------------------------------------------------------------------------------------------


def _planes(words: Array, scales: Array, *, dtype: DTypeLike) -> Iterator[Array]:
    """The four planes of weights, [outputs, 2 words] each, with instructions that every chip has."""
    exponents = jnp.maximum(scales.astype(jnp.int32) << 23, 1 << 22)  # 2^-127 is a denormal
    factor = _each_word(lax.bitcast_convert_type(exponents, jnp.float32))
    for plane in range(_PLANES):
        codes = ((words >> (4 * (plane + 4 * half))).astype(jnp.int32) for half in range(2))
        yield _interleave(*((_value(code) * factor).astype(dtype) for code in codes))


def _value(codes: Array) -> Array:
    """Of the lowest 4 bits s e e m, as float32. From 1.0 on, e e m go on counting where float32's bits have them."""
    magnitudes, half = codes & 7, 0x3F00_0000
    bits = jnp.where(magnitudes < 2, magnitudes * half, half + (magnitudes << 22))
    return lax.bitcast_convert_type(bits | (codes & 8) << 28, jnp.float32)


def _planes_ptx(words: Array, scales: Array) -> Iterator[Array]:
    """The same in bfloat16, 2^-64 of their values: see `scale_bits`."""
    factor = _each_word(scale_bits(scales.astype(jnp.uint32)))
    for half in (words, words >> 8):
        for plane in range(2):
            pairs = _multiply(code_bits(half, plane), factor)
            low, high = (part.astype(jnp.uint16) for part in (pairs, pairs >> 16))
            yield _interleave(*(lax.bitcast_convert_type(part, jnp.bfloat16) for part in (low, high)))


def code_bits(words: UInt32[Array, "*words"], plane: int) -> UInt32[Array, "*words"]:
    """The codes of plane 0 or 1, s e e m, as two bfloat16 that are 2^-126 of their values:

        s 000000ee m000000    e e = 0 is a denormal, as it is in E2M1

    One product shifts a code by 12, for its sign, and by 6.
    """
    place = 4 * plane
    return (words & (_CODE << place)) * (_SHIFT_12_AND_6 >> place) & _SIGN_AND_MAGNITUDE


def scale_bits(scales: UInt32[Array, "*blocks"]) -> UInt32[Array, "*blocks"]:
    """2^126 2^-64 2^(scale - 127) as bfloat16, twice.

    With 2^126 alone, which codes want, scales from 2^2 on would pass bfloat16's largest. So every weight is 2^-64 of
    itself, and the float32 sums are multiplied by 2^64 in the end: exact for scale bytes 59 to 192, which are 2^-68 to
    2^65. Below those, parts of weights that are under 2^-69 are lost; above, and for 255, which is NaN, they are inf.
    """
    return (jnp.minimum(scales, np.uint32(193)) + np.uint32(62)) * np.uint32(0x0080_0080)


def _multiply(a: Array, b: Array) -> Array:
    """Both bfloat16 of a times those of b. Chips before Hopper have no product but this: a b + (-0)."""
    instruction = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
    args = [a.astype(jnp.int32), b.astype(jnp.int32)]  # Pallas gives unsigned results a type that Triton refuses
    [product] = plgpu.elementwise_inline_asm(
        instruction,
        args=args,
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.int32)],
    )
    return product.astype(a.dtype)


def _each_word(scales: Array) -> Array:
    """[outputs, blocks] to [outputs, words]."""
    outputs, num_blocks = scales.shape
    repeated = jnp.broadcast_to(scales[:, :, None], (outputs, num_blocks, _BLOCK_WORDS))
    return repeated.reshape(outputs, num_blocks * _BLOCK_WORDS)


def _interleave(low: Array, high: Array) -> Array:
    return jnp.stack([low, high], axis=-1).reshape(low.shape[0], 2 * low.shape[1])
