"""The scheduler under random requests, against a device that remembers what was written into which page.

The device holds, for each page and offset, the history that was computed there: a number that stands for all ids up to
that position. A page that is shared wrongly, released early or written while another reads it shows another history.
"""

import itertools
from random import Random

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.scheduler import QueueFull, Scheduler
from gptoss_jax.engine.sequence import Piece, Plan, Sequence

# Few ids: prompts share prefixes, and pages are alike that must not be shared. Prompts are the beginning of this one
# text and a tail of their own.
TEXT = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]
RANDOMS = st.integers(0, 1 << 32).map(Random)  # even: what hypothesis draws itself is mostly small
PROGRAMS = (
    (Program(4, 1, 0, 0), Program(4, 1, 1, 5)),
    (Program(1, 3, 0, 0), Program(2, 1, 0, 0), Program(4, 3, 0, 0), Program(4, 1, 2, 3), Program(4, 3, 1, 8)),
    (Program(4, 3, 0, 0), Program(0, 0, 1, 4)),  # they take turns
    (Program(2, 1, 0, 0), Program(2, 1, 3, 2), Program(4, 2, 0, 0), Program(0, 0, 1, 6)),  # sometimes
)


def histories(ids: list[int]) -> list[int]:
    """For each position a number that stands for the ids up to it."""
    return list(itertools.accumulate(ids, lambda before, one: hash((before, one)), initial=0))[1:]


class Device:
    """Writes a step's positions, and then asserts that each query sees its own history and no other."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.full: dict[tuple[int, int], int] = {}  # (page, offset)
        self.sliding: dict[tuple[int, int], int] = {}

    def lose(self) -> None:
        self.full.clear()
        self.sliding.clear()

    def run(self, plan: Plan) -> None:
        pieces = (*plan.decode, *plan.prefill)
        written = [place for piece in pieces for place in self._write(piece)]
        assert len(written) == len(set(written)), "two rows write into one place"
        for piece in pieces:
            self._read(piece)

    def _history(self, piece: Piece) -> list[int]:
        return histories([*piece.sequence.ids[: piece.start], *piece.tokens])

    def _write(self, piece: Piece) -> list[tuple[str, int, int]]:
        size, places = self.limits.page_size, []
        history = self._history(piece)
        for position in range(piece.start, piece.start + piece.count):
            number, offset = divmod(position, size)
            page, sliding = piece.sequence.full_pages[number], piece.sequence.sliding_pages[number]
            assert sliding is not None
            self.full[page, offset] = self.sliding[sliding, offset] = history[position]
            places += [("full", page, offset), ("sliding", sliding, offset)]
        return places

    def _read(self, piece: Piece) -> None:
        size = self.limits.page_size
        for position, past in enumerate(self._history(piece)):
            number, offset = divmod(position, size)
            assert self.full[piece.sequence.full_pages[number], offset] == past
            if position > piece.start - self.limits.window:
                page = piece.sequence.sliding_pages[number]
                assert page is not None, f"the query at {piece.start} sees {position}"
                assert self.sliding[page, offset] == past


class Machine(RuleBasedStateMachine):
    @initialize(random=RANDOMS)
    def start(self, random):
        size, window, programs = random.randint(1, 4), random.randint(1, 9), random.choice(PROGRAMS)
        widest = max(max(program.decode_width, program.prefill_width) for program in programs)
        has_one_width = len({program.prefill_width for program in programs if program.prefill_rows}) == 1
        self.limits = Limits(
            max_rows=random.randint(1, 4) if programs is not PROGRAMS[3] else 4,
            page_size=size,
            num_full_pages=-(-24 // size) + random.randint(0, 6),
            num_sliding_pages=-(-(window + widest) // size) + 1 + random.randint(0, 6),
            window=window,
            max_context=40,
            programs=programs,
            max_queue=8,
            max_queued_tokens=60,
            ageing=random.randint(1, 5),
            aligned_chunks=has_one_width and random.random() < 0.5,
        )
        self.scheduler = Scheduler(self.limits)
        self.device = Device(self.limits)
        self.live: dict[int, Sequence] = {}
        self.order: dict[int, tuple[int, int]] = {}  # by which they are to be served: the test's own count
        self.arrivals = 0
        self.first: int | None = None  # who came first in the last step, and for how many steps it has waited as such
        self.idle_turns = 0

    # One rule, since hypothesis leaves some rules out for a whole example.
    @rule(random=RANDOMS)
    def serve(self, random):
        for _ in range(random.randint(0, 6)):
            prompt = [*TEXT[: random.randint(0, len(TEXT))], *random.choices((0, 1), k=random.randint(0, 6))] or [0]
            self.submit(
                prompt,
                max_new_tokens=random.randint(1, 12),
                priority=random.choice((-1, 0, 0, 0, 1)),
                followers=random.choice((0, 0, 0, 1, 2)),
            )
        drafts, ends = random.random() < 0.5, random.choice((0.0, 0.1))
        for _ in range(random.randint(1, 12)):
            self.step(random, drafts=drafts, ends=ends)
            self.books_are_right()

    def submit(self, prompt, *, max_new_tokens, priority, followers):
        settings = {"max_new_tokens": max_new_tokens, "priority": priority}
        leader = Sequence(id=self.arrivals, ids=list(prompt), **settings)
        others = [self.arrivals + i for i in range(1, followers + 1)]
        group = [leader, *(Sequence(id=i, ids=list(prompt), leader=leader, **settings) for i in others)]
        too_long = len(prompt) + max_new_tokens - 1 > self.limits.num_full_pages * self.limits.page_size
        waiting = [one for one in self.live.values() if one.state == "waiting"]
        queued = sum(len(one.ids) for one in waiting)
        is_full = len(waiting) + len(group) > 8 or (waiting and queued + len(group) * len(prompt) > 60)
        try:
            self.scheduler.submit(*group)
        except QueueFull:
            assert is_full
            assert not too_long
        except ValueError:
            assert too_long
        else:
            assert not too_long
            assert not is_full
            for one in group:
                self.live[one.id] = one
                self.order[one.id] = (self.arrivals - priority * self.limits.ageing, -priority)
                self.arrivals += 1

    def step(self, random, *, drafts, ends):
        """One turn of an engine's loop; requests are aborted while the step runs, and stop early, this often."""
        before = {one.id: one.slot for one in self.live.values()}
        plan = self.scheduler.schedule((lambda one: random.choices((0, 1), k=one.id % 5)) if drafts else None)
        assert (plan is None) == (not self.live), "nothing to do, though somebody waits"
        if plan is None:
            return
        self.check_plan(plan, before)
        self.device.run(plan)
        if random.random() < ends:
            self.end(random.choice(sorted(self.live)))
        sampled = {}
        for piece in (*plan.decode, *plan.prefill):
            if piece.samples:
                accepted = random.randint(0, len(piece.draft))
                sampled[piece.sequence.id] = [*piece.draft[:accepted], random.randint(0, 1)]
        expected = {one: [*self.live[one].ids, *new] for one, new in sampled.items() if one in self.live}
        self.scheduler.commit(plan, sampled)
        for one, ids in expected.items():
            assert self.live[one].ids == ids
            if len(ids) == self.live[one].max_length or random.random() < ends:
                self.end(one)

    @precondition(lambda self: self.live)
    @rule(random=RANDOMS)
    def abort(self, random):
        self.end(random.choice(sorted(self.live)))

    @precondition(lambda self: self.live)
    @rule()
    def raise_in_a_step(self):
        plan = self.scheduler.schedule()
        for piece in (*plan.decode, *plan.prefill) if plan is not None else ():
            self.end(piece.sequence.id)
        self.device.lose()
        lost = self.scheduler.drop_cache()
        assert all(one.slot is None and one.state == "waiting" for one in lost)
        assert self.scheduler.counts.running == self.scheduler.counts.held_full_pages == 0

    def end(self, sequence_id: int) -> None:
        assert self.scheduler.abort(sequence_id)
        del self.live[sequence_id]

    def check_plan(self, plan: Plan, before: dict[int, int | None]) -> None:
        """What a plan promises, without asking how it was made."""
        pieces = (*plan.decode, *plan.prefill)
        assert pieces
        assert len({piece.sequence.id for piece in pieces}) == len(pieces)
        for piece in pieces:
            one = piece.sequence
            assert piece.start == one.computed
            assert piece.start + piece.count - len(piece.draft) <= len(one.ids)
            assert piece.samples == (piece.start + piece.count - len(piece.draft) == len(one.ids))
            assert len(one.ids) + len(piece.draft) + 1 <= one.max_length
            assert one.slot is not None
            assert before[one.id] in (None, one.slot), "a slot changes while its sequence runs"
        self.check_program(plan)
        self.check_fairness(plan)
        if self.limits.aligned_chunks:
            width = max(program.prefill_width for program in self.limits.programs)
            for piece in plan.prefill:
                assert piece.start % width == 0
                assert piece.count == min(width, piece.sequence.num_prompt - piece.start)
        preempted = [(one.id, slot) for one, slot in zip(plan.preempted, plan.freed_slots, strict=True)]
        assert preempted == [(one.id, before[one.id]) for one in plan.preempted]
        assert not {piece.sequence.slot for piece in pieces} & set(plan.freed_slots)
        assert list(plan.admitted) == [piece.sequence for piece in pieces if before[piece.sequence.id] is None]

    def check_program(self, plan: Plan) -> None:
        def holds(program: Program) -> bool:
            return (
                program.decode_rows >= len(plan.decode)
                and program.decode_width >= max((piece.count for piece in plan.decode), default=0)
                and program.prefill_rows >= len(plan.prefill)
                and program.prefill_width >= max((piece.count for piece in plan.prefill), default=0)
            )

        assert plan.program in self.limits.programs
        assert holds(plan.program)
        smallest = min(program.num_tokens for program in self.limits.programs if holds(program))
        assert plan.program.num_tokens == smallest

    def check_fairness(self, plan: Plan) -> None:
        """The first in order that runs gets on, at least in every second step; who is admitted is the first to wait."""
        running = [one for one in self.live.values() if one.state == "running"]
        first = min(running, key=lambda one: self.order[one.id])
        planned = {piece.sequence.id for piece in (*plan.decode, *plan.prefill)}
        before = self.idle_turns if first.id == self.first else 0
        self.first, self.idle_turns = first.id, 0 if first.id in planned else before + 1
        takes_turns = not (plan.decode and plan.prefill) and not any(
            program.decode_rows >= self.limits.max_rows and program.prefill_rows for program in self.limits.programs
        )
        assert self.idle_turns <= takes_turns, f"{first} waits for {self.idle_turns} steps"
        if not takes_turns:
            decoding = {one.id for one in running if one.computed >= one.prefill_end}
            assert decoding <= planned, "a stream waits beside a prompt"
        admitted = [self.order[one.id] for one in plan.admitted]
        waiting = [one for one in self.live.values() if one.state == "waiting" and one not in plan.preempted]
        waiting = [one for one in waiting if one.leader is None or len(one.leader.ids) > one.num_prompt]
        if admitted and waiting:
            assert max(admitted) < min(self.order[one.id] for one in waiting), "somebody was overtaken"
        last = max((self.order[one.id] for one in running), default=(0, 0))
        assert all(self.order[one.id] > last or one.slot is None for one in plan.preempted)
        assert all(
            self.order[victim.id] > self.order[piece.sequence.id]
            for victim in plan.preempted
            for piece in (*plan.decode, *plan.prefill)
        ), "a better one was preempted for a worse"

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        for one in self.live.values():
            assert one.computed < len(one.ids) <= one.max_length
        self.check_parents()

    def check_parents(self) -> None:
        """Of a cached page that nobody holds all pages before it are cached: else it would be lost room."""
        pool = self.scheduler._ledger.full
        idle = {key for key, page in pool._cached.items() if page in pool._idle}
        parents = getattr(self, "parents", {})
        for one in self.live.values():
            parents.update(itertools.pairwise(reversed(one.keys)))
        self.parents = parents
        assert all(parents.get(key) is None or parents[key] in pool for key in idle), "a leaf outlives its parent"

    def teardown(self):
        """All that is left ends in bounded time, and no page stays behind."""
        if not hasattr(self, "scheduler"):
            return
        # The best of those that run gains an id or a chunk each second step, and can lose it all to each better one.
        bound = 2 * (1 + len(self.live)) * sum(one.max_length for one in self.live.values())
        steps = 0
        while self.live:
            plan = self.scheduler.schedule()
            assert plan is not None
            self.device.run(plan)
            pieces = (*plan.decode, *plan.prefill)
            self.scheduler.commit(plan, {piece.sequence.id: [1] for piece in pieces if piece.samples})
            self.scheduler.check()
            for one in [one for one in self.live.values() if len(one.ids) == one.max_length]:
                self.end(one.id)
            steps += 1
            assert steps <= bound, f"{len(self.live)} sequences starve after {steps} steps"
        counts = self.scheduler.counts
        assert counts.running == counts.waiting == counts.queued_tokens == 0
        assert counts.held_full_pages == counts.held_sliding_pages == 0
        self.scheduler.check()


# Random numbers shrink slowly and to nothing that is easier to read.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def test_random_requests_keep_the_books():
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=20, phases=PHASES))


@pytest.mark.slow
def test_many_more_random_requests_keep_the_books():
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=1000, stateful_step_count=30, phases=PHASES, derandomize=False)
    )
