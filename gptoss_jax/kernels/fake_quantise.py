"""Values as MXFP4 would hold them, with a gradient to train by. Knows the codec; knows no weights and no optimiser.

A code does not follow its value, so that the true gradient is zero almost everywhere. It is taken as 1 where the code
would be the nearest although the grid went on past 6, with 8, and as 0 beyond, where the code is 6 whatever the value:

    |value| / scale     3       4       5       6       7       8 ...
    |code|              3  )[     4     ](      6 ...............
    gradient            1       1       1       1       )   0 ...

To cut at 6 instead is usual, but wrong for weights that were quantised before: of normal ones a quarter of the blocks
by the rule "up", and half by "floor", have a weight at 6, which would cease to learn with its first step outward. With
no cut at all, weights past the range would drift on without effect. By the rules "even" and "up" none comes there, as
the scale is made of the largest.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from gptoss_jax.kernels.mxfp4 import ScaleRule, in_blocks, nearest_codes, scales_for, values_of


def fake_quantise(
    values: Float[Array, "*rows K"], *, scales: UInt8[Array, "*rows C"] | None = None, rule: ScaleRule = "even"
) -> Float[Array, "*rows K"]:
    """What `mxfp4.encode` and then decode give, bit for bit and in the dtype of the values.

    Blocks of 32 neighbours on the last axis are each for themselves: cut between them, nothing travels.

    Args:
        values: a block that holds NaN or inf comes out as NaN.
        scales: kept ones; None makes new ones.
        rule: how they are made, see `mxfp4.encode`.

    Raises:
        UserError: a last axis that is no multiple of 32, scales of another shape, or no such rule.
    """
    return _fake_quantise(values, scales, rule if scales is None else "reuse")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_quantise(values: Array, scales: Array | None, rule: ScaleRule) -> Array:
    blocked = in_blocks(values)
    found = scales_for(blocked, rule=rule, scales=scales)
    codes, _ = nearest_codes(blocked, found)
    return values_of(codes, found, values.dtype).reshape(values.shape)


def _forward(values: Array, scales: Array | None, rule: ScaleRule) -> tuple[Array, tuple[Array, Array | None]]:
    return _fake_quantise(values, scales, rule), (values, scales)  # nothing is kept that is not there anyway


def _backward(rule: ScaleRule, saved: tuple[Array, Array | None], d_out: Array) -> tuple[Any, None]:
    values, scales = saved
    blocked = in_blocks(values)
    _, is_inside = nearest_codes(blocked, scales_for(blocked, rule=rule, scales=scales))
    return jnp.where(is_inside.reshape(values.shape), d_out, jnp.zeros_like(d_out)), None


_fake_quantise.defvjp(_forward, _backward)
