"""What an engine's pages weigh, and how many there is room for. Knows sizes; makes no array."""

import bisect
import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.paged import page_bytes
from gptoss_jax.model.transformer import GptOss

_SPARE = 1  # page of each group, see model/paged.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pools:
    """The pages of both groups on one device.

    Attributes:
        config: of the model.
        dtype: of keys and values; int8 is codes with scales.
        kv_heads: that one device has of every page.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.bfloat16
    kv_heads: int | None = None

    @classmethod
    def of(cls, model: GptOss, *, kv_dtype: DTypeLike | None) -> "Pools":
        """Those of a model on its mesh."""
        shards = 1 if model.mesh is None else model.mesh.shape["tensor"]
        dtype = model.dtype if kv_dtype is None else kv_dtype
        return cls(config=model.config, dtype=dtype, kv_heads=model.kv_heads // shards)

    def nbytes(self, *, full: int, sliding: int, page_size: int) -> int:
        """Of so many pages of each group."""
        sizes = {"page_size": page_size, "dtype": self.dtype, "kv_heads": self.kv_heads}
        found = (full + _SPARE) * page_bytes(self.config, "full", **sizes)
        return found + (sliding + _SPARE) * page_bytes(self.config, "sliding", **sizes)

    def full_pages_within(self, nbytes: int, *, sliding: Callable[[int], int], page_size: int, most: int) -> int:
        """How many full pages there is room for, `most` at most, beside as many sliding ones as they ask for.

        Raises:
            UserError: not even for one.
        """

        def needed(full: int) -> int:
            return self.nbytes(full=full, sliding=sliding(full), page_size=page_size)

        found = bisect.bisect_right(range(1, most + 1), nbytes, key=needed)
        if not found:
            raise UserError(
                f"cache_bytes is {nbytes}; the first page of {page_size} positions, with what layers with a window "
                f"need beside it, takes {needed(1)}: give more, or smaller pages, fewer rows or fewer prefill_tokens"
            )
        return found
