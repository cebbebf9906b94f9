"""Matrix products of token groups with one expert each, whose weights may be packed. One door: `moe_matmul`.

Differentiated here: whatever ran forward, backward.py goes back. xla.py is the readable reference that the other
implementations are judged by; choose.py lists them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels.choose import function, layout
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.moe_matmul import backward
from gptoss_jax.kernels.moe_matmul.xla import Weight
from gptoss_jax.kernels.mxfp4 import MXFP4

__all__ = ["moe_matmul"]


def moe_matmul(
    x: Float[Array, "M I"],
    weight: Weight,
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
    impl: str = "xla",
    device_kind: str | None = None,
) -> Float[Array, "M O"]:
    """x[rows of group e] · weight[e]ᵀ + bias[e] for each expert e, accumulated in float32; then swiglu, if asked for.

    Args:
        x: rows sorted by expert; the first group_sizes[0] belong to expert 0, and so on.
        weight: one matrix for each expert, packed or plain, in `choose.layout(impl)`; only those of experts with rows
            are read. The outputs with swiglu are gate and up of each of F units.

                          rows: MXFP4 or plain    columns: Columns or plain
            product       [E, O, I]               [E, I, O]
            swiglu        [E, F, 2, I]            [E, 2, I, F]
        bias: [E, O], or with swiglu [E, F, 2], in either layout; added once to each row.
        group_sizes: rows of each expert; their sum may be less than M.
        swiglu_limit: where swiglu cuts gate and up; None is the product alone.
        expected_rows: how many rows have an expert on average; None is all. It sizes tiles, and changes no result.
        impl: a name of `choose`, resolved. "xla" takes Columns too.
        device_kind: whose block sizes are taken, where kernels/tuned has them.

    Returns:
        float32 [M, O], or swiglu of the float32 sums [M, F] in x's dtype. Rows past the last group are zero.

    Raises:
        Unsupported: packed weights lie in another layout than the implementation reads.
    """
    _check_layout(weight, impl)
    if not x.shape[0]:  # no kernel has a grid of nothing
        return jnp.zeros((0, bias.shape[1]), jnp.float32 if swiglu_limit is None else x.dtype)
    return _moe_matmul(x, weight, bias, group_sizes, swiglu_limit, expected_rows, impl, device_kind)


def _check_layout(weight: Weight, impl: str) -> None:
    wrong = MXFP4 if layout(impl) == "columns" else Columns
    if impl != "xla" and isinstance(weight, wrong):
        raise Unsupported(
            f"moe_matmul's implementation {impl!r} reads packed weights in {layout(impl)}, these are {wrong.__name__}: "
            "transform them when they are loaded, or choose 'xla'"
        )


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _moe_matmul(
    x: Array,
    weight: Weight,
    bias: Array,
    group_sizes: Array,
    swiglu_limit: float | None,
    expected_rows: int | None,
    impl: str,
    device_kind: str | None,
) -> Array:
    found = function("moe_matmul", "moe_matmul", impl, device_kind=device_kind)
    return found(x, weight, bias, group_sizes, swiglu_limit=swiglu_limit, expected_rows=expected_rows)


def _forward(*operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return _moe_matmul(*operands), operands[:4]


def _backward(
    swiglu_limit: float | None,
    expected_rows: int | None,
    impl: str,
    device_kind: str | None,
    saved: tuple[Any, ...],
    d_out: Array,
) -> tuple[Any, ...]:
    x, weight, bias, group_sizes = saved
    settings: dict[str, Any] = {"swiglu_limit": swiglu_limit, "expected_rows": expected_rows, "plain": layout(impl)}
    return (*backward.moe_matmul(x, weight, bias, group_sizes, d_out, **settings), None)


_moe_matmul.defvjp(_forward, _backward)
