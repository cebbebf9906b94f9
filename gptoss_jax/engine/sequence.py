"""One request's ids and where they stand, and what a step does with them. Knows ids and page numbers; decides nothing.

    ids       | prompt ........................ | generated ...... | last |
    computed  | keys and values are in pages .................... ^        the rest is fed next
    pages     | 0 | 1 | 2 | ...                                  | n |     position p lies in page p // Z at p % Z

A sequence that decodes has computed all its ids but the last, whose turn it is.
"""

import dataclasses
from typing import Literal

from gptoss_jax.engine.limits import Program

NO_ADAPTER = -1  # in place of an adapter's number: the model as it is


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A request's ids with its place on the device; what is not in the constructor belongs to the scheduler.

    Attributes:
        id: unique among those that wait or run.
        ids: the prompt, then what was generated.
        max_new_tokens: how many may be generated; whoever samples stops there, or earlier, by `Scheduler.finish`.
        priority: higher goes first; see `Limits.ageing`.
        leader: a sequence with the same prompt: this one waits for its first id and finds the prompt in the cache.
        prompt_logprobs: the prompt's ids are scored, so that all of it has to be computed; see engine/request.py.
        adapter: which of the model's it takes; with another one its keys and values would be others.
        num_prompt: how many of the ids are the prompt's.
        computed: positions whose keys and values lie in the pages.
        prefill_end: positions before it are computed in the prefill part, those after it in the decode part.
        cached: positions that were found in the prefix cache when it was admitted first; None before.
        slot: None while it waits.
        full_pages: page ids by page number.
        sliding_pages: the same for sliding layers, equally long; None for those behind the window.
        keys: names of the contents of whole pages, as far as somebody asked.
        keyed: whole pages that were offered to the cache under these names.
        first_sliding: page number of the first sliding page that is held.
        arrival: number of its submission.
        rank: its place in the order in which sequences are served: the smallest first.
    """

    id: int
    ids: list[int]
    max_new_tokens: int
    priority: int = 0
    leader: "Sequence | None" = None
    prompt_logprobs: int | None = None
    adapter: int = NO_ADAPTER

    num_prompt: int = dataclasses.field(init=False)
    state: Literal["new", "waiting", "running", "finished"] = dataclasses.field(default="new", init=False)
    computed: int = dataclasses.field(default=0, init=False)
    prefill_end: int = dataclasses.field(default=0, init=False)
    cached: int | None = dataclasses.field(default=None, init=False)
    slot: int | None = dataclasses.field(default=None, init=False)
    full_pages: list[int] = dataclasses.field(default_factory=list, init=False)
    sliding_pages: list[int | None] = dataclasses.field(default_factory=list, init=False)
    keys: list[bytes] = dataclasses.field(default_factory=list, init=False, repr=False)
    keyed: int = dataclasses.field(default=0, init=False)
    first_sliding: int = dataclasses.field(default=0, init=False)
    arrival: int = dataclasses.field(default=0, init=False)
    rank: tuple[int, int] = dataclasses.field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def max_length(self) -> int:
        """Ids that it has at its end, at most."""
        return self.num_prompt + self.max_new_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What one row of a step computes: positions start .. start + count - 1, the draft's among them as the last.

    With `samples` the id after the last of the sequence's own ids is wanted (and those after each id of the draft).
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The `count` ids to feed."""
        return [*self.sequence.ids[self.start : self.start + self.count - len(self.draft)], *self.draft]

    @property
    def scored(self) -> list[int]:
        """The ids of the prompt that are scored: those behind the first of the ids to feed, the second, …"""
        sequence = self.sequence
        if sequence.prompt_logprobs is None:
            return []
        return sequence.ids[self.start + 1 : min(self.start + self.count + 1, sequence.num_prompt)]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One step: its pieces by part, and the program that holds them.

    `admitted` got their slots with this plan. `preempted` lost their pages and the slots `freed_slots`, in this order,
    and wait again; no slot that this plan frees is given away by it.
    """

    decode: tuple[Piece, ...]
    prefill: tuple[Piece, ...]
    program: Program
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    freed_slots: tuple[int, ...] = ()
