"""The dense product against NumPy in float64, plain and 8-bit; its gradients, and what packing costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import linear
from gptoss_jax.kernels.choose import implementations
from gptoss_jax.kernels.linear.int8 import Int8, pack

INPUTS, OUTPUTS = 96, 37
# Of each sum's spread: the order of a float32 sum; the products of bfloat16 are exact in it.
TOLERANCE = 1e-5
# 8-bit weights may be rounded to bfloat16 beside rows of it: by half a unit in the last of 8 bits, each of 96 terms on
# its own; the largest of some thousand sums is four of their spreads away.
ROUNDED = 4 * 2**-9

every_impl = pytest.mark.parametrize("impl", implementations("linear", platform="cpu"))
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
run = jax.jit(linear.matmul, static_argnames="impl")


def operands(num_rows: int, dtype, *, inputs: int = INPUTS) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(num_rows)
    x, weight = rng.standard_normal((num_rows, inputs)), rng.standard_normal((OUTPUTS, inputs))
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


def float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@every_impl
@every_dtype
@pytest.mark.parametrize("inputs", [INPUTS, 50], ids=lambda n: f"{n} inputs")
@pytest.mark.parametrize("num_rows", [0, 1, 3, 100])
def test_agrees_with_float64(num_rows: int, inputs: int, dtype, impl: str):
    x, weight = operands(num_rows, dtype, inputs=inputs)
    out = run(x, weight, impl=impl)
    assert (out.shape, out.dtype) == ((num_rows, OUTPUTS), jnp.float32)
    np.testing.assert_allclose(float64(out), float64(x) @ float64(weight).T, atol=TOLERANCE * inputs**0.5)


@every_impl
@every_dtype
@pytest.mark.parametrize("num_rows", [1, 3, 100])
def test_8_bit_weights_are_what_they_stand_for(num_rows: int, dtype, impl: str):
    x, weight = operands(num_rows, dtype)
    packed = pack(weight)
    out = run(x, packed, impl=impl)
    values = float64(packed.codes) * np.repeat(float64(packed.scales), 32, axis=1)
    tolerance = (ROUNDED if dtype == jnp.bfloat16 else TOLERANCE) * INPUTS**0.5
    np.testing.assert_allclose(float64(out), float64(x) @ values.T, atol=tolerance)


@pytest.mark.skipif("cpu-invariant" not in implementations("linear", platform="cpu"), reason="no compiled kernels")
@every_dtype
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype):
    x, weight = operands(100, dtype)
    together = run(x, weight, impl="cpu-invariant")
    for part in (slice(0, 1), slice(7, 10), slice(60, 100)):
        np.testing.assert_array_equal(run(x[part], weight, impl="cpu-invariant"), together[part])


@every_impl
def test_gradients_are_those_of_the_plain_product(impl: str):
    x, weight = operands(5, jnp.float32)

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(linear.matmul(x, weight, impl=impl)))

    d_x, d_weight = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight)
    slope = np.cos(float64(x) @ float64(weight).T)
    np.testing.assert_allclose(float64(d_x), slope @ float64(weight), atol=TOLERANCE * 10)  # sums of sums
    np.testing.assert_allclose(float64(d_weight), slope.T @ float64(x), atol=TOLERANCE * 10)


@every_impl
def test_gradients_pass_through_8_bit_weights(impl: str):
    x, weight = operands(5, jnp.float32)
    packed = pack(weight)
    d_x = jax.jit(jax.grad(lambda x: jnp.sum(linear.matmul(x, packed, impl=impl))))(x)
    expected = np.broadcast_to(float64(packed.decode(jnp.float32)).sum(0), x.shape)
    np.testing.assert_allclose(float64(d_x), expected, atol=TOLERANCE * 10)


@every_impl
def test_a_batch_of_products_is_each_of_them(impl: str):
    x, weight = operands(6, jnp.float32)
    out = jax.vmap(lambda x: linear.matmul(x, weight, impl=impl))(x.reshape(2, 3, INPUTS))
    expected = float64(x) @ float64(weight).T
    np.testing.assert_allclose(float64(out).reshape(6, OUTPUTS), expected, atol=TOLERANCE * INPUTS**0.5)


# ---- packing ---------------------------------------------------------------------------------------------------------


@every_dtype
def test_a_value_is_off_by_half_a_scale_at_most(dtype):
    _, weight = operands(1, dtype)
    size = np.exp2(np.arange(OUTPUTS)[:, None] - 18.0)  # rows of very different size
    packed = pack(weight * jnp.asarray(size, dtype))
    assert (packed.codes.dtype, packed.scales.dtype) == (jnp.int8, jnp.float32)
    assert (packed.shape, packed.scales.shape) == ((OUTPUTS, INPUTS), (OUTPUTS, INPUTS // 32))
    assert packed.nbytes == OUTPUTS * INPUTS * 36 // 32
    original = float64(weight) * size
    scales = np.repeat(float64(packed.scales), 32, axis=1)
    off = np.abs(float64(packed.codes) * scales - original)
    assert (off <= scales * (0.5 + 127 * 2**-23)).all()  # a code of 127 makes the most of float32's last bit
    largest = np.abs(original).reshape(OUTPUTS, -1, 32).max(-1)
    np.testing.assert_allclose(float64(packed.scales) * 127, largest, rtol=2**-23)
    assert np.abs(np.asarray(packed.codes)).reshape(OUTPUTS, -1, 32).max(-1).min() == 127


def test_the_error_of_random_weights_is_what_the_docs_say():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((512, 2880)).astype(np.float32), rng.standard_normal((8, 2880))
    values = float64(pack(jnp.asarray(weight)).decode(jnp.float32))
    exact = x @ weight.T.astype(np.float64)
    error = np.sqrt(np.mean((x @ values.T - exact) ** 2) / np.mean(exact**2))
    assert error == pytest.approx(0.0052, abs=0.0002)  # docs/token.md


def test_zeros_stay_zeros():
    packed = pack(jnp.zeros((2, 64)).at[1, 40].set(-3.0))
    assert not np.asarray(packed.codes)[0].any()
    assert packed.codes[1, 40] == -127
    np.testing.assert_array_equal(packed.decode(jnp.float32)[1, 40], np.float32(3) / 127 * -127)
    assert np.isfinite(np.asarray(packed.scales)).all()


def test_a_packed_matrix_is_a_tree_of_two_arrays():
    packed = pack(jnp.ones((3, 32)))
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(3, 32), (3, 1)]
    assert isinstance(jax.tree.map(lambda leaf: leaf, packed), Int8)


def test_products_of_bfloat16_go_back_in_bfloat16() -> None:
    """In float32 they take a processor that multiplies bfloat16 several times as long."""
    x, weight = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((5, 4), jnp.bfloat16)
    gradients = jax.jit(jax.grad(lambda x, weight: jnp.sum(linear.matmul(x, weight) ** 2), argnums=(0, 1)))
    products = re.findall(r"dot_general .*: \((\S+), (\S+)\)", gradients.lower(x, weight).as_text())
    assert len(products) == 3
    assert all(operand.endswith("xbf16>") for operands in products for operand in operands)
    d_x, d_weight = gradients(x, weight)
    np.testing.assert_array_equal(d_x, jnp.full((3, 4), 2 * 4 * 5, jnp.bfloat16))
    np.testing.assert_array_equal(d_weight, jnp.full((5, 4), 2 * 4 * 3, jnp.bfloat16))
