"""The MXFP4 codec: 4-bit E2M1 codes in blocks of 32 that share one E8M0 scale byte. Knows bits; knows no model.

    block of 16 bytes   byte i = element 2i in the low nibble, element 2i + 1 in the high nibble
    code  s e e m       0 .5 1 1.5 2 3 4 6, and the same with the sign bit set (there is a -0)
    value               code * 2^(scale - 127); scale byte 255 is NaN

OCP Microscaling Formats v1.0, sections 5.1 and 6.3.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from gptoss_jax.errors import UserError

BLOCK = 32
CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST_CODE = 6.0
NAN_SCALE = 255

ScaleRule = Literal["reuse", "even", "floor", "up"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4:
    """A packed array. Its logical shape is that of the blocks, with the last two axes (C, 16) standing for 32 C values."""

    blocks: UInt8[Array, "*rows C 16"] | UInt8[np.ndarray, "*rows C 16"]
    scales: UInt8[Array, "*rows C"] | UInt8[np.ndarray, "*rows C"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, index) -> "MXFP4":
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
    """Builds float32 bits with integers, so that no step flushes a denormal to zero (XLA's CPU arithmetic does).

    The magnitude s.eem without its sign is three bits "eem"; shifted to bit 22 they are already the two low exponent bits
    and the top mantissa bit of a float, and the scale is added to the exponent. Code 1 (0.5) is the one denormal of E2M1.
    """
    pair = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1)  # low nibble first
    code = pair.reshape(*scales.shape, BLOCK).astype(jnp.int32)
    magnitude, sign = code & 7, (code & 8) << 28
    scale = scales.astype(jnp.int32)[..., None]
    above = jnp.where(magnitude == 1, 0, magnitude << 22)  # 0.5 is 2^-1: no mantissa bit, one exponent less
    bits = above + ((scale - 1) << 23)
    # Exponents of 0 and less are float denormals, shifted out by hand; 255 and more are inf.
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | 0x800000
    bits = jnp.where(exponent <= 0, significand >> jnp.clip(1 - exponent, 0, 31), bits)
    bits = jnp.where(exponent >= 255, 0x7F800000, bits)
    bits = jnp.where(magnitude == 0, 0, bits)
    bits = jnp.where(scale == NAN_SCALE, 0x7FC00000, bits | sign)
    values = bits.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if jnp.dtype(dtype) == jnp.bfloat16:  # a narrowing of the bits, not of the value: nothing below bit 22 - 2 is set
        return lax.bitcast_convert_type((values >> 16).astype(jnp.int16), jnp.bfloat16)
    return lax.bitcast_convert_type(values, jnp.float32).astype(dtype)


def encode(
    values: Float[np.ndarray, "*rows K"],
    *,
    rule: ScaleRule,
    scales: UInt8[np.ndarray, "*rows C"] | None = None,
) -> MXFP4:
    """Packs on the host. Codes round to nearest, ties to even, saturate at 6 and keep the sign of zero.

    The scale of a block with largest magnitude m, by `rule`:
        reuse  the given `scales`: a decoded array comes back byte for byte
        floor  2^(floor(log2 m) - 2), the OCP rule; m may saturate
        even   the same after rounding m to one mantissa bit, ties to even: less saturates
        up     the smallest power of two with m <= 6 * scale: nothing saturates

    Raises:
        UserError: NaN or inf, a last axis that is no multiple of 32, or scales missing or not wanted.
    """
    if rule not in get_args(ScaleRule):
        raise UserError(f"scale rule {rule!r} is unknown; there are {', '.join(get_args(ScaleRule))}")
    if (rule == "reuse") != (scales is not None):
        raise UserError(f"scale rule {rule!r} with scales={'given' if scales is not None else None}: only 'reuse' has them")
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
    scaled = np.ldexp(blocked, 127 - scales.astype(np.int32)[..., None])
    scaled = np.clip(scaled, -LARGEST_CODE, LARGEST_CODE)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    return MXFP4(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


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


def _scales(largest: Float[np.ndarray, "*rows C"], rule: ScaleRule) -> UInt8[np.ndarray, "*rows C"]:
    """The scale bytes for each block's largest magnitude; a block of zeros gets the smallest scale."""
    fraction, exponent = np.frexp(largest)  # largest = fraction * 2^exponent, fraction in [0.5, 1)
    log2 = exponent - 1
    if rule == "even":
        log2 = log2 + (fraction >= 0.875)  # 1.75 and more rounds to 2 (1.75 is the tie between 1.5 and 2; 2 is even)
    if rule == "up":
        log2 = log2 + (fraction > 0.75)  # 6 = 1.5 * 2^2
    return np.where(largest > 0, np.clip(log2 - 2 + 127, 0, 254), 0).astype(np.uint8)
