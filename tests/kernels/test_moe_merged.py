"""The grouped matmul on merged and quantised weights: bytes against the codec on the host, gradients against a dense
twin, and what its compiled form must not hold."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.moe_matmul.merged import merged_codes, merged_matmul
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.mxfp4 import MXFP4, encode, refuse_nan_scales

EXPERTS, UNITS, INPUTS, RANK = 4, 5, 64, 35  # ranks of two sweeps and a bit
LIMIT = 1.5  # cuts about a third of the values below
SIZES = (3, 0, 270, 1)  # an expert without rows, one with two tiles
TOLERANCE = 1e-5  # of the largest: the order of a float32 sum

FORMS = [(jnp.float32, None), (jnp.float32, LIMIT), (jnp.bfloat16, LIMIT)]

codes_of = jax.jit(merged_codes)
run = jax.jit(merged_matmul)


def random_weight(outputs: tuple[int, ...], *, experts: int = EXPERTS, inputs: int = INPUTS) -> MXFP4:
    rng = np.random.default_rng(0)
    shape = (experts, *outputs, inputs // 32)
    scales = rng.integers(123, 126, size=shape, dtype=np.uint8)
    return MXFP4(rng.integers(256, size=(*shape, 16), dtype=np.uint8), scales)


def random_adapter(outputs: tuple[int, ...], *, rank: int = RANK, size: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((EXPERTS, rank, INPUTS)).astype(np.float32)
    return a, (rng.standard_normal((EXPERTS, *outputs, rank)) * size).astype(np.float32)


def merged_on_host(weight: MXFP4, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As merged.py defines it, in NumPy: of bfloat16, in float32, one rank after the other."""
    a, b = (each.astype(ml_dtypes.bfloat16).astype(np.float32) for each in (a, b))
    update = np.zeros(weight.shape, np.float32)
    lead = (slice(None), *[None] * (b.ndim - 2))
    for r in range(a.shape[1]):
        update = update + b[..., r, None] * a[:, r][lead]
    values = np.asarray(weight.decode(jnp.float32))
    return np.where(update == 0, values, values + update)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, RANK])
def test_codes_are_those_of_the_host(rank: int):
    """Byte for byte, with nothing left to the order of a sum; and many of them are not the weight's own."""
    weight = random_weight((UNITS, 2))
    a, b = random_adapter((UNITS, 2), rank=rank)
    expected = encode(merged_on_host(weight, a, b), rule="reuse", scales=weight.scales)
    changed = (expected.blocks != weight.blocks).mean()
    assert 0.1 < changed < 0.95
    found = codes_of(weight, jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    np.testing.assert_array_equal(found.scales, weight.scales)


@pytest.mark.parametrize(("order", "code"), [(slice(None), 2), (slice(None, None, -1), 3)], ids=["down", "up"])
def test_the_sum_is_made_in_the_order_of_the_ranks(order: slice, code: int):
    """1.25 is the tie between 1 (code 2) and 1.5 (code 3). Behind it 20 times 2^-25 are lost one by one, each less than
    half of its last bit; before it they make more than that. And a is rounded to bfloat16, or would be above 1."""
    b = np.array([1.25] + [2**-25] * 20, np.float32)[order]
    a = np.full((1, len(b), 32), 1 + 2**-10, np.float32)
    zeros = MXFP4(np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 127, np.uint8))
    found = codes_of(zeros, jnp.asarray(a), jnp.asarray(b[None, None]))
    np.testing.assert_array_equal(found.blocks, np.full((1, 1, 1, 16), code << 4 | code))


def test_a_matrix_multiplied_is_the_matrix_exported():
    """Rows of one 1 each read it out, bit for bit: on the way through the tiles nothing is merged otherwise."""
    weight, (a, b) = random_weight((UNITS,)), map(jnp.asarray, random_adapter((UNITS,)))
    x = jnp.tile(jnp.eye(INPUTS), (EXPERTS, 1))
    out = run(x, weight, a, b, jnp.zeros((EXPERTS, UNITS)), jnp.full(EXPERTS, INPUTS))
    exported = codes_of(weight, a, b).decode(jnp.float32)
    np.testing.assert_array_equal(out.reshape(EXPERTS, INPUTS, UNITS).swapaxes(1, 2), exported)


def test_what_nobody_changed_keeps_every_byte():
    """All bytes under all scales whose values are finite, -0 among them: in experts without an update, and of others in
    the inputs and outputs without one."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(4, 4, 16), (253, 4, 4, 16))
    scales = np.broadcast_to(np.arange(253, dtype=np.uint8)[:, None, None], (253, 4, 4))
    weight, rng = MXFP4(blocks, scales), np.random.default_rng(2)
    a, b = rng.standard_normal((253, 2, 128)), rng.standard_normal((253, 4, 2)) * 100
    b[1::2] = 0  # every second expert
    a[:, :, :32] = b[:, 2] = 0
    found = codes_of(weight, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    changed = np.asarray(found.blocks) != blocks
    assert not changed[1::2].any()
    assert not changed[:, 2].any()
    assert not changed[:, :, 0].any()
    assert changed[100:150:2, [0, 1, 3], 1:].mean() > 0.5
    np.testing.assert_array_equal(found.scales, scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad: float):
    """By the loss at once, and at the latest by the export; codes could not tell it."""
    weight, (a, b) = random_weight((UNITS,)), random_adapter((UNITS,))
    a[2, 3, 40] = bad
    merged = codes_of(weight, jnp.asarray(a), jnp.asarray(b))
    with pytest.raises(UserError, match=r"scale byte 255 \(NaN\) at \(2, 0, 1\)"):
        refuse_nan_scales(np.asarray(merged.scales), name="merged")
    assert (np.asarray(merged.scales) == 255).sum() == UNITS
    x, sizes = jnp.ones((EXPERTS, INPUTS)), jnp.ones(EXPERTS, jnp.int32)
    out = np.asarray(run(x, weight, jnp.asarray(a), jnp.asarray(b), jnp.zeros((EXPERTS, UNITS)), sizes))
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), [False, False, True, False])


# ---- products and gradients ------------------------------------------------------------------------------------------


def dense_twin(weight: MXFP4, a: np.ndarray, b: np.ndarray, *, limit: float | None) -> Callable[..., jax.Array]:
    """Every row's own matrix, all at once: quantised on the host, and straight through where it does not saturate."""
    merged = merged_on_host(weight, a, b)
    on_grid = np.asarray(encode(merged, rule="reuse", scales=weight.scales).decode(jnp.float32))
    inside = np.abs(merged) < np.repeat(np.ldexp(7.0, weight.scales.astype(int) - 127), 32, axis=-1)
    assert 0.02 < (~inside).mean() < 0.3
    expert = np.repeat(np.arange(EXPERTS), SIZES)

    def dense(x: jax.Array, a: jax.Array, b: jax.Array, bias: jax.Array) -> jax.Array:
        update = jnp.einsum("eri,e...r->e...i", straight(a), straight(b), precision="highest")
        moving = jnp.where(inside, update, 0)
        matrices = on_grid + (moving - jax.lax.stop_gradient(moving))
        sums = jnp.einsum("mi,m...i->m...", x, matrices[expert], precision="highest") + bias[expert]
        return sums if limit is None else swiglu(sums[..., 0], sums[..., 1], limit)

    return dense


def there_and_back(
    run: Callable[..., jax.Array], operands: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def both(operands: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, back = jax.vjp(run, *operands)
        return out, back(d_out)

    return jax.jit(both)(operands, d_out)


def straight(values: jax.Array) -> jax.Array:
    """Rounded to bfloat16, with the gradient of what is not."""
    return values + jax.lax.stop_gradient(values.astype(jnp.bfloat16).astype(jnp.float32) - values)


@pytest.mark.parametrize(("dtype", "limit"), FORMS, ids=["float32-sums", "float32-swiglu", "bf16-swiglu"])
def test_agrees_with_a_dense_twin(dtype, limit: float | None):
    """There and back. The rows behind the last group are nobody's, and hold no numbers."""
    outputs, rng, num_rows = (UNITS,) if limit is None else (UNITS, 2), np.random.default_rng(3), sum(SIZES)
    weight, (a, b) = random_weight(outputs), random_adapter(outputs, size=0.1)
    x = jnp.asarray(rng.standard_normal((num_rows + 6, INPUTS)), dtype).at[num_rows:].set(jnp.nan)
    bias = jnp.asarray(rng.standard_normal((EXPERTS, *outputs)), dtype)
    d_out = jnp.asarray(rng.standard_normal((num_rows + 6, UNITS)), jnp.float32 if limit is None else dtype)
    d_out = d_out.at[num_rows:].set(jnp.nan)

    def ours(*operands: jax.Array) -> jax.Array:
        x, a, b, bias = operands
        return merged_matmul(x, weight, a, b, bias, jnp.asarray(SIZES), swiglu_limit=limit)

    out, gradients = there_and_back(ours, (x, jnp.asarray(a), jnp.asarray(b), bias), d_out)
    wide = tuple(jnp.asarray(each, jnp.float32) for each in (x[:num_rows], a, b, bias))
    d_wide = d_out[:num_rows].astype(jnp.float32)
    expected, theirs = there_and_back(dense_twin(weight, a, b, limit=limit), wide, d_wide)
    tolerance = TOLERANCE if dtype == jnp.float32 else 2**-7  # 8 bits of a row, of the result and of what comes back

    def check(name: str, found: jax.Array, like: jax.Array, expected: jax.Array) -> None:
        assert (found.dtype, found.shape) == (like.dtype, like.shape), name
        found = np.asarray(found, np.float32)
        own = found[:num_rows] if len(found) > num_rows else found
        largest = np.abs(expected).max()
        assert largest > 0, name
        np.testing.assert_allclose(own, expected, rtol=0, atol=tolerance * largest, err_msg=name)
        assert not found[len(own) :].any(), name

    check("out", out, d_out, expected)
    for name, found, like, wanted in zip(("x", "a", "b", "bias"), gradients, (x, a, b, bias), theirs, strict=True):
        check(name, found, like, wanted)


def test_no_rows_have_no_outputs():
    weight, (a, b) = random_weight((UNITS, 2)), map(jnp.asarray, random_adapter((UNITS, 2)))
    x, sizes = jnp.ones((0, INPUTS), jnp.bfloat16), jnp.zeros(EXPERTS, jnp.int32)
    out = merged_matmul(x, weight, a, b, jnp.ones((EXPERTS, UNITS, 2)), sizes, swiglu_limit=LIMIT)
    assert (out.shape, out.dtype) == ((0, UNITS), jnp.bfloat16)


def test_other_weights_are_refused():
    a, b = map(jnp.asarray, random_adapter((UNITS,)))
    plain = jnp.ones((EXPERTS, UNITS, INPUTS))
    columns = Columns(jnp.zeros((EXPERTS, INPUTS // 2, UNITS), jnp.uint8), jnp.zeros((EXPERTS, 2, UNITS), jnp.uint8))
    for weight, name in ((plain, "plain"), (columns, "in columns")):
        with pytest.raises(Unsupported, match=f"packed in rows, these are {name}"):
            merged_matmul(jnp.ones((3, INPUTS)), weight, a, b, jnp.ones((EXPERTS, UNITS)), jnp.array([3, 0, 0, 0]))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), FORMS[::2], ids=["float32-sums", "bf16-swiglu"])
def test_no_gradient_unpacks_more_than_one_expert(dtype, limit: float | None):
    """16 experts of 2.3 million weights: all of them in float32 would be four times what is allowed here."""
    experts, wide, long, rows = 16, 1600, 1440, 40
    outputs = (wide,) if limit is None else (wide // 2, 2)
    weight = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_weight(outputs, experts=experts, inputs=long)))
    x, bias = jax.ShapeDtypeStruct((rows, long), dtype), jax.ShapeDtypeStruct((experts, *outputs), dtype)
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((experts, RANK, long), (experts, *outputs, RANK)))

    def gradients(weight: MXFP4, sizes: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
        def loss(x: jax.Array, a: jax.Array, b: jax.Array, bias: jax.Array) -> jax.Array:
            return (merged_matmul(x, weight, a, b, bias, sizes, swiglu_limit=limit).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*operands)

    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    memory = jax.jit(gradients).lower(weight, sizes, x, a, b, bias).compile().memory_analysis()
    assert memory is not None
    # Values, gradients and updates of one expert, and where the ranks take several sweeps the sum before the last.
    assert memory.temp_size_in_bytes < 4 * 4 * wide * long


def test_an_export_unpacks_one_expert_at_a_time():
    experts, wide, long = 16, 416, 352
    weight = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_weight((wide,), experts=experts, inputs=long)))
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((experts, RANK, long), (experts, wide, RANK)))
    memory = codes_of.lower(weight, a, b).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * 4 * wide * long
