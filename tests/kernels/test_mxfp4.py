"""The MXFP4 codec against exact arithmetic in float64: every byte under every scale, and every rounding rule."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.mxfp4 import MXFP4, ScaleRule, decode, decode_on_host, encode, refuse_nan_scales

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)
# 6 * 2^(252 - 127) is the largest product of a code that a float still holds; the releases use scales around 120.
LARGEST_FINITE_SCALE = 252


@pytest.fixture(scope="module")
def every_byte_and_scale() -> MXFP4:
    """256 rows of 16 blocks: row s has scale s, its blocks the bytes 0 to 255 in order."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    return MXFP4(blocks, scales)


@pytest.fixture(scope="module")
def exact(every_byte_and_scale: MXFP4) -> np.ndarray:
    """The same values in float64, which holds all of them."""
    blocks = every_byte_and_scale.blocks
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(256, 512)
    values = np.ldexp(CODES[codes], np.arange(256)[:, None] - 127)
    values[255] = np.nan
    return values


# ---- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_decode_is_exact_for_every_byte_and_scale(every_byte_and_scale, exact, dtype, jitted: bool):
    decoder = jax.jit(decode, static_argnames="dtype") if jitted else decode
    decoded = np.asarray(decoder(every_byte_and_scale.blocks, every_byte_and_scale.scales, dtype))
    assert_same_bits(decoded, exact)


def test_decode_on_host_is_exact_for_every_byte_and_scale(every_byte_and_scale, exact):
    assert_same_bits(decode_on_host(every_byte_and_scale.blocks, every_byte_and_scale.scales), exact)


def assert_same_bits(decoded: np.ndarray, exact: np.ndarray) -> None:
    """Compares bits: a comparison of values calls -0 and 0 equal, and may take a denormal for zero."""
    assert decoded.shape == exact.shape
    with np.errstate(over="ignore"):
        expected = exact.astype(decoded.dtype)  # float64 to float32 or bfloat16: exact here, or past the range
    finite = np.isfinite(expected)
    assert (expected[finite].astype(np.float64) == exact[finite]).all(), "the judge itself rounded"
    assert (np.isnan(decoded) == np.isnan(exact)).all()
    unsigned = np.uint16 if decoded.dtype.itemsize == 2 else np.uint32
    numbers = ~np.isnan(exact)
    np.testing.assert_array_equal(decoded.view(unsigned)[numbers], expected.view(unsigned)[numbers])


def test_the_range_has_both_ends(exact):
    """The table of the tests above holds denormals of both dtypes and products past the largest float."""
    smallest = np.nanmin(np.abs(exact[exact != 0]))
    assert smallest == 2.0**-128 < np.finfo(np.float32).tiny
    with np.errstate(over="ignore"):
        past = np.isinf(exact.astype(np.float32)).any(axis=1)
    assert np.flatnonzero(past).tolist() == list(range(LARGEST_FINITE_SCALE + 1, 255))


# ---- encode ----------------------------------------------------------------------------------------------------------


def nearest_codes(values: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """By search: the code nearest to value / scale, of two the one with an even last bit, with the value's sign."""
    ratio = np.abs(np.ldexp(values, 127 - scale_bytes.astype(int)[..., None]))
    ratio = np.minimum(ratio, 1e3)  # at 1e300 float64 sees all codes equally far away
    distance = np.abs(ratio[..., None] - CODES[:8])
    ties = distance == distance.min(axis=-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    magnitude = even_first[np.argmax(ties[..., even_first], axis=-1)]
    return magnitude + 8 * np.signbit(values)


def searched_scale(largest: float, rule: ScaleRule) -> int:
    """By search over all scale bytes but NaN's; the smallest where a rule asks for less."""
    scales = np.ldexp(1.0, np.arange(255) - 127)
    if rule == "up":
        return int(np.flatnonzero(largest <= 6 * scales)[0])
    if rule == "even":  # to the nearest of 1, 1.5, 2, 3, 4, 6, 8, 12 ...: a tie goes to 1, 2, 4, whose last bit is 0
        grid = np.array([[1.0, 1.5]]) * np.ldexp(1.0, np.arange(-160, 140))[:, None]
        distance = np.abs(grid - largest)
        ties = distance == distance.min()
        largest = float(grid[:, 0][ties[:, 0]][0] if ties[:, 0].any() else grid[:, 1][ties[:, 1]][0])
    fits = np.flatnonzero(4 * scales <= largest)  # 4 = 2^2 is the largest power of two among the codes
    return int(fits[-1]) if fits.size else 0


def unpack(packed: MXFP4) -> np.ndarray:
    blocks = np.asarray(packed.blocks)
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)


def awkward_values() -> np.ndarray:
    """Blocks whose elements lie on, just below and just above every tie of the codes, at many magnitudes."""
    rng = np.random.default_rng(3)
    ties = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 1e-30])
    near = np.concatenate([ties, np.nextafter(ties, 9, dtype=np.float32), np.nextafter(ties, -9, dtype=np.float32)])
    near = np.concatenate([near, -near]).astype(np.float32)
    magnitudes = np.ldexp(np.float32(1), rng.integers(-135, 125, size=(200, 1)))
    return (rng.choice(near, size=(200, 96)) * magnitudes).astype(np.float32)


@pytest.mark.parametrize("rule", ["even", "floor", "up"])
def test_encode_agrees_with_a_search_over_all_scales_and_codes(rule: ScaleRule):
    values = awkward_values()
    packed = encode(values, rule=rule)
    blocks = values.reshape(200, 3, 32).astype(np.float64)
    scales = np.vectorize(searched_scale)(np.abs(blocks).max(axis=-1), rule)
    np.testing.assert_array_equal(packed.scales, scales)
    np.testing.assert_array_equal(unpack(packed), nearest_codes(blocks, scales))


def test_encode_takes_given_scales_and_saturates():
    values = awkward_values()
    scales = np.random.default_rng(4).integers(0, 255, size=(200, 3), dtype=np.uint8)
    packed = encode(values, rule="reuse", scales=scales)
    np.testing.assert_array_equal(packed.scales, scales)
    expected = nearest_codes(values.reshape(200, 3, 32).astype(np.float64), scales)
    np.testing.assert_array_equal(unpack(packed), expected)
    assert {7, 15} <= set(expected.ravel().tolist())


@pytest.mark.parametrize(
    ("largest", "even", "floor", "up"),
    [(4.0, 127, 127, 127), (6.0, 127, 127, 127), (6.5, 127, 127, 128), (7.0, 128, 127, 128), (8.0, 128, 128, 128)],
)
def test_scale_rules_by_hand(largest: float, even: int, floor: int, up: int):
    values = np.zeros((1, 32), np.float32)
    values[0, 5] = -largest
    assert [int(encode(values, rule=rule).scales[0, 0]) for rule in ("even", "floor", "up")] == [even, floor, up]


def test_rounding_by_hand():
    """Ties go to the even code, 6 is the most, zero and what rounds to it keep their sign."""
    values = np.zeros((1, 32), np.float32)
    values[0, :12] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -7.0, -0.0, -0.2, -5.1]
    codes = unpack(encode(values, rule="floor"))[0, 0]
    assert CODES[codes[:9]].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -6]
    assert codes[9:12].tolist() == [8, 8, 15]


def test_a_block_of_zeros_keeps_their_signs():
    values = np.zeros((2, 64), np.float32)
    values[1, 1::2] = -0.0
    decoded = np.asarray(encode(values, rule="even").decode(jnp.float32))
    np.testing.assert_array_equal(decoded.view(np.uint32), values.view(np.uint32))


bytes_of = st.integers(0, 255)


@given(
    blocks=st_np.arrays(np.uint8, (3, 5, 16), elements=bytes_of),
    scales=st_np.arrays(np.uint8, (3, 5), elements=st.integers(0, LARGEST_FINITE_SCALE)),
    in_bf16=st.booleans(),
)
def test_decode_then_encode_with_the_same_scales_gives_the_same_bytes(
    blocks: np.ndarray, scales: np.ndarray, in_bf16: bool
):
    """For every scale up to 252, far past the released ones: also where all values are denormal, also for -0."""
    packed = MXFP4(blocks, scales)
    again = encode(np.asarray(packed.decode(jnp.bfloat16 if in_bf16 else jnp.float32)), rule="reuse", scales=scales)
    np.testing.assert_array_equal(again.blocks, blocks)
    np.testing.assert_array_equal(again.scales, scales)


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_scales_past_the_range_are_refused_rather_than_changed(every_byte_and_scale, scale: int):
    """Some of these codes decode to inf (or NaN), which no longer says which code it was."""
    row = every_byte_and_scale[scale]
    with pytest.raises(UserError, match="neither NaN nor inf"):
        encode(np.asarray(row.decode(jnp.float32)), rule="reuse", scales=row.scales)


def test_a_finite_value_under_a_nan_scale_is_refused():
    with pytest.raises(UserError, match=r"scale byte 255 \(NaN\) at \(1, 0\)"):
        encode(np.ones((2, 32), np.float32), rule="reuse", scales=np.array([[127], [255]], np.uint8))


@pytest.mark.parametrize("rule", ["even", "floor", "up"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64], ids=["bf16", "float64"])
def test_encode_takes_every_float(rule: ScaleRule, dtype):
    values = np.random.default_rng(0).standard_normal((7, 64)).astype(ml_dtypes.bfloat16)
    expected = encode(values.astype(np.float32), rule=rule)
    packed = encode(values.astype(dtype), rule=rule)
    np.testing.assert_array_equal(packed.blocks, expected.blocks)
    np.testing.assert_array_equal(packed.scales, expected.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encode_refuses_what_it_cannot_hold(bad: float):
    values = np.zeros((3, 64), np.float32)
    values[2, 40] = bad
    with pytest.raises(UserError, match=rf"value at \(2, 40\) is {bad}: MXFP4 holds neither NaN nor inf"):
        encode(values, rule="even")


def test_encode_refuses_what_does_not_fit_together():
    values, scales = np.zeros((3, 64), np.float32), np.zeros((3, 2), np.uint8)
    with pytest.raises(UserError, match="last axis is 63, no multiple of 32"):
        encode(values[:, :63], rule="even")
    with pytest.raises(UserError, match="'reuse' needs them"):
        encode(values, rule="reuse")
    with pytest.raises(UserError, match="'up' was given some"):
        encode(values, rule="up", scales=scales)
    with pytest.raises(UserError, match=r"scales have shape \(3, 1\), the blocks of the values need \(3, 2\)"):
        encode(values, rule="reuse", scales=scales[:, :1])


# ---- the packed array ------------------------------------------------------------------------------------------------


def test_it_is_a_pytree_that_knows_its_logical_shape():
    packed = MXFP4(jnp.zeros((5, 7, 3, 16), jnp.uint8), jnp.ones((5, 7, 3), jnp.uint8))
    assert packed.shape == (5, 7, 96)
    assert packed.nbytes == 5 * 7 * 3 * 17
    assert packed[2].shape == (7, 96)
    assert packed.reshape_rows(35).shape == (35, 96)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p))(packed)
    assert isinstance(doubled, MXFP4)
    assert int(doubled.scales.min()) == 2
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert paths == [".blocks", ".scales"]


def test_it_passes_through_transformations_that_put_no_arrays_into_it():
    packed = MXFP4(jnp.zeros((5, 3, 16), jnp.uint8), jnp.ones((5, 3), jnp.uint8))
    assert jax.tree.map(lambda x: x.shape, packed).scales == (5, 3)
    assert jax.eval_shape(lambda p: p, packed).shape == (5, 96)
    one_row = jax.vmap(lambda p: p.decode(jnp.float32))(packed)
    np.testing.assert_array_equal(one_row, packed.decode(jnp.float32))


def test_nan_scales_are_refused_by_name_and_position():
    scales = np.full((4, 3, 2), 254, np.uint8)
    refuse_nan_scales(scales, name="fine")
    refuse_nan_scales(scales[:0], name="empty")
    scales[1, 2, 0] = 255
    with pytest.raises(UserError, match=r"tensor layers\.3\.scales holds scale byte 255 \(NaN\) at \(1, 2, 0\)"):
        refuse_nan_scales(scales, name="layers.3.scales")
