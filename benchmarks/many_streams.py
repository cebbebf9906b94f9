"""Many clients of one server at once, some of which go away midway. Knows HTTP and events; knows no engine.

They take little time themselves, for they run on the server's machine: what came is kept as it is until all is over.
"""

import asyncio
import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gptoss_jax.errors import UserError

Body: TypeAlias = Mapping[str, Any]
Choice: TypeAlias = Mapping[str, Any]

_EVENT = b"data: {"
_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """How many streams there are, of how many ids each, which part of them is cut, in how many seconds all begin."""

    streams: int
    tokens: int
    cut: float
    within_s: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the streams."""

    completed: int
    wrong: int
    cut: int
    seconds: float


async def run_load(
    port: int, load: Load, *, body: Callable[[int], Body], is_right: Callable[[int, Sequence[Choice]], bool]
) -> Outcome:
    """Opens all streams, and waits until each was read to its end or was cut.

    Args:
        port: of a server on this machine.
        load: see Load.
        body: what stream `number` asks for.
        is_right: whether stream `number` may have told these choices; asked of those that were not cut.
    """
    rng = random.Random(load.seed)
    cuts = [rng.randrange(load.tokens) if rng.random() < load.cut else None for _ in range(load.streams)]
    begins = [rng.random() * load.within_s for _ in range(load.streams)]
    began = time.perf_counter()
    told = await asyncio.gather(
        *[read_stream(port, body(number), cut=cuts[number], after_s=begins[number]) for number in range(load.streams)]
    )
    seconds = time.perf_counter() - began
    whole = [number for number, cut in enumerate(cuts) if cut is None]
    return Outcome(
        completed=len(whole),
        wrong=sum(not is_right(number, told[number]) for number in whole),
        cut=load.streams - len(whole),
        seconds=seconds,
    )


async def read_stream(port: int, body: Body, *, cut: int | None = None, after_s: float = 0.0) -> list[Choice]:
    """What a stream of /v1/completions tells; of one that is cut, what there was of it after so many events."""
    await asyncio.sleep(after_s)
    text = json.dumps({**body, "stream": True})
    head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = await _ask(port, f"{head}Content-Length: {len(text)}\r\n\r\n{text}", cut=cut)
    return [json.loads(line[6:])["choices"][0] for line in answer.split(b"\n") if line.startswith(_EVENT)]


async def settled(port: int) -> dict[str, float]:
    """The server's counts, once nothing runs in it any more."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        counts = await counts_of(port)
        waiting = counts["gptoss_engine_running"] + counts["gptoss_engine_waiting"]
        if not waiting and counts["gptoss_http_open_requests"] == 1:  # which is this one
            return counts
        if time.monotonic() > deadline:
            raise UserError(f"the server still runs something {_PATIENCE_S:g} s after the last client left: {counts}")
        await asyncio.sleep(0.05)


async def counts_of(port: int) -> dict[str, float]:
    """What /metrics says, by name, of what has no labels."""
    lines = (await _ask(port, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")).decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if re.fullmatch(r"\w+ \S+", line))}


async def _ask(port: int, request: str, *, cut: int | None = None) -> bytes:
    """What a server answers. In HTTP 1.0 it comes as it is, in no chunks, and the connection ends with it."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: _Client(request.encode(), cut), "127.0.0.1", port)
    await client.ended
    return bytes(client.answer)


class _Client(asyncio.Protocol):
    """Asks, and keeps what comes; goes away after so many events, as of a program that has died."""

    def __init__(self, request: bytes, cut: int | None):
        self.answer = bytearray()
        self.ended = asyncio.get_running_loop().create_future()
        self._request = request
        self._cut = cut
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)
        self._leave_when_cut()

    def data_received(self, data: bytes) -> None:
        self.answer += data
        self._leave_when_cut()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():  # else who waited for it was cancelled
            self.ended.set_result(None)

    def _leave_when_cut(self) -> None:
        if self._cut is not None and self._transport is not None and self.answer.count(_EVENT) >= self._cut:
            self._transport.abort()
