"""The grouped matmul for GPUs, in Pallas' interpreter: against float64, bit by bit, and lowered for CUDA and ROCm.

What the interpreter cannot run is one PTX instruction, the product of two pairs of bfloat16. It is done here in NumPy.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gptoss_jax.kernels import tuned
from gptoss_jax.kernels.moe_matmul import gpu
from gptoss_jax.kernels.mxfp4 import MXFP4
from tests import oracle

EXPERTS, UNITS, INPUTS, ROWS, LIMIT = 5, 21, 160, 27, 1.5
# Several steps of inputs, the last one 4 words of 16; several blocks of outputs, the last one 10 of 16; tiles of 8.
SMALL = {name: gpu.Blocks(rows=8, outputs=16, words=16, warps=1, stages=2) for name in gpu.DEFAULTS}
GROUPS = [
    (0, 26, 0, 1, 0),
    (27, 0, 0, 0, 0),
    (0, 0, 0, 0, 27),
    (8, 8, 8, 2, 1),
    (5, 0, 9, 0, 1),  # twelve rows belong to nobody
    (0, 0, 1, 0, 0),
    (0, 0, 0, 0, 0),
]


def random_weight(rng: np.random.Generator, *outputs: int, scales: range = range(121, 125)) -> MXFP4:
    blocks = rng.integers(256, size=(EXPERTS, *outputs, INPUTS // 32, 16), dtype=np.uint8)
    return MXFP4(blocks, rng.choice(np.asarray(scales, np.uint8), size=blocks.shape[:-1]))


def loop(x, matrices, bias, group_sizes: tuple[int, ...], *, limit: float | None) -> np.ndarray:
    x, bias = np.asarray(x, np.float64), np.asarray(bias, np.float64).reshape(EXPERTS, -1)
    matrices = matrices.reshape(EXPERTS, -1, INPUTS)
    out = np.zeros((len(x), matrices.shape[1] // (1 if limit is None else 2)))
    for expert, (size, end) in enumerate(zip(group_sizes, np.cumsum(group_sizes), strict=True)):
        sums = x[end - size : end] @ matrices[expert].T + bias[expert]
        out[end - size : end] = sums if limit is None else oracle.swiglu(sums, limit=limit)
    return out


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["sums", "swiglu"])
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_agrees_with_a_loop_for_all_shapes_of_groups(limit: float | None, packed: bool, dtype):
    rng = np.random.default_rng(1)
    outputs = (2 * UNITS,) if limit is None else (UNITS, 2)
    weight = random_weight(rng, *outputs)
    matrices = oracle.mxfp4_decode(weight.blocks, weight.scales)
    given_weight = jax.tree.map(jnp.asarray, weight) if packed else jnp.asarray(matrices, dtype)
    x = jnp.asarray(rng.standard_normal((ROWS, INPUTS)), dtype)
    bias = jnp.asarray(rng.standard_normal((EXPERTS, *outputs)), dtype)
    run = jax.jit(functools.partial(gpu.moe_matmul, swiglu_limit=limit, blocks=SMALL, interpret=True))
    for group_sizes in GROUPS:
        out = run(x, given_weight, bias, jnp.asarray(group_sizes))
        assert out.dtype == (jnp.float32 if limit is None else dtype)
        expected = loop(x, matrices, bias, group_sizes, limit=limit)
        tolerance = 1e-5 * math.sqrt(INPUTS)  # the order of a float32 sum
        if limit is not None:  # at most (limit + 1) times as steep, and then rounded to x's dtype
            tolerance = tolerance * (LIMIT + 1) + np.abs(expected) * jnp.finfo(dtype).eps
        assert (np.abs(np.asarray(out, np.float64) - expected) <= tolerance).all(), group_sizes
        assert not np.asarray(out)[sum(group_sizes) :].any()


@pytest.mark.parametrize(("num_rows", "rows"), [(3, 8), (40, 16), (150, 64)])
def test_the_default_blocks_agree_with_a_loop(num_rows: int, rows: int):
    rng = np.random.default_rng(2)
    weight = random_weight(rng, UNITS, 2)
    x = jnp.asarray(rng.standard_normal((num_rows, INPUTS)), jnp.bfloat16)
    bias = jnp.asarray(rng.standard_normal((EXPERTS, UNITS, 2)), jnp.bfloat16)
    group_sizes = (num_rows - 2, 0, 1, 0, 0)
    blocks = gpu._choose_blocks(gpu.DEFAULTS, num_rows=num_rows, num_experts=EXPERTS, dtype=jnp.bfloat16)
    assert blocks.rows == rows
    given_weight = jax.tree.map(jnp.asarray, weight)
    out = gpu.moe_matmul(x, given_weight, bias, jnp.asarray(group_sizes), swiglu_limit=LIMIT, interpret=True)
    expected = loop(x, oracle.mxfp4_decode(weight.blocks, weight.scales), bias, group_sizes, limit=LIMIT)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-4)  # as above


def test_rows_of_nobody_and_experts_without_rows_may_hold_anything():
    """One value of theirs that is multiplied, even by zero, would make a NaN."""
    group_sizes = np.array([0, 6, 0, 5, 0])
    weight = random_weight(np.random.default_rng(3), 2 * UNITS)
    weight.scales[group_sizes == 0] = 255
    x = np.full((ROWS, INPUTS), np.nan, np.float32)
    x[: group_sizes.sum()] = 1
    bias = np.where(group_sizes[:, None] > 0, np.ones(2 * UNITS, np.float32), np.nan)
    run = functools.partial(gpu.moe_matmul, blocks=SMALL, interpret=True)
    for given_weight in (jax.tree.map(jnp.asarray, weight), jax.tree.map(jnp.asarray, weight).decode(jnp.float32)):
        out = run(jnp.asarray(x), given_weight, jnp.asarray(bias), jnp.asarray(group_sizes))
        assert np.isfinite(out).all()
        assert not np.asarray(out)[group_sizes.sum() :].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_weights_come_out_bit_by_bit_from_a_product_with_the_unit_matrix(dtype):
    """Scales from 3 to 252: XLA's products on a CPU flush denormals, and bfloat16 ends after 6 * 2^(252 - 127)."""
    weight = random_weight(np.random.default_rng(4), 2 * UNITS, scales=range(3, 253))
    out = gpu.moe_matmul(
        jnp.eye(INPUTS, dtype=dtype),
        jax.tree.map(jnp.asarray, weight),
        jnp.zeros((EXPERTS, 2 * UNITS), dtype),
        jnp.array([0, 0, INPUTS, 0, 0]),
        blocks=SMALL,
        interpret=True,
    )
    np.testing.assert_array_equal(out, oracle.mxfp4_decode(weight.blocks, weight.scales)[2].T)


# ---- the form for NVIDIA's chips, which multiplies pairs of bfloat16 -------------------------------------------------


def planes_by_pairs(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[planes, words, 2]: what the PTX form makes of each word and its scale, the instruction done in NumPy."""

    def pairs(bits) -> np.ndarray:
        return np.asarray(bits).view(np.uint16).reshape(-1, 2).view(ml_dtypes.bfloat16).astype(np.float64)

    factors = pairs(gpu.scale_bits(jnp.asarray(scales, jnp.uint32)))
    planes = [gpu.code_bits(jnp.asarray(half), plane) for half in (words, words >> 8) for plane in range(2)]
    with np.errstate(over="ignore", invalid="ignore"):  # far past the largest scale, and zeros there
        return np.stack([(pairs(plane) * factors).astype(ml_dtypes.bfloat16).astype(np.float64) for plane in planes])


@pytest.fixture(scope="module")
def every_scale() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales [words], what the PTX form makes of them [words, 8], and what they are."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(256, size=(256, 7, 16), dtype=np.uint8)
    blocks[:, 0] = np.arange(16) * 0x11  # each code in both nibbles
    scales = np.repeat(np.arange(256, dtype=np.uint8), 7).reshape(256, 7)
    words = blocks.view(np.uint32).reshape(-1)
    planes = planes_by_pairs(words, np.repeat(scales.reshape(-1), 4)) * gpu._UNIT
    with np.errstate(over="ignore"):
        values = oracle.mxfp4_decode(blocks, scales).reshape(-1, 8)
    # x's inputs, numbered, tell which of a word's eight weights each place of the planes meets.
    order = np.asarray(gpu._in_planes(jnp.arange(8, dtype=jnp.float32)[None])).reshape(4, 2).astype(int)
    found = np.empty_like(values)
    for plane, half in np.ndindex(4, 2):
        found[:, order[plane, half]] = planes[plane, :, half]
    return np.repeat(scales.reshape(-1), 4), found, values


def test_pairs_are_exact_for_usual_scales_and_meet_their_inputs(every_scale):
    scales, found, values = every_scale
    usual = (scales >= 59) & (scales <= 192)
    np.testing.assert_array_equal(found[usual], values[usual])
    assert (np.signbit(found[usual]) == np.signbit(values[usual])).all()


def test_pairs_of_unusual_scales_lose_as_little_as_is_said(every_scale):
    scales, found, values = every_scale
    tiny, huge = scales < 59, scales > 192
    assert np.abs(found[tiny] - values[tiny]).max() <= 2.0**-70
    assert not np.isfinite(found[huge]).any()  # loud


# ---- tiles and blocks ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(0, 30),
    st.sampled_from([8, 16, 64]),
)
def test_the_grid_has_a_program_for_every_tile(group_sizes: list[int], of_nobody: int, rows: int):
    num_rows = sum(group_sizes) + of_nobody
    tiles = sum(math.ceil(size / rows) for size in (*group_sizes, of_nobody))
    assert tiles <= gpu._most_tiles(num_rows, len(group_sizes), rows=rows)


@pytest.mark.parametrize("device_kind", ["default", "NVIDIA H100 80GB HBM3", "NVIDIA B200", "NVIDIA A100-SXM4-80GB"])
def test_tuned_blocks_are_complete_and_powers_of_two(device_kind: str):
    forms = tuned.find("moe_matmul", "gpu", device_kind=device_kind) or tuned.default("moe_matmul", "gpu")
    blocks = {name: gpu.Blocks(**sizes) for name, sizes in forms.items()}
    assert blocks.keys() == gpu.DEFAULTS.keys()
    assert (blocks == gpu.DEFAULTS) == (device_kind == "default")
    for form in blocks.values():
        sizes = dataclasses.asdict(form)
        del sizes["stages"]
        assert all(size.bit_count() == 1 for size in sizes.values()), form


# ---- lowering --------------------------------------------------------------------------------------------------------

# Triton's custom call comes without a promise of compatibility: exporting it must be allowed.
ALLOWED = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
DEVICES = {"cuda": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"), "rocm": AbstractDevice("gfx942", 304, "gpu")}


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_gpus(platform: str, packed: bool, dtype: str):
    shape = (EXPERTS, UNITS, 2)
    blocks = jax.ShapeDtypeStruct((*shape, INPUTS // 32, 16), jnp.uint8)
    scales = jax.ShapeDtypeStruct((*shape, INPUTS // 32), jnp.uint8)
    weights = (blocks, scales) if packed else (jax.ShapeDtypeStruct((*shape, INPUTS), dtype),)

    def call(x, bias, group_sizes, *weights):
        weight = MXFP4(*weights) if packed else weights[0]
        return gpu.moe_matmul(x, weight, bias, group_sizes, swiglu_limit=LIMIT)

    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(jax.jit(call), platforms=[platform], disabled_checks=ALLOWED)(
            jax.ShapeDtypeStruct((ROWS, INPUTS), dtype),
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct((EXPERTS,), jnp.int32),
            *weights,
        )
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 1
