"""MXFP4 matrices with the outputs of an input side by side: the layout of the TPU kernels. Knows bytes and no model.

A TPU multiplies by matrices whose inputs lie on sublanes and whose outputs lie on lanes. Bytes are the released ones,
none changes; rows and columns of the matrix of bytes change places:

    released (rows)      codes [O, C, 16]    scales [O, C]        C = inputs / 32
    columns              codes [16C, O]      scales [C, O]

    byte row 16c + i     input 32c + 2i in the low nibble, input 32c + 2i + 1 in the high one

So a byte widened to a 32-bit word holds the two inputs that lie together in one word of bfloat16, and unpacking moves
nothing from sublane to sublane. Both conversions keep whole blocks together: a shard of blocks, outputs or leading axes
converts alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from gptoss_jax.kernels.mxfp4 import BLOCK, decode

BLOCK_BYTES = BLOCK // 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """A packed array whose logical shape is [*lead, inputs, outputs].

    The mark keeps type checkers off __init__ only: see `MXFP4`.
    """

    __no_type_check__ = True

    codes: UInt8[Array, "*lead 16*C O"] | UInt8[np.ndarray, "*lead 16*C O"]
    scales: UInt8[Array, "*lead C O"] | UInt8[np.ndarray, "*lead C O"]

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, blocks, outputs = self.scales.shape
        return (*lead, blocks * BLOCK, outputs)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> "Columns":
        """Indexes leading axes; matrices stay whole."""
        return Columns(self.codes[index], self.scales[index])

    def decode(self, dtype: DTypeLike) -> Float[Array, "*lead I O"]:
        """Every value, exactly, as `mxfp4.decode` has it."""
        by_row = decode(rows_codes(self.codes), rows_scales(self.scales), dtype)
        return jnp.swapaxes(by_row, -1, -2)


def columns_codes(
    blocks: UInt8[Array, "*lead O C 16"] | UInt8[np.ndarray, "*lead O C 16"],
) -> UInt8[Array, "*lead 16*C O"] | UInt8[np.ndarray, "*lead 16*C O"]:
    """The released blocks in columns."""
    return blocks.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


def columns_scales(
    scales: UInt8[Array, "*lead O C"] | UInt8[np.ndarray, "*lead O C"],
) -> UInt8[Array, "*lead C O"] | UInt8[np.ndarray, "*lead C O"]:
    """The released scales in columns."""
    return scales.swapaxes(-1, -2)


def rows_codes(
    codes: UInt8[Array, "*lead byte_rows O"] | UInt8[np.ndarray, "*lead byte_rows O"],
) -> UInt8[Array, "*lead O byte_rows//16 16"] | UInt8[np.ndarray, "*lead O byte_rows//16 16"]:
    """`columns_codes` undone."""
    by_row = codes.swapaxes(-1, -2)
    return by_row.reshape(*by_row.shape[:-1], -1, BLOCK_BYTES)


def rows_scales(
    scales: UInt8[Array, "*lead C O"] | UInt8[np.ndarray, "*lead C O"],
) -> UInt8[Array, "*lead O C"] | UInt8[np.ndarray, "*lead O C"]:
    """`columns_scales` undone."""
    return scales.swapaxes(-1, -2)


def placed(sharding: Sharding, *, ndim: int) -> Format:
    """Where codes and scales of so many axes are to lie, for jit's out_shardings: on a TPU, axis after axis.

    Left to itself XLA may choose other axes for sublanes and lanes, that pad less ([128, 90, 2880] has the 128 experts
    on lanes), and then rewrites all experts' bytes before each call of the kernel. Arrays placed so keep their layout
    wherever jit is given them.
    """
    return Format(Layout(tuple(range(ndim))), sharding)
