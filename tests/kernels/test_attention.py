"""Attention with sinks against the oracle, one row at a time: windows, ragged rows, blocks of queries, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.attention import full, sliding, xla
from gptoss_jax.kernels.choose import implementations
from tests import oracle

HEADS, KV_HEADS, HEAD_DIM = 12, 4, 16
TOLERANCE = 1e-5  # values are of order one and their weights sum to one: a float32 softmax errs by a few 1e-6
GARBAGE = 50.0  # in slots that no query may see: one of them in sight would win most of the softmax


class Case:
    """Random queries of rows that begin at different positions, each row with keys and values up to its last query."""

    def __init__(self, first_query: list[int], num_queries: int, *, seed: int = 0, sinks: float | None = None):
        rng = np.random.default_rng(seed)
        rows, end = len(first_query), max(first_query) + num_queries
        self.first_query = first_query
        self.q = rng.standard_normal((rows, num_queries, HEADS, HEAD_DIM), np.float32)
        self.k = rng.standard_normal((rows, end, KV_HEADS, HEAD_DIM), np.float32)
        self.v = rng.standard_normal((rows, end, KV_HEADS, HEAD_DIM), np.float32)
        self.sinks = rng.standard_normal(HEADS, np.float32) if sinks is None else np.full(HEADS, sinks, np.float32)

    def expected(self, *, window: int | None) -> np.ndarray:
        out = np.empty(self.q.shape)
        for row, first in enumerate(self.first_query):
            seen = slice(0, first + self.q.shape[1])
            q, k, v = (x.astype(np.float64)[None] for x in (self.q[row], self.k[row, seen], self.v[row, seen]))
            out[row] = oracle.attention(q, k, v, self.sinks.astype(np.float64), window=window)[0]
        return out

    def full(self, *, slots: int | None = None, impl: str = "xla", dtype=jnp.float32) -> np.ndarray:
        """Keys lie where their positions say, with garbage behind each row's last, up to `slots`."""
        slots = slots or self.k.shape[1]
        k = np.full((len(self.k), slots, KV_HEADS, HEAD_DIM), GARBAGE, np.float32)
        v = k.copy()
        for row, first in enumerate(self.first_query):
            end = first + self.q.shape[1]
            k[row, :end], v[row, :end] = self.k[row, :end], self.v[row, :end]
        arrays = (*(jnp.asarray(x, dtype) for x in (self.q, k, v)), jnp.asarray(self.sinks))
        out = full(*arrays, first_query=self._first(), impl=impl)
        assert out.dtype == dtype
        return np.asarray(out, np.float32)

    def sliding(self, *, window: int, impl: str = "xla", dtype=jnp.float32) -> np.ndarray:
        """Keys are the window before the first query and then the queries' own; garbage stands before position 0."""
        num_keys = window + self.q.shape[1]
        k = np.full((len(self.k), num_keys, KV_HEADS, HEAD_DIM), GARBAGE, np.float32)
        v = k.copy()
        for row, first in enumerate(self.first_query):
            start = first - window
            k[row, max(-start, 0) :] = self.k[row, max(start, 0) : start + num_keys]
            v[row, max(-start, 0) :] = self.v[row, max(start, 0) : start + num_keys]
        arrays = (*(jnp.asarray(x, dtype) for x in (self.q, k, v)), jnp.asarray(self.sinks))
        out = sliding(*arrays, first_query=self._first(), window=window, impl=impl)
        assert out.dtype == dtype
        return np.asarray(out, np.float32)

    def _first(self) -> jax.Array:
        return jnp.asarray(self.first_query, jnp.int32)


@pytest.fixture(params=["one block", "blocks of 4", "blocks of 1"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of the 4 is short where 4 does not divide the queries."""
    if request.param == "blocks of 4":
        monkeypatch.setattr(xla, "_MOST_QUERIES", 7)  # rounded down to a power of two
    if request.param == "blocks of 1":
        monkeypatch.setattr(xla, "SCORES_AT_ONCE", 1)  # not even one query's scores fit


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("first_query", "num_queries"), [([0], 21), ([30, 0, 7], 13), ([5, 41], 1)], ids=str)
def test_full_agrees_with_the_oracle(first_query: list[int], num_queries: int):
    case = Case(first_query, num_queries)
    expected = case.expected(window=None)
    np.testing.assert_allclose(case.full(), expected, atol=TOLERANCE)
    np.testing.assert_allclose(case.full(slots=case.k.shape[1] + 19), expected, atol=TOLERANCE)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [1, 9, 64])
@pytest.mark.parametrize(
    ("first_query", "num_queries"), [([0], 21), ([30, 0, 7, 8, 9, 10], 13), ([5, 41, 9], 1)], ids=str
)
def test_sliding_agrees_with_the_oracle(first_query: list[int], num_queries: int, window: int):
    """Windows of the query alone, shorter and longer than the chunk; rows that begin about where the window fills."""
    case = Case(first_query, num_queries)
    np.testing.assert_allclose(case.sliding(window=window), case.expected(window=window), atol=TOLERANCE)


def test_blocks_of_the_released_size():
    """More queries than the largest block, with the constants as they are."""
    case = Case([3, 0], xla._MOST_QUERIES + 75)
    np.testing.assert_allclose(case.full(), case.expected(window=None), atol=TOLERANCE)
    np.testing.assert_allclose(case.sliding(window=128), case.expected(window=128), atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 9])
def test_the_window_has_two_sharp_edges(window: int | None):
    """Moving one value moves exactly the queries that see it."""
    case, at = Case([12], 30), 20
    before = case.full() if window is None else case.sliding(window=window)
    case.v[0, at] += 1
    after = case.full() if window is None else case.sliding(window=window)
    moved = np.flatnonzero(np.abs(after - before).max(axis=(0, 2, 3)))
    seen_from = range(at, 42 if window is None else at + window)
    assert (moved + 12).tolist() == list(seen_from)


@pytest.mark.parametrize("sink", [-1e4, -3.0, 50.0, 1e4])
def test_extreme_sinks(sink: float):
    """At -1e4 the sink takes nothing, at 1e4 everything."""
    case = Case([0, 6], 11, sinks=sink)
    for out, window in ((case.full(), None), (case.sliding(window=9), 9)):
        np.testing.assert_allclose(out, case.expected(window=window), atol=TOLERANCE)
        assert (sink < 100) == bool(out.any())


def test_each_query_head_has_its_own_sink_and_three_share_a_key():
    case = Case([4], 5)
    case.sinks = np.linspace(-2, 6, HEADS, dtype=np.float32)
    np.testing.assert_allclose(case.full(), case.expected(window=None), atol=TOLERANCE)
    before = case.full()
    case.v[:, :, 2] += 1
    moved = np.flatnonzero(np.abs(case.full() - before).max(axis=(0, 1, 3)))
    assert moved.tolist() == [6, 7, 8]


def test_many_keys():
    case = Case([20_000, 3], 2)
    np.testing.assert_allclose(case.full(), case.expected(window=None), atol=TOLERANCE)


def test_a_query_that_sees_nothing_is_zero():
    """Padding may stand anywhere, even where no key is: all of its softmax is the sink."""
    case = Case([0], 3)
    arrays = list(map(jnp.asarray, (case.q, case.k, case.v, case.sinks)))
    nowhere = jnp.array([-7], jnp.int32)
    assert not np.asarray(full(*arrays, first_query=nowhere)).any()
    padded = [arrays[0], *(jnp.pad(x, ((0, 0), (9, 0), (0, 0), (0, 0))) for x in arrays[1:3]), arrays[3]]
    assert not np.asarray(sliding(*padded, first_query=nowhere, window=9)).any()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("first_query", "num_queries"), [([0], 21), ([30, 0, 7], 13), ([5, 41, 0], 1)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("impl", implementations("attention", platform="cpu"))
def test_every_implementation_agrees_with_the_oracle(
    impl: str, dtype, first_query: list[int], num_queries: int, window: int | None
):
    """Prompts, chunks over caches of different length, and decoding; with sinks that matter."""
    case = Case(first_query, num_queries, seed=7)
    case.sinks *= 3
    case.q, case.k, case.v = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (case.q, case.k, case.v))
    if window is None:
        out = case.full(slots=case.k.shape[1] + 19, impl=impl, dtype=dtype)
    else:
        out = case.sliding(window=window, impl=impl, dtype=dtype)
    # In bfloat16 the scaled queries, the weights and the result are rounded to 8 bits: 2^-8 of values that reach 3.
    tolerance = TOLERANCE if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(out, case.expected(window=window), atol=tolerance)


@pytest.mark.parametrize("impl", implementations("attention", platform="cpu"))
@pytest.mark.parametrize(("rows", "num_queries"), [(2, 0), (0, 3)])
def test_no_queries_have_no_values(rows: int, num_queries: int, impl: str):
    q = jnp.ones((rows, num_queries, HEADS, HEAD_DIM), jnp.bfloat16)
    k, near = (jnp.ones((rows, keys, KV_HEADS, HEAD_DIM), jnp.bfloat16) for keys in (30, 9 + num_queries))
    settings = {"first_query": jnp.zeros(rows, jnp.int32), "impl": impl}
    for out in (
        full(q, k, k, jnp.ones(HEADS), **settings),
        sliding(q, near, near, jnp.ones(HEADS), window=9, **settings),
    ):
        assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_memory_does_not_grow_with_queries_times_keys(dtype):
    """A prompt's worth of queries over the whole context of the release's heads: 2 TiB of scores if made at once."""
    queries, keys, heads, kv_heads, head_dim = 4096, 131072, 64, 8, 64
    q = jax.ShapeDtypeStruct((1, queries, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, keys, kv_heads, head_dim), dtype)
    sinks, first = jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, first: jax.Array) -> jax.Array:
        return full(q, k, v, sinks, first_query=first)

    memory = jax.jit(attend).lower(q, k, k, sinks, first).compile().memory_analysis()
    assert memory is not None
    scores = 4 * xla.SCORES_AT_ONCE
    around = 4 * (3 * queries * heads * head_dim + 4 * keys * kv_heads * head_dim)  # q, k and v, in other layouts
    assert memory.temp_size_in_bytes < 3 * scores + around  # scores, their exponentials, and weights in v's dtype
