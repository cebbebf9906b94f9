"""The MXFP4 codec: 4-bit E2M1 codes in blocks of 32 that share one E8M0 scale byte. Knows bits; knows no model.

    block of 16 bytes   byte i = element 2i in the low nibble, element 2i + 1 in the high nibble
    code  s e e m       0 .5 1 1.5 2 3 4 6, and the same with the sign bit set (there is a -0)
    value               code * 2^(scale - 127); scale byte 255 is NaN

OCP Microscaling Formats v1.0, sections 5.1 and 6.3.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from gptoss_jax.errors import UserError

BLOCK = 32
CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST_CODE = 6.0
NAN_SCALE = 255

_INF, _NAN, _FRACTION = 0x7F800000, 0x7FC00000, 0x007FFFFF  # float32 bits

ScaleRule = Literal["reuse", "even", "floor", "up"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4:
    """A packed array. The last two axes of the blocks, (C, 16), stand for 32 C values of its logical shape.

    PEP 484's mark below keeps checkers off __init__ only: jax rebuilds a pytree with whatever its leaves became, which
    in tree.map and eval_shape are no arrays.
    """

    __no_type_check__ = True

    blocks: UInt8[Array, "*rows C 16"] | UInt8[np.ndarray, "*rows C 16"]
    scales: UInt8[Array, "*rows C"] | UInt8[np.ndarray, "*rows C"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> "MXFP4":
        """Indexes leading axes; blocks stay whole."""
        return MXFP4(self.blocks[index], self.scales[index])

    def reshape_rows(self, *rows: int) -> "MXFP4":
        """Another shape of the leading axes; the packed axis stays the last."""
        num_blocks = self.scales.shape[-1]
        return MXFP4(self.blocks.reshape(*rows, num_blocks, BLOCK // 2), self.scales.reshape(*rows, num_blocks))

    def decode(self, dtype: DTypeLike) -> Float[Array, "*rows K"]:
        """Every value, exactly: bfloat16 holds each product that float32 holds. Past the largest float it is inf."""
        return decode(self.blocks, self.scales, dtype)


def decode(
    blocks: UInt8[Array, "*rows C 16"] | UInt8[np.ndarray, "*rows C 16"],
    scales: UInt8[Array, "*rows C"] | UInt8[np.ndarray, "*rows C"],
    dtype: DTypeLike,
) -> Float[Array, "*rows K"]:
    """The values in their order; see `MXFP4.decode`."""
    even, odd = decode_planes(blocks, scales, dtype)
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)


def decode_planes(
    blocks: UInt8[Array, "*rows C 16"] | UInt8[np.ndarray, "*rows C 16"],
    scales: UInt8[Array, "*rows C"] | UInt8[np.ndarray, "*rows C"],
    dtype: DTypeLike,
) -> tuple[Float[Array, "*rows C*16"], Float[Array, "*rows C*16"]]:
    """The even elements and the odd ones, which a product may sum one after the other.

    The low nibbles of all bytes and the high ones each decode in one sweep; to interleave them takes XLA on a CPU as
    long again as to decode them.
    """
    scale = jnp.asarray(scales, jnp.int32)[..., None]
    shape = (*scales.shape[:-1], scales.shape[-1] * (BLOCK // 2))
    bytes_ = jnp.asarray(blocks, jnp.int32)
    even, odd = (_float_of(code, scale, dtype).reshape(shape) for code in (bytes_ & 0xF, bytes_ >> 4))
    return even, odd


def _float_of(code: Int[Array, "*rows C n"], scale: Int[Array, "*rows C 1"], dtype: DTypeLike) -> Array:
    """Builds float32 bits with integers, so that no step flushes a denormal to zero, as XLA's CPU arithmetic does."""
    magnitude, sign = code & 7, (code & 8) << 28
    exponent = (magnitude >> 1) + scale - 1
    mantissa = jnp.where(magnitude == 1, 0, (magnitude & 1) << 22)  # 0.5, E2M1's denormal, is 1.0 one exponent down
    denormal = (mantissa | 1 << 23) >> jnp.clip(1 - exponent, 0, 2)
    bits = jnp.where(exponent > 0, exponent << 23 | mantissa, denormal)
    bits = jnp.where(exponent >= 255, _INF, bits)
    bits = jnp.where(magnitude == 0, 0, bits) | sign
    bits = jnp.where(scale == NAN_SCALE, _NAN, bits)
    if jnp.dtype(dtype) == jnp.bfloat16:  # the upper half of a float32, and nothing is set below
        return lax.bitcast_convert_type((bits >> 16).astype(jnp.int16), jnp.bfloat16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def decode_on_host(
    blocks: UInt8[np.ndarray, "*rows C 16"], scales: UInt8[np.ndarray, "*rows C"]
) -> Float[np.ndarray, "*rows K"]:
    """The bfloat16 values, from a table of all 256 scales x 256 bytes, in NumPy: no device has to hold them."""
    pairs = _value_pairs()[scales[..., None].astype(np.uint16) << 8 | blocks]
    return pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)


@functools.cache
def _value_pairs() -> np.ndarray:
    """For scale << 8 | byte the bfloat16 bits of both elements, the even one in the low half; exact in float64."""
    with np.errstate(over="ignore"):  # past bfloat16's largest value is inf, as everywhere
        values = np.ldexp(np.array(CODE_VALUES), np.arange(256)[:, None] - 127).astype(ml_dtypes.bfloat16)
    values[NAN_SCALE] = np.nan
    bits = values.view(np.uint16).astype(np.uint32)
    return (bits[:, None, :] | bits[:, :, None] << 16).reshape(-1)


def encode(
    values: Float[np.ndarray, "*rows K"],
    *,
    rule: ScaleRule,
    scales: UInt8[np.ndarray, "*rows C"] | None = None,
) -> MXFP4:
    """Packs on the host. Codes round to nearest, ties to even, saturate at 6 and keep the sign of zero.

    The scale of a block with largest magnitude m, by `rule`:
        reuse  the given `scales`: a decoded array comes back byte for byte (past scale 252 it may hold inf: an error)
        floor  2^(floor(log2 m) - 2), the OCP rule; m may saturate
        even   the same after rounding m to one mantissa bit, ties to even: less saturates
        up     the smallest power of two with m <= 6 * scale: nothing saturates

    Raises:
        UserError: NaN or inf, a last axis that is no multiple of 32, or scales missing, not wanted or NaN (255).
    """
    _check_rule(rule, scales)
    if values.shape[-1] % BLOCK:
        raise UserError(f"the last axis is {values.shape[-1]}, no multiple of {BLOCK}: MXFP4 packs whole blocks")
    blocked = np.asarray(values, np.float32).reshape(*values.shape[:-1], -1, BLOCK)
    if not np.isfinite(blocked).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(values, np.float32)))[0])
        raise UserError(f"the value at {where} is {values[where]}: MXFP4 holds neither NaN nor inf")
    if scales is None:
        scales = _scales(np.abs(blocked).max(axis=-1), rule)
    if scales.shape != blocked.shape[:-1]:
        raise UserError(f"scales have shape {scales.shape}, the blocks of the values need {blocked.shape[:-1]}")
    refuse_nan_scales(scales, name="scales")
    with np.errstate(over="ignore"):  # far past the largest code: inf saturates like anything else
        scaled = np.ldexp(blocked, 127 - scales.astype(np.int32)[..., None])
    scaled = np.clip(scaled, -LARGEST_CODE, LARGEST_CODE)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    return MXFP4(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def encode_on_device(
    values: Float[Array, "*rows K"], *, rule: ScaleRule, scales: UInt8[Array, "*rows C"] | None = None
) -> MXFP4:
    """`encode` of an array where it lies, byte for byte, and inside jit.

    There nothing can be refused: a block with NaN or inf gets the NaN scale, and keeps it where it has it.
    """
    blocked = in_blocks(values)
    found = scales_for(blocked, rule=rule, scales=scales)
    codes, _ = nearest_codes(blocked, found)
    return pack(codes[..., 0::2], codes[..., 1::2], found)


def in_blocks(values: Float[Array, "*rows K"]) -> Float[Array, "*rows C 32"]:
    """Raises UserError where the last axis is no multiple of 32."""
    if values.shape[-1] % BLOCK:
        raise UserError(f"the last axis is {values.shape[-1]}, no multiple of {BLOCK}: MXFP4 packs whole blocks")
    return values.reshape(*values.shape[:-1], -1, BLOCK)


def scales_for(
    values: Float[Array, "*rows C n"], *, rule: ScaleRule, scales: UInt8[Array, "..."] | None
) -> UInt8[Array, "*rows C"]:
    """The scale bytes that `encode` would take by its rule; NaN's for a block that holds NaN or inf."""
    _check_rule(rule, scales)
    largest = _magnitude_bits(values).max(axis=-1)
    if scales is None:
        fraction = largest & _FRACTION
        bump = {"floor": False, "even": fraction >= 3 << 21, "up": fraction > 1 << 22}[rule]  # 1.75 and 1.5, as below
        scales = jnp.clip((largest >> 23) - 2 + bump, 0, NAN_SCALE - 1).astype(jnp.uint8)
    elif scales.shape != largest.shape:
        raise UserError(f"scales have shape {scales.shape}, the blocks of the values need {largest.shape}")
    return jnp.where(largest < _INF, scales, jnp.uint8(NAN_SCALE))


def nearest_codes(
    values: Float[Array, "*rows C n"], scales: UInt8[Array, "*rows C"]
) -> tuple[Int[Array, "*rows C n"], Bool[Array, "*rows C n"]]:
    """The codes that `encode` gives, and whether each is nearest though the grid went on past 6, with 8.

    In integers, as XLA's CPU arithmetic takes denormals for zero: value / scale is significand * 2^(exponent - 23).
    From 1 on there are two codes in a power of two; below it the step is 0.5.
    """
    magnitude = _magnitude_bits(values)
    fraction, biased = magnitude & _FRACTION, magnitude >> 23
    significand = jnp.where(biased == 0, fraction << 1, fraction | 1 << 23)
    exponent = jnp.clip(biased - scales[..., None].astype(jnp.int32), -3, 3)  # below 0.25 is 0, from 8 on 6
    dropped = 22 - jnp.minimum(exponent, 0)
    is_odd = significand >> dropped & 1
    rounded = significand + (1 << dropped - 1) - 1 + is_odd >> dropped  # half to even
    code = rounded + 2 * jnp.maximum(exponent, 0)
    return jnp.minimum(code, 7) | (_float32_bits(values) >> 28 & 8), code <= 7


def pack(even: Int[Array, "*rows C 16"], odd: Int[Array, "*rows C 16"], scales: UInt8[Array, "*rows C"]) -> MXFP4:
    """The codes of the even elements and of the odd ones, in bytes."""
    return MXFP4((even | odd << 4).astype(jnp.uint8), scales)


def values_of(
    codes: Int[Array, "*rows C n"], scales: UInt8[Array, "*rows C"], dtype: DTypeLike
) -> Float[Array, "*rows C n"]:
    """Every value, exactly, of codes one by one; see `MXFP4.decode`."""
    return _float_of(codes, scales[..., None].astype(jnp.int32), dtype)


def _magnitude_bits(values: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Those of float32 without the sign: as integers they are in the order of the magnitudes, NaN after inf."""
    return _float32_bits(values) & 0x7FFFFFFF


def _float32_bits(values: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    if values.dtype == jnp.bfloat16:  # its upper half; a conversion might flush a denormal
        return lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def refuse_nan_scales(scales: UInt8[np.ndarray, "*rows C"], *, name: str) -> None:
    """Scale byte 255 would make 32 weights NaN.

    Raises:
        UserError: naming the tensor and the first position.
    """
    if scales.size and scales.max() == NAN_SCALE:
        where = tuple(int(i) for i in np.argwhere(scales == NAN_SCALE)[0])
        raise UserError(
            f"tensor {name} holds scale byte 255 (NaN) at {where}; expected 0 to 254: "
            "the file is damaged or was quantised from NaN; get it again"
        )


def _check_rule(rule: str, scales: Any) -> None:
    if rule not in get_args(ScaleRule):
        raise UserError(f"scale rule {rule!r} is unknown; there are {', '.join(get_args(ScaleRule))}")
    if (rule == "reuse") != (scales is not None):
        found = "none" if scales is None else "some"
        raise UserError(f"scale rule {rule!r} was given {found} of the scales: 'reuse' needs them, no other rule does")


def _scales(largest: Float[np.ndarray, "*rows C"], rule: ScaleRule) -> UInt8[np.ndarray, "*rows C"]:
    """The scale bytes for each block's largest magnitude; a block of zeros gets the smallest scale."""
    fraction, exponent = np.frexp(largest)  # largest = fraction * 2^exponent, fraction in [0.5, 1)
    log2 = exponent - 1
    if rule == "even":
        log2 = log2 + (fraction >= 0.875)  # 1.75 and more rounds to 2 (1.75 is the tie between 1.5 and 2; 2 is even)
    if rule == "up":
        log2 = log2 + (fraction > 0.75)  # 6 = 1.5 * 2^2
    return np.where(largest > 0, np.clip(log2 - 2 + 127, 0, 254), 0).astype(np.uint8)
