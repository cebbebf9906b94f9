"""What an engine may hold and which steps it compiles. Knows sizes; knows no arrays and no requests.

A step is a program of fixed shape, and all programs are compiled before the first request. So they are few: rows that
decode in powers of two, past eight of four, and beside all rows a prompt's chunk of three lengths, or many short ones.

    max_rows=8, prefill_tokens=512      decode    [1, 1]  [2, 1]  [4, 1]  [8, 1]  [8, 1]    [8, 1]    [8, 1]   [8, 1]
                                        prefill                                   [1, 512]  [1, 128]  [1, 64]  [8, 64]
"""

import dataclasses
import functools
from typing import Literal

from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.pools import Pools
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig

_TOKENS_PER_ROW = 4096  # of the cache, where nothing is said
_SHORT, _MIDDLE = 8, 4  # such parts of a long chunk: one message is padded to 64 or 128 tokens, not to 512
_FEW_ROWS = (1, 2, 4, 8)  # steps that decode so many are compiled, then powers of four


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How large an engine is and how it works.

    Attributes:
        max_rows: sequences that run at a time; others wait.
        max_context: tokens of one sequence, prompt and continuation; by default what the model and the cache allow.
        page_size: positions of a page, the unit in which the cache is given out and prompts are shared.
        cache_tokens: positions in the cache of layers that see everything, over all sequences and what is kept of
            finished ones; by default 4,096 for each row. Layers with a window need little beside them.
        cache_bytes: of all pages on one device, instead of cache_tokens; more than all rows at full length need is not
            taken.
        kv_dtype: of keys and values; None is the model's. "int8" halves bfloat16, at an error that docs/engine.md says.
        prefill_tokens: of prompts in one step at most, so that decoding rows wait for no more than one such step.
        draft_tokens: guessed ids that a step checks for each row, found by looking up what was said before; 0 is off.
        batch_invariant: a sequence's scores are the same to the bit whatever runs beside it, and whether its prompt was
            computed or found. Prompts and decoding take turns then, each in one program of full size.
        max_queue: sequences that may wait; one more is refused.
        max_queued_tokens: tokens of their prompts.
    """

    max_rows: int = 8
    max_context: int | None = None
    page_size: int = 64
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    kv_dtype: Literal["int8"] | None = None
    prefill_tokens: int = 512
    draft_tokens: int = 0
    batch_invariant: bool = False
    max_queue: int = 1024
    max_queued_tokens: int = 1 << 22

    def limits(self, config: ModelConfig, pools: Pools | None = None) -> Limits:
        """What the scheduler has to keep to for this model.

        Args:
            config: the model's.
            pools: what its pages weigh, which cache_bytes asks for; by default those of bfloat16 on one device.

        Raises:
            UserError: a number that makes no sense, with the way out.
        """
        self._check()
        full_pages = self._full_pages(Pools(config=config) if pools is None else pools)
        allowed = min(config.max_context, full_pages * self.page_size)
        max_context = allowed if self.max_context is None else self.max_context
        if max_context > allowed:
            raise UserError(
                f"max_context is {max_context}; the model's is {config.max_context} and the cache has "
                f"{full_pages * self.page_size} positions: give a smaller max_context or a greater cache"
            )
        return Limits(
            max_rows=self.max_rows,
            page_size=self.page_size,
            num_full_pages=full_pages,
            num_sliding_pages=self._sliding_pages(config.sliding_window, full_pages),
            window=config.sliding_window,
            max_context=max_context,
            programs=self.programs(),
            max_queue=self.max_queue,
            max_queued_tokens=self.max_queued_tokens,
            aligned_chunks=self.batch_invariant,
        )

    def programs(self) -> tuple[Program, ...]:
        """The shapes of all steps."""
        width, rows, tokens = 1 + self.draft_tokens, self.max_rows, self.prefill_tokens
        if self.batch_invariant:
            return (Program(rows, width, 0, 0), Program(0, 0, 1, tokens))
        short = max(tokens // _SHORT, 1)
        powers = (*_FEW_ROWS, *(4**power for power in range(2, rows.bit_length())))
        decode = sorted({min(some, rows) for some in powers})
        prefill = sorted({(1, short), (min(rows, _SHORT), short), (1, max(tokens // _MIDDLE, 1)), (1, tokens)})
        return (
            *(Program(some, width, 0, 0) for some in decode),
            *(Program(rows, width, *shape) for shape in prefill),
        )

    def _full_pages(self, pools: Pools) -> int:
        config = pools.config
        if self.cache_bytes is None:
            cache_tokens = self.max_rows * _TOKENS_PER_ROW if self.cache_tokens is None else self.cache_tokens
            return -(-cache_tokens // self.page_size)
        longest = config.max_context if self.max_context is None else self.max_context
        return pools.full_pages_within(
            self.cache_bytes,
            sliding=functools.partial(self._sliding_pages, config.sliding_window),
            page_size=self.page_size,
            most=self.max_rows * -(-longest // self.page_size),
        )

    def _sliding_pages(self, window: int, full_pages: int) -> int:
        """Room for every row's window and chunk, and as much again, at least a quarter of the cache, for what is kept.

        A prompt that is kept can be gone on from where the window before that place is kept too.
        """
        seen = window - 1 + max(self.prefill_tokens, 1 + self.draft_tokens)
        running = self.max_rows * (-(-seen // self.page_size) + 1)
        return min(running + max(running, full_pages // 4), running + full_pages)

    def _check(self) -> None:
        for name in ("max_rows", "page_size", "prefill_tokens", "max_queue", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise UserError(
                f"cache_tokens is {self.cache_tokens} and cache_bytes {self.cache_bytes}; expected one of them: "
                "each says how large the cache is"
            )
        for name in ("cache_tokens", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"{name} is {value}; expected at least 2, a token and the one behind it")
        if self.draft_tokens < 0:
            raise UserError(f"draft_tokens is {self.draft_tokens}; expected 0 (off) or more")
