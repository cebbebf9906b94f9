"""The layout of columns: where each byte goes, that none is lost, and that shards are converted where they lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.columns import Columns, columns_codes, columns_scales, placed, rows_codes, rows_scales
from tests import oracle

EXPERTS, PARTS, OUTPUTS, BLOCKS = 4, 2, 24, 6


@pytest.fixture(scope="module")
def released() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(256, size=(EXPERTS, PARTS, OUTPUTS, BLOCKS, 16), dtype=np.uint8)
    return codes, rng.integers(117, 131, size=codes.shape[:-1], dtype=np.uint8)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_every_byte_goes_where_the_first_lines_say_and_comes_back(released, array):
    codes, scales = map(array, released)
    by_column = columns_codes(codes)
    assert by_column.shape == (EXPERTS, PARTS, 16 * BLOCKS, OUTPUTS)
    for block, byte in [(0, 0), (0, 15), (5, 3)]:
        np.testing.assert_array_equal(by_column[..., 16 * block + byte, :], codes[..., block, byte])
    assert columns_scales(scales).shape == (EXPERTS, PARTS, BLOCKS, OUTPUTS)
    np.testing.assert_array_equal(columns_scales(scales)[..., 5, :], scales[..., 5])
    np.testing.assert_array_equal(rows_codes(by_column), codes)
    np.testing.assert_array_equal(rows_scales(columns_scales(scales)), scales)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "float32"])
def test_decodes_to_the_matrix_with_inputs_first(released, dtype):
    codes, scales = released
    packed = Columns(columns_codes(codes), columns_scales(scales))
    assert packed.shape == (EXPERTS, PARTS, 32 * BLOCKS, OUTPUTS)
    assert packed.nbytes == codes.nbytes + scales.nbytes
    assert packed[1].shape == packed.shape[1:]
    expected = oracle.mxfp4_decode(codes, scales).swapaxes(-1, -2)
    np.testing.assert_array_equal(np.asarray(packed.decode(dtype), np.float64), expected)
    np.testing.assert_array_equal(np.asarray(packed[2, 1].decode(dtype), np.float64), expected[2, 1])


def test_it_passes_through_transformations_that_put_no_arrays_into_it():
    packed = Columns(jnp.zeros((5, 48, 7), jnp.uint8), jnp.ones((5, 3, 7), jnp.uint8))
    assert jax.tree.map(lambda x: x.shape, packed).scales == (5, 3, 7)
    assert jax.eval_shape(lambda p: p, packed).shape == (5, 96, 7)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert paths == [".codes", ".scales"]


@pytest.mark.parametrize("cut", ["outputs", "blocks"])
def test_shards_are_converted_where_they_lie(released, cut: str):
    """Experts and either axis of the matrix are cut, as on a mesh: no byte has to move to another device."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor"))
    outputs, blocks = ("tensor", None) if cut == "outputs" else (None, "tensor")

    def place(spec: P, ndim: int) -> Format:
        return placed(NamedSharding(mesh, spec), ndim=ndim)

    codes, scales = (
        jax.device_put(array, NamedSharding(mesh, P("expert", None, outputs, blocks))) for array in released
    )
    targets = (place(P("expert", None, blocks, outputs), 4),) * 2
    convert = jax.jit(lambda codes, scales: (columns_codes(codes), columns_scales(scales)), out_shardings=targets)
    compiled = convert.lower(codes, scales).compile()
    assert not re.search(r"all-|collective|reduce-scatter", compiled.as_text())
    by_column = Columns(*convert(codes, scales))
    assert by_column.codes.sharding.spec == P("expert", None, blocks, outputs)
    expected = oracle.mxfp4_decode(*released).swapaxes(-1, -2)
    np.testing.assert_array_equal(by_column.decode(jnp.float32), expected)
