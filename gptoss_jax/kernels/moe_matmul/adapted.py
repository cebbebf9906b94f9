"""The grouped matmul of a weight with an adapter: a thin product beside the packed one. Knows arrays; knows no routing.

The weight stays as it lies; what is added comes before the swiglu, which is therefore not the kernel's here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.choose import layout
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.low_rank import only_own
from gptoss_jax.kernels.moe_matmul import moe_matmul
from gptoss_jax.kernels.moe_matmul.merged import merged_matmul
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.moe_matmul.xla import Weight
from gptoss_jax.kernels.mxfp4 import MXFP4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Every expert's weight and what adapters add to it. Also a tree of PartitionSpecs in their places.

    Attributes:
        weight: as `moe_matmul` takes it.
        a: [E, R, I].
        b: [E, *outputs, R], in rows whatever the weight's layout.
        ranks: how many of R each adapter has, see low_rank.py.
        merged: the product is that of weight + b · a as MXFP4 on the weight's scales would hold it: see merged.py.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    weight: Any
    a: Any
    b: Any
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    merged: bool = dataclasses.field(default=False, metadata={"static": True})


def adapted_matmul(
    x: Float[Array, "M I"],
    weight: Weight | Adapted,
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    adapter: Int[Array, " M"] | None = None,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
    impl: str = "xla",
    device_kind: str | None = None,
) -> Float[Array, "M O"]:
    """`moe_matmul` with what the adapters of each row add to the sums: b[e] · (a[e] · x).

    Args as there, and:
        adapter: which of several adapters each row takes, -1 none; None is all.
    """
    settings: dict[str, Any] = {"expected_rows": expected_rows, "impl": impl, "device_kind": device_kind}
    if not isinstance(weight, Adapted):
        return moe_matmul(x, weight, bias, group_sizes, swiglu_limit=swiglu_limit, **settings)
    if weight.merged:
        assert adapter is None, "merged weights are one adapter's, for every row"
        operands = (weight.weight, weight.a, weight.b)
        return merged_matmul(x, *operands, bias, group_sizes, swiglu_limit=swiglu_limit, expected_rows=expected_rows)
    added = _added(x, weight, group_sizes, adapter=adapter, expected_rows=expected_rows)
    if swiglu_limit is None:
        return moe_matmul(x, weight.weight, bias, group_sizes, **settings) + added
    gate, up = _gate_up(x, weight.weight, bias, group_sizes, settings)
    added = added.reshape(*gate.shape, 2)
    return swiglu(gate + added[..., 0], up + added[..., 1], swiglu_limit).astype(x.dtype)


def _added(
    x: Float[Array, "M I"],
    adapted: Adapted,
    group_sizes: Int[Array, " E"],
    *,
    adapter: Int[Array, " M"] | None,
    expected_rows: int | None,
) -> Float[Array, "M O"]:
    def product(x: Array, matrices: Float[Array, "E O I"]) -> Float[Array, "M O"]:
        no_bias = jnp.zeros(matrices.shape[:2], x.dtype)
        return moe_matmul(x, matrices, no_bias, group_sizes, expected_rows=expected_rows)

    h = only_own(product(x, adapted.a), adapted.ranks, adapter)
    return product(h.astype(x.dtype), adapted.b.reshape(len(adapted.b), -1, adapted.b.shape[-1]))


def _gate_up(
    x: Float[Array, "M I"],
    weight: Weight,
    bias: Float[Array, "E F 2"],
    group_sizes: Int[Array, " E"],
    settings: dict[str, Any],
) -> tuple[Float[Array, "M F"], Float[Array, "M F"]]:
    """The float32 sums of both. Of columns gate and up are matrices of their own, [E, 2, I, F]; of rows they mix."""
    if isinstance(weight, Columns) or layout(settings["impl"]) == "columns":
        halves = (moe_matmul(x, weight[:, i], bias[..., i], group_sizes, **settings) for i in range(2))
        gate, up = halves
        return gate, up
    experts = len(bias)
    if isinstance(weight, MXFP4):
        matrices: Weight = weight.reshape_rows(experts, -1)
    else:
        matrices = weight.reshape(experts, -1, weight.shape[-1])
    sums = moe_matmul(x, matrices, bias.reshape(experts, -1), group_sizes, **settings)
    sums = sums.reshape(len(x), -1, 2)
    return sums[..., 0], sums[..., 1]
