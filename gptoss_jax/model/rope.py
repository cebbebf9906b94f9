"""Rotary position embedding with YaRN scaling. Knows positions and head dims; knows no attention."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.model.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of dimensions, float64 [head_dim / 2].

    YaRN (arXiv:2309.00071, section 3.2) keeps the fast pairs, divides the slow ones by `factor`, and ramps between.
    The ramp's ends are real numbers: rounding them (low 8.0928 -> 8, high 17.398 -> 18 for head_dim 64) is
    `truncate: true`, which gpt-oss was not trained with; it shows only past `original_context`. Ends past the pairs are
    clamped as `transformers` does.
    """
    pairs = head_dim // 2
    fast = rope.theta ** -(np.arange(pairs, dtype=np.float64) / pairs)
    if rope.factor == 1.0:
        return fast
    low = max(_pair_turning(rope, pairs, turns=rope.beta_fast), 0.0)
    high = max(min(_pair_turning(rope, pairs, turns=rope.beta_slow), head_dim - 1.0), low + 0.001)
    ramp = np.clip((np.arange(pairs) - low) / (high - low), 0.0, 1.0)
    return fast / rope.factor * ramp + fast * (1.0 - ramp)


def concentration(rope: RopeConfig) -> float:
    """What multiplies cos and sin: 0.1 ln(factor) + 1, which is 1.3466 for factor 32."""
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0


def rotate(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], rope: RopeConfig
) -> Float[Array, "B T heads H"]:
    """Turns the pair (x[i], x[i + H/2]) by positions * frequency[i]; float32 inside, x's dtype outside.

    Halves are paired, not neighbours. Angles are products of two float32, as in both references.
    """
    scale = concentration(rope)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(rope, x.shape[-1]), jnp.float32)
    cos = (jnp.cos(angles) * scale)[:, :, None, :]
    sin = (jnp.sin(angles) * scale)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _pair_turning(rope: RopeConfig, pairs: int, *, turns: float) -> float:
    """The (real-valued) index of the pair that makes `turns` full turns over the original context."""
    return pairs * math.log(rope.original_context / (turns * 2 * math.pi)) / math.log(rope.theta)
