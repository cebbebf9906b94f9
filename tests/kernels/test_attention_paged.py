"""Attention over pages against the oracle and against contiguous keys: shuffled, shared and garbage pages, any rows."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels import attention, tuned
from gptoss_jax.kernels.attention import QuantizedPages, paged, quantize
from gptoss_jax.kernels.attention import xla as contiguous
from gptoss_jax.kernels.attention.gpu import DEFAULTS
from gptoss_jax.kernels.attention.pages import gpu, tpu, xla
from gptoss_jax.kernels.choose import implementations
from tests import oracle

HEADS, KV_HEADS, HEAD_DIM = 12, 4, 16
TOLERANCE = 1e-5  # values are of order one and their weights sum to one: a float32 softmax errs by a few 1e-6
ROUNDED = 2e-2  # bfloat16: scaled queries, weights and the result are rounded to 8 bits, 2^-8 of values that reach 3
GARBAGE = 3e4  # in every slot that no query may see: one of them in sight would win the whole softmax


class Case:
    """Random rows, their keys in pages of a pool in random order; entries of pages that are not needed are 0.

    A row has `first[b]` positions before its queries, of which `count[b]` are real. Page 0 is an ordinary page.
    """

    def __init__(
        self,
        first: list[int],
        count: list[int],
        num_queries: int,
        *,
        page_size: int,
        window: int | None = None,
        dtype=jnp.float32,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
        head_dim: int = HEAD_DIM,
        garbage: float = GARBAGE,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.first, self.count, self.window, self.page_size, self.dtype = first, count, window, page_size, dtype
        self.end = [start + real for start, real in zip(first, count, strict=True)]

        def random(*shape: int) -> np.ndarray:
            return np.array(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))

        rows, longest = len(first), max(*self.end, 1)
        self.q = random(rows, num_queries, heads, head_dim)
        self.k, self.v = (random(rows, longest, kv_heads, head_dim) for _ in range(2))
        self.sinks = 3 * rng.standard_normal(heads, np.float32)
        table_width = -(-longest // page_size) + 3
        needed = [list(self._needed(row)) for row in range(rows)]
        ids = rng.permutation(sum(map(len, needed)) + 2).tolist()
        self.table = np.zeros((rows, table_width), np.int32)
        self.k_pages, self.v_pages = (
            np.full((len(ids), page_size, kv_heads, head_dim), garbage, np.float32).astype(dtype) for _ in range(2)
        )
        for row, pages in enumerate(needed):
            for page in pages:
                self.table[row, page] = ids.pop()
                self._fill(row, page)

    def _needed(self, row: int) -> range:
        """Pages that a real query of the row sees, or holds its own key."""
        if not self.count[row]:
            return range(0)
        low = 0 if self.window is None else max(self.first[row] - self.window + 1, 0)
        return range(low // self.page_size, -(-self.end[row] // self.page_size))

    def _fill(self, row: int, page: int) -> None:
        start = page * self.page_size
        kept = slice(start, min(start + self.page_size, self.end[row]))
        for pages, x in ((self.k_pages, self.k), (self.v_pages, self.v)):
            pages[self.table[row, page], : kept.stop - start] = x[row, kept]

    def run(self, *, impl: str = "xla", quantized: bool = False) -> np.ndarray:
        """The real queries' results; the others, which must be finite, are made 0."""
        k_pages, v_pages = jnp.asarray(self.k_pages), jnp.asarray(self.v_pages)
        if quantized:
            k_pages, v_pages = QuantizedPages(*quantize(k_pages)), QuantizedPages(*quantize(v_pages))
        operands = (jnp.asarray(self.q), k_pages, v_pages, jnp.asarray(self.table), jnp.asarray(self.sinks))
        first, count = (jnp.asarray(x, jnp.int32) for x in (self.first, self.count))
        out = attend(*operands, first_query=first, count=count, window=self.window, impl=impl)
        assert (out.shape, out.dtype) == (self.q.shape, self.dtype)
        done = np.array(out, np.float32)
        assert np.isfinite(done).all()
        for row, count in enumerate(self.count):
            done[row, count:] = 0
        return done

    def expected(self) -> np.ndarray:
        out = np.zeros(self.q.shape)
        for row, (end, count) in enumerate(zip(self.end, self.count, strict=True)):
            if count:
                arrays = (self.q[row, :count], self.k[row, :end], self.v[row, :end])
                q, k, v = (x.astype(np.float64)[None] for x in arrays)
                out[row, :count] = oracle.attention(q, k, v, self.sinks.astype(np.float64), window=self.window)[0]
        return out

    def quantize(self) -> None:
        """Keys and values become what their codes stand for; the pages stay."""
        for name in ("k", "v"):
            codes, scales = (np.asarray(x, np.float64) for x in quantize(jnp.asarray(getattr(self, name))))
            setattr(self, name, codes * scales[..., None])

    def check(self, *, impl: str = "xla") -> None:
        tolerance = TOLERANCE if self.dtype == jnp.float32 else ROUNDED
        np.testing.assert_allclose(self.run(impl=impl), self.expected(), rtol=0, atol=tolerance)


attend = functools.partial(jax.jit, static_argnames=("window", "impl"))(paged)

# Row by row: a prompt or a chunk, decoding with drafts, decoding; positions before them, and rows with nothing to do.
RAGGED = [
    ([0, 30, 7, 19], [33, 0, 1, 20], 33),
    ([37, 0, 8, 15], [5, 1, 0, 4], 5),
    ([0, 41, 15, 16, 9], [1, 1, 1, 1, 0], 1),
]
EVERY_RAGGED = pytest.mark.parametrize(
    ("first", "count", "num_queries"), [RAGGED[0], pytest.param(*RAGGED[1], marks=pytest.mark.slow), RAGGED[2]], ids=str
)
IMPLEMENTATIONS = pytest.mark.parametrize("impl", implementations("attention", platform="cpu"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups of 16 keys and blocks of 4 queries, the last of which begins early."""
    monkeypatch.setattr(xla, "_KEYS_AT_ONCE", 16)
    monkeypatch.setattr(xla, "_FEWEST_QUERIES", 3)
    monkeypatch.setattr(contiguous, "_MOST_QUERIES", 4)
    attend.clear_cache()  # pyright: ignore[reportFunctionMemberAccess]
    yield
    attend.clear_cache()  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@EVERY_RAGGED
@pytest.mark.parametrize("page_size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (8, 16))])
def test_the_reference_agrees_with_the_oracle(page_size: int, first, count, num_queries: int, window):
    Case(first, count, num_queries, page_size=page_size, window=window).check()


@pytest.mark.parametrize("window", [None, 9])
@EVERY_RAGGED
@IMPLEMENTATIONS
def test_every_implementation_agrees_with_the_oracle(impl: str, first, count, num_queries: int, window):
    Case(first, count, num_queries, page_size=16, window=window).check(impl=impl)


@pytest.mark.parametrize("window", [None, 9])
@IMPLEMENTATIONS
def test_bfloat16(impl: str, window: int | None):
    Case([300, 2, 0], [5, 4, 1], 5, page_size=128, window=window, dtype=jnp.bfloat16).check(impl=impl)


@IMPLEMENTATIONS
def test_the_heads_of_the_release(impl: str):
    """Eight query heads to a key head, their window and their pages; one row with a key more than four pages."""
    sizes = {"heads": 16, "kv_heads": 2, "head_dim": 64, "page_size": 128}
    for window in (None, 128):
        Case([508, 127, 0], [5, 1, 0], 5, window=window, **sizes).check(impl=impl)


@pytest.mark.parametrize("window", [None, 9])
def test_pages_hold_what_contiguous_keys_hold(window: int | None):
    """Beside `full` and `sliding` on the same keys."""
    case = Case([30, 30], [7, 7], 7, page_size=4, window=window)
    q, k, v, sinks, first = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.sinks, case.first))
    if window is None:
        beside = attention.full(q, k, v, sinks, first_query=first)
    else:
        near = slice(30 - window, None)
        beside = attention.sliding(q, k[:, near], v[:, near], sinks, first_query=first, window=window)
    np.testing.assert_allclose(case.run(), beside, rtol=0, atol=TOLERANCE)


@IMPLEMENTATIONS
def test_rows_may_share_pages(impl: str):
    """A prefix of two pages lies once in the pool; the pages that the second row had of it are now garbage."""
    case = Case([33, 40], [5, 2], 5, page_size=16)
    case.k[1, :32], case.v[1, :32] = case.k[0, :32], case.v[0, :32]
    for pages in (case.k_pages, case.v_pages):
        pages[case.table[1, :2]] = GARBAGE
    case.table[1, :2] = case.table[0, :2]
    case.check(impl=impl)


@pytest.mark.parametrize("window", [None, 9])
@IMPLEMENTATIONS
def test_a_row_does_not_feel_the_others(impl: str, window: int | None):
    """Bit for bit: whether the others are idle, short, or so long that a row looks at further pages in vain."""
    case = Case([21, 300, 40, 9], [5, 5, 0, 2], 5, page_size=16, window=window)
    in_a_crowd = case.run(impl=impl)[0]
    case.first[1:], case.count[1:] = [0, 3, 7], [0, 1, 0]
    case.q[1:], case.table[1:] = 1, case.table[0]
    np.testing.assert_array_equal(case.run(impl=impl)[0], in_a_crowd)


@pytest.mark.parametrize("window", [None, 9])
def test_a_row_alone_gives_the_same_bits(window: int | None):
    """Of the reference also in a call of another shape: a narrower table, and no other row."""
    case = Case([21, 300, 0], [5, 3, 0], 5, page_size=4, window=window, dtype=jnp.bfloat16)
    together = case.run()[0]
    case.q, case.table, case.first, case.count = case.q[:1], case.table[:1, :7], [21], [5]
    np.testing.assert_array_equal(case.run()[0], together)


@pytest.mark.parametrize("impl", ["tpu-interpret", "gpu-interpret"])
def test_what_no_query_sees_may_be_nan(impl: str):
    for window in (None, 9):
        Case([37, 0, 8], [5, 0, 4], 5, page_size=16, window=window, garbage=np.nan).check(impl=impl)


def test_codes_err_by_half_a_step():
    x = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    x[1, 2] = 0
    codes, scales = quantize(jnp.asarray(x))
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (jnp.int8, x.shape, jnp.float32, x.shape[:-1])
    largest = np.abs(x).max(axis=-1)
    np.testing.assert_array_equal(np.abs(codes).max(axis=-1), np.where(largest > 0, 127, 0))
    error = np.abs(np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None] - x)
    assert (error <= largest[..., None] / 254 * (1 + 1e-5)).all()  # float32 rounds the quotient and the scale


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
@IMPLEMENTATIONS
def test_quantized_pages_are_attended_to_as_what_they_stand_for(impl: str, dtype, window: int | None):
    """Every implementation against the oracle over codes times scales: only products and sums round."""
    case = Case([37, 0, 8], [5, 0, 4], 5, page_size=16, window=window, dtype=dtype)
    out = case.run(impl=impl, quantized=True)
    case.quantize()
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=TOLERANCE if dtype == jnp.float32 else ROUNDED)


@pytest.mark.parametrize("window", [None, 9])
def test_eight_bits_err_little(window: int | None):
    """The oracle over codes times scales, beside itself over what was quantized."""
    case = Case([37, 0, 8], [5, 0, 4], 5, page_size=16, window=window)
    before, largest = case.expected(), np.abs(case.v).max()
    # With half a step of 1/254 a score errs by e at most, a share by a factor exp(2 e), and a value by half a step.
    e = np.abs(case.q).sum(axis=-1).max() * np.abs(case.k).max() / 254 / HEAD_DIM**0.5
    case.quantize()
    assert 0 < np.abs(case.expected() - before).max() <= np.expm1(2 * e) * largest + largest / 254


@IMPLEMENTATIONS
def test_heads_may_be_spread_over_devices(impl: str):
    """Within shard_map a device sees its own heads of every page."""
    case = Case([37, 8], [5, 4], 5, page_size=16)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    heads, everywhere = P(None, None, "tensor"), P()

    def local(q, k, v, table, sinks, first, count):
        return paged(q, k, v, table, sinks, first_query=first, count=count, impl=impl)

    specs = (heads, heads, heads, everywhere, P("tensor"), everywhere, everywhere)
    spread = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))
    numbers = [np.asarray(x, np.int32) for x in (case.first, case.count)]
    out = np.array(spread(case.q, case.k_pages, case.v_pages, case.table, case.sinks, *numbers))
    out[1, 4:] = 0
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("window", [None, 128])
def test_memory_grows_neither_with_the_pool_nor_with_queries_times_keys(window: int | None, quantized: bool):
    """The reference on the context of the release: 2048 queries over it have 64 GiB of scores, the pool has 256 MiB.

    In a loop XLA's CPU compiler converts all of a bfloat16 pool to float32 beforehand, if it can.
    """
    page_size, kv_heads, head_dim = 64, 8, 64
    num_pages, num_queries = 131072 // page_size, 2048
    pages = jax.ShapeDtypeStruct((num_pages, page_size, kv_heads, head_dim), jnp.int8 if quantized else jnp.bfloat16)
    if quantized:
        pages = QuantizedPages(pages, jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32))  # pyright: ignore
    numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = attend.lower(
        jax.ShapeDtypeStruct((1, num_queries, 64, head_dim), jnp.bfloat16),
        pages,
        pages,
        jax.ShapeDtypeStruct((1, num_pages), jnp.int32),
        jax.ShapeDtypeStruct((64,), jnp.float32),
        first_query=numbers,
        count=numbers,
        window=window,
        impl="xla",
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    scores = 4 * 64 * 512 * 512  # of one block of queries and one group of keys
    queries = 4 * num_queries * 64 * head_dim
    assert memory.temp_size_in_bytes < 4 * scores + 3 * queries


@pytest.mark.parametrize("window", [None, 9, 300])
@pytest.mark.parametrize("num_queries", [1, 37])
def test_pages_in_sight_are_fetched_once_and_others_hardly(num_queries: int, window: int | None):
    """Each operand of the TPU's kernel goes from page to page and, behind the last in sight, stays where it was."""
    blocks = tpu.Blocks(rows=48, keys=32, most_keys=32)
    settings = {"num_queries": num_queries, "page_size": 16, "table_width": 40, "window": window, "pack": 1}
    steps = tpu._Steps.cut(jnp.zeros((1, 4, num_queries * 3, 16)), blocks=blocks, **settings)
    for first, count in ((0, num_queries), (15, 1), (16, num_queries), (543, num_queries), (7, 0)):
        num_steps = int(steps.page_steps(jnp.array([first, 560]), jnp.array([count, 1])))
        for i in range(steps.query_blocks):
            t = np.arange(i * steps.queries, min((i + 1) * steps.queries, count))
            seen = {p // 16 for at in first + t for p in range(max(at - (window or 10**6) + 1, 0), at + 1)}
            low, high = (int(x) for x in steps.pages_in_sight(first, count, i))
            assert seen == set(range(low, high + 1))
            fetched = []
            for m in range(steps.pages):
                pages = [int(steps.page_of(first, count, i, j, m)) for j in range(num_steps)]
                fetched += [page for page, before in zip(pages, [None, *pages], strict=False) if page != before]
            assert seen <= set(fetched)
            assert len(fetched) <= max(len(seen), steps.pages)


@IMPLEMENTATIONS
def test_no_queries_have_no_values(impl: str):
    case = Case([5], [3], 3, page_size=16)
    operands = (case.k_pages, case.v_pages, case.table[:0], case.sinks)
    none = jnp.zeros(0, jnp.int32)
    out = paged(jnp.asarray(case.q[:0]), *map(jnp.asarray, operands), first_query=none, count=none, impl=impl)
    assert out.shape == (0, *case.q.shape[1:])


def test_there_is_no_gradient():
    case = Case([5], [3], 3, page_size=16)
    arrays = map(jnp.asarray, (case.k_pages, case.v_pages, case.table, case.sinks))
    attending = functools.partial(paged, first_query=jnp.array([5]), count=jnp.array([3]))
    with pytest.raises(Unsupported, match=r"no gradient.*train with `full` and `sliding`"):
        jax.grad(lambda q, *others: attending(q, *others).sum())(jnp.asarray(case.q), *arrays)


def test_pages_that_a_kernel_does_not_take():
    case = Case([5], [3], 3, page_size=8)
    with pytest.raises(Unsupported, match="multiple of 128 positions; they have 8"):
        case.run(impl="tpu")
    with pytest.raises(Unsupported, match="multiple of 16 positions; they have 8"):
        case.run(impl="gpu-interpret")
    mixed = Case([5], [3], 3, page_size=16)
    mixed.k_pages = mixed.k_pages.astype(jnp.bfloat16)
    for impl in ("tpu-interpret", "gpu-interpret"):
        with pytest.raises(Unsupported, match=r"bfloat16 and float32: (convert|cast) them"):
            mixed.run(impl=impl)


def test_tuned_sizes_are_sizes():
    """The defaults of the files are those of the code, and what a kind of device has of its own is complete."""
    default = tuned.default("attention.pages", "gpu")
    assert {form: gpu.Blocks(**sizes) for form, sizes in default.items()} == DEFAULTS
    assert tpu.Blocks(**tuned.default("attention.pages", "tpu")) == tpu.Blocks()
    for kind in ("TPU v4", "TPU v5", "TPU v6 lite", "TPU7x"):
        sizes = tuned.find("attention.pages", "tpu", device_kind=kind)
        assert sizes is not None
        assert sizes.keys() == tuned.default("attention.pages", "tpu").keys()


def test_the_kernel_lowers_for_tpu():
    """Without a device or its compiler: Pallas' own rules, of decoding and of a prompt, with a window and without."""
    pool = jax.ShapeDtypeStruct((40, 128, 4, 16), jnp.bfloat16)
    numbers, sinks = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((12,), jnp.float32)
    for num_queries, window in ((1, None), (77, 9)):
        q, table = jax.ShapeDtypeStruct((2, num_queries, 12, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 9), jnp.int32)
        settings = {"first_query": numbers, "count": numbers, "window": window, "impl": "tpu"}
        traced = attend.trace(q, pool, pool, table, sinks, **settings)
        assert "@tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
