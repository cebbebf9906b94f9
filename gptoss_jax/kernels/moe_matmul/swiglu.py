"""The clamped swiglu of gpt-oss, in plain jnp. Knows gate and up; knows no experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SLOPE = 1.702  # sigmoid(1.702 x) x approximates GELU; a constant of the trained models


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], limit: float) -> Float[Array, "*rows F"]:
    """gate · sigmoid(1.702 gate) · (up + 1), with gate at most `limit` and up within ± `limit`.

    A value at the limit or past it has no gradient; NaN stays NaN. jnp.minimum would give half the gradient at the
    limit itself, which bfloat16 sums do reach.
    """
    gate = jnp.where(gate >= limit, limit, gate)
    up = jnp.where(up >= limit, limit, jnp.where(up <= -limit, -limit, up))
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)
