"""The caches against plain lists of what each position was given, fed in chunks of many sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.model.cache import Cache, FullCache, RingCache, _scatter_behind, _update_behind
from tests.tiny import TINY

ROWS, WINDOW, CAPACITY, KV_HEADS, HEAD_DIM = 3, 9, 60, 4, 16

chunks = st.lists(
    st.integers(1, 21).flatmap(lambda size: st.tuples(*[st.integers(0, size)] * ROWS).map(lambda c: (size, c))),
    min_size=1,
    max_size=4,
).filter(lambda pieces: sum(size for size, _ in pieces) <= CAPACITY)


def empty(slots: int) -> tuple[jax.Array, jax.Array]:
    shape = (ROWS, slots, KV_HEADS, HEAD_DIM)
    return jnp.zeros(shape), jnp.zeros(shape)


def numbered(row: int, position: int) -> float:
    """One number for each token of each row, never 0."""
    return 1.0 + row * 1000 + position


def feed(lengths: list[int], size: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Keys that say their row and position, or -1 for padding; values are the keys, negated."""
    k = np.full((ROWS, size, KV_HEADS, HEAD_DIM), -1.0, np.float32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for t in range(count):
            k[row, t] = numbered(row, length + t)
    return k, -k


@settings(max_examples=25)
@given(chunks)
def test_the_ring_hands_out_the_window_and_the_chunk(pieces: list[tuple[int, tuple[int, ...]]]):
    ring, lengths = RingCache(*empty(WINDOW)), [0] * ROWS
    for size, counts in pieces:
        k, v = feed(lengths, size, counts)
        arguments = {"length": jnp.asarray(lengths), "count": jnp.asarray(counts)}
        keys, values, ring = ring.extend(jnp.asarray(k), jnp.asarray(v), **arguments)
        np.testing.assert_array_equal(keys[:, WINDOW:], k)
        for row, length in enumerate(lengths):
            for slot, position in enumerate(range(length - WINDOW, length)):
                if position >= 0:
                    assert (keys[row, slot] == numbered(row, position)).all(), (row, position)
        past = np.asarray(keys) != -1  # of padding the keys are -1 and the values 1
        np.testing.assert_array_equal(np.asarray(values)[past], -np.asarray(keys)[past])
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
    # In the end each position of the last window lies in its slot.
    for row, length in enumerate(lengths):
        for position in range(max(0, length - WINDOW), length):
            assert (ring.k[row, position % WINDOW] == numbered(row, position)).all()
            assert (ring.v[row, position % WINDOW] == -numbered(row, position)).all()


@settings(max_examples=25)
@given(chunks)
def test_the_full_cache_keeps_every_position(pieces: list[tuple[int, tuple[int, ...]]]):
    cache, lengths = FullCache(*empty(CAPACITY)), [0] * ROWS
    for size, counts in pieces:
        k, v = feed(lengths, size, counts)
        arguments = {"length": jnp.asarray(lengths), "count": jnp.asarray(counts)}
        keys, values, cache = cache.extend(jnp.asarray(k), jnp.asarray(v), **arguments)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        expected = np.zeros((ROWS, CAPACITY))
        for row, length in enumerate(lengths):
            expected[row, :length] = [numbered(row, position) for position in range(length)]
        for found in (keys, cache.k, -values, -cache.v):
            np.testing.assert_array_equal(found, np.broadcast_to(expected[..., None, None], found.shape))


def test_writing_past_the_capacity_overwrites_nothing():
    cache = FullCache(*(x + 5 for x in empty(4)))
    k, v = feed([2, 3, 4], 3, (3, 3, 3))
    arguments = {"length": jnp.array([2, 3, 4]), "count": jnp.array([3, 3, 3])}
    _, _, grown = cache.extend(jnp.asarray(k), jnp.asarray(v), **arguments)
    expected = [[5, 5, numbered(0, 2), numbered(0, 3)], [5, 5, 5, numbered(1, 3)], [5, 5, 5, 5]]
    np.testing.assert_array_equal(grown.k[:, :, 0, 0], expected)


# On a TPU, where other devices scatter, slices are written in place: platform_dependent hides the one or the other.
scatter, update = jax.jit(_scatter_behind), jax.jit(_update_behind)


@given(
    st.sampled_from([(20, 1), (20, 7), (20, 20), (1, 1)]).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes),
            st.tuples(*[st.integers(0, sizes[0] + 3)] * ROWS),
            st.tuples(*[st.integers(0, sizes[1])] * ROWS),
        )
    )
)
def test_slices_are_written_as_a_scatter_writes(
    case: tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]],
):
    """Wherever rows stand, at the end, across it and past it too."""
    (slots, size), lengths, counts = case
    rng = np.random.default_rng(slots + size)
    buffer = rng.standard_normal((ROWS, slots, KV_HEADS, HEAD_DIM)).astype(np.float32)
    values = rng.standard_normal((ROWS, size, KV_HEADS, HEAD_DIM)).astype(np.float32)
    arguments = buffer, values, jnp.asarray(lengths, jnp.int32), jnp.asarray(counts, jnp.int32)
    expected = buffer.copy()
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        kept = max(0, min(count, slots - length))
        expected[row, length : length + kept] = values[row, :kept]
    np.testing.assert_array_equal(update(*arguments), expected)
    np.testing.assert_array_equal(scatter(*arguments), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_an_empty_cache_has_a_ring_for_sliding_layers_and_all_the_room_for_others(dtype):
    cache = Cache.empty(TINY, rows=5, capacity=77, dtype=dtype)
    assert [type(layer) for layer in cache.layers] == [RingCache, FullCache] * 3
    for layer, slots in zip(cache.layers, [9, 77] * 3, strict=True):
        assert layer.k.shape == layer.v.shape == (5, slots, 4, 16)
        assert layer.k.dtype == layer.v.dtype == dtype
    assert cache.length.tolist() == [0] * 5
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    assert len(set(buffers)) == len(buffers), "two arrays share memory: donating one would delete the other"


def test_the_cache_passes_through_transformations_that_put_no_arrays_into_it():
    cache = Cache.empty(TINY, rows=2, capacity=30, dtype=jnp.float32)
    assert jax.tree.map(lambda x: x.shape, cache).layers[1].k == (2, 30, 4, 16)
    assert jax.eval_shape(lambda c: c, cache).length.shape == (2,)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)}
    assert {".length", ".layers[0].k", ".layers[5].v"} <= names
