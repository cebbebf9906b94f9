"""Sends requests to an engine and notes when their ids came. Knows clocks and streams; knows no arrays, judges nothing.

    open      each request comes at its time, however many are under way: as users do
    closed    so many are under way, and each one that ends makes room for the next: as a batch does

Times are seconds since the run began. A request that comes at a time of its own is timed from then on, not from when
the program got round to it: what it waited for a busy program is part of what its user waits.
"""

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import Finished, Request, Token


@dataclasses.dataclass(kw_only=True)
class Record:
    """What became of one request.

    Attributes:
        due: when it was to come.
        submitted: when it was handed to the engine.
        found_running: requests with a place on the device when it came.
        found_waiting: requests in the queue then.
        ids: that came.
        times: when each of them came.
    """

    request: Request
    due: float
    submitted: float
    found_running: int
    found_waiting: int
    ids: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def first_seconds(self) -> float:
        """Until the first id."""
        return self.times[0] - self.due

    @property
    def whole_seconds(self) -> float:
        """Until the last id."""
        return self.times[-1] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds from each id to the next."""
        return [late - early for early, late in zip(self.times, self.times[1:], strict=False)]


def run_open(engine: Engine, requests: Sequence[Request], *, due: Sequence[float]) -> list[Record]:
    """Each request at its time.

    Raises:
        RuntimeError: one did not get all the ids that it asked for.
    """

    async def run() -> list[Record]:
        start = time.perf_counter()

        async def one(request: Request, its_due: float) -> Record:
            await asyncio.sleep(start + its_due - time.perf_counter())
            return await _follow(engine, request, start=start, due=its_due)

        return await asyncio.gather(*map(one, requests, due))

    return asyncio.run(run())


def run_closed(engine: Engine, requests: Sequence[Request], *, concurrent: int) -> list[Record]:
    """So many at a time, in this order; a request is due when there is room for it.

    Raises:
        RuntimeError: as of `run_open`.
    """

    async def run() -> list[Record]:
        start = time.perf_counter()

        async def some(left: Iterator[Request]) -> list[Record]:
            now = time.perf_counter
            return [await _follow(engine, request, start=start, due=now() - start) for request in left]

        left = iter(requests)
        return [
            record for records in await asyncio.gather(*(some(left) for _ in range(concurrent))) for record in records
        ]

    return asyncio.run(run())


async def _follow(engine: Engine, request: Request, *, start: float, due: float) -> Record:
    queue = engine.stats().queue
    record = Record(
        request=request,
        due=due,
        submitted=time.perf_counter() - start,
        found_running=queue.running,
        found_waiting=queue.waiting,
    )
    async with engine.submit(request) as events:
        async for event in events:
            if isinstance(event, Finished):
                _check(event, record)
            elif isinstance(event, Token):
                record.times.append(time.perf_counter() - start)
                record.ids.append(event.id)
    return record


def _check(finished: Finished, record: Record) -> None:
    if finished.reason != "length":
        raise RuntimeError(
            f"a request ended by {finished.reason!r} after {len(record.ids)} of {record.request.max_new_tokens} ids: "
            f"{finished.message or 'the engine says no more'}"
        )
