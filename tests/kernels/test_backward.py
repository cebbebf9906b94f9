"""Gradients of both ops: against differences of the oracle in float64, and what their compiled form must not hold."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels import attention
from gptoss_jax.kernels.attention import xla as attention_xla
from gptoss_jax.kernels.moe_matmul import moe_matmul
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.kernels.mxfp4 import MXFP4
from tests import oracle

# Gradients below are of order one to ten: the order of a float32 sum, as forward, some of them one after another.
TOLERANCE = 1e-4
STEP = 1e-6  # of float64: the differences are right to about STEP^2 and 1e-16 / STEP, both far below


def differences(f: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """The gradient of f, one coordinate at a time."""
    found = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        there, back = at.copy(), at.copy()
        there[index] += STEP
        back[index] -= STEP
        found[index] = (f(there) - f(back)) / (2 * STEP)
    return found


# ---- moe_matmul ------------------------------------------------------------------------------------------------------

EXPERTS, INPUTS, UNITS = 4, 32, 5
LIMIT = 1.5  # cuts about a third of the values below


def random_weight(outputs: tuple[int, ...], *, seed: int = 0, experts: int = EXPERTS, inputs: int = INPUTS) -> MXFP4:
    rng = np.random.default_rng(seed)
    shape = (experts, *outputs, inputs // 32)
    scales = rng.integers(123, 126, size=shape, dtype=np.uint8)
    return MXFP4(jnp.asarray(rng.integers(256, size=(*shape, 16), dtype=np.uint8)), jnp.asarray(scales))


def loop(
    x: np.ndarray, matrices: np.ndarray, bias: np.ndarray, group_sizes: tuple[int, ...], limit: float | None
) -> np.ndarray:
    outputs = bias.shape[1:]
    out, start = np.zeros((len(x), outputs[0])), 0
    for expert, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        flat = x[rows] @ matrices[expert].reshape(-1, x.shape[1]).T + bias[expert].reshape(-1)
        out[rows] = flat if limit is None else oracle.swiglu(flat, limit=limit)
        start += size
    return out


@pytest.mark.parametrize("group_sizes", [(0, 7, 0, 1), (3, 2, 1, 2), (1, 0, 2, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("limit", [None, LIMIT], ids=["sums", "swiglu"])
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
def test_moe_matmul_agrees_with_differences(group_sizes: tuple[int, ...], limit: float | None, packed: bool):
    rng = np.random.default_rng(3)
    outputs = (UNITS,) if limit is None else (UNITS, 2)
    weight = random_weight(outputs)
    matrices = oracle.mxfp4_decode(np.asarray(weight.blocks), np.asarray(weight.scales))
    x, bias = rng.standard_normal((8, INPUTS)), rng.standard_normal((EXPERTS, *outputs))
    d_out = rng.standard_normal((8, UNITS))

    def run(x: jax.Array, given: MXFP4 | jax.Array, bias: jax.Array) -> jax.Array:
        return moe_matmul(x, given, bias, jnp.asarray(group_sizes), swiglu_limit=limit)

    given = weight if packed else jnp.asarray(matrices, jnp.float32)
    operands = (jnp.asarray(x, jnp.float32), given, jnp.asarray(bias, jnp.float32))
    _, back = jax.vjp(run, *operands)
    d_x, d_weight, d_bias = back(jnp.asarray(d_out, jnp.float32))

    def loss(x: np.ndarray, matrices: np.ndarray, bias: np.ndarray) -> float:
        return float(np.sum(d_out * loop(x, matrices, bias, group_sizes, limit)))

    np.testing.assert_allclose(d_x, differences(lambda at: loss(at, matrices, bias), x), atol=TOLERANCE)
    np.testing.assert_allclose(d_bias, differences(lambda at: loss(x, matrices, at), bias), atol=TOLERANCE)
    if packed:
        assert {leaf.dtype for leaf in jax.tree.leaves(d_weight)} == {jax.dtypes.float0}
    else:
        np.testing.assert_allclose(d_weight, differences(lambda at: loss(x, at, bias), matrices), atol=TOLERANCE)


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
@pytest.mark.parametrize("num_rows", [6, 300])
def test_moe_matmul_in_bfloat16(packed: bool, num_rows: int):
    """Beside jax.grad of one dense product per expert in float32, from the same bfloat16 operands."""
    rng = np.random.default_rng(4)
    weight = random_weight((UNITS, 2), seed=1)
    sizes = np.array([0, num_rows - 5, 1, 3])
    expert_of_row = np.repeat(np.arange(EXPERTS), sizes)
    matrices = weight.decode(jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((num_rows, INPUTS)), jnp.bfloat16)
    bias = jnp.asarray(rng.standard_normal((EXPERTS, UNITS, 2)), jnp.bfloat16)
    d_out = jnp.asarray(rng.standard_normal((num_rows, UNITS)), jnp.bfloat16)

    def dense(x: jax.Array, matrices: jax.Array, bias: jax.Array) -> jax.Array:
        own = slice(len(expert_of_row))
        sums = jnp.einsum("mi,mfpi->mfp", x[own], matrices[expert_of_row]) + bias[expert_of_row]
        return jnp.sum(swiglu(sums[..., 0], sums[..., 1], LIMIT) * d_out[own].astype(jnp.float32))

    expected = jax.grad(dense, argnums=(0, 1, 2))(*(a.astype(jnp.float32) for a in (x, matrices, bias)))
    given = weight if packed else matrices
    run = functools.partial(moe_matmul, group_sizes=jnp.asarray(sizes), swiglu_limit=LIMIT)
    out, back = jax.vjp(lambda x, given, bias: run(x, given, bias), x, given, bias)
    assert out.dtype == jnp.bfloat16
    found = back(d_out)
    names = ("x", "weight", "bias")
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if packed and name == "weight":
            continue
        assert ours.dtype == jnp.bfloat16
        # Rounded to 8 bits at the end, and for x and the weight once more where a tile's sum is made: 2^-8 of the size.
        ours, largest = np.asarray(ours, np.float32), np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=2**-7 * largest, err_msg=name)


def test_rows_of_nobody_take_no_part():
    """Neither what they hold nor what comes back to them is a number, and no gradient sees it."""
    x = jnp.full((9, INPUTS), jnp.nan).at[:3].set(1.0)
    d_out = jnp.full((9, UNITS), jnp.nan).at[:3].set(1.0)
    weight = random_weight((UNITS, 2)).decode(jnp.float32)
    bias, sizes = jnp.ones((EXPERTS, UNITS, 2)), jnp.array([0, 2, 0, 1])
    _, back = jax.vjp(lambda x, weight, bias: moe_matmul(x, weight, bias, sizes, swiglu_limit=LIMIT), x, weight, bias)
    d_x, d_weight, d_bias = back(d_out)
    assert all(np.isfinite(each).all() for each in (d_x, d_weight, d_bias))
    assert not np.asarray(d_x)[3:].any()
    assert np.asarray(d_x)[:3].any()


def test_a_value_at_the_limit_has_no_gradient():
    gate = jnp.array([1.0, 1.5, 2.0, -9.0])
    d_gate = jax.grad(lambda gate: swiglu(gate, jnp.zeros(4), LIMIT).sum())(gate)
    np.testing.assert_array_equal(d_gate == 0, [False, True, True, False])
    d_up = jax.grad(lambda up: swiglu(jnp.ones(4), up, LIMIT).sum())(jnp.array([-2.0, -1.5, -1.0, 1.5]))
    np.testing.assert_array_equal(d_up == 0, [True, True, False, True])
    assert np.isnan(swiglu(jnp.array([jnp.nan]), jnp.array([0.0]), LIMIT)).all()
    assert np.isnan(swiglu(jnp.array([0.0]), jnp.array([jnp.nan]), LIMIT)).all()


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["sums", "swiglu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_no_gradient_unpacks_more_than_one_expert(dtype, limit: float | None):
    """23 experts of 146,432 weights: a residual or an unpacked copy of them all would be 13 MB in float32."""
    experts, wide, long, rows = 23, 416, 352, 40
    outputs = (wide,) if limit is None else (wide // 2, 2)
    weight = jax.eval_shape(lambda: random_weight(outputs, experts=experts, inputs=long))
    x, bias = jax.ShapeDtypeStruct((rows, long), dtype), jax.ShapeDtypeStruct((experts, *outputs), dtype)

    def gradients(x: jax.Array, weight: MXFP4, bias: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
            return (moe_matmul(x, weight, bias, sizes, swiglu_limit=limit).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, bias)

    compiled = jax.jit(gradients).lower(x, weight, bias, jax.ShapeDtypeStruct((experts,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # One expert in float32, and in bfloat16 before XLA's CPU products widen it; the rest is rows.
    assert memory.temp_size_in_bytes < 2.5 * 4 * wide * long


def test_frozen_plain_weights_cost_no_gradient():
    """LoRA differentiates around them: the sum that nobody reads is not made."""
    experts, wide, long, rows = 23, 416, 352, 40
    shapes = ((rows, long), (experts, wide, long), (experts, wide))
    x, weight, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    d_x = jax.grad(lambda x, weight, bias, sizes: moe_matmul(x, weight, bias, sizes).sum())
    compiled = jax.jit(d_x).lower(x, weight, bias, jax.ShapeDtypeStruct((experts,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.5 * 4 * wide * long


# ---- attention -------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 6, 2, 4, 5
GARBAGE = 50.0


@pytest.fixture(params=["one block", "blocks of 4", "blocks of 1"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 queries are two blocks of 4, whose second begins early."""
    if request.param == "blocks of 4":
        monkeypatch.setattr(attention_xla, "_MOST_QUERIES", 4)
    if request.param == "blocks of 1":
        monkeypatch.setattr(attention_xla, "SCORES_AT_ONCE", 1)


def attention_operands(first_query: list[int], num_queries: int, num_keys: int) -> tuple[np.ndarray, ...]:
    """q, k, v, sinks and what comes back."""
    rng, rows = np.random.default_rng(5), len(first_query)
    q, d_out = (rng.standard_normal((rows, num_queries, HEADS, HEAD_DIM)) for _ in range(2))
    k, v = (rng.standard_normal((rows, num_keys, KV_HEADS, HEAD_DIM)) for _ in range(2))
    return q, k, v, rng.standard_normal(HEADS), d_out


def check_attention(run: Callable[..., jax.Array], seen: list[slice], first: list[int], window: int | None) -> None:
    """`seen`: which keys of each row exist; the others hold garbage in `run`, and their gradients are zero."""
    num_queries = 7
    num_keys = max(keys.stop for keys in seen) + 3 if window is None else window + num_queries
    q, k, v, sinks, d_out = attention_operands(first, num_queries, num_keys)

    def loss(q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: np.ndarray) -> float:
        total = 0.0
        for row, keys in enumerate(seen):
            out = oracle.attention(q[row, None], k[row, None, keys], v[row, None, keys], sinks, window=window)
            total += float(np.sum(out[0] * d_out[row]))
        return total

    expected = [
        differences(lambda at, i=i: loss(*(at if i == j else x for j, x in enumerate((q, k, v, sinks)))), operand)
        for i, operand in enumerate((q, k, v, sinks))
    ]
    for row, keys in enumerate(seen):
        hidden = np.ones(num_keys, bool)
        hidden[keys] = False
        k[row, hidden] = v[row, hidden] = GARBAGE
        assert not any(gradient[row, hidden].any() for gradient in expected[1:3])
    _, back = jax.vjp(run, *(jnp.asarray(x, jnp.float32) for x in (q, k, v, sinks)))
    found = back(jnp.asarray(d_out, jnp.float32))
    for name, ours, theirs in zip(("q", "k", "v", "sinks"), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=name)


@pytest.mark.usefixtures("blocks")
def test_full_attention_agrees_with_differences():
    first = [4, 0]
    run = functools.partial(attention.full, first_query=jnp.array(first))
    check_attention(lambda q, k, v, sinks: run(q, k, v, sinks), [slice(0, 11), slice(0, 7)], first, None)


@pytest.mark.usefixtures("blocks")
def test_sliding_attention_agrees_with_differences():
    """Rows whose window is full, begins at the first position, and fills on the way."""
    first = [9, 0, 2]
    run = functools.partial(attention.sliding, first_query=jnp.array(first), window=WINDOW)
    seen = [slice(0, 12), slice(5, 12), slice(3, 12)]
    check_attention(lambda q, k, v, sinks: run(q, k, v, sinks), seen, first, WINDOW)


def test_attention_in_bfloat16():
    q, k, v, sinks, d_out = attention_operands([20], 7, 27)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    run = functools.partial(attention.full, first_query=jnp.array([20]))
    widened = [x.astype(jnp.float32) for x in half]
    d_half = jnp.asarray(d_out, jnp.bfloat16)
    _, back = jax.vjp(lambda *operands: run(*operands), *widened, jnp.asarray(sinks, jnp.float32))
    expected = back(d_half.astype(jnp.float32))  # right, as the tests above found
    _, back = jax.vjp(lambda *operands: run(*operands), *half, jnp.asarray(sinks, jnp.float32))
    for ours, theirs in zip(back(d_half), expected, strict=True):
        # Weights, scores' gradients and the result are rounded to 8 bits each.
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=3 * 2**-8 * np.abs(theirs).max())
    assert [gradient.dtype for gradient in back(d_half)] == [jnp.bfloat16] * 3 + [jnp.float32]


@pytest.mark.parametrize("window", [None, 128])
def test_attention_gradients_never_hold_all_scores(window: int | None):
    """A prompt's worth of queries over a long context, with the release's heads: 137 GB of scores if made at once."""
    queries, heads, kv_heads, head_dim = 4096, 64, 8, 64
    keys = 131072 if window is None else window + queries
    q = jax.ShapeDtypeStruct((1, queries, heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys, kv_heads, head_dim), jnp.bfloat16)
    sinks, first = jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, first: jax.Array) -> jax.Array:
        if window is None:
            return attention.full(q, k, v, sinks, first_query=first).astype(jnp.float32).sum()
        return attention.sliding(q, k, v, sinks, first_query=first, window=window).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, k, sinks, first).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    scores = 4 * attention_xla.SCORES_AT_ONCE
    around = 4 * (4 * queries * heads * head_dim + 6 * keys * kv_heads * head_dim)  # operands and gradients
    # The shares of a block, their gradients and the scores'; half of that is what XLA keeps.
    assert memory.temp_size_in_bytes < 4 * scores + around
