"""What runs, so that a server can count it, wait for it and end it. Knows streams and tasks; knows no route.

Everything that a server asks of its engine goes through `WatchedEngine`: whoever asked, the ids are counted, and a
shutdown finds the stream.
"""

import asyncio
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.request import Event, Finished, Request, Token
from gptoss_jax.engine.stats import Stats
from gptoss_jax.engine.stream import Stream
from gptoss_jax.server.metrics import Metrics, Stopwatch

_logger = logging.getLogger(__name__)

_POLL_S = 0.02  # between two looks whether a server that ends may end
_LAST_WORDS_S = 2.0  # for clients to be told that their answer was ended


class Running:
    """Streams and background turns that have not ended."""

    def __init__(self) -> None:
        # Weakly: a stream that nobody holds any more has no reader, and nothing waits for it.
        self._streams: weakref.WeakSet[WatchedStream] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._streams) + len(self._tasks)

    def start(self, turn: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]:
        """Runs a turn that no request waits for. A shutdown waits for it, then cancels it."""
        task = asyncio.create_task(turn, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def add(self, stream: "WatchedStream") -> None:
        """A stream has begun."""
        self._streams.add(stream)

    def discard(self, stream: "WatchedStream") -> None:
        """It has ended."""
        self._streams.discard(stream)

    async def drain(self, stops_at: Callable[[], float]) -> None:
        """Waits until nothing runs, then ends what still does. `stops_at`, on the monotonic clock, may come nearer."""
        if await self._wait(stops_at):
            return
        _logger.warning("%d answers have not finished in time; they are ended", len(self))
        for stream in list(self._streams):
            stream.end()
        last_words = time.monotonic() + _LAST_WORDS_S
        if not await self._wait(lambda: last_words):
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self, stops_at: Callable[[], float]) -> bool:
        while len(self) and time.monotonic() < stops_at():
            await asyncio.sleep(_POLL_S)
        return not len(self)


class WatchedEngine:
    """An engine whose streams are counted, and known to `Running`; an `AnyEngine`.

    Args:
        model: by which name its requests are counted.
        adapter: the engine's, which all its requests take.
    """

    def __init__(self, engine: AnyEngine, *, model: str, adapter: str | None, metrics: Metrics, running: Running):
        self._engine = engine
        self._model = model
        self._adapter = adapter
        self._metrics = metrics
        self._running = running

    @property
    def vocab_size(self) -> int:
        """The engine's."""
        return self._engine.vocab_size

    @property
    def max_context(self) -> int:
        """The engine's."""
        return self._engine.max_context

    def submit(self, request: Request) -> Stream:
        """The engine's, watched."""
        own = dataclasses.replace(request, adapter=self._adapter)
        stream = WatchedStream(self._engine.submit(own), request.n, self._metrics, self._running)
        self._metrics.requests.labels(self._model).inc()
        self._metrics.prompt_tokens.inc(len(request.prompt))
        return stream

    def stats(self) -> Stats:
        """The engine's."""
        return self._engine.stats()

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()


class WatchedStream(Stream):
    """A stream that is read through this one."""

    def __init__(self, stream: Stream, n: int, metrics: Metrics, running: Running):
        super().__init__(n, abort=lambda _: stream.abort())
        self._inner = stream
        self._left = n
        self._metrics = metrics
        self._running = running
        self._watches = [Stopwatch(metrics) for _ in range(n)]
        running.add(self)

    def __next__(self) -> Event:
        return self._see(next(self._inner))

    async def __anext__(self) -> Event:
        return self._see(await anext(self._inner))

    def abort(self) -> None:
        """Ends it, for a reader that goes away."""
        self.end()
        self._running.discard(self)

    def end(self) -> None:
        """Ends it, for a reader that is told so."""
        self._inner.abort()

    def _see(self, event: Event) -> Event:
        match event:
            case Token():
                self._watches[event.index].token()
            case Finished():
                if not event.index:  # the others find the prompt that the first one computed
                    self._metrics.cached_tokens.inc(event.cached_tokens)
                self._left -= 1
                if not self._left:
                    self._running.discard(self)
        return event
