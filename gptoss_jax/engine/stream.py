"""What a caller holds of a request: its events, for a thread or an event loop. Knows events; knows no engine, no model.

The engine never waits for a reader. Events that nobody has read are kept, at most one for each id that was asked for.
A reader that waits is woken by a lock (a thread) or by its loop (a coroutine); nothing polls.
"""

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable

from gptoss_jax.engine.request import Event, Finished, PromptScores, Token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One continuation in full; the scores of the prompt's ids, where they were asked for, are told with the first."""

    index: int
    tokens: tuple[Token, ...]
    finished: Finished
    prompt_scores: tuple[Token, ...] | None = None

    @property
    def ids(self) -> list[int]:
        """The generated ids; a stop id is the last of them."""
        return [token.id for token in self.tokens]


class Stream:
    """The events of one request, in the order of each continuation. Read it with `for`, with `async for`, or `result`.

    It ends when all `n` continuations have finished. As a context manager it aborts what is left when the block ends.
    One reader at a time.
    """

    def __init__(self, n: int, *, abort: Callable[["Stream"], None]):
        self._unread: deque[Event] = deque()
        self._unfinished = n  # continuations whose `Finished` was not read yet
        self._abort = abort
        self._lock = threading.Lock()
        self._reader: _Waiting | None = None

    def abort(self) -> None:
        """Ends what is not finished yet; the engine frees its pages before its next step. `Finished` tells of it."""
        self._abort(self)

    def result(self) -> list[Answer]:
        """Waits for all continuations, in order of their index. Events that were read before are not among them."""
        return _answers(self)

    async def result_async(self) -> list[Answer]:
        """`result`, for a coroutine."""
        return _answers([event async for event in self])

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Event:
        while (event := self._take()) is None:
            if not self._unfinished:
                raise StopIteration
            waiting = _WaitingThread()
            if self._wait_with(waiting):
                waiting.woken.acquire()
        return event

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        while (event := self._take()) is None:
            if not self._unfinished:
                raise StopAsyncIteration
            loop = asyncio.get_running_loop()
            waiting = _WaitingTask(loop, loop.create_future())
            if self._wait_with(waiting):
                await waiting.woken
        return event

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def _take(self) -> Event | None:
        if not self._unread:
            return None
        event = self._unread.popleft()
        self._unfinished -= isinstance(event, Finished)
        return event

    def _wait_with(self, waiting: "_Waiting") -> bool:
        """Whether there is something to wait for: events may have come since the last look."""
        with self._lock:
            self._reader = None if self._unread else waiting
            return self._reader is not None

    def _put(self, events: Iterable[Event]) -> "_Waiting | None":
        """Adds events; the reader to be woken."""
        with self._lock:
            self._unread.extend(events)
            reader, self._reader = self._reader, None
        return reader


@dataclasses.dataclass(frozen=True)
class _WaitingThread:
    woken: threading.Lock = dataclasses.field(default_factory=lambda: _locked())


@dataclasses.dataclass(frozen=True)
class _WaitingTask:
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Future[None]


_Waiting = _WaitingThread | _WaitingTask


def deliver(events: Iterable[tuple[Stream, Iterable[Event]]]) -> None:
    """Puts events into their streams and wakes who waits for them: a loop once, however many of its tasks wait."""
    sleeping: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream, its_events in events:
        match stream._put(its_events):
            case _WaitingThread(woken):
                woken.release()
            case _WaitingTask(loop, woken):
                sleeping.setdefault(loop, []).append(woken)
    for loop, futures in sleeping.items():
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
            loop.call_soon_threadsafe(_wake, futures)


def _wake(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # a cancelled task waits no longer
            future.set_result(None)


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _answers(events: Iterable[Event]) -> list[Answer]:
    tokens: dict[int, list[Token]] = {}
    scores: dict[int, tuple[Token, ...]] = {}
    ends: dict[int, Finished] = {}
    for event in events:
        match event:
            case Finished():
                ends[event.index] = event
            case PromptScores():
                scores[event.index] = event.tokens
            case Token():
                tokens.setdefault(event.index, []).append(event)
    return [
        Answer(index=i, tokens=tuple(tokens.get(i, ())), finished=end, prompt_scores=scores.get(i))
        for i, end in sorted(ends.items())
    ]
