"""The small layers: a declared parameter, linear maps, RMSNorm, embedding. Knows logical axes; knows no model."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import compute_on
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.linear import matmul
from gptoss_jax.kernels.linear.int8 import BLOCK, Int8
from gptoss_jax.kernels.low_rank import low_rank
from gptoss_jax.sharding import WHOLE, Axes, Placement, row_axis

Memory = Literal["device", "host"]
Dense = Literal["bf16", "int8"]
Init = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]

_HOST = jax.memory.Space.Host
_compute_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)  # the function's name in jax 0.10


def declare(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, dtype: DTypeLike, init: Init, placement: Placement = WHOLE
) -> nnx.Param:
    """The one place where a parameter comes to be; its logical axes, one per dimension, travel with it as metadata.

    sharding.py turns the axes into a place on a mesh, convert/names.py finds the parameter by its path. `shape` is the
    released one; the parameter has the fitted one, and lies on the mesh.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(placement.lay(placement.fit(init(rngs.params(), shape, dtype), axes), axes), axes=axes)


def fan_in(size: int) -> Init:
    """Normal with variance 1/size, so that the output of a sum over `size` terms is of order one."""
    return nnx.initializers.normal(stddev=size**-0.5)


class LowRank(nnx.Module):
    """What adapters add to one weight: b · a, their ranks in a row, whose scales b has in it. See model/adapter.py."""

    def __init__(
        self,
        ranks: Sequence[int],
        *,
        a: tuple[tuple[int, ...], Axes],
        b: tuple[tuple[int, ...], Axes],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
    ):
        zeros = nnx.initializers.zeros_init()
        self.a = declare(rngs, *a, dtype=dtype, init=zeros, placement=placement)
        self.b = declare(rngs, *b, dtype=dtype, init=zeros, placement=placement)
        self.ranks = tuple(ranks)


class Linear(nnx.Module):
    """weight · x + bias, accumulated in float32. The weight lies [*outputs, *inputs], as released.

    On a CPU a matrix-vector product reads [out, in] eighteen times as fast as [in, out].

    Args:
        outputs: their sizes.
        inputs: their sizes.
        axes: of the weight; the bias has the first of them.
        dtype: of the parameters.
        dense: "int8" keeps codes [*outputs, *inputs] and scales [*outputs, C] instead of the weight.
        impl: of the product, a name of `choose`, resolved.
    """

    def __init__(
        self,
        outputs: tuple[int, ...],
        inputs: tuple[int, ...],
        *,
        axes: Axes,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
        use_bias: bool = True,
        dense: Dense = "bf16",
        impl: str = "xla",
    ):
        size, output_axes = math.prod(inputs), axes[: len(outputs)]
        make = functools.partial(declare, rngs, placement=placement)
        if dense == "bf16":
            self.weight = make((*outputs, *inputs), axes, dtype=dtype, init=fan_in(size))
        elif size % BLOCK:
            raise UserError(
                f"{size} inputs are no multiple of {BLOCK}, of which each has one scale in 8-bit weights: use dense "
                "bf16"
            )
        else:
            scales_axes = (*output_axes, None)
            self.codes = make((*outputs, *inputs), axes, dtype=jnp.int8, init=_random_codes)
            self.scales = make((*outputs, size // BLOCK), scales_axes, dtype=jnp.float32, init=_scales_for(size))
        zeros = nnx.initializers.zeros_init()
        self.bias = make(outputs, output_axes, dtype=dtype, init=zeros) if use_bias else None
        self.adapter: LowRank | None = nnx.data(None)
        self.num_inputs = len(inputs)
        self.dense: Dense = dense
        self.impl = impl

    def __call__(
        self, x: Float[Array, "..."], *, out_dtype: DTypeLike | None = None, adapter: Int[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """x [*rows, *inputs] -> [*rows, *outputs] in `out_dtype`, or in x's dtype.

        `adapter` [*rows] is which of several adapters each row takes, -1 none; None is all that are attached.
        """
        rows, inputs = x.shape[: -self.num_inputs], math.prod(x.shape[-self.num_inputs :])
        weight, outputs = self._matrix(inputs)
        flat = x.reshape(-1, inputs)
        y = matmul(flat, weight, impl=self.impl)
        if self.adapter is not None:
            y = y + _added(flat, self.adapter, None if adapter is None else adapter.reshape(-1))
        y = y.reshape(*rows, *outputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    def _matrix(self, inputs: int) -> tuple[Float[Array, "O I"] | Int8, tuple[int, ...]]:
        """The weight with its outputs in one axis and its inputs in another, and the sizes of the outputs."""
        if self.dense == "bf16":
            weight = self.weight[...]
            return weight.reshape(-1, inputs), weight.shape[: -self.num_inputs]
        codes, scales = self.codes[...], self.scales[...]
        return Int8(codes.reshape(-1, inputs), scales.reshape(-1, inputs // BLOCK)), scales.shape[:-1]


def _added(x: Float[Array, "M I"], to: LowRank, adapter: Int[Array, " M"] | None) -> Float[Array, "M O"]:
    a, b = to.a[...], to.b[...]
    return low_rank(x, a.reshape(len(a), -1), b.reshape(-1, b.shape[-1]), ranks=to.ranks, adapter=adapter)


def _random_codes(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.randint(key, shape, -127, 128).astype(dtype)


def _scales_for(size: int) -> Init:
    """With which random codes, whose root mean square is 127 / √3, have variance of 1/size."""
    return nnx.initializers.constant(3**0.5 / 127 * size**-0.5)


def check_dense(dense: str, *, num_devices: int) -> None:
    """Raises UserError for a name that is none, Unsupported for 8-bit weights on several devices."""
    if dense not in get_args(Dense):
        raise UserError(f"dense weights {dense!r} are unknown; expected one of {', '.join(get_args(Dense))}")
    if dense == "int8" and num_devices > 1:
        raise Unsupported(
            f"8-bit dense weights lie on 1 device, the mesh has {num_devices}: blocks of {BLOCK} inputs would be cut "
            "between them; choose dense bf16 there"
        )


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in x's dtype (arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, placement: Placement = WHOLE):
        ones = nnx.initializers.ones_init()
        self.scale = declare(rngs, (width,), ("width",), dtype=jnp.float32, init=ones, placement=placement)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)  # the mean of squares needs more than bf16's 8 bits
        rms = jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 / rms * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """One row of the table for each id.

    In the host's memory the table takes none of the device's (1.16 GB in the release), and each step fetches the few
    rows that it needs from there.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
        memory: Memory = "device",
    ):
        axes, normal = ("vocab", "width"), nnx.initializers.normal(1.0)
        self.weight = declare(rngs, (vocab_size, width), axes, dtype=dtype, init=normal, placement=placement)
        self.mesh = placement.mesh
        self.memory: Memory = memory
        if memory == "host" and self.mesh is not None and self.mesh.shape["tensor"] > 1:
            raise UserError(
                f"an embedding in the host's memory lies there whole, and mesh axis tensor={self.mesh.shape['tensor']} "
                "cuts it already: leave it on the devices, or choose tensor=1"
            )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.memory == "host":
            return _rows_on_host(self.weight[...], ids)
        if self.mesh is None or self.mesh.shape["tensor"] == 1:
            return self.weight[...][ids]
        # Written out, since XLA for GPUs gathers the whole table on each device where ids are few.
        rows = P(row_axis(ids.shape[0], self.mesh))
        look_up = jax.shard_map(
            _own_rows, mesh=self.mesh, in_specs=(P("tensor"), rows), out_specs=rows, check_vma=False
        )
        return look_up(self.weight[...], ids)


def _own_rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each id's row lies on one device of `tensor`; the others add zeros to it."""
    own = ids - lax.axis_index("tensor") * table.shape[0]
    is_own = (own >= 0) & (own < table.shape[0])
    return lax.psum(jnp.where(is_own[..., None], table[jnp.where(is_own, own, 0)], 0), "tensor")


def _rows_on_host(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table, ids = jax.device_put((table, ids), _HOST)
    look_up = _compute_on(lambda table, ids: table[ids], compute_type="device_host", out_memory_spaces=_HOST)
    return jax.device_put(look_up(table, ids), jax.memory.Space.Device)
