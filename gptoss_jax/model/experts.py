"""The experts' matrices and where their bytes lie, in either layout. Knows logical axes; knows no routing.

layout     gate and up                  down
rows       [E, F, 2, D]   as released   [E, D, F]    the inputs of a row lie together: CPU and GPU
columns    [E, 2, D, F]                 [E, F, D]    the outputs of an input lie together: TPU
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.choose import Layout
from gptoss_jax.kernels.columns import Columns, columns_codes, columns_scales
from gptoss_jax.kernels.moe_matmul.adapted import Adapted
from gptoss_jax.kernels.mxfp4 import BLOCK, MXFP4
from gptoss_jax.model.layers import Init, LowRank, declare, fan_in
from gptoss_jax.sharding import WHOLE, Axes, Placement, partition


class ExpertLinear(nnx.Module):
    """One matrix [*outputs, inputs] and bias per expert, packed in MXFP4 along the inputs, or plain."""

    def __init__(
        self,
        num_experts: int,
        outputs: tuple[int, ...],
        inputs: int,
        *,
        axes: tuple[Axes, str],
        packed: bool,
        layout: Layout,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
    ):
        output_axes, input_axis = axes
        rows, row_axes = (num_experts, *outputs), ("experts", *output_axes)
        self.packed = packed
        self.layout: Layout = layout
        self.adapter: LowRank | None = nnx.data(None)
        self.merged = False  # see adapter.attach

        def make(shape: tuple[int, ...], axes: Axes, kind: str, *, dtype: DTypeLike, init: Init) -> nnx.Param:
            parameter = declare(rngs, shape, axes, dtype=dtype, init=init, placement=placement)
            if layout == "rows":
                return parameter
            turned = axes_in_columns(kind, axes)
            return nnx.Param(placement.lay(in_columns(kind, parameter[...]), turned), axes=turned)

        zeros = nnx.initializers.zeros_init()
        self.bias = declare(rngs, rows, row_axes, dtype=dtype, init=zeros, placement=placement)
        if not packed:
            self.weight = make((*rows, inputs), (*row_axes, input_axis), "weight", dtype=dtype, init=fan_in(inputs))
            return
        if inputs % BLOCK:
            raise UserError(
                f"{input_axis}={inputs} is no multiple of {BLOCK}: MXFP4 packs whole blocks; use bf16 experts"
            )
        block_axes = (*row_axes, f"{input_axis}_blocks")
        shape = (*rows, inputs // BLOCK)
        codes = (*shape, BLOCK // 2)
        self.blocks = make(codes, (*block_axes, None), "blocks", dtype=jnp.uint8, init=_random_codes)
        self.scales = make(shape, block_axes, "scales", dtype=jnp.uint8, init=_scales_for(inputs))

    def arrays(self) -> tuple[MXFP4 | Columns | Array | Adapted, Array]:
        """All experts' matrices, as the layout has them and with what adapters add, and their biases [E, *outputs]."""
        return self._matrix(lambda parameter: parameter[...]), self.bias[...]

    def specs(self) -> tuple[Any, P]:
        """Where the arrays lie on a mesh: specs in their places."""

        def spec(parameter: nnx.Param) -> P:
            return partition(parameter.get_metadata()["axes"])

        return self._matrix(spec), spec(self.bias)

    def _matrix(self, of: Callable[[nnx.Param], Any]) -> Any:
        weight = self._weight(of)
        if self.adapter is None:
            return weight
        return Adapted(weight, of(self.adapter.a), of(self.adapter.b), self.adapter.ranks, self.merged)

    def _weight(self, of: Callable[[nnx.Param], Any]) -> Any:
        if not self.packed:
            return of(self.weight)
        kind = MXFP4 if self.layout == "rows" else Columns
        return kind(of(self.blocks), of(self.scales))


def is_expert_matrix(parameter: str) -> bool:
    """Whether the parameter of this path is laid out by `Layout`."""
    *_, linear, kind = parameter.split(".")
    return linear in ("gate_up", "down") and kind != "bias"


def in_columns(kind: str, array: Array) -> Array:
    """A "blocks", "scales" or "weight" parameter of the rows layout in the layout of columns; no bit is lost.

    Of [E, F, 2, …] gate and up come apart as [E, 2, F, …] before inputs and outputs change places.
    """
    if array.ndim == (5 if kind == "blocks" else 4):
        array = jnp.swapaxes(array, 1, 2)
    if kind == "blocks":
        return jnp.asarray(columns_codes(array))
    return jnp.asarray(columns_scales(array)) if kind == "scales" else jnp.swapaxes(array, -1, -2)


def axes_in_columns(kind: str, axes: Axes) -> Axes:
    """The logical axes of what `in_columns` gives."""
    experts, *outputs, inputs = axes[:-1] if kind == "blocks" else axes
    return (experts, *outputs[1:], inputs, outputs[0])


def _random_codes(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.bits(key, shape, dtype)


def _scales_for(inputs: int) -> Init:
    """The scale at which random codes, whose root mean square is 2.9, have variance of about 1/inputs."""
    exponent = round(-math.log2(2.9 * inputs**0.5))
    return nnx.initializers.constant(127 + exponent)
