"""Turns on their way: for a client that waits, and in the background. Knows the chat and the store; knows no HTTP.

Turn      the chat's events of one turn; what is wrong with the request shows before the first of them is told
answer    Asked ─► Turn ─► Writer ─► the client's events, and the store in front of the last one
Job       the same with nobody waiting: its events are kept, for as many readers as come
Desk      the store, and the jobs
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from types import TracebackType
from typing import Any

from gptoss_jax.chat import ChatEvent, Part, TurnFinished
from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.harmony.events import Fault
from gptoss_jax.server.errors import as_api_error
from gptoss_jax.server.responses.ask import Asked
from gptoss_jax.server.responses.events import Ending, Event, Writer
from gptoss_jax.server.responses.store import NotStored, ResponseStore, StoreClosed, StoredResponse
from gptoss_jax.server.service import Service

_logger = logging.getLogger(__name__)

PATIENCE_S = 1.0  # for streams: in which a request that the engine refuses gets an HTTP status; later it gets an event
_MOST_JOBS = 1000  # under way
_KEPT_JOBS = 32  # whose events can still be read after their end
_CODES = {400: "invalid_prompt", 422: "invalid_prompt", 429: "rate_limit_exceeded"}  # OpenAI's, by HTTP status


class Turn:
    """The chat's events of one turn, as an async context manager: leaving it ends the turn.

    Entering waits for the first event, so that an error of the request is raised there.

    Args:
        patience_s: how long it waits at most; None for as long as it takes.
    """

    def __init__(self, asked: Asked, service: Service, *, patience_s: float | None):
        self._patience_s = patience_s
        self._events: AsyncIterator[ChatEvent] = service.chat_of(asked.model).stream(
            asked.conversation, settings=asked.settings, tools=asked.tools
        )
        self._first: asyncio.Future[ChatEvent] | None = None

    async def __aenter__(self) -> "Turn":
        self._first = asyncio.ensure_future(anext(self._events))
        try:
            await asyncio.wait({self._first}, timeout=self._patience_s)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait({self._first})
        if isinstance(self._events, AsyncGenerator):
            await self._events.aclose()

    async def __aiter__(self) -> AsyncIterator[ChatEvent]:
        if self._first is not None:
            yield await self._first
        async for event in self._events:
            yield event


class Answer:
    """A response on its way, from what was asked to its last event."""

    def __init__(self, asked: Asked, *, service: Service, store: ResponseStore | None):
        self._asked = asked
        self._service = service
        self._store = store if asked.response["store"] else None
        self.writer = Writer(
            asked.response, hosted=[tool.namespace.name for tool in asked.tools], logprobs=asked.logprobs
        )

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return self.writer.response

    def turn(self, *, patience_s: float | None = None) -> Turn:
        """The turn that it is the answer of; not begun."""
        return Turn(self._asked, self._service, patience_s=patience_s)

    async def events(self, *, patience_s: float | None = None) -> AsyncGenerator[Event, None]:
        """All events. Whoever stops reading ends the turn; then nothing is stored.

        Args:
            patience_s: after which the first ones are told though the engine has not begun; an error of the request is
                an event then, and no exception.
        """
        async with self.turn(patience_s=patience_s) as turn:
            for event in self.writer.begin("in_progress"):
                yield event
            async with contextlib.aclosing(self.of_turn(turn)) as events:
                async for event in events:
                    yield event
        yield await self.last()

    async def of_turn(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """What the turn says, and the end of what it left open."""
        finished: TurnFinished | None = None
        try:
            async for chat_event in turn:
                self._count(chat_event)
                if isinstance(chat_event, TurnFinished):
                    finished = chat_event
                for event in self.writer.push(chat_event):
                    yield event
            status, error = await self._ending(finished)
        except Exception as cause:  # the stream has begun: the client is told by an event
            status, error = "failed", _told(cause)
        for event in self.writer.close(status, error=error):
            yield event

    async def last(self) -> Event:
        """Stores the response, then makes its last event: who has read that may go on from it."""
        await self.keep()
        return self.writer.last()

    async def keep(self) -> None:
        """Stores the response as it is now. A server that ends waits for it; a client that leaves changes nothing."""
        if self._store is not None:
            await asyncio.shield(self._service.running.start(self._put(self._store)))

    async def _put(self, store: ResponseStore) -> None:
        stored = StoredResponse(body=self.response, input=self._asked.input, output=self.writer.stored)
        try:
            await store.put(stored)
        except (sqlite3.Error, StoreClosed):  # a full disk: the answer is there all the same
            _logger.exception("response %s could not be stored", self._asked.response["id"])
            self.writer.set_stored(False)

    async def _ending(self, finished: TurnFinished | None) -> tuple[Ending, dict[str, str] | None]:
        if finished is None:
            return "failed", {"code": "server_error", "message": "the turn ended without an end"}
        match finished.reason:
            case "stop":
                return await self._judged()
            case "tool_calls":
                return "completed", None
            case "length":
                return "incomplete", None
            case "refused":
                return "failed", {"code": "invalid_prompt", "message": finished.message or "the engine refused this"}
            case _:
                return "failed", {"code": "server_error", "message": finished.message or "the turn was ended"}

    async def _judged(self) -> tuple[Ending, dict[str, str] | None]:
        """Whether the answer fits its schema, of which the server may hold it only to a part."""
        grammar = self._asked.settings.final
        if grammar is None or not self._service.settings.lenient_schemas:
            return "completed", None
        wrong = await asyncio.to_thread(grammar.check, self.writer.final_text)
        if not wrong:
            return "completed", None
        return "failed", {"code": "server_error", "message": f"the answer does not fit the schema: {'; '.join(wrong)}"}

    def _count(self, event: ChatEvent) -> None:
        if isinstance(event, Part) and isinstance(event.event, Fault):
            self._service.metrics.fault(event.event.kind)


class Job:
    """A response in the background. While the engine's queue is full it waits."""

    def __init__(self, answer: Answer, *, retry_s: float):
        self._answer = answer
        self._retry_s = retry_s
        self._events: list[Event] = []
        self._ended = False
        self._grown = asyncio.Event()  # replaced whenever it is set
        self.task: asyncio.Task[None] | None = None

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return self._answer.response

    async def begin(self) -> None:
        """Makes it known, and stores it: from now on it can be asked for, even if this process ends."""
        self._add(self._answer.writer.begin("queued"))
        await self._answer.keep()

    async def run(self) -> None:
        """The turn. Cancelling it ends the response as cancelled, with what there is of it."""
        writer = self._answer.writer
        try:
            while not await self._ran():
                await asyncio.sleep(self._retry_s)
        except asyncio.CancelledError:
            self._add(writer.close("cancelled"))
        except Exception as cause:
            self._add(writer.close("failed", error=_told(cause)))
        try:
            await self._answer.keep()
        finally:
            self._ended = True
            self._add([writer.last()])

    async def _ran(self) -> bool:
        """Runs the turn; False where there was no room for it."""
        try:
            async with self._answer.turn() as turn:
                self._add(self._answer.writer.go())
                async with contextlib.aclosing(self._answer.of_turn(turn)) as events:
                    async for event in events:
                        self._add([event])
        except QueueFull:
            return False
        return True

    async def cancel(self) -> None:
        """Ends it, and waits until it has ended. One that has ended stays as it is."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})

    async def read(self, *, after: int = -1) -> AsyncGenerator[Event, None]:
        """Its events behind number `after`, those to come included."""
        position = after + 1
        while True:
            grown, ended = self._grown, self._ended
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if ended:
                return
            await grown.wait()

    def _add(self, events: Iterable[Event]) -> None:
        self._events.extend(events)
        self._grown.set()
        self._grown = asyncio.Event()


class Desk:
    """All responses that are not this moment's: the store, and what runs in the background."""

    def __init__(self, service: Service, store: ResponseStore | None):
        self._service = service
        self.store = store
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # the oldest first; the last ones of those that ended

    def answer(self, asked: Asked) -> Answer:
        """A response for a client that waits."""
        return Answer(asked, service=self._service, store=self.store)

    async def start(self, asked: Asked) -> Job:
        """A response that nobody waits for. Raises QueueFull where as many are under way as may."""
        if sum(job.task is not None and not job.task.done() for job in self._jobs.values()) >= _MOST_JOBS:
            raise QueueFull(f"{_MOST_JOBS} responses in the background are under way, as many as may; try again later")
        job = Job(self.answer(asked), retry_s=self._service.settings.retry_after_s)
        await job.begin()
        job.task = self._service.running.start(job.run(), name=asked.response["id"])
        self._jobs[asked.response["id"]] = job
        job.task.add_done_callback(lambda _: self._forget_oldest())
        return job

    def job(self, response_id: str) -> Job | None:
        """What runs in the background under this id, or has lately."""
        return self._jobs.get(response_id)

    async def body(self, response_id: str) -> dict[str, Any]:
        """The response as it is now. Raises NotStored."""
        job = self._jobs.get(response_id)
        if job is not None:
            return job.response
        if self.store is None:
            raise NotStored(response_id)
        return await self.store.body(response_id)

    async def delete(self, response_id: str) -> None:
        """Forgets a response; one that still runs is ended first. Raises NotStored."""
        job = self._jobs.pop(response_id, None)
        if job is not None:
            await job.cancel()
        if self.store is None:
            raise NotStored(response_id)
        await self.store.delete(response_id)

    def _forget_oldest(self) -> None:
        ended = [name for name, job in self._jobs.items() if job.task is not None and job.task.done()]
        for name in ended[: max(0, len(ended) - _KEPT_JOBS)]:
            del self._jobs[name]


def open_desk(service: Service) -> Desk:
    """The desk of a server; its store is closed with the service. Raises UserError for a file that cannot be used."""
    where = service.settings.store
    if where == "none":
        return Desk(service, None)
    store = ResponseStore.open(where)
    service.resources.callback(store.close)
    return Desk(service, store)


def _told(cause: Exception) -> dict[str, str]:
    """An error as a response tells of it; of our own mistakes nothing but that there was one."""
    error = as_api_error(cause)
    if error.status == 500:
        _logger.exception("a response was cut short by a mistake of the server's", exc_info=cause)
    return {"code": _CODES.get(error.status, "server_error"), "message": error.message}
