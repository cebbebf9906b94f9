"""Many requests at once: a queue, one thread that makes steps, streams of events. Knows ids; knows no text, no arrays.

        submit ─► scheduler ─► plan ─► runner ─► sampled ids ─► continuation ─► events ─► stream ─► reader
                      ▲                                              │
                      └───────────── commit, finish ◄────────────────┘

One lock guards all but the device's call, so `submit` and `abort` wait for Python's part of a step at most. A step that
raises fails the requests in it: the others are computed anew from their ids, which are all that must not be lost.
"""

import atexit
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from gptoss_jax.engine.adapters import number_of
from gptoss_jax.engine.continuation import Continuation, TokenBytes, describe
from gptoss_jax.engine.limits import Limits
from gptoss_jax.engine.lockstep import LockstepRunner, execute_what_is_told, spans_processes
from gptoss_jax.engine.pools import Pools
from gptoss_jax.engine.programs import Drawn
from gptoss_jax.engine.request import Request, SamplingParams, Token
from gptoss_jax.engine.runner import Result, Runner, StepInput
from gptoss_jax.engine.scheduler import Scheduler
from gptoss_jax.engine.sequence import Piece, Plan
from gptoss_jax.engine.sequence import Sequence as Scheduled
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.engine.stats import Counts, Stats
from gptoss_jax.engine.stops import StopStrings
from gptoss_jax.engine.stream import Stream, deliver
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import is_first
from gptoss_jax.model.transformer import GptOss

_logger = logging.getLogger(__name__)


@runtime_checkable
class StepRunner(Protocol):
    """What the engine asks of a runner, see runner.py: a plan is staged, executed, and its results told by piece."""

    @property
    def num_programs(self) -> int: ...
    def admit(self, sequence: Scheduled, sampling: SamplingParams) -> None: ...
    def retire(self, slot: int) -> None: ...
    def stage(self, plan: Plan, *, is_masked: bool) -> StepInput: ...
    def masks(self, plan: Plan, allowed: Mapping[int, np.ndarray]) -> np.ndarray: ...
    def execute(self, step: StepInput, masks: Callable[[], np.ndarray]) -> Drawn: ...
    def results(self, plan: Plan, drawn: Drawn) -> Sequence[Result]: ...
    def reset(self) -> None: ...


@dataclasses.dataclass(eq=False, slots=True)
class _Entry:
    """A sequence under way, and whose it is."""

    sequence: Scheduled
    continuation: Continuation
    stream: Stream


class Engine:
    """Runs requests on a model, many at a time, until it is closed. Any thread and any event loop may submit.

        with Engine(model) as engine:
            for event in engine.submit(Request(prompt=ids, max_new_tokens=100)):
                ...

    Args:
        model: stays the caller's, and is not to change while the engine runs.
        settings: see EngineSettings.
        token_bytes: what an id stands for; only stop strings ask for it.
        adapters: names for those that the model has, in their order (see model/adapter.py), by which requests ask for
            one. Without names the only one that there may be answers every request.

    A model that lies on several processes has its engine in process 0; the others call `follow`.

    Raises:
        UserError: settings that contradict each other, a mesh that an engine cannot run on, or adapters that the model
            does not have.
    """

    def __init__(
        self,
        model: GptOss,
        *,
        settings: EngineSettings | None = None,
        token_bytes: TokenBytes | None = None,
        adapters: Sequence[str] = (),
    ):
        if spans_processes(model) and not is_first():
            raise UserError(
                "an engine is opened where process 0 is not, on a model that lies on several processes; "
                "expected process 0 alone to open it: the others call follow with the same model and settings"
            )
        settings = EngineSettings() if settings is None else settings
        runner, limits = _warm_runner(model, settings, adapters)
        lockstep = LockstepRunner(runner, limits) if spans_processes(model) else None
        self._begin(lockstep or runner, limits, model.config.vocab_size, settings.draft_tokens, token_bytes)
        if lockstep is not None:
            self._resources.callback(lockstep.close)

    @classmethod
    def on(
        cls,
        runner: StepRunner,
        *,
        limits: Limits,
        vocab_size: int,
        draft_tokens: int = 0,
        token_bytes: TokenBytes | None = None,
    ) -> "Engine":
        """An engine on a runner that is there already, and warm."""
        engine = cls.__new__(cls)
        engine._begin(runner, limits, vocab_size, draft_tokens, token_bytes)
        return engine

    def _begin(
        self,
        runner: StepRunner,
        limits: Limits,
        vocab_size: int,
        draft_tokens: int,
        token_bytes: TokenBytes | None,
    ) -> None:
        self._runner = runner
        self._limits = limits
        self._vocab_size = vocab_size
        self._draft_tokens = draft_tokens
        self._token_bytes = token_bytes
        self._scheduler = Scheduler(limits)
        self._entries: dict[int, _Entry] = {}  # by the sequence's id
        self._aborted: list[Stream] = []  # by their readers, since the last step
        self._ids = itertools.count()  # of sequences
        self._counts = Counts()
        self._begun = 0.0  # when the plan of this step was asked for
        self._closed: str | None = None  # why
        self._changed = threading.Condition()
        self._resources = contextlib.ExitStack()  # what else is to be closed
        self._thread = threading.Thread(target=self._serve, name="gptoss_jax engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # while jax is still there

    @property
    def vocab_size(self) -> int:
        """Ids are smaller than this."""
        return self._vocab_size

    @property
    def max_context(self) -> int:
        """The most ids of one request, prompt and continuation."""
        return self._limits.max_context

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that a request may ask for."""
        return self._limits.adapters

    def submit(self, request: Request) -> Stream:
        """Queues a request; its events come by the stream.

        Raises:
            QueueFull: as many wait as may; try again later.
            UserError: the request asks for what this engine cannot do, or the engine is closed.
        """
        continuations = self._continuations(request)
        sequences = self._sequences(request)
        stream = Stream(request.n, abort=self._abort)
        with self._changed:
            if self._closed is not None:
                raise UserError(f"{self._closed}; requests go to an engine that is open")
            entries = [_Entry(sequence, own, stream) for sequence, own in zip(sequences, continuations, strict=True)]
            self._scheduler.submit(*sequences)
            self._entries.update((entry.sequence.id, entry) for entry in entries)
            self._changed.notify()
        return stream

    def close(self) -> None:
        """Ends everything that runs or waits, by Finished("abort"), and the thread. More than once does no harm."""
        with self._changed:
            self._closed = self._closed or "the engine is closed"
            self._changed.notify()
        self._thread.join()
        self._resources.close()
        atexit.unregister(self.close)

    def stats(self) -> Stats:
        """What it does and has done."""
        with self._changed:
            return Stats(
                queue=self._scheduler.counts, programs=self._runner.num_programs, **dataclasses.asdict(self._counts)
            )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _continuations(self, request: Request) -> list[Continuation]:
        request.check(vocab_size=self._vocab_size, max_context=self._limits.max_context)
        stops = None
        if request.stop:
            if self._token_bytes is None:
                raise UserError("stop strings need the bytes of ids; give the engine token_bytes")
            stops = StopStrings([text.encode() if isinstance(text, str) else text for text in request.stop])
        return [
            Continuation(
                request,
                index,
                vocab_size=self._vocab_size,
                draft_tokens=self._draft_tokens,
                stops=stops,
                token_bytes=self._token_bytes,
            )
            for index in range(request.n)
        ]

    def _sequences(self, request: Request) -> list[Scheduled]:
        """One for each continuation; all but the first wait for the first to compute the prompt."""

        adapter = number_of(request.adapter, self._limits.adapters)

        def sequence(leader: Scheduled | None = None) -> Scheduled:
            return Scheduled(
                id=next(self._ids),
                ids=list(request.prompt),
                max_new_tokens=max(request.max_new_tokens, 1),
                priority=request.priority,
                leader=leader,
                prompt_logprobs=request.prompt_logprobs if leader is None else None,
                adapter=adapter,
            )

        first = sequence()
        return [first, *(sequence(first) for _ in range(1, request.n))]

    def _abort(self, stream: Stream) -> None:
        with self._changed:
            self._aborted.append(stream)
            self._changed.notify()

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        while True:
            try:
                plan = self._next_plan()
                if plan is None:
                    return
                self._step(plan)
            except Exception as error:
                _logger.exception("a mistake of the engine; all its requests fail")
                if not self._start_over(error):
                    return

    def _next_plan(self) -> Plan | None:
        """Waits until there is something to do; None when the engine is closed."""
        with self._changed:
            while True:
                self._apply_aborts()
                if self._closed is not None:
                    self._end(list(self._entries.values()), "abort")
                    return None
                self._begun = time.perf_counter()
                plan = self._scheduler.schedule(self._draft if self._draft_tokens else None)
                if plan is not None:
                    return plan
                self._changed.wait()

    def _step(self, plan: Plan) -> None:
        pieces = (*plan.decode, *plan.prefill)
        entries = [self._entries[piece.sequence.id] for piece in pieces]
        try:
            for slot in plan.freed_slots:
                self._runner.retire(slot)
            for sequence in plan.admitted:
                continuation = self._entries[sequence.id].continuation
                continuation.cached_tokens = sequence.cached or 0
                self._runner.admit(sequence, continuation.sampling)
            constrained = _constrained(pieces, entries)
            step = self._runner.stage(plan, is_masked=bool(constrained))
            started = time.perf_counter()
            drawn = self._runner.execute(step, lambda: self._runner.masks(plan, _masks(constrained)))
            ended = time.perf_counter()
            results = self._runner.results(plan, drawn)
        except Exception as error:
            _logger.exception("a step failed, and with it %d of %d sequences", len(entries), len(self._entries))
            self._fail(entries, error)
            return
        with self._changed:
            self._commit(plan, entries, results)
            host_seconds = started - self._begun + time.perf_counter() - ended
            self._counts.step(pieces, [len(result.ids) for result in results], host_seconds=host_seconds)

    def _commit(self, plan: Plan, entries: Sequence[_Entry], results: Sequence[Result]) -> None:
        """Tells what a step gave, up to where each continuation ends."""
        taken = {}
        for piece, entry, result in zip((*plan.decode, *plan.prefill), entries, results, strict=True):
            if result.scores is not None:
                entry.continuation.score_prompt(piece.start + 1, result.scores)
            if result.is_broken:
                entry.continuation.finish("error", message="the model's scores are no numbers")
            if entry.continuation.finished:  # by an error of this step
                self._release(entry)
            elif result.ids:
                index = entry.continuation.index
                drawn = zip(result.ids, result.logprobs, result.top, strict=True)
                taken[entry.sequence.id] = entry.continuation.advance(Token(index, *each) for each in drawn)
                self._counts.generated_tokens += len(taken[entry.sequence.id])
        self._scheduler.commit(plan, taken)
        for entry in entries:
            if entry.continuation.finished and entry.sequence.state != "finished":
                self._release(entry)
        _deliver(entries)

    def _apply_aborts(self) -> None:
        if self._aborted:
            streams, self._aborted = set(self._aborted), []
            self._end([entry for entry in self._entries.values() if entry.stream in streams], "abort")

    def _end(self, entries: Sequence[_Entry], reason: Literal["abort", "error"], *, message: str = "") -> None:
        """Ends continuations wherever they stand."""
        for entry in entries:
            entry.continuation.finish(reason, message=message)
            self._release(entry)
        _deliver(entries)

    def _release(self, entry: _Entry) -> None:
        slot = entry.sequence.slot
        self._scheduler.finish(entry.sequence)
        if slot is not None:
            self._runner.retire(slot)
        del self._entries[entry.sequence.id]

    def _fail(self, entries: Sequence[_Entry], error: Exception) -> None:
        """Ends what was in a step that raised. All that lay on the device is lost with it."""
        with self._changed:
            self._counts.failed_steps += 1
            self._end(entries, "error", message=describe(error))
            self._scheduler.drop_cache()
            self._runner.reset()

    def _start_over(self, error: Exception) -> bool:
        """Ends everything; whether the engine can go on."""
        with self._changed:
            entries, self._entries = list(self._entries.values()), {}
            for entry in entries:
                entry.continuation.finish("error", message=describe(error))
            _deliver(entries)
            self._scheduler = Scheduler(self._limits)
            try:
                self._runner.reset()
            except Exception as again:
                _logger.exception("the device cannot be had again; the engine is closed")
                self._closed = f"the engine has ended by an error ({describe(again)})"
            return self._closed is None

    def _draft(self, sequence: Scheduled) -> Sequence[int]:
        return self._entries[sequence.id].continuation.draft()


def follow(model: GptOss, *, settings: EngineSettings | None = None, adapters: Sequence[str] = ()) -> None:
    """What every process but 0 does for an engine: it executes what process 0 tells, until that closes the engine.

    Raises:
        UserError: as of Engine; or the settings or the adapters' names are not process 0's.
    """
    execute_what_is_told(*_warm_runner(model, EngineSettings() if settings is None else settings, adapters))


def _warm_runner(model: GptOss, settings: EngineSettings, adapters: Sequence[str]) -> tuple[Runner, Limits]:
    limits = settings.limits(model.config, Pools.of(model, kv_dtype=settings.kv_dtype))
    limits = dataclasses.replace(limits, adapters=tuple(adapters))
    if settings.batch_invariant and model.impl.moe_matmul == "cpu":
        raise UserError(
            "batch_invariant is set, and moe_matmul's implementation 'cpu' sums the rows of an expert that has few in "
            'another order than of one that has many: load the model with impl="moe_matmul=cpu-invariant"'
        )
    runner = Runner(model, limits, kv_dtype=settings.kv_dtype)
    runner.warm_up()
    return runner, limits


def _constrained(pieces: Sequence[Piece], entries: Sequence[_Entry]) -> list[_Entry]:
    """Those that have a constraint and sample."""
    both = zip(pieces, entries, strict=True)
    return [entry for piece, entry in both if piece.samples and entry.continuation.is_constrained]


def _masks(constrained: Iterable[_Entry]) -> dict[int, np.ndarray]:
    """By slot. A constraint that fails ends its continuation, and then anything may come: nobody is told of it."""
    found = {}
    for entry in constrained:
        mask = entry.continuation.mask()
        if mask is not None:
            assert entry.sequence.slot is not None
            found[entry.sequence.slot] = mask
    return found


def _deliver(entries: Sequence[_Entry]) -> None:
    deliver([(entry.stream, entry.continuation.take_unread()) for entry in entries if entry.continuation.unread])
