"""The grouped matmul against a loop in NumPy, and what its compiled form must not hold: a dense product or weight."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels.choose import implementations, layout
from gptoss_jax.kernels.columns import Columns, columns_codes, columns_scales
from gptoss_jax.kernels.moe_matmul import moe_matmul
from gptoss_jax.kernels.mxfp4 import MXFP4
from tests import oracle

INPUTS, OUTPUTS, LIMIT = 96, 80, 1.5
# Of each output's spread: the order of a float32 sum; bfloat16 operands are exact in it, so they cost nothing more.
TOLERANCE = 1e-5


GROUPS = [  # few different numbers of rows: each is compiled once
    ((0, 10, 0, 1), 11),
    ((11, 0, 0, 0), 11),
    ((0, 0, 0, 11), 11),
    ((3, 3, 2, 3), 11),
    ((1, 0, 2, 0), 11),  # eight rows belong to nobody
    ((0, 0, 0, 0), 11),
    ((0, 0, 1, 0), 1),
    ((0, 300, 0, 0), 300),  # more than one tile of any size
    ((3, 270, 9, 1), 300),
]
run = jax.jit(moe_matmul, static_argnames=("swiglu_limit", "impl"))
# How the weights lie, and for whom. "xla" takes them all, the others those of their layout.
FORMS = [
    ("mxfp4", "xla"),
    ("plain", "xla"),
    ("columns", "xla"),
    *(
        (form, impl)
        for impl in implementations("moe_matmul", platform="cpu")
        if impl != "xla"
        for form in ("packed", "plain")
    ),
]


def random_weight(
    num_experts: int, *, seed: int = 0, outputs: int | tuple[int, ...] = OUTPUTS, inputs: int = INPUTS
) -> MXFP4:
    rng = np.random.default_rng(seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    blocks = rng.integers(256, size=(num_experts, *outputs, inputs // 32, 16), dtype=np.uint8)
    scales = rng.integers(121, 125, size=(num_experts, *outputs, inputs // 32), dtype=np.uint8)
    return MXFP4(blocks, scales)


def on_device(weight: MXFP4) -> MXFP4:
    return jax.tree.map(jnp.asarray, weight)


def in_columns(weight: MXFP4) -> Columns:
    """Gate and up apart, inputs before outputs: from the released form by hand."""
    blocks, scales = weight.blocks, weight.scales
    if scales.ndim == 4:
        blocks, scales = blocks.swapaxes(1, 2), scales.swapaxes(1, 2)
    return Columns(jnp.asarray(columns_codes(blocks)), jnp.asarray(columns_scales(scales)))


def loop(
    x: np.ndarray, matrices: np.ndarray, bias: np.ndarray, group_sizes: tuple[int, ...], *, limit: float | None = None
) -> np.ndarray:
    out, start = np.zeros((len(x), matrices.shape[1])), 0
    for expert, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        flat = x[rows].astype(np.float64) @ matrices[expert].reshape(-1, x.shape[1]).T
        flat = flat + bias[expert].astype(np.float64).reshape(-1)
        out[rows] = flat if limit is None else oracle.swiglu(flat, limit=limit)
        start += size
    return out


@pytest.mark.parametrize("swiglu_limit", [None, LIMIT], ids=["sums", "swiglu"])
@pytest.mark.parametrize(("group_sizes", "num_rows"), GROUPS, ids=str)
@pytest.mark.parametrize(("form", "impl"), FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_agrees_with_a_loop(
    group_sizes: tuple[int, ...], num_rows: int, form: str, impl: str, dtype, swiglu_limit: float | None
):
    rng = np.random.default_rng(1)
    outputs = (OUTPUTS,) if swiglu_limit is None else (OUTPUTS, 2)
    weight = random_weight(4, outputs=outputs)
    matrices = oracle.mxfp4_decode(weight.blocks, weight.scales)
    x = jnp.asarray(rng.standard_normal((num_rows, INPUTS)), dtype)
    bias = jnp.asarray(rng.standard_normal((4, *outputs)), dtype)
    out = run(x, given(weight, form, impl, dtype), bias, jnp.asarray(group_sizes), swiglu_limit=swiglu_limit, impl=impl)
    assert out.dtype == (jnp.float32 if swiglu_limit is None else dtype)
    expected = loop(np.asarray(x), matrices, np.asarray(bias), group_sizes, limit=swiglu_limit)
    tolerance = TOLERANCE * np.sqrt(INPUTS)
    if swiglu_limit is not None:  # up to (limit + 1) times as steep as the sums; and rounded to x's dtype
        tolerance = tolerance * (LIMIT + 1) + np.abs(expected) * jnp.finfo(dtype).eps
    assert (np.abs(np.asarray(out, np.float64) - expected) <= tolerance).all()
    assert not np.asarray(out)[sum(group_sizes) :].any()


@pytest.mark.parametrize("swiglu_limit", [None, LIMIT], ids=["sums", "swiglu"])
@pytest.mark.parametrize("impl", implementations("moe_matmul", platform="cpu"))
def test_no_rows_have_no_outputs(impl: str, swiglu_limit: float | None):
    outputs = (OUTPUTS,) if swiglu_limit is None else (OUTPUTS, 2)
    weight, x = (
        given(random_weight(4, outputs=outputs), "packed", impl, jnp.bfloat16),
        jnp.ones((0, INPUTS), jnp.bfloat16),
    )
    out = run(x, weight, jnp.ones((4, *outputs)), jnp.zeros(4, jnp.int32), swiglu_limit=swiglu_limit, impl=impl)
    assert (out.shape, out.dtype) == ((0, OUTPUTS), jnp.float32 if swiglu_limit is None else x.dtype)


@pytest.mark.parametrize("impl", implementations("moe_matmul", platform="cpu"))
def test_few_rows_are_expected_and_all_come(impl: str):
    """Tiles are made for one row each, and one expert gets nearly all of 300."""
    weight, sizes = random_weight(4), (0, 280, 0, 9)
    x = np.random.default_rng(3).standard_normal((300, INPUTS)).astype(np.float32)
    bias = np.ones((4, OUTPUTS), np.float32)
    arrays = jnp.asarray(x), given(weight, "packed", impl, jnp.float32), jnp.asarray(bias), jnp.asarray(sizes)
    out = moe_matmul(*arrays, expected_rows=4, impl=impl)
    expected = loop(x, oracle.mxfp4_decode(weight.blocks, weight.scales), bias, sizes)
    assert (np.abs(np.asarray(out, np.float64) - expected) <= TOLERANCE * np.sqrt(INPUTS)).all()


def given(weight: MXFP4, form: str, impl: str, dtype) -> MXFP4 | Columns | jax.Array:
    """The weight as the implementation wants it."""
    if form == "columns" or (form == "packed" and layout(impl) == "columns"):
        return in_columns(weight)
    if form != "plain":
        return on_device(weight)
    return in_columns(weight).decode(dtype) if layout(impl) == "columns" else on_device(weight).decode(dtype)


@pytest.mark.parametrize(("impl", "wrong"), [("tpu", "mxfp4"), ("tpu-interpret", "mxfp4"), ("gpu", "columns")])
def test_the_wrong_layout_is_refused(impl: str, wrong: str):
    weight = given(random_weight(4), wrong, impl, jnp.float32)
    with pytest.raises(
        Unsupported, match=f"{impl!r} reads packed weights in (rows|columns), these are {type(weight).__name__}"
    ):
        moe_matmul(jnp.ones((3, INPUTS)), weight, jnp.ones((4, OUTPUTS)), jnp.array([1, 1, 1, 0]), impl=impl)


def test_rows_of_nobody_may_hold_anything():
    x = np.full((9, INPUTS), np.nan, np.float32)
    x[:3] = 1
    out = moe_matmul(jnp.asarray(x), on_device(random_weight(4)), jnp.ones((4, OUTPUTS)), jnp.array([0, 2, 0, 1]))
    assert np.isfinite(out[:3]).all()
    assert not np.asarray(out)[3:].any()


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
def test_experts_without_rows_are_not_read(packed: bool):
    """Theirs is scale byte 255: one value that is read and multiplied, even by zero, would make a NaN."""
    group_sizes = (0, 6, 0, 0, 5, 0)
    weight = random_weight(6)
    for expert, size in enumerate(group_sizes):
        if not size:
            weight.scales[expert] = 255
    x = jnp.asarray(np.random.default_rng(2).standard_normal((13, INPUTS)), jnp.float32)
    given = on_device(weight) if packed else on_device(weight).decode(jnp.float32)
    bias = jnp.where(jnp.asarray(group_sizes)[:, None] > 0, 1.0, jnp.nan) * jnp.ones((6, OUTPUTS))
    assert np.isfinite(moe_matmul(x, given, bias, jnp.asarray(group_sizes))).all()


# ---- the compiled form -----------------------------------------------------------------------------------------------

EXPERTS, ROWS, WIDE, LONG = 23, 40, 416, 352  # one matrix, 146,432 elements, outnumbers the rows' inputs and outputs


@pytest.fixture(scope="module", params=["float32 mxfp4", "float32 plain", "bfloat16 mxfp4", "bfloat16 plain"])
def compiled(request: pytest.FixtureRequest) -> jax.stages.Compiled:
    dtype, kind = request.param.split()
    weight = jax.ShapeDtypeStruct((EXPERTS, WIDE, LONG), dtype)
    if kind == "mxfp4":
        weight = jax.eval_shape(lambda: on_device(random_weight(EXPERTS, outputs=WIDE, inputs=LONG)))
    x, bias = jax.ShapeDtypeStruct((ROWS, LONG), dtype), jax.ShapeDtypeStruct((EXPERTS, WIDE), dtype)
    return jax.jit(moe_matmul).lower(x, weight, bias, jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)).compile()


def made_arrays(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Elements of every array that the program makes, by its type.

    What it was given it only passes on, and what stands inside of a fusion never is in memory as a whole.
    """
    passed_on = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "call", "opt-barrier")
    text = compiled.as_text()
    fused = set(re.findall(r" fusion\(.*calls=%([\w.-]+)", text))
    made, computation = {}, ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            computation = header[1]
        instruction = re.match(r"  (?:ROOT )?%[\w.-]+ = (\w+\[([\d,]*)\])\S* ([\w-]+)\(", line)
        if instruction and computation not in fused and instruction[3] not in passed_on:
            made[instruction[1]] = math.prod(int(size) for size in instruction[2].split(",") if size)
    return made


def test_no_array_is_larger_than_one_matrix(compiled: jax.stages.Compiled):
    made = made_arrays(compiled)
    parts = {WIDE * LONG, WIDE * LONG // 2}  # a plain matrix is taken whole, a packed one as two planes
    assert parts & {*made.values()}, "the one matrix itself is not found: the test reads the program wrongly"
    assert max(made.values()) in parts, max(made, key=lambda name: made[name])
    assert max(parts) < EXPERTS * ROWS * WIDE


def test_temporary_memory_is_less_than_two_experts(compiled: jax.stages.Compiled):
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * 4 * WIDE * LONG
