"""Fake quantisation, and the codec on devices, bit for bit against the codec on the host; gradients against a rule."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.fake_quantise import fake_quantise
from gptoss_jax.kernels.mxfp4 import MXFP4, ScaleRule, encode, encode_on_device, refuse_nan_scales

NEW_SCALES: tuple[ScaleRule, ...] = ("even", "floor", "up")
quantised = jax.jit(fake_quantise, static_argnames="rule")
encoded = jax.jit(encode_on_device, static_argnames="rule")


def bits(values: np.ndarray | jax.Array) -> np.ndarray:
    """A comparison of values calls -0 and 0 equal, and may take a denormal for zero."""
    values = np.asarray(values)
    return values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint32)


def assert_as_on_the_host(values: np.ndarray, *, rule: ScaleRule, scales: np.ndarray | None = None) -> None:
    expected = encode(values, rule=rule, scales=scales)
    packed = encoded(values, rule=rule, scales=scales)
    np.testing.assert_array_equal(packed.scales, expected.scales)
    np.testing.assert_array_equal(packed.blocks, expected.blocks)
    found = quantised(values, rule=rule, scales=scales)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(bits(found), bits(expected.decode(values.dtype)))


# ---- values ----------------------------------------------------------------------------------------------------------


def values_at_ties(dtype) -> np.ndarray:
    """On, just below and just above every tie between two codes and between two scales, from 2^-140 to 2^124."""
    ties = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7], np.float32).astype(dtype)
    raw = bits(ties)
    near = np.concatenate([raw, raw + 1, np.maximum(raw, 1) - 1]).astype(raw.dtype).view(dtype)
    rng = np.random.default_rng(0)
    exponents = rng.integers(-140, 122, size=(300, 3, 1))
    chosen = rng.choice(np.concatenate([near, -near]), size=(300, 3, 32)).astype(np.float64)
    return np.ldexp(chosen, exponents).astype(dtype).reshape(300, 96)


@pytest.mark.parametrize("rule", NEW_SCALES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bf16"])
def test_near_ties_as_on_the_host(dtype, rule: ScaleRule):
    assert_as_on_the_host(values_at_ties(dtype), rule=rule)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bf16"])
def test_kept_scales_as_on_the_host(dtype):
    """Scales that have nothing to do with the values: most saturate or become a zero."""
    values, rng = values_at_ties(dtype), np.random.default_rng(1)
    near = encode(values, rule="even").scales.astype(int) + rng.integers(-3, 4, size=(300, 3))
    scales = np.clip(near, 0, 254).astype(np.uint8)
    scales[:100] = rng.integers(255, size=(100, 3))
    assert_as_on_the_host(values, rule="reuse", scales=scales)


any_bits = st_np.arrays(np.uint32, (4, 64), elements=st.integers(0, 2**32 - 1))


@given(raw=any_bits, scales=st_np.arrays(np.uint8, (4, 2), elements=st.integers(0, 254)))
def test_any_floats_as_on_the_host(raw: np.ndarray, scales: np.ndarray):
    values = raw.view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(-0.0))
    assert_as_on_the_host(values, rule="reuse", scales=scales)
    assert_as_on_the_host(values, rule="even")


def test_what_the_grid_holds_comes_back_bit_for_bit():
    """Every byte under every scale whose values are finite: also -0, also where all values are denormal."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (253, 16, 16))
    scales = np.broadcast_to(np.arange(253, dtype=np.uint8)[:, None], (253, 16))
    for dtype in (jnp.float32, jnp.bfloat16):
        values = MXFP4(blocks, scales).decode(dtype)
        np.testing.assert_array_equal(bits(quantised(values, scales=scales)), bits(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bad: float):
    """The host refuses it; on a device the export is the first that can, by the scale."""
    values = np.ones((2, 96), np.float32)
    values[1, 40] = bad
    for scales in (None, np.full((2, 3), 127, np.uint8)):
        found = np.asarray(quantised(values, scales=scales)).reshape(2, 3, 32)
        assert np.isnan(found[1, 1]).all()
        assert np.isnan(found).sum() == 32
    with pytest.raises(UserError, match=r"scale byte 255 \(NaN\) at \(1, 1\)"):
        refuse_nan_scales(np.asarray(encoded(values, rule="even").scales), name="trained")


# ---- the gradient ----------------------------------------------------------------------------------------------------


def gradient(values: jax.Array, d_out: jax.Array, **settings) -> np.ndarray:
    _, back = jax.vjp(functools.partial(quantised, **settings), values)
    return np.asarray(back(d_out)[0])


def test_the_gradient_by_hand():
    """It ends where the next code would begin, were there one: at 7, and not at the last code's own 6."""
    values = np.zeros((1, 32), np.float32)
    values[0, :9] = [0.1, -0.0, 5.0, 6.0, 6.9, -6.9, 7.0, -7.0, 1e30]
    d_out = np.arange(1.0, 33.0, dtype=np.float32)[None]
    expected = d_out.copy()
    expected[0, 6:9] = 0
    scales = np.full((1, 1), 127, np.uint8)
    np.testing.assert_array_equal(gradient(jnp.asarray(values), jnp.asarray(d_out), scales=scales), expected)


@pytest.mark.parametrize("rule", NEW_SCALES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_new_scales_leave_no_weight_without_a_gradient(dtype, rule: ScaleRule):
    """But for "floor", whose largest values lie up to 8 * scale."""
    values = np.random.default_rng(2).standard_normal((500, 64)).astype(dtype)
    d_out = np.random.default_rng(3).standard_normal((500, 64)).astype(dtype)
    scales = encode(values, rule=rule).scales.astype(int)
    largest = np.repeat(np.ldexp(7.0, scales - 127), 32, axis=-1)
    expected = np.where(np.abs(values.astype(np.float64)) < largest, d_out, 0)
    found = gradient(jnp.asarray(values), jnp.asarray(d_out), rule=rule)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert (expected == 0).any() == (rule == "floor")


def test_a_weight_learns_its_way_to_another_code():
    """Plain descent on |q(w) - target|²/2 from one end of the grid to the other, and no further."""
    targets = np.linspace(-6.4, 6.4, 32, dtype=np.float32)[None]
    scales = jnp.full((1, 1), 127, jnp.uint8)

    def loss(values: jax.Array) -> jax.Array:
        return jnp.sum((fake_quantise(values, scales=scales) - targets) ** 2) / 2

    values, gradient = -jnp.asarray(targets), jax.jit(jax.grad(loss))
    for _ in range(200):
        values = values - 0.1 * gradient(values)
    distance = np.abs(np.asarray(quantised(values, scales=scales)) - targets)
    gaps = np.where(np.abs(targets) > 4, 2, np.where(np.abs(targets) > 2, 1, 0.5))
    assert (distance <= gaps).all()  # to one of the two codes around: between them it goes back and forth
    assert np.abs(values).max() < 7.5


# ---- on a mesh -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [P("x", "y"), P(None, ("x", "y"))], ids=str)
def test_nothing_travels_between_devices(spec: P):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.random.default_rng(4).standard_normal((6, 8 * 32)).astype(np.float32)
    lying = jax.device_put(values, NamedSharding(mesh, spec))
    back = jax.jit(jax.value_and_grad(lambda values: fake_quantise(values).sum()))
    program = jax.jit(lambda values: jax.vjp(fake_quantise, values)[1](values)).lower(lying).compile().as_text()
    assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", program)
    found = quantised(lying)
    assert found.sharding.is_equivalent_to(lying.sharding, 2)
    np.testing.assert_array_equal(found, quantised(values))
    assert back(lying)[1].sharding.is_equivalent_to(lying.sharding, 2)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refuses_what_does_not_fit_together():
    values = jnp.zeros((3, 64))
    with pytest.raises(UserError, match="last axis is 63, no multiple of 32"):
        fake_quantise(values[:, :63])
    with pytest.raises(UserError, match=r"scales have shape \(3, 1\), the blocks of the values need \(3, 2\)"):
        fake_quantise(values, scales=jnp.zeros((3, 1), jnp.uint8))
    with pytest.raises(UserError, match="'reuse' needs them"):
        fake_quantise(values, rule="reuse")
    with pytest.raises(UserError, match="'up' was given some"):
        encode_on_device(values, rule="up", scales=jnp.zeros((3, 2), jnp.uint8))
