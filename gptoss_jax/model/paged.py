"""The KV cache in pages that many sequences share, and what one step brings to it. Knows positions, no weights.

A page is Z positions in every layer of one group; position p of a sequence lies in the page that its table names at
p // Z, at offset p % Z. Layers that see everything and layers with a window are two groups with page numbers of their
own, because a sequence holds of the second only what its window still needs:

    page size 4, window 5, a sequence of 15 tokens      table, by p // 4      0   1   2   3

                                                        full                  7   2   9   4
                                                        sliding               0   0   3   1     0: not held, not seen

A step has parts, a decode part and a prefill part: rows of equal width. All but attention runs on the tokens of all
parts in one line, [1, M, …].
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.attention import QuantizedPages, quantize
from gptoss_jax.kernels.put_rows import put_rows
from gptoss_jax.model.config import LayerKind, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """The next tokens of some sequences, a row for each.

    Attributes:
        tokens: the token t of row b stands at position first[b] + t.
        slots: which place of the engine the row's sequence holds.
        first: see tokens.
        count: how many tokens of each row are real; 0 is an idle row.
        full_table: which page each Z positions lie in, for layers that see everything.
        sliding_table: for layers with a window; entries that are not held may be any page.
        adapter: which of the model's adapters each row's sequence takes, -1 none; None is all that are attached.
    """

    __no_type_check__ = True  # as in cache.py

    tokens: Int[Array, "B T"]
    slots: Int[Array, " B"]
    first: Int[Array, " B"]
    count: Int[Array, " B"]
    full_table: Int[Array, "B J"]
    sliding_table: Int[Array, "B J"]
    adapter: Int[Array, " B"] | None = None

    @property
    def size(self) -> int:
        """Its tokens, padding included."""
        return math.prod(self.tokens.shape)

    def table(self, window: int | None) -> Int[Array, "B J"]:
        return self.full_table if window is None else self.sliding_table

    def positions(self) -> Int[Array, "B T"]:
        return self.first[:, None] + jnp.arange(self.tokens.shape[1])

    def is_real(self) -> Bool[Array, "B T"]:
        return jnp.arange(self.tokens.shape[1]) < self.count[:, None]


def adapters_in_line(parts: Sequence[Part]) -> Int[Array, "1 M"] | None:
    """The adapter of each token of all parts, or None if they name none."""
    found = [spread(part.adapter, part.tokens.shape[1]) for part in parts if part.adapter is not None]
    assert len(found) in (0, len(parts)), "either all parts name adapters or none does"
    return in_line(found)[None] if found else None


def in_line(arrays: Sequence[Array]) -> Array:
    """[B, T, …] of each part -> [M, …] of all."""
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in arrays])


def spread(adapter: Int[Array, " B"], num_tokens: int) -> Int[Array, "B T"]:
    """A row's adapter for each of its tokens."""
    return jnp.broadcast_to(adapter[:, None], (len(adapter), num_tokens))


def apart(x: Array, parts: Sequence[Part]) -> list[Array]:
    """[M, …] of all parts -> [B, T, …] of each."""
    found, start = [], 0
    for part in parts:
        found.append(x[start : start + part.size].reshape(*part.tokens.shape, *x.shape[1:]))
        start += part.size
    assert start == len(x), (start, x.shape)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerPages:
    """Keys and values of one layer, of every sequence."""

    __no_type_check__ = True

    k: Float[Array, "P Z K H"] | QuantizedPages
    v: Float[Array, "P Z K H"] | QuantizedPages

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: DTypeLike) -> "LayerPages":
        """Zeros [P, Z, K, H]; int8 is codes with a scale for each position and head."""

        def zeros() -> Array | QuantizedPages:
            codes = jnp.zeros(shape, dtype)
            return QuantizedPages(codes, jnp.zeros(shape[:3], jnp.float32)) if is_quantized(dtype) else codes

        return cls(zeros(), zeros())  # two buffers: each is donated by itself

    def write(
        self, k: Float[Array, "M K H"], v: Float[Array, "M K H"], parts: Sequence[Part], *, window: int | None
    ) -> "LayerPages":
        """With the parts' real tokens in their places; what stands elsewhere stays."""

        def put(pool: Array, values: Array) -> Array:
            return _write(pool, values.astype(pool.dtype), parts, window)

        return jax.tree.map(put, self, LayerPages(_as_stored(self.k, k), _as_stored(self.v, v)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """The pages of every layer. Page ids mean the same in all layers of a group."""

    __no_type_check__ = True

    layers: tuple[LayerPages, ...]

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        *,
        num_full_pages: int,
        num_sliding_pages: int,
        page_size: int,
        dtype: DTypeLike,
        kv_heads: int | None = None,
    ) -> "PagedCache":
        """Pages of zeros, and a spare one that takes what padding would write.

        `kv_heads` is how many there are on the mesh; by default the model's.
        """
        heads = config.num_kv_heads if kv_heads is None else kv_heads
        num_pages = {"full": num_full_pages + 1, "sliding": num_sliding_pages + 1}
        shapes = [(num_pages[kind], page_size, heads, config.head_dim) for kind in config.layer_kinds]
        return cls(tuple(LayerPages.empty(shape, dtype) for shape in shapes))


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) == jnp.int8


def page_bytes(
    config: ModelConfig, kind: LayerKind, *, page_size: int, dtype: DTypeLike, kv_heads: int | None = None
) -> int:
    """Of one page, in all layers of its group."""
    heads = config.num_kv_heads if kv_heads is None else kv_heads
    head_bytes = config.head_dim * jnp.dtype(dtype).itemsize + (4 if is_quantized(dtype) else 0)  # codes and a scale
    return config.layer_kinds.count(kind) * page_size * 2 * heads * head_bytes


def _as_stored(pool: Array | QuantizedPages, values: Float[Array, "M K H"]) -> Array | QuantizedPages:
    return QuantizedPages(*quantize(values)) if isinstance(pool, QuantizedPages) else values


def _write(pool: Array, values: Array, parts: Sequence[Part], window: int | None) -> Array:
    """Of pool [P, Z, …] and values [M, …]: each form writes in place, if the pool was donated, on its platform."""
    tables = [part.table(window) for part in parts]
    firsts, counts = [part.first for part in parts], [part.count for part in parts]
    rows = apart(values, parts)
    return lax.platform_dependent(pool, rows, tables, firsts, counts, tpu=_update, default=_put)


def _put(pool: Array, rows: list[Array], tables: list[Array], firsts: list[Array], counts: list[Array]) -> Array:
    return put_rows(pool, _slots(pool, rows, tables, firsts, counts), in_line(rows))


def _slots(
    pool: Array, rows: list[Array], tables: list[Array], firsts: list[Array], counts: list[Array]
) -> Int[Array, " M"]:
    """Where each token's place is, among the positions of all pages; that of padding is in the spare page."""
    num_pages, page_size = pool.shape[:2]

    def of_part(values: Array, table: Array, first: Array, count: Array) -> Int[Array, "B T"]:
        t = jnp.arange(values.shape[1])
        positions = first[:, None] + t
        page = jnp.take_along_axis(table, jnp.minimum(positions // page_size, table.shape[1] - 1), axis=1)
        return jnp.where(t < count[:, None], page * page_size + positions % page_size, (num_pages - 1) * page_size)

    return in_line([of_part(*each) for each in zip(rows, tables, firsts, counts, strict=True)])


def _update(pool: Array, rows: list[Array], tables: list[Array], firsts: list[Array], counts: list[Array]) -> Array:
    """Page by page: what is there is read, and put back where nothing is to be written."""
    for each in zip(rows, tables, firsts, counts, strict=True):
        pool = _update_part(pool, *each)
    return pool


def _update_part(pool: Array, values: Array, table: Array, first: Array, count: Array) -> Array:
    page_size = pool.shape[1]
    num_rows, num_values = values.shape[:2]
    touched = (num_values + page_size - 2) // page_size + 1  # by a row that begins at the end of a page
    width = (1, page_size, *pool.shape[2:])
    offset = jnp.arange(page_size)

    def write_page(i: Int[Array, ""] | int, pool: Array) -> Array:
        row, number = i // touched, first[i // touched] // page_size + i % touched
        page = table[row, jnp.minimum(number, table.shape[1] - 1)]
        t = number * page_size + offset - first[row]  # which of the row's values stands at each offset
        is_new = (t >= 0) & (t < count[row])
        at = (page, *[0] * (pool.ndim - 1))
        new = values[row][jnp.clip(t, 0, num_values - 1)]
        found = lax.dynamic_slice(pool, at, width)
        mask = is_new.reshape(1, page_size, *[1] * (pool.ndim - 2))
        return lax.dynamic_update_slice(pool, jnp.where(mask, new[None], found), at)

    return lax.fori_loop(0, num_rows * touched, write_page, pool)
