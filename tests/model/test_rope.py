"""Rotary embedding against the numbers of the release and float64, over all 131,072 positions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model.config import RopeConfig
from gptoss_jax.model.rope import concentration, frequencies, rotate
from tests import oracle
from tests.tiny import TINY

RELEASE = RopeConfig(theta=150000.0, factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0)
PLAIN = dataclasses.replace(RELEASE, factor=1.0)
POSITIONS = np.array([0, 1, 2, 127, 128, 4095, 4096, 4097, 5000, 32768, 99999, 131071])


def tables(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    return oracle.rope_tables(TINY.to_hf(mxfp4=True) | {"head_dim": head_dim}, POSITIONS)


def test_the_range_of_the_ramp_is_the_releases():
    """Its ends are found again from the frequencies: the share that is slowed grows in a line between them."""
    fast, found = 150000.0 ** -(np.arange(32) / 32), frequencies(RELEASE, 64)
    slowed = (fast - found) / (fast - fast / 32)
    np.testing.assert_allclose(slowed[:9], 0, atol=1e-12)
    np.testing.assert_allclose(slowed[18:], 1, atol=1e-12)
    slope = np.diff(slowed[9:18])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-9)
    low = 9 - slowed[9] / slope[0]
    assert low == pytest.approx(8.0928, abs=5e-5)
    assert low + 1 / slope[0] == pytest.approx(17.398, abs=5e-4)


def test_concentration_is_the_releases():
    assert concentration(RELEASE) == pytest.approx(1.3466, abs=5e-5)
    assert concentration(PLAIN) == 1


def test_factor_one_is_plain_rope():
    np.testing.assert_allclose(frequencies(PLAIN, 16), 150000.0 ** -(np.arange(8) / 8), rtol=1e-15)


@pytest.mark.parametrize("head_dim", [16, 22, 64])
def test_rotate_agrees_with_float64_at_every_length(head_dim: int):
    x = np.random.default_rng(0).standard_normal((1, len(POSITIONS), 3, head_dim)).astype(np.float32)
    out = np.asarray(rotate(jnp.asarray(x), jnp.asarray(POSITIONS)[None], RELEASE))
    expected = oracle.rotate(x.astype(np.float64), *tables(head_dim))
    # An angle is a rounded product of a rounded frequency, wrong by up to 2 parts in 2^24. So are cos and sin, plus
    # their own rounding, and both halves of x bear it.
    angle_error = POSITIONS[:, None] * frequencies(RELEASE, head_dim) * 2.0**-23 + 1e-6
    bound = concentration(RELEASE) * np.abs(x).max() * 2 * np.tile(angle_error, 2)
    assert (np.abs(out - expected) <= bound[None, :, None]).all()


def test_halves_are_turned_not_neighbours():
    """The pair (i, i + H/2) turns by its own angle: one unit in the first half leaks into the second only."""
    unit = jnp.zeros((1, 1, 1, 16)).at[..., 3].set(1.0)
    angle = 11 * frequencies(PLAIN, 16)[3]
    out = np.asarray(rotate(unit, jnp.full((1, 1), 11), PLAIN))[0, 0, 0]
    assert np.flatnonzero(out).tolist() == [3, 11]
    np.testing.assert_allclose(out[[3, 11]], [math.cos(angle), math.sin(angle)], atol=1e-6)


def test_only_the_distance_counts():
    """Scores of rotated queries and keys, each row moved far along: what lets a cache keep rotated keys."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((2, 5, 1, 16)), jnp.float32) for _ in range(2))
    scores = []
    for start in (0, 1000):
        positions = jnp.asarray([[0], [17]]) + start + jnp.arange(5)
        turned = [rotate(x, positions, RELEASE)[:, :, 0] for x in (q, k)]
        scores.append(np.einsum("bth,bsh->bts", *map(np.asarray, turned)))
    # Angles near 1,000 are known to 2^-14, and the scores are sums of 16 products of order one.
    np.testing.assert_allclose(scores[0], scores[1], atol=16 * 2.0**-14)


def test_bfloat16_is_turned_in_float32():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, len(POSITIONS), 3, 16)), jnp.bfloat16)
    positions = jnp.asarray(POSITIONS)[None]
    out = rotate(x, positions, RELEASE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rotate(x.astype(jnp.float32), positions, RELEASE).astype(jnp.bfloat16))
