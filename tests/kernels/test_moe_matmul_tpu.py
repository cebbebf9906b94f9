"""The TPU's grouped matmul in Pallas' interpreter, against NumPy in float64, and lowered for TPUs without one.

How it is cut decides what may go wrong: tiles that straddle experts, last tiles and blocks that reach past the arrays,
odd numbers of MXFP4 blocks. What every implementation must do is in test_moe_matmul.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.columns import Columns, columns_codes, columns_scales
from gptoss_jax.kernels.moe_matmul.tpu import Blocks, _items, moe_matmul
from gptoss_jax.kernels.mxfp4 import decode
from tests import oracle

EXPERTS, INPUTS, OUTPUTS, LIMIT = 5, 96, 176, 1.5
BLOCKS = Blocks(rows=16, outputs=128)  # the last block of outputs reaches past the 176 that there are
# Of each output's spread: the order of a float32 sum; products of bfloat16 are exact in it, so they cost nothing more.
TOLERANCE = 1e-5
BF16_ROUNDING = 2**-8  # of a result that is given in bfloat16

run = jax.jit(moe_matmul, static_argnames=("swiglu_limit", "blocks", "interpret"))


def random_weight(*shape: int, inputs: int = INPUTS, seed: int = 0) -> tuple[Columns, np.ndarray]:
    """Packed [*shape[:-1], I, O], and the same in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(256, size=(*shape, inputs // 32, 16), dtype=np.uint8)
    scales = rng.integers(121, 125, size=codes.shape[:-1], dtype=np.uint8)
    packed = Columns(jnp.asarray(columns_codes(codes)), jnp.asarray(columns_scales(scales)))
    return packed, oracle.mxfp4_decode(codes, scales).swapaxes(-1, -2)


def loop(x, weight: np.ndarray, bias, group_sizes: tuple[int, ...], *, limit: float | None = None) -> np.ndarray:
    """x [M, I], weight [E, I, O] or [E, 2, I, F], bias [E, O] or [E, F, 2]."""
    x, bias = np.asarray(x, np.float64), np.asarray(bias, np.float64)
    out, start = np.zeros((len(x), weight.shape[-1])), 0
    for expert, size in enumerate(group_sizes):
        rows = x[start : start + size]
        if limit is None:
            out[start : start + size] = rows @ weight[expert] + bias[expert]
        else:
            gate_up = np.stack([rows @ weight[expert, 0], rows @ weight[expert, 1]], axis=-1) + bias[expert]
            out[start : start + size] = oracle.swiglu(gate_up.reshape(size, 2 * weight.shape[-1]), limit=limit)
        start += size
    return out


def tolerance(expected: np.ndarray, dtype, *, swiglu: bool) -> np.ndarray:
    allowed = np.full_like(expected, TOLERANCE * np.sqrt(INPUTS) * (4 if swiglu else 1))  # 4: the slope of swiglu
    return allowed + (np.abs(expected) * BF16_ROUNDING if swiglu and dtype == jnp.bfloat16 else 0)


NUM_ROWS = 40
GROUPS = [
    (0, 7, 0, 20, 3),  # the last ten rows belong to nobody
    (0, 0, 0, 0, 0),
    (40, 0, 0, 0, 0),
    (0, 0, 0, 0, 40),
    (0, 16, 16, 0, 8),  # groups begin where tiles do
    (8, 8, 8, 8, 8),
    (1, 1, 1, 1, 1),  # tiles of nobody at all
]


@pytest.mark.parametrize("group_sizes", GROUPS, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("swiglu", [True, False], ids=["swiglu", "product"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_agrees_with_a_loop(group_sizes: tuple[int, ...], packed: bool, swiglu: bool, dtype):
    rng = np.random.default_rng(1)
    weight, matrices = random_weight(EXPERTS, *([2] if swiglu else []), OUTPUTS)
    x = jnp.asarray(rng.standard_normal((NUM_ROWS, INPUTS)), dtype).at[sum(group_sizes) :].set(jnp.nan)
    bias = jnp.asarray(rng.standard_normal((EXPERTS, OUTPUTS, *([2] if swiglu else []))), dtype)
    given = weight if packed else jnp.asarray(matrices, dtype)  # bfloat16 holds them exactly too
    limit = LIMIT if swiglu else None
    out = run(x, given, bias, jnp.asarray(group_sizes), swiglu_limit=limit, blocks=BLOCKS, interpret=True)
    assert out.dtype == (dtype if swiglu else jnp.float32)
    expected = loop(x, matrices, bias, group_sizes, limit=limit)
    assert (np.abs(np.asarray(out, np.float64) - expected) <= tolerance(expected, dtype, swiglu=swiglu)).all()


@pytest.mark.parametrize(("inputs", "num_rows"), [(32, 1), (256, 9), (608, 9)])  # fewer rows than the smallest tile
def test_any_number_of_blocks_and_rows(inputs: int, num_rows: int):
    """1, 8 and 19 MXFP4 blocks: eight are unpacked at a time."""
    weight, matrices = random_weight(2, 24, inputs=inputs)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((num_rows, inputs)), jnp.float32)
    group_sizes = (num_rows // 2, num_rows - num_rows // 2)
    out = run(x, weight, jnp.zeros((2, 24)), jnp.asarray(group_sizes), interpret=True)
    np.testing.assert_allclose(out, loop(x, matrices, np.zeros((2, 24)), group_sizes), atol=TOLERANCE * np.sqrt(inputs))


@pytest.mark.parametrize("float4", [False, True], ids=["by-table", "by-float4"])
def test_unpacking_is_exact_for_every_byte_and_scale(float4: bool):
    """One row of x picks one input. Output s has scale s, its 16 blocks the bytes 0 to 255 in order."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (1, 256, 16))
    weight = Columns(jnp.asarray(columns_codes(codes)), jnp.asarray(columns_scales(scales)))
    x = jnp.eye(512, dtype=jnp.bfloat16)
    out = np.asarray(
        run(x, weight, jnp.zeros((1, 256)), jnp.array([512]), blocks=Blocks(float4=float4), interpret=True)
    )
    expected = np.asarray(decode(codes[0], scales[0], jnp.float32)).T
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(np.arange(256) > 252, out.shape))
    np.testing.assert_array_equal(out[:, 2:253], expected[:, 2:253])
    assert (np.abs(out[:, 0] - expected[:, 0]) <= 6 * 2.0**-127).all()
    denormal = np.abs(expected[:, 1]) < 2.0**-126
    np.testing.assert_array_equal(out[:, 1], np.where(denormal, 0, expected[:, 1]))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_experts_without_rows_are_not_read(packed: bool):
    """Theirs are NaN: one value that is read and multiplied, even by zero, would be seen."""
    group_sizes = (0, 6, 0, 5, 0)
    idle = np.array(group_sizes) == 0
    weight, matrices = random_weight(EXPERTS, OUTPUTS)
    weight = Columns(weight.codes, weight.scales.at[idle].set(255))
    given = weight if packed else jnp.asarray(matrices, jnp.float32).at[idle].set(jnp.nan)
    bias = jnp.zeros((EXPERTS, OUTPUTS)).at[idle].set(jnp.nan)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((40, INPUTS)), jnp.float32)
    assert np.isfinite(run(x, given, bias, jnp.asarray(group_sizes), blocks=BLOCKS, interpret=True)).all()
    seen = run(x, given, bias, jnp.array([1, 6, 0, 5, 0]), blocks=BLOCKS, interpret=True)
    assert np.isnan(seen[:1]).all()
    assert np.isfinite(seen[1:]).all()


def test_each_device_of_a_mesh_computes_its_own_experts():
    """As the model calls it: inside of shard_map, with a different number of rows on each device."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    weight, matrices = random_weight(4, 24)
    rng = np.random.default_rng(3)
    x, bias = jnp.asarray(rng.standard_normal((20, INPUTS)), jnp.float32), jnp.zeros((4, 24))
    group_sizes = jnp.array([0, 3, 9, 1])

    def local(x, weight, bias, group_sizes):
        return moe_matmul(x, weight, bias, group_sizes, interpret=True)

    cut = P("expert")
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))(
        x, weight, bias, group_sizes
    )
    first, second = loop(x[:10], matrices[:2], bias[:2], (0, 3)), loop(x[10:], matrices[2:], bias[2:], (9, 1))
    np.testing.assert_allclose(out, np.concatenate([first, second]), atol=TOLERANCE * np.sqrt(INPUTS))


# ---- items of work ---------------------------------------------------------------------------------------------------


items_of = jax.jit(_items, static_argnames=("num_rows", "tile"))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    num_rows=st.sampled_from([3, 64, 135]),
    tile=st.sampled_from([16, 32]),
)
def test_items_cover_each_row_once_and_change_experts_seldom(sizes: list[int], num_rows: int, tile: int):
    group_sizes = np.diff(np.minimum(np.cumsum(sizes), num_rows), prepend=0)
    items = jax.tree.map(np.asarray, items_of(jnp.asarray(group_sizes, jnp.int32), num_rows=num_rows, tile=tile))
    owner = np.full(num_rows, -1)
    owner[: group_sizes.sum()] = np.repeat(np.arange(len(group_sizes)), group_sizes)
    found, row = np.full(num_rows, -1), np.arange(num_rows)
    busy = items.start < items.end
    for i in np.flatnonzero(busy):
        rows = (row // tile == items.tile[i]) & (row >= items.start[i]) & (row < items.end[i])
        assert rows.any()
        assert (found[rows] == -1).all()
        found[rows] = items.expert[i]
    np.testing.assert_array_equal(found, owner)
    # Every tile is written, in one go, and the weights of an expert are copied once: where its number changes.
    np.testing.assert_array_equal(np.unique(items.tile), np.arange(-(-num_rows // tile)))
    assert (np.diff(items.tile) >= 0).all()
    visited = np.flatnonzero(group_sizes)
    changes = items.expert[np.flatnonzero(np.diff(items.expert, prepend=-1))]
    np.testing.assert_array_equal(changes, visited if visited.size else [len(group_sizes) - 1])
    np.testing.assert_array_equal(items.x_tile[busy], items.tile[busy])
    if busy.any():  # for rows of nobody nothing is copied
        assert (items.x_tile[~busy] == items.x_tile[busy][-1]).all()


# ---- lowering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("num_rows", [4, 8192])
def test_lowers_for_tpu_at_the_sizes_of_the_release(num_rows: int, packed: bool):
    """Mosaic's program is made, which refuses blocks and operations that it does not know; it is not compiled."""
    experts, width = 32, 2880
    x = jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((experts, 2, width, width), jnp.bfloat16)
    if packed:
        codes = jax.ShapeDtypeStruct((experts, 2, width // 2, width), jnp.uint8)
        weight = Columns(codes, jax.ShapeDtypeStruct((experts, 2, width // 32, width), jnp.uint8))
    bias = jax.ShapeDtypeStruct((experts, width, 2), jnp.bfloat16)
    traced = run.trace(x, weight, bias, jax.ShapeDtypeStruct((experts,), jnp.int32), swiglu_limit=7.0)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
