"""Decides which rows run next, in which program and with which pages. Knows token counts; knows no arrays and no text.

    submit ─► waiting ─ admitted: a slot, pages ─► running: prefill chunks, then one id (and a draft's) a step ─► finish
                 ▲                                    │
                 └───── preempted: pages are short ───┘

One order rules everything, the rank. A sequence's rank is its arrival, put forward by `ageing` for each step of
priority, and never changes. The first in rank is admitted first (nobody overtakes it, though a later one may be
smaller), gets its pages first and its prompt computed first; the last in rank is preempted first.

So the first in rank of those that run gets on in every step (every second one where parts take turns), since all
others' pages can be had for it, and ends, being of bounded length; then the next one is first. A request of priority p
waits for those before it and at most (p' - p) * ageing later ones of each higher priority p', then for no more: nobody
starves and nothing goes round in circles. A preempted sequence keeps its ids and its rank; what it had computed stays
cached while nobody needs the room.
"""

import bisect
import dataclasses
import operator
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

from gptoss_jax.engine.ledger import Ledger
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.sequence import Piece, Plan, Sequence
from gptoss_jax.errors import UserError

_rank = operator.attrgetter("rank")
Draft = Callable[[Sequence], Items[int]]


class QueueFull(UserError):
    """A request that does not find room in the queue now; it may later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What there is now, and what was since the beginning.

    Attributes:
        running: sequences with a slot.
        waiting: sequences without one, preempted ones and those that wait for their leader among them.
        queued_tokens: ids of those that wait.
        held_full_pages: that a sequence holds.
        held_sliding_pages: likewise.
        cached_full_pages: that nobody holds and the prefix cache keeps.
        cached_sliding_pages: likewise.
        prefilled_tokens: positions computed in prefill parts, after a preemption once more.
        cached_tokens: positions that were found in the prefix cache instead.
        preemptions: how often a sequence lost its pages to another.
    """

    running: int
    waiting: int
    queued_tokens: int
    held_full_pages: int
    held_sliding_pages: int
    cached_full_pages: int
    cached_sliding_pages: int
    prefilled_tokens: int
    cached_tokens: int
    preemptions: int


class Scheduler:
    """All sequences between submit and finish. One thread at a time; `abort` may come between a plan and its commit.

    The caller's loop: schedule a plan, run it, commit what it sampled, finish the sequences that end there. One that
    ends before the commit is passed over by it, and only the pages of earlier steps are cached.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._ledger = Ledger(limits)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # by rank, as are those that run
        self._running: list[Sequence] = []
        self._followers: dict[int, list[Sequence]] = {}  # by their leader's id, until its prompt is computed
        self._free_slots = list(range(limits.max_rows - 1, -1, -1))
        self._arrivals = 0
        self._num_waiting = 0
        self._queued_tokens = 0
        self._prefilled_tokens = 0
        self._cached_tokens = 0
        self._preemptions = 0
        self._prefill_is_next = True  # where prompts and decoding take turns

    def submit(self, *sequences: Sequence) -> None:
        """Queues all of them or none; a leader stands before its followers.

        Raises:
            QueueFull: the queue is full.
            UserError: one that could never run.
        """
        for sequence in sequences:
            self._check_fits(sequence)
        self._check_queue(sequences)
        for sequence in sequences:
            sequence.arrival = self._arrivals
            sequence.rank = (self._arrivals - sequence.priority * self.limits.ageing, -sequence.priority)
            self._arrivals += 1
            self._sequences[sequence.id] = sequence
            self._wait(sequence)

    def abort(self, sequence_id: int) -> bool:
        """Ends a sequence wherever it is and frees its pages now; False where it has ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self.finish(sequence)
        return sequence is not None

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence: its pages are free or, with whole content, cached; its slot is free."""
        if sequence.state == "running":
            self._stop(sequence)
        else:
            self._leave_queue(sequence)
        sequence.state = "finished"
        del self._sequences[sequence.id]
        self._lead(sequence)

    def schedule(self, draft: Draft | None = None) -> Plan | None:
        """The next step, None where there is nothing to do.

        Every sequence that decodes is in it, with the ids that `draft` guesses after its own, as many as a program
        takes and its length allows. So are chunks of prompts, best rank first, as many as the best program takes:
        see `Limits.fit`. In the end the smallest program is named that holds what was found room for.
        """
        decoding = [sequence for sequence in self._running if sequence.computed >= sequence.prefill_end]
        prefilling = self._prefilling()
        drafts = self._drafts(decoding, draft) if draft is not None else {}
        step = _Step(drafts, self.limits.programs[0])
        if not prefilling or self._fit_together(len(decoding)):
            self._fill(step, decoding, prefilling)
        else:
            if self._prefill_is_next:
                self._fill(step, [], prefilling)
            if not step.prefill:  # not their turn, or no room for any of them
                self._fill(step, decoding, {})
            self._prefill_is_next = not step.prefill
        return self._plan(step) if step.decode or step.prefill else None

    def commit(self, plan: Plan, sampled: Mapping[int, Items[int]]) -> None:
        """Takes over what a step computed.

        Args:
            plan: the step.
            sampled: by sequence id, for each piece that samples: the accepted ids of its draft and the one after them,
                or fewer where the sequence ends among them. Sequences that ended since are passed over.
        """
        for piece in plan.decode:
            if piece.sequence.state == "running":
                self._advance(piece, sampled)
        for piece in plan.prefill:
            if piece.sequence.state == "running":
                self._advance(piece, sampled)
                self._prefilled_tokens += piece.count

    def drop_cache(self) -> list[Sequence]:
        """After the device lost its state: nothing is cached, and all that ran, returned here, wait to be computed."""
        lost = list(self._running)
        for sequence in lost:
            self._stop(sequence)
            self._wait(sequence)
        self._ledger.forget()
        return lost

    @property
    def counts(self) -> Counts:
        full, sliding = self._ledger.full, self._ledger.sliding
        return Counts(
            running=len(self._running),
            waiting=self._num_waiting,
            queued_tokens=self._queued_tokens,
            held_full_pages=full.num_held,
            held_sliding_pages=sliding.num_held,
            cached_full_pages=full.num_idle,
            cached_sliding_pages=sliding.num_idle,
            prefilled_tokens=self._prefilled_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
        )

    def check(self) -> None:
        """Asserts what must always hold, page by page: for tests."""
        following = [sequence for followers in self._followers.values() for sequence in followers]
        queue = [*self._waiting, *following]
        for state, members in (("running", self._running), ("waiting", queue)):
            assert all(sequence.state == state for sequence in members)
        assert sorted(self._sequences) == sorted(sequence.id for sequence in (*self._running, *queue))
        for line in (self._running, self._waiting):
            assert line == sorted(line, key=_rank), "a line is out of order"
        assert self._num_waiting == len(queue)
        assert self._queued_tokens == sum(len(sequence.ids) for sequence in queue)
        assert all(not sequence.full_pages and not sequence.sliding_pages for sequence in queue), "a queued page"
        assert all(leader in self._sequences for leader in self._followers), "followers of nobody"
        slots = [sequence.slot for sequence in self._running if sequence.slot is not None]
        assert sorted([*slots, *self._free_slots]) == list(range(self.limits.max_rows)), "a slot is lost or given twice"
        self._ledger.check(self._running)

    # The queue

    def _check_fits(self, sequence: Sequence) -> None:
        assert sequence.state == "new", f"{sequence} was submitted before"
        assert sequence.id not in self._sequences, f"id {sequence.id} is in use"
        limits = self.limits
        if not sequence.ids or sequence.max_new_tokens < 1:
            raise UserError(
                f"a request has {len(sequence.ids)} prompt ids and {sequence.max_new_tokens} new ones; "
                "expected at least 1 of each"
            )
        if sequence.max_length > limits.max_context:
            raise UserError(
                f"{sequence.num_prompt} prompt ids and {sequence.max_new_tokens} new ones are {sequence.max_length}; "
                f"the engine's context is {limits.max_context}: shorten the prompt or ask for fewer"
            )
        needed = limits.num_pages(sequence.max_length - 1)  # the last id is never fed
        if needed > limits.num_full_pages:
            raise UserError(
                f"{sequence.num_prompt} prompt ids and {sequence.max_new_tokens} new ones need {needed} pages of "
                f"{limits.page_size}; the cache has {limits.num_full_pages}: shorten the prompt, ask for fewer, or "
                "give the engine a larger cache"
            )

    def _check_queue(self, sequences: Items[Sequence]) -> None:
        limits, num_tokens = self.limits, sum(len(sequence.ids) for sequence in sequences)
        if self._num_waiting + len(sequences) > limits.max_queue:
            raise QueueFull(
                f"{self._num_waiting} requests wait and {len(sequences)} more came; the queue takes "
                f"{limits.max_queue}: try again later"
            )
        if self._num_waiting and self._queued_tokens + num_tokens > limits.max_queued_tokens:
            raise QueueFull(
                f"{self._queued_tokens} ids wait and {num_tokens} more came; the queue takes "
                f"{limits.max_queued_tokens}: try again later"
            )

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        self._num_waiting += 1
        self._queued_tokens += len(sequence.ids)
        leader = sequence.leader
        if leader is not None and leader.state in ("waiting", "running") and len(leader.ids) == leader.num_prompt:
            self._followers.setdefault(leader.id, []).append(sequence)
        else:
            bisect.insort(self._waiting, sequence, key=_rank)

    def _leave_queue(self, sequence: Sequence) -> None:
        self._num_waiting -= 1
        self._queued_tokens -= len(sequence.ids)
        followers = self._followers.get(sequence.leader.id, []) if sequence.leader is not None else []
        if sequence in followers:
            followers.remove(sequence)
        else:
            _remove(self._waiting, sequence)

    def _lead(self, leader: Sequence) -> None:
        """Those that waited for it wait for themselves: its prompt is cached, or never will be."""
        for follower in self._followers.pop(leader.id, ()):
            bisect.insort(self._waiting, follower, key=_rank)

    # A step

    def _prefilling(self) -> dict[Sequence, int]:
        """Positions that are left to prefill of whoever may be in a prefill part, by rank."""
        left = {s: s.prefill_end - s.computed for s in self._running if s.computed < s.prefill_end}
        if not self._waiting or not self._free_slots or self._ledger.available <= len(self._running):
            return left
        rows = max(program.prefill_rows for program in self.limits.programs)
        for sequence in self._waiting[: min(rows, len(self._free_slots))]:
            end = self._prefill_end(sequence)
            left[sequence] = end - self._ledger.cached_pages(sequence, end=end) * self.limits.page_size
        return dict(sorted(left.items(), key=lambda item: item[0].rank))

    def _prefill_end(self, sequence: Sequence) -> int:
        return sequence.num_prompt if self.limits.aligned_chunks else len(sequence.ids)

    def _fill(self, step: "_Step", decoding: list[Sequence], prefilling: Mapping[Sequence, int]) -> None:
        """Places these sequences, as many as a program takes, best rank first."""
        step.program = self.limits.fit(
            decode_rows=len(decoding),
            decode_width=1 + max(map(len, step.drafts.values()), default=0),
            prefills=list(prefilling.values()),
        )
        # Both come in order of rank, and a sort of two such runs is one merge.
        for sequence in sorted([*decoding, *prefilling], key=_rank) if prefilling else decoding:
            self._place(sequence, step)

    def _fit_together(self, decode_rows: int) -> bool:
        return any(program.decode_rows >= decode_rows and program.prefill_rows for program in self.limits.programs)

    def _drafts(self, decoding: Items[Sequence], draft: Draft) -> dict[Sequence, tuple[int, ...]]:
        longest = max(program.decode_width for program in self.limits.programs) - 1
        drafts = {}
        for sequence in decoding:
            room = min(longest, sequence.max_length - len(sequence.ids) - 1)
            if room > 0 and sequence.computed == len(sequence.ids) - 1 and (guess := tuple(draft(sequence)[:room])):
                drafts[sequence] = guess
        return drafts

    def _place(self, sequence: Sequence, step: "_Step") -> None:
        """Finds room for the sequence's next piece, if there is, and puts it into the step."""
        if sequence.state == "waiting":  # for the first time, or since this step preempted it
            self._admit(sequence, step)
        elif sequence.computed >= sequence.prefill_end:
            self._place_decode(sequence, step)
        elif len(step.prefill) < step.program.prefill_rows:
            count = min(step.program.prefill_width, sequence.prefill_end - sequence.computed)
            if self._make_room(sequence, count, step):
                step.prefill.append(self._piece(sequence, count))

    def _place_decode(self, sequence: Sequence, step: "_Step") -> None:
        draft = step.drafts.get(sequence, ())[: step.program.decode_width - 1] if step.drafts else ()
        if draft and self._ledger.missing(sequence, end=sequence.computed + 1 + len(draft)) > self._ledger.available:
            draft = ()  # a guess is not worth another's pages
        if self._make_room(sequence, 1 + len(draft), step):
            step.decode.append(self._piece(sequence, 1, draft))

    def _piece(self, sequence: Sequence, count: int, draft: tuple[int, ...] = ()) -> Piece:
        start = sequence.computed
        return Piece(sequence, start, count + len(draft), start + count == len(sequence.ids), draft)

    def _make_room(self, sequence: Sequence, count: int, step: "_Step") -> bool:
        """Pages for `count` more positions, from the last in rank if need be; False if that is the sequence itself."""
        end = sequence.computed + count
        missing = self._ledger.missing(sequence, end=end)
        while missing > self._ledger.available:
            last = self._running[-1]
            assert len(self._running) > 1, f"{sequence} does not fit though it runs alone"
            self._preempt(last, step)
            if last is sequence:
                return False
        if missing > 0:
            self._ledger.grow(sequence, end=end)
        return True

    def _admit(self, sequence: Sequence, step: "_Step") -> None:
        """A slot and the pages of its first chunk for the first that waits, while nobody is short of pages.

        A page number for each one that runs is left over, or it would be preempted for them soon.
        """
        if step.preempted or len(step.prefill) >= step.program.prefill_rows or sequence is not self._waiting[0]:
            return
        end = self._prefill_end(sequence)
        self._ledger.attach(sequence, end=end)
        count = min(step.program.prefill_width, end - sequence.computed)
        missing = self._ledger.missing(sequence, end=sequence.computed + count)
        if missing + len(self._running) > self._ledger.available:
            self._ledger.release(sequence)
            return
        self._leave_queue(sequence)
        sequence.state, sequence.slot, sequence.prefill_end = "running", self._free_slots.pop(), end
        bisect.insort(self._running, sequence, key=_rank)
        self._cached_tokens += sequence.computed
        if sequence.cached is None:
            sequence.cached = sequence.computed
        self._ledger.grow(sequence, end=sequence.computed + count)
        step.admitted.append(sequence)
        step.prefill.append(self._piece(sequence, count))

    def _preempt(self, sequence: Sequence, step: "_Step") -> None:
        assert sequence.slot is not None
        step.preempted.append(sequence)
        step.freed_slots.append(sequence.slot)
        self._preemptions += 1
        self._stop(sequence)
        self._wait(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence."""
        assert sequence.slot is not None
        _remove(self._running, sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        self._ledger.release(sequence)

    def _plan(self, step: "_Step") -> Plan:
        program = self.limits.fit(
            decode_rows=len(step.decode),
            decode_width=max((piece.count for piece in step.decode), default=0),
            prefills=[piece.count for piece in step.prefill],
        )
        return Plan(
            decode=tuple(step.decode),
            prefill=tuple(step.prefill),
            program=program,
            admitted=tuple(step.admitted),
            preempted=tuple(step.preempted),
            freed_slots=tuple(step.freed_slots),
        )

    def _advance(self, piece: Piece, sampled: Mapping[int, Items[int]]) -> None:
        sequence, own = piece.sequence, piece.count - len(piece.draft)
        new = sampled[sequence.id] if piece.samples else ()
        assert not piece.samples or 1 <= len(new) <= 1 + len(piece.draft), f"{len(new)} ids for {piece}"
        assert tuple(new[:-1]) == piece.draft[: max(len(new) - 1, 0)], f"{new} do not begin as {piece} guessed"
        # Of a draft only what was accepted is computed; the id after it is not.
        sequence.computed = piece.start + own + max(len(new) - 1, 0)
        sequence.ids.extend(new)
        self._ledger.settle(sequence)
        if new and self._followers:
            self._lead(sequence)


@dataclasses.dataclass
class _Step:
    """A plan that grows."""

    drafts: Mapping[Sequence, tuple[int, ...]]
    program: Program
    decode: list[Piece] = dataclasses.field(default_factory=list)
    prefill: list[Piece] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    freed_slots: list[int] = dataclasses.field(default_factory=list)


def _remove(line: list[Sequence], sequence: Sequence) -> None:
    """Takes it out of a line that is sorted by rank."""
    index = bisect.bisect_left(line, sequence.rank, key=_rank)
    assert line[index] is sequence
    del line[index]
