"""What the engine may hold, and the steps it may run. Knows sizes and names; knows no sequence and no array."""

import dataclasses
from collections.abc import Sequence

from gptoss_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """The shape of one compiled step: a decode part [decode_rows, decode_width] beside a prefill part; 0 is absent."""

    decode_rows: int
    decode_width: int
    prefill_rows: int
    prefill_width: int

    @property
    def num_tokens(self) -> int:
        """What the step computes, padding included: the measure of its size and of its time."""
        return self.decode_rows * self.decode_width + self.prefill_rows * self.prefill_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Frozen sizes that scheduler and runner share.

    A step computes at most the `num_tokens` of the largest program, and a row that decodes is in every step (in every
    second one where they take turns): so long a stream waits for its next id at most, however long the prompts are.

    Args:
        max_rows: slots, that is sequences that run at the same time.
        page_size: positions of one page.
        num_full_pages: pages of the full-attention layers.
        num_sliding_pages: pages of the sliding layers. With as many as full pages every cached prefix stays usable;
            with fewer a prefix is lost once the last window before its end is.
        window: positions that a sliding layer sees, the query's own among them.
        max_context: ids of one sequence, prompt and generated.
        programs: the steps that are compiled. Where none holds the rows that decode and a prefill part, prompts and
            decoding take turns.
        max_queue: sequences that may wait.
        max_queued_tokens: ids that may wait; of an empty queue it is not asked.
        ageing: how many earlier requests one step of priority passes at most.
        aligned_chunks: chunks begin at multiples of the prefill width and hold prompt ids only, whatever the prefix
            cache had; after a preemption generated ids are fed again one by one. So every position is computed by the
            same shape of step, warm and cold, alone and in company.
        adapters: names of the model's adapters, in their order, of which each sequence takes one or none. Without any
            nobody chooses, and steps are compiled without the choice.
    """

    max_rows: int
    page_size: int
    num_full_pages: int
    num_sliding_pages: int
    window: int
    max_context: int
    programs: tuple[Program, ...]
    max_queue: int = 1024
    max_queued_tokens: int = 1 << 22
    ageing: int = 64
    aligned_chunks: bool = False
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_rows", "page_size", "num_full_pages", "num_sliding_pages", "window", "max_context", "ageing"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        self._check_programs()
        # A sequence alone needs the window before a chunk and the chunk, at whatever offset they begin in a page.
        longest = max(max(program.prefill_width, program.decode_width) for program in self.programs)
        positions = min(self.window - 1 + longest, self.max_context)
        needed = min(self.num_pages(positions - 1) + 1, self.num_pages(self.max_context))
        if self.num_sliding_pages < needed:
            raise UserError(
                f"num_sliding_pages is {self.num_sliding_pages}; a window of {self.window} and a chunk of {longest} "
                f"need {needed} pages of {self.page_size}: give more, or a smaller chunk"
            )

    def _check_programs(self) -> None:
        for program in self.programs:
            pairs = ((program.decode_rows, program.decode_width), (program.prefill_rows, program.prefill_width))
            if any((rows < 1) != (width < 1) for rows, width in pairs) or program.num_tokens < 1:
                raise UserError(f"{program} has a part without rows or without width; expected both or neither")
        most = max((program.decode_rows for program in self.programs), default=0)
        if most < self.max_rows:
            raise UserError(
                f"max_rows is {self.max_rows}; the programs decode {most} rows at most: declare a larger one"
            )
        if not any(program.prefill_rows for program in self.programs):
            raise UserError(f"none of {len(self.programs)} programs has a prefill part; expected at least one")
        widths = {program.prefill_width for program in self.programs if program.prefill_rows}
        if self.aligned_chunks and len(widths) > 1:
            raise UserError(f"aligned_chunks asks for one prefill width; the programs have {sorted(widths)}")

    def num_pages(self, num_positions: int) -> int:
        """Pages that hold positions 0 .. num_positions - 1."""
        return -(-num_positions // self.page_size)

    def first_visible_page(self, position: int) -> int:
        """The page of a sliding layer in which the oldest key lies that a query at `position` or later sees."""
        return max(0, position - self.window + 1) // self.page_size

    def fit(self, *, decode_rows: int, decode_width: int, prefills: Sequence[int]) -> Program:
        """The program for this many decode rows, drafts up to this width and prompts with this much left, best first.

        Of those with enough decode rows the one that takes the most prompt ids, one chunk of each prompt from the first
        on; of equals the one that cuts drafts least; of equals the smallest.
        """
        enough = [program for program in self.programs if program.decode_rows >= decode_rows]
        return max(enough, key=lambda program: (*_taken(program, decode_width, prefills), -program.num_tokens))


def _taken(program: Program, decode_width: int, prefills: Sequence[int]) -> tuple[int, int]:
    """Ids of prompts, and of a row that decodes, that this program takes."""
    width = program.prefill_width
    ids = sum([left if left < width else width for left in prefills[: program.prefill_rows]])
    return ids, min(program.decode_width, decode_width)
