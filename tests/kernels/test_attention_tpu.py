"""The TPU's attention kernel in the interpreter, against the oracle: odd sizes, small blocks, NaN in unused slots."""

import functools
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels import tuned
from gptoss_jax.kernels.attention import tpu, xla
from tests import oracle

TOLERANCE = 1e-5  # values are of order one and their weights sum to one: a float32 softmax errs by a few 1e-6
SMALL = tpu.Blocks(rows=48, keys=128, most_keys=256, pack=2, packs=2)  # several blocks of everything


class Case:
    """Random queries of rows that begin at different positions; every slot that no query may see holds NaN."""

    def __init__(
        self,
        first_query: list[int],
        num_queries: int,
        *,
        heads: int = 12,
        kv_heads: int = 4,
        head_dim: int = 16,
        dtype: np.dtype | type = np.float32,
    ):
        rng = np.random.default_rng(0)
        rows, self.end = len(first_query), [first + num_queries for first in first_query]

        def random(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(dtype)

        self.first_query, self.num_queries = first_query, num_queries
        self.q = random(rows, num_queries, heads, head_dim)
        self.k, self.v = (random(rows, max(self.end), kv_heads, head_dim) for _ in range(2))
        self.sinks = rng.standard_normal(heads, np.float32)

    def expected(self, *, window: int | None) -> np.ndarray:
        out = np.empty(self.q.shape)
        for row, end in enumerate(self.end):
            q, k, v = (x[row : row + 1].astype(np.float64) for x in (self.q, self.k[:, :end], self.v[:, :end]))
            out[row] = oracle.attention(q, k, v, self.sinks.astype(np.float64), window=window)[0]
        return out

    def run(self, *, window: int | None, blocks: tpu.Blocks | None = SMALL, unused: int = 0) -> np.ndarray:
        """Of `full` where there is no window, over a cache with `unused` slots behind the longest row."""
        keys = (self._cache(x, unused) if window is None else self._windows(x, window) for x in (self.k, self.v))
        out = _attend(self.q, *keys, self.sinks, np.array(self.first_query), window=window, blocks=blocks)
        assert out.dtype == self.q.dtype
        return np.asarray(out).astype(np.float64)

    def _cache(self, x: np.ndarray, unused: int) -> np.ndarray:
        """Each key where its position says."""
        cache = np.full((len(x), max(self.end) + unused, *x.shape[2:]), np.nan, x.dtype)
        for row, end in enumerate(self.end):
            cache[row, :end] = x[row, :end]
        return cache

    def _windows(self, x: np.ndarray, window: int) -> np.ndarray:
        """The window before the first query and then the queries' own."""
        near = np.full((len(x), window + self.num_queries, *x.shape[2:]), np.nan, x.dtype)
        for row, first in enumerate(self.first_query):
            near[row, max(window - first, 0) :] = x[row, max(first - window, 0) : self.end[row]]
        return near


@functools.partial(jax.jit, static_argnames=("window", "blocks"))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array,
    first_query: jax.Array,
    *,
    window: int | None,
    blocks: tpu.Blocks | None,
) -> jax.Array:
    if window is None:
        return tpu.full(q, k, v, sinks, first_query=first_query, blocks=blocks, interpret=True)
    return tpu.sliding(q, k, v, sinks, first_query=first_query, window=window, blocks=blocks, interpret=True)


@pytest.mark.parametrize(
    ("first_query", "num_queries", "unused"),
    [([0], 21, 0), ([290, 0, 7], 13, 403), ([5, 127, 128, 300, 0], 1, 403), ([300, 0, 87], 41, 1)],
    ids=str,
)
def test_full_agrees_with_the_oracle(first_query: list[int], num_queries: int, unused: int):
    """A prompt, chunks over a cache and decode; rows that end within, at and right behind a block of 128 keys."""
    case = Case(first_query, num_queries)
    np.testing.assert_allclose(case.run(window=None, unused=unused), case.expected(window=None), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("first_query", "num_queries", "window"),
    [
        ([0], 21, 1),
        ([300, 0, 8, 9, 10], 1, 9),
        ([300, 0, 149, 150, 151], 1, 150),
        ([0, 140, 400], 203, 9),
        ([0, 140, 400], 203, 150),
    ],
    ids=str,
)
def test_sliding_agrees_with_the_oracle(first_query: list[int], num_queries: int, window: int):
    case = Case(first_query, num_queries)
    np.testing.assert_allclose(case.run(window=window), case.expected(window=window), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "first_query", "num_queries"),
    [(16, 2, [1500, 0], 1), (12, 3, [1030, 5], 2), (8, 1, [1100, 3], 70)],
    ids=str,
)
def test_released_head_dim_and_blocks(heads: int, kv_heads: int, first_query: list[int], num_queries: int):
    """The heads of the release's shards, and three key heads, of which two do not make a pair."""
    case = Case(first_query, num_queries, heads=heads, kv_heads=kv_heads, head_dim=64)
    for window in (None, 128):
        out = case.run(window=window, blocks=None, unused=900)
        np.testing.assert_allclose(out, case.expected(window=window), atol=TOLERANCE)


@pytest.mark.parametrize("num_queries", [1, 50])
def test_bfloat16(num_queries: int):
    case = Case([700, 2], num_queries, heads=16, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    for window in (None, 9):
        # Weights and the result are rounded to 8 bits each: 2^-8 of values that reach 3.
        np.testing.assert_allclose(case.run(window=window), case.expected(window=window), atol=2e-2)


@pytest.mark.parametrize("pack", [1, 2, 4])
def test_packed_key_heads_stay_apart(pack: int):
    """A value moves the query heads that share its key head, whichever key heads lie beside it."""
    case = Case([200, 130], 3)
    blocks = tpu.Blocks(keys=128, most_keys=128, pack=pack)
    before = case.run(window=None, blocks=blocks)
    np.testing.assert_allclose(before, case.expected(window=None), atol=TOLERANCE)
    case.v[:, :, 2] += 1
    moved = np.flatnonzero(np.abs(case.run(window=None, blocks=blocks) - before).max(axis=(0, 1, 3)))
    assert moved.tolist() == [6, 7, 8]


@pytest.mark.parametrize("window", [None, 9, 128])
def test_the_window_has_two_sharp_edges(window: int | None):
    """Moving one value moves exactly the queries that see it, across blocks of 16 queries and 128 keys."""
    case, at = Case([112], 160), 128
    before = case.run(window=window)
    case.v[0, at] += 1
    moved = np.flatnonzero(np.abs(case.run(window=window) - before).max(axis=(0, 2, 3)))
    assert (moved + 112).tolist() == list(range(at, 272 if window is None else at + window))


@pytest.mark.parametrize("sink", [-1e4, 50.0, 1e4])
def test_extreme_sinks(sink: float):
    """At -1e4 the sink takes nothing, at 1e4 everything."""
    case = Case([0, 200], 11)
    case.sinks[:] = sink
    for window in (None, 9):
        out = case.run(window=window)
        np.testing.assert_allclose(out, case.expected(window=window), atol=TOLERANCE)
        assert (sink < 100) == bool(out.any())


@pytest.mark.parametrize(("first_query", "window"), [(-70, None), (-4000, 209)])
def test_a_query_that_sees_nothing_is_zero(first_query: int, window: int | None):
    """Padding may stand anywhere, even where no key is: all of its softmax is the sink."""
    q, kv, sinks = jnp.ones((1, 40, 12, 16)), jnp.full((1, 249, 4, 16), jnp.nan), jnp.zeros(12)
    assert not np.asarray(_attend(q, kv, kv, sinks, jnp.array([first_query]), window=window, blocks=SMALL)).any()


def test_padding_behind_the_last_slot_sees_the_slots_there_are():
    """As in the reference, whose rows may be padded beyond what the cache can hold."""
    case = Case([190], 13)
    q, k, v, sinks = (jnp.asarray(x) for x in (case.q, case.k[:, :200], case.v[:, :200], case.sinks))
    first = jnp.array([190])
    out = _attend(q, k, v, sinks, first, window=None, blocks=SMALL)
    np.testing.assert_allclose(out, xla.full(q, k, v, sinks, first_query=first), atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 1, 9, 140, 300])
@pytest.mark.parametrize(("num_queries", "spare"), [(1, 300), (37, 0), (200, 77)])
def test_the_blocks_that_are_fetched_are_those_in_sight(window: int | None, num_queries: int, spare: int):
    num_keys = num_queries + (spare + 500 if window is None else window)
    q = jnp.zeros((1, 4, num_queries * 3, 16))
    steps = tpu._Steps.cut(q, num_queries=num_queries, num_keys=num_keys, window=window, blocks=SMALL)
    firsts = np.array([0, 1, 7, 126, 127, 128, 129, 255, 256, 500])
    counts = []
    for first in firsts:
        t, key = np.arange(num_queries)[:, None], np.arange(num_keys)
        last = t + (first if window is None else window)
        seen = (key <= last) & (key >= (0 if window is None else np.maximum(t + 1, window - first)))
        for i in range(steps.query_blocks):
            blocks = np.flatnonzero(seen[i * steps.queries : (i + 1) * steps.queries].any(axis=0)) // steps.keys
            low, high = steps.key_blocks(int(first), i)
            assert (int(low), int(high)) == (blocks[0], blocks[-1])
            counts.append(blocks[-1] - blocks[0] + 1)
    steps_made = int(steps.key_steps(jnp.asarray(firsts, jnp.int32)))
    assert steps_made == max(counts) if window is None else steps_made >= max(counts)


@pytest.mark.parametrize("window", [None, 9])
def test_under_shard_map(window: int | None):
    """Rows over two devices and heads over two: each holds two of the key heads and their queries."""
    case = Case([40, 3], 7)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    heads = P("data", None, "tensor", None)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, first: jax.Array) -> jax.Array:
        if window is None:
            return tpu.full(q, k, v, sinks, first_query=first, interpret=True)
        return tpu.sliding(q, k, v, sinks, first_query=first, window=window, interpret=True)

    specs = (heads, heads, heads, P("tensor"), P("data"))
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))
    k, v = (case._cache(x, 13) if window is None else case._windows(x, window) for x in (case.k, case.v))
    out = sharded(case.q, k, v, case.sinks, np.asarray(case.first_query, np.int32))
    np.testing.assert_allclose(out, case.expected(window=window), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("num_queries", [1, 77])
def test_lowers_for_tpu(num_queries: int, dtype: jax.typing.DTypeLike):
    """Without a TPU or its compiler: Pallas' own rules, for a layer of each kind."""
    q = jax.ShapeDtypeStruct((2, num_queries, 12, 16), dtype)
    kv = jax.ShapeDtypeStruct((2, 1001, 4, 16), dtype)
    near = jax.ShapeDtypeStruct((2, 9 + num_queries, 4, 16), dtype)
    sinks, first = jax.ShapeDtypeStruct((12,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def both(q: jax.Array, kv: jax.Array, near: jax.Array, sinks: jax.Array, first: jax.Array) -> jax.Array:
        q = tpu.full(q, kv, kv, sinks, first_query=first)
        return tpu.sliding(q, near, near, sinks, first_query=first, window=9)

    lowered = jax.jit(both).trace(q, kv, near, sinks, first).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call") == 2


def test_types_that_the_kernel_does_not_take():
    q, kv = jnp.zeros((1, 1, 4, 16), jnp.bfloat16), jnp.zeros((1, 9, 2, 16), jnp.float32)
    with pytest.raises(Unsupported, match="bfloat16, float32 and float32: convert them"):
        tpu.full(q, kv, kv, jnp.zeros(4), first_query=jnp.zeros(1, jnp.int32), interpret=True)


def test_tuned_sizes_are_sizes():
    """The default of the file is that of the code, and what a kind of device has of its own is complete."""
    table = json.loads(resources.files(tuned).joinpath("attention.tpu.json").read_text(encoding="utf-8"))
    assert tpu.Blocks(**table["default"]) == tpu.Blocks()
    for kind in table.keys() - {"default"}:
        sizes = tuned.find("attention", "tpu", device_kind=kind)
        assert sizes is not None
        assert sizes.keys() == table["default"].keys()
        assert tpu.Blocks(**sizes).keys % 128 == 0
