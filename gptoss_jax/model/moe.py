"""The mixture of experts of one layer: router, dispatch, expert MLP. Knows the experts' mesh axes, no attention."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.moe_matmul import moe_matmul
from gptoss_jax.kernels.mxfp4 import BLOCK, MXFP4
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Axes, Init, Linear, declare, fan_in
from gptoss_jax.sharding import partition, row_axis

SWIGLU_SLOPE = 1.702  # sigmoid(1.702 x) x approximates GELU; a constant of the trained models


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
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        output_axes, input_axis = axes
        rows, row_axes = (num_experts, *outputs), ("experts", *output_axes)
        self.bias = declare(rngs, rows, row_axes, dtype=dtype, init=nnx.initializers.zeros_init())
        self.packed = packed
        if not packed:
            self.weight = declare(rngs, (*rows, inputs), (*row_axes, input_axis), dtype=dtype, init=fan_in(inputs))
            return
        if inputs % BLOCK:
            raise UserError(
                f"{input_axis}={inputs} is no multiple of {BLOCK}: MXFP4 packs whole blocks; use bf16 experts"
            )
        block_axes = (*row_axes, f"{input_axis}_blocks")
        shape = (*rows, inputs // BLOCK)
        self.blocks = declare(rngs, (*shape, BLOCK // 2), (*block_axes, None), dtype=jnp.uint8, init=_random_codes)
        self.scales = declare(rngs, shape, block_axes, dtype=jnp.uint8, init=_scales_for(inputs))

    def matrix(self) -> MXFP4 | Array:
        """[E, *outputs, inputs]"""
        return MXFP4(self.blocks[...], self.scales[...]) if self.packed else self.weight[...]


class MoE(nnx.Module):
    """Every token visits its `experts_per_token` best experts; none is dropped."""

    def __init__(self, config: ModelConfig, *, packed: bool, mesh: Mesh | None, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, width, expert_width = config.num_experts, config.width, config.expert_width
        self.router = Linear((experts,), (width,), axes=("router_experts", "width"), dtype=dtype, rngs=rngs)
        kwargs = {"packed": packed, "dtype": dtype, "rngs": rngs}
        gate_up_axes, down_axes = (("expert_width", "gate_up"), "width"), (("width",), "expert_width")
        self.gate_up = ExpertLinear(experts, (expert_width, 2), width, axes=gate_up_axes, **kwargs)
        self.down = ExpertLinear(experts, (width,), expert_width, axes=down_axes, **kwargs)
        self.experts_per_token = config.experts_per_token
        self.limit = config.swiglu_limit
        self.mesh = mesh

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Routes by float32 logits: rounding them to bfloat16 would send tokens to other experts at near-ties."""
        logits = self.router(x, out_dtype=jnp.float32)
        experts = (self.gate_up.matrix(), self.gate_up.bias[...], self.down.matrix(), self.down.bias[...])

        def mix(x: Array, logits: Array, *experts: Any, **shard: Any) -> Array:
            return mix_experts(x, *route(logits, self.experts_per_token), *experts, limit=self.limit, **shard)

        if self.mesh is None:
            return mix(x, logits, *experts, first_expert=0, adds_down_bias=True)
        return _on_mesh(mix, self.mesh, num_rows=x.shape[0])(x, logits, *experts)


def route(logits: Float[Array, "B T E"], experts_per_token: int) -> tuple[Int[Array, "B T X"], Float[Array, "B T X"]]:
    """The best experts of each token, and the softmax over their logits only (after the choice, not before)."""
    best, chosen = lax.top_k(logits, experts_per_token)
    return chosen, jax.nn.softmax(best, axis=-1)


def swiglu(gate_up: Float[Array, "M F 2"], limit: float) -> Float[Array, "M F"]:
    """gate sigmoid(1.702 gate) (up + 1), gate at most `limit`, up within ± `limit`; in the release they alternate."""
    gate = jnp.minimum(gate_up[..., 0], limit)
    up = jnp.clip(gate_up[..., 1], -limit, limit)
    return gate * jax.nn.sigmoid(SWIGLU_SLOPE * gate) * (up + 1)


def mix_experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T X"],
    weights: Float[Array, "B T X"],
    gate_up: MXFP4 | Array,
    gate_up_bias: Float[Array, "E F 2"],
    down: MXFP4 | Array,
    down_bias: Float[Array, "E D"],
    *,
    limit: float,
    first_expert: Int[Array, ""] | int,
    adds_down_bias: Array | bool,
) -> Float[Array, "B T D"]:
    """The weighted sum of the visited experts among those given, which are first_expert, first_expert + 1, …

    Visits to other experts count nothing here, so the sum over shards of experts is the whole. The down projection of a
    shard of the expert width is a part of a sum too: only one shard adds its bias.
    """
    num_experts, expert_width = gate_up_bias.shape[:2]
    width, visits = x.shape[-1], chosen.shape[-1]
    local = chosen.reshape(-1) - first_expert
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)  # foreign visits sort behind
    order = jnp.argsort(local, stable=True)
    group_sizes = jnp.bincount(local, length=num_experts)
    rows = x.reshape(-1, width)[order // visits]

    hidden = moe_matmul(rows, _as_rows(gate_up, 2 * expert_width), gate_up_bias.reshape(num_experts, -1), group_sizes)
    hidden = swiglu(hidden.reshape(-1, expert_width, 2), limit).astype(x.dtype)
    bias = jnp.where(adds_down_bias, down_bias, jnp.zeros_like(down_bias))
    out = moe_matmul(hidden, down, bias, group_sizes)

    by_visit = jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, width)
    return jnp.einsum("btx,btxd->btd", weights, by_visit).astype(x.dtype)


def _on_mesh(mix: Callable[..., Array], mesh: Mesh, *, num_rows: int) -> Callable[..., Array]:
    """`mix` where each device takes its rows to its own experts and width; one sum over both brings them together.

    The choice of experts is made inside: outside XLA gathers the rows of all devices before a top_k.
    """
    rows = P(row_axis(num_rows, mesh))

    def local(x: Array, logits: Array, *experts: MXFP4 | Array) -> Array:
        down_bias = experts[-1]
        first = lax.axis_index("expert") * down_bias.shape[0]
        first_width_shard = lax.axis_index("tensor") == 0
        out = mix(x, logits, *experts, first_expert=first, adds_down_bias=first_width_shard)
        return lax.psum(out.astype(jnp.float32), ("expert", "tensor")).astype(x.dtype)

    gate_up, down = partition(("experts", "expert_width")), partition(("experts", None, "expert_width"))
    experts = partition(("experts",))
    in_specs = (rows, rows, gate_up, gate_up, down, experts)
    # The sums of a loop with a number of steps that differs by device have no replication rule to check.
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)


def _as_rows(matrix: MXFP4 | Array, outputs: int) -> MXFP4 | Array:
    """[E, F, 2, inputs] as [E, 2F, inputs]: no byte moves."""
    if isinstance(matrix, MXFP4):
        return matrix.reshape_rows(matrix.shape[0], outputs)
    return matrix.reshape(matrix.shape[0], outputs, -1)


def _random_codes(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.bits(key, shape, dtype)


def _scales_for(inputs: int) -> Init:
    """The scale at which random codes, whose root mean square is 2.9, have variance of about 1/inputs."""
    exponent = round(-math.log2(2.9 * inputs**0.5))
    return nnx.initializers.constant(127 + exponent)
