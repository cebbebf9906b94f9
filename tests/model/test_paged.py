"""The model on pages against the model on a contiguous cache, and pages against plain lists of what was written."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from gptoss_jax.kernels.attention import QuantizedPages
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.paged import PagedCache, Part, _put, _update, apart, in_line, page_bytes
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
NUM_PAGES, PAGE_SIZE, TABLE = 31, 4, 11
ROWS, LENGTH = 3, 40
GARBAGE = 37.0  # in every place that nobody wrote: a thousand times the keys, and finite

Feed = tuple[int, int, int]  # (row, first, count)
# What each step feeds: a decode part of 3 rows with room for drafts, and a prefill part of 2 rows; ragged, with idle
# rows, chunks that begin and end anywhere in a page and are longer than the window, and parts in any order of rows.
DECODE, PREFILL = (3, 3), (2, 17)
STEPS: Sequence[tuple[Sequence[Feed], Sequence[Feed]]] = [
    ([], [(0, 0, 13), (1, 0, 5)]),
    ([(0, 13, 1)], [(2, 0, 17), (1, 5, 9)]),
    ([(2, 17, 1), (0, 14, 3)], [(1, 14, 17)]),
    ([(0, 17, 2), (1, 31, 1), (2, 18, 3)], []),
    ([(1, 32, 3)], [(0, 19, 16), (2, 21, 1)]),
    ([(0, 35, 1), (1, 35, 1)], [(2, 22, 16)]),
]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss(CONFIG, dtype=jnp.float32, impl="xla", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(CONFIG.vocab_size, size=(ROWS, LENGTH), dtype=np.int32)


@pytest.fixture(scope="module")
def expected(model: GptOss, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of whole rows in one call, on a contiguous cache."""
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens))


class Tables:
    """Pages of each row in shuffled order; of the sliding ones those behind the window are given to nobody."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.full, self.sliding = (
            np.split(rng.permutation(NUM_PAGES)[: ROWS * 10].astype(np.int32), ROWS) for _ in range(2)
        )

    def part(self, feeds: Sequence[Feed], shape: tuple[int, int], tokens: np.ndarray) -> Part:
        num_rows, _ = shape
        part = Part(*(np.zeros(size, np.int32) for size in (shape, *[num_rows] * 3, *[(num_rows, TABLE)] * 2)))
        for b, (row, first, count) in enumerate(feeds):
            part.tokens[b, :count] = tokens[row, first : first + count]
            part.tokens[b, count:] = 350  # padding, which nothing may depend on
            part.slots[b], part.first[b], part.count[b] = row, first, count
            end = -(-(first + count) // PAGE_SIZE)
            seen = max(0, first - CONFIG.sliding_window + 1) // PAGE_SIZE
            part.full_table[b, :end] = self.full[row][:end]
            part.sliding_table[b, seen:end] = self.sliding[row][seen:end]
        return part


def run_steps(model: GptOss, cache: PagedCache, tokens: np.ndarray) -> list[tuple[Feed, np.ndarray]]:
    """Logits [count, V] of everything that STEPS feed."""
    graph, parameters = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(parameters: nnx.State, parts: list[Part], cache: PagedCache):
        model = nnx.merge(graph, parameters)
        hidden, cache = model.extend_paged(parts, cache)
        return [model.logits(part) for part in hidden], cache

    tables, found = Tables(), []
    for decode, prefill in STEPS:
        parts = [tables.part(decode, DECODE, tokens), tables.part(prefill, PREFILL, tokens)]
        logits, cache = step(parameters, parts, cache)
        for feeds, scores in zip((decode, prefill), logits, strict=True):
            found += [(feed, np.asarray(scores)[b, : feed[2]]) for b, feed in enumerate(feeds)]
    return found


def pages(model: GptOss, dtype: DTypeLike | None = None) -> PagedCache:
    sizes = {"num_full_pages": NUM_PAGES, "num_sliding_pages": NUM_PAGES, "page_size": PAGE_SIZE}
    return jax.tree.map(lambda x: jnp.full_like(x, GARBAGE), model.empty_pages(**sizes, dtype=dtype))


def errors(found: list[tuple[Feed, np.ndarray]], expected: np.ndarray) -> np.ndarray:
    """The largest error behind each token, in units of the logits' spread."""
    each = [np.abs(scores - expected[row, first : first + count]) for (row, first, count), scores in found]
    return np.concatenate(each).max(axis=-1) / expected.std()


def test_pages_give_the_logits_of_a_contiguous_cache(model, tokens, expected):
    found = run_steps(model, pages(model), tokens)
    assert errors(found, expected).max() < 1e-5  # float32, sums in another order
    assert len(errors(found, expected)) == 110  # every token that STEPS feed


def test_rows_that_a_wrong_draft_wrote_are_written_again(model, tokens, expected):
    """Keys of rejected drafts stand behind a row's end until the right ones come, and nobody has seen them."""
    wrong = tokens.copy()
    wrong[0, 15:17] = (tokens[0, 15:17] + 1) % CONFIG.vocab_size
    tables, cache = Tables(), pages(model)
    extend = nnx.jit(lambda model, parts, cache: model.extend_paged(parts, cache))
    for feeds, shape, ids in (
        ([(0, 0, 14)], PREFILL, tokens),
        ([(0, 14, 3)], DECODE, wrong),
        ([(0, 15, 3)], DECODE, tokens),
    ):
        hidden, cache = extend(model, [tables.part(feeds, shape, ids)], cache)
    scores = np.asarray(model.logits(hidden[0]))[0]
    assert errors([((0, 15, 3), scores)], expected).max() < 1e-5


def test_8_bit_pages_are_near(model, tokens, expected):
    """A code errs by 1/254 of its head's largest magnitude at most. Measured after two layers: 0.017 of the logits'
    spread, 0.034 at worst. Three times that would be a mistake, in a scale say."""
    found = errors(run_steps(model, pages(model, jnp.int8), tokens), expected)
    assert 0.001 < np.median(found) < 0.05
    assert found.max() < 0.1


@pytest.mark.slow
def test_bf16_pages_are_near(tokens, expected):
    """Measured: 0.03. Every token goes to all experts, as a router near a tie would choose by bfloat16's rounding."""
    config = dataclasses.replace(CONFIG, experts_per_token=CONFIG.num_experts)
    model = GptOss(config, dtype=jnp.bfloat16, impl="xla", rngs=nnx.Rngs(0))
    contiguous = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens))
    assert errors(run_steps(model, pages(model), tokens), contiguous).max() < 0.1


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((1, 6), marks=pytest.mark.slow)], ids=str)
def test_pages_on_a_mesh(tokens, expected, shape):
    """Key heads and vocabulary are padded on six tensor shards."""
    mesh = make_mesh(expert=shape[0], tensor=shape[1])
    model = GptOss(CONFIG, dtype=jnp.float32, impl="xla", mesh=mesh, rngs=nnx.Rngs(0))
    cache = pages(model)
    assert {x.sharding.spec[2] for x in jax.tree.leaves(cache)} == {"tensor"}
    found = [(feed, scores[:, : CONFIG.vocab_size]) for feed, scores in run_steps(model, cache, tokens)]
    assert errors(found, expected).max() < 1e-5


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16, pytest.param(jnp.int8, marks=pytest.mark.slow)],
    ids=["float32", "bf16", "int8"],
)
def test_a_step_writes_in_place(dtype):
    """Of pools of 1.3 to 5 MB not one is copied: all that a step needs beside them is less than the smallest."""
    config = dataclasses.replace(CONFIG, sliding_window=11)
    model = GptOss(config, dtype=jnp.float32 if dtype == jnp.float32 else jnp.bfloat16, impl="xla", rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(model)
    cache = model.empty_pages(num_full_pages=5000, num_sliding_pages=5000, page_size=PAGE_SIZE, dtype=dtype)
    tables = Tables()
    parts = [tables.part([], DECODE, np.zeros((1, 1), np.int32)), tables.part([], PREFILL, np.zeros((1, 1), np.int32))]

    def step(parameters: nnx.State, parts: list[Part], cache: PagedCache):
        return nnx.merge(graph, parameters).extend_paged(parts, cache)

    memory = jax.jit(step, donate_argnums=2).lower(parameters, parts, cache).compile().memory_analysis()
    held = jax.tree.leaves(cache)
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in held)
    assert memory.temp_size_in_bytes < min(x.nbytes for x in held if x.ndim == 4)


@pytest.mark.parametrize("write", [_put, _update])
@pytest.mark.parametrize("tail", [(4, 16), (4,)], ids=["values", "scales"])
def test_every_form_writes_real_tokens_and_nothing_else(write, tail):
    """Rows, and page by page, against a loop; only the spare page may hold anything."""
    rng = np.random.default_rng(3)
    pool = rng.standard_normal((NUM_PAGES + 1, PAGE_SIZE, *tail)).astype(np.float32)
    tables, feeds = Tables(), [(0, 3, 14), (1, 8, 8), (2, 39, 1)]
    parts = [
        tables.part(feeds[:2], PREFILL, np.zeros((ROWS, LENGTH), np.int32)),
        tables.part(feeds[2:], DECODE, np.zeros((ROWS, LENGTH), np.int32)),
    ]
    values = [rng.standard_normal((*part.tokens.shape, *tail)).astype(np.float32) for part in parts]
    expected = pool.copy()
    for part, rows in zip(parts, values, strict=True):
        for b, (first, count) in enumerate(zip(part.first, part.count, strict=True)):
            for t in range(count):
                page, offset = divmod(first + t, PAGE_SIZE)
                expected[part.full_table[b, page], offset] = rows[b, t]
    operands = pool, values, *([getattr(part, name) for part in parts] for name in ("full_table", "first", "count"))
    written = np.asarray(jax.jit(write)(*operands))
    np.testing.assert_array_equal(written[:-1], expected[:-1])


def test_in_line_and_apart_are_each_others_way_back():
    parts = [Tables().part([], shape, np.zeros((1, 1), np.int32)) for shape in (DECODE, PREFILL)]
    arrays = [jnp.arange(part.size * 5).reshape(*part.tokens.shape, 5) for part in parts]
    for there, back in zip(arrays, apart(in_line(arrays), parts), strict=True):
        np.testing.assert_array_equal(there, back)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bf16", "int8"])
def test_the_bytes_of_a_page_are_those_of_the_arrays(dtype):
    sizes = {"num_full_pages": 5, "num_sliding_pages": 7, "page_size": PAGE_SIZE, "dtype": dtype}
    cache = PagedCache.empty(TINY, **sizes)
    assert [isinstance(layer.k, QuantizedPages) for layer in cache.layers] == [dtype == jnp.int8] * 6
    for kind, number in (("full", 5 + 1), ("sliding", 7 + 1)):
        layers = [layer for layer, of in zip(cache.layers, TINY.layer_kinds, strict=True) if of == kind]
        held = sum(x.nbytes for x in jax.tree.leaves(layers))
        assert held == number * page_bytes(TINY, kind, page_size=PAGE_SIZE, dtype=dtype)
