"""A plan as the array of words that a compiled step reads. Knows pieces and slots; knows no model and no device.

All of a step's input is one int32 array, so that it takes one transfer, whatever the step; a program's layout says
where in it each field of each part lies. The fields are views: of a NumPy array they are filled in, of a traced array
they are what the step computes with.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.sequence import Piece, Plan

NOT_ASKED = -1


@dataclasses.dataclass(frozen=True)
class PartWords:
    """The fields of one part; arrays of int32, NumPy's or JAX's.

    Attributes:
        tokens: [B, T], as in model/paged.py; so are slots, first and count [B].
        num_prompt: [B], ids of the row's prompt: what stands behind them was generated.
        num_sampled: [B], after how many of the row's last tokens an id is wanted.
        full_table: [B, J], as in model/paged.py; so is sliding_table.
        targets: [B, T], the id behind each token whose logprob is wanted; -1 where none is.
        adapter: [B], as in model/paged.py; None where nobody chooses.
    """

    tokens: Any
    slots: Any
    first: Any
    count: Any
    num_prompt: Any
    num_sampled: Any
    full_table: Any
    sliding_table: Any
    targets: Any
    adapter: Any = None

    @staticmethod
    def shapes(rows: int, width: int, table_width: int, *, has_adapter: bool) -> tuple[tuple[int, ...], ...]:
        """Of the fields, in their order."""
        last = [(rows,)] if has_adapter else []
        return ((rows, width), *[(rows,)] * 5, (rows, table_width), (rows, table_width), (rows, width), *last)


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """Where the fields of a program's parts lie; a part without rows has none."""

    program: Program
    table_width: int
    has_adapter: bool = False

    @classmethod
    def of(cls, program: Program, limits: Limits) -> "StepLayout":
        return cls(program, table_width(limits), bool(limits.adapters))

    @property
    def num_words(self) -> int:
        """Those of the parts, and one that says whether masks are waited for."""
        return sum(math.prod(shape) for part in self._parts() for shape in part) + 1

    def fields(self, words: Any) -> tuple[PartWords, ...]:
        """Decode, then prefill."""
        sizes = [math.prod(shape) for part in self._parts() for shape in part]
        starts = iter(itertools.accumulate(sizes, initial=0))

        def view(shape: tuple[int, ...]) -> Any:
            start = next(starts)
            return words[start : start + math.prod(shape)].reshape(shape)

        return tuple(PartWords(*map(view, part)) for part in self._parts())

    def _parts(self) -> list[tuple[tuple[int, ...], ...]]:
        """The shapes of the fields of each part."""
        program = self.program
        sizes = ((program.decode_rows, program.decode_width), (program.prefill_rows, program.prefill_width))
        settings = {"table_width": self.table_width, "has_adapter": self.has_adapter}
        return [PartWords.shapes(rows, width, **settings) for rows, width in sizes if rows]


def table_width(limits: Limits) -> int:
    """Pages of one sequence, at most."""
    return limits.num_pages(limits.max_context)


class Staging:
    """Fills the words of each step. It remembers the page tables of the slots, and writes only what is new in them."""

    def __init__(self, limits: Limits):
        self._limits = limits
        width = table_width(limits)
        self._full = np.zeros((limits.max_rows, width), np.int32)
        self._sliding = np.zeros((limits.max_rows, width), np.int32)
        self._num_known = [0] * limits.max_rows  # pages of each slot in the tables
        layouts = {program: StepLayout.of(program, limits) for program in limits.programs}
        self._words = {program: np.zeros(layout.num_words, np.int32) for program, layout in layouts.items()}
        self._fields = {program: layouts[program].fields(words) for program, words in self._words.items()}

    def admit(self, slot: int) -> None:
        """Forgets the pages of the slot's last sequence."""
        self._num_known[slot] = 0

    def words(self, program: Program) -> Int32[np.ndarray, " words"]:
        """Those of the program's last plan."""
        return self._words[program]

    def stage(self, plan: Plan, *, is_masked: bool) -> Int32[np.ndarray, " words"]:
        """The words of the plan, until the next plan of the same program."""
        parts = iter(self._fields[plan.program])
        if plan.program.decode_rows:
            self._fill(next(parts), plan.decode)
        if plan.program.prefill_rows:
            self._fill(next(parts), plan.prefill)
        words = self._words[plan.program]
        words[-1] = is_masked
        return words

    def _fill(self, part: PartWords, pieces: Sequence[Piece]) -> None:
        slots = []
        part.targets[...] = NOT_ASKED
        for row, piece in enumerate(pieces):
            slot = piece.sequence.slot
            assert slot is not None, piece
            slots.append(slot)
            part.tokens[row, : piece.count] = piece.tokens
            if targets := piece.scored:
                part.targets[row, : len(targets)] = targets
            self._learn_pages(slot, piece)
        num = len(slots)
        part.slots[:num] = slots
        part.first[:num] = [piece.start for piece in pieces]
        part.count[:num] = [piece.count for piece in pieces]
        part.num_prompt[:num] = [piece.sequence.num_prompt for piece in pieces]
        part.num_sampled[:num] = [piece.samples * (1 + len(piece.draft)) for piece in pieces]
        if part.adapter is not None:
            part.adapter[:num] = [piece.sequence.adapter for piece in pieces]
        part.full_table[:num] = self._full[slots]
        part.sliding_table[:num] = self._sliding[slots]
        for idle in (
            part.first,
            part.count,
            part.num_sampled,
        ):  # no other field of an idle row matters
            idle[num:] = 0

    def _learn_pages(self, slot: int, piece: Piece) -> None:
        """Those that are not known, and those that the piece writes to: after a wrong draft they may be others."""
        size, sequence = self._limits.page_size, piece.sequence
        end = (piece.start + piece.count - 1) // size + 1
        first = min(self._num_known[slot], piece.start // size)
        self._full[slot, first:end] = sequence.full_pages[first:end]
        seen = max(first, self._limits.first_visible_page(piece.start))
        self._sliding[slot, seen:end] = np.array(sequence.sliding_pages[seen:end])  # what is seen is held: no None
        self._num_known[slot] = end
