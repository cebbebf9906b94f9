"""What the server adds to an engine: many streams at once over a real socket, some cut short. Knows no model.

A process serves a scripted engine, which says of each id when it was made, where a logprob would stand. Another one,
this one, opens the streams, and cuts a part of them after some ids. The server's own time for an id is from its making
to the moment when its event was given to the socket; what the client takes is not in it.

    engine's thread   ids of all streams ──► streams ─► chunks ─► JSON ─► socket
                      made                                              sent
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import report
from gptoss_jax.cli.terminal import table
from gptoss_jax.engine.request import Request
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import load_tokenizer, write_byte_tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine

VOCAB_SIZE = 352
_ORIGIN = time.perf_counter()
_MADE = re.compile(rb'"token_logprobs":\[-([0-9.e+-]+)\]')
_PATIENCE_S = 60.0


def script_of(prompt: Sequence[int], length: int) -> list[int]:
    """What the engine answers: lower-case letters that follow from the prompt."""
    rng = random.Random(bytes(prompt))
    return [rng.randrange(ord("a"), ord("z") + 1) for _ in range(length)]


def answer_of(prompt: str, length: int) -> str:
    """The same as text."""
    return bytes(script_of(prompt.encode(), length)).decode()


# ---- the server's process --------------------------------------------------------------------------------------------


class StampedEngine(ScriptedEngine):
    """Says of each id when it was made."""

    @staticmethod
    def logprob(token_id: int) -> float:
        return -(time.perf_counter() - _ORIGIN)


class Timed:
    """Notes how old each id is when its event has been given to the socket."""

    def __init__(self, app: ASGIApp, ages: list[float]):
        self._app = app
        self._ages = ages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timed(message: Message) -> None:
            await send(message)
            made = _MADE.search(message.get("body", b""))
            if made is not None:
                self._ages.append(time.perf_counter() - _ORIGIN - float(made[1]))

        await self._app(scope, receive, timed if scope["type"] == "http" else send)


def serve(options: argparse.Namespace) -> int:
    """Serves until it is terminated; prints its port first, what it measured last."""
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder, "tokenizer.json"), VOCAB_SIZE)
        tokenizer = load_tokenizer(Path(folder))

    def script(request: Request) -> list[int]:
        return script_of(request.prompt, options.tokens)

    ages: list[float] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    pace = {"seconds_per_token": options.step_ms / 1000, "max_rows": options.rows}
    with StampedEngine(script, vocab_size=VOCAB_SIZE, **pace) as engine:
        app = create_app(engine, tokenizer=tokenizer, model_name="scripted", settings=ServerSettings(page=False))
        config = uvicorn.Config(Timed(app, ages), log_level="error", lifespan="on", server_header=False)
        began = time.process_time()
        _Server(config).run(sockets=[listener])
        cpu_seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"open_streams": engine.num_open, "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak, "ages": ages}
        print(json.dumps(told), flush=True)
    return 0


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends without raising the signal again: what was measured is yet to be told."""
        self.should_exit = True


# ---- the clients' process --------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def running(*, tokens: int, step_ms: float, rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """A server's port, and what it tells when it has ended: filled in behind the block."""
    command = [sys.executable, "-m", "benchmarks.server_load", "--serve"]
    command += ["--tokens", str(tokens), "--step-ms", str(step_ms), "--rows", str(rows)]
    told: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=report.ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), told
        finally:
            process.terminate()
            last = process.stdout.read()
    told |= json.loads(last)


async def run_load(port: int, load: Load) -> Outcome:
    """Opens all streams, and waits until each was read to its end or was cut."""
    rng = random.Random(load.seed)
    cuts = [rng.randrange(load.tokens) if rng.random() < load.cut else None for _ in range(load.streams)]
    begins = [rng.random() * load.within_s for _ in range(load.streams)]
    began = time.perf_counter()
    texts = await asyncio.gather(
        *[
            _read_stream(port, f"stream {number}", cut=cuts[number], after_s=begins[number])
            for number in range(load.streams)
        ]
    )
    expected = [answer_of(f"stream {number}", load.tokens) for number in range(load.streams)]
    whole = [(text, right) for text, right, cut in zip(texts, expected, cuts, strict=True) if cut is None]
    return Outcome(
        completed=len(whole),
        wrong=sum(text != right for text, right in whole),
        cut=load.streams - len(whole),
        seconds=time.perf_counter() - began,
    )


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
    async with _asked(port, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n") as reader:
        lines = (await reader.read()).decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if re.fullmatch(r"\w+ \S+", line))}


async def _read_stream(port: int, prompt: str, *, cut: int | None, after_s: float) -> str:
    """The text of a stream; of one that is cut, what there was of it after so many events."""
    await asyncio.sleep(after_s)
    body = json.dumps({"prompt": prompt, "max_tokens": 100_000, "stream": True, "logprobs": 0})
    head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    text, num_events = "", 0
    async with _asked(port, f"{head}Content-Length: {len(body)}\r\n\r\n{body}") as reader:
        while num_events != cut and (line := await reader.readline()):
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                num_events += 1
    return text


@contextlib.asynccontextmanager
async def _asked(port: int, request: str) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that closes behind its answer; in HTTP 1.0 an answer comes as it is, in no chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        yield reader
    finally:
        writer.transport.abort()  # as of a client whose process has died


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = report.parser("server_load", "Opens many streams over a scripted engine at once, and cuts a part of them.")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=report.positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=report.positive, default=60, metavar="N", help="each; default: %(default)s")
    parser.add_argument("--cut", type=float, default=1 / 3, metavar="P", help="part that is cut; default: a third")
    parser.add_argument(
        "--rows", type=int, action="append", metavar="N", help="that the engine runs at a time; default: 16, 64, 256"
    )
    parser.add_argument("--step-ms", type=float, default=25.0, metavar="MS", help="of the engine; default: %(default)g")
    parser.add_argument(
        "--within-s", type=float, default=2.0, metavar="S", help="all streams begin; default: %(default)g"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    if options.serve:
        options.rows = options.rows[0]
        return serve(options)
    return report.main(_benchmark, options)


def _benchmark(options: argparse.Namespace) -> None:
    result = report.document("server_load", options)
    load = Load(
        streams=options.streams,
        tokens=options.tokens,
        cut=options.cut,
        within_s=options.within_s,
        seed=options.seed,
    )
    points = [_point(load, rows, options.step_ms) for rows in options.rows or (16, 64, 256)]
    result |= {"load": dataclasses.asdict(load), "step_ms": options.step_ms, "points": points}
    report.describe(result)
    columns = ("rows of a step", "whole", "wrong", "cut", "median", "p90", "p99", "most", "CPU of an id")
    table(f"{options.streams} streams; from an id's making to the socket", columns, [_row(point) for point in points])
    report.write(options.out, result)


def _point(load: Load, rows: int, step_ms: float) -> dict[str, Any]:
    with running(tokens=load.tokens, step_ms=step_ms, rows=rows) as (port, told):
        outcome = asyncio.run(_measured(port, load))
    ages = np.array(told.pop("ages")) * 1000
    percentiles = {f"p{percent}": float(np.percentile(ages, percent)) for percent in (50, 90, 99)}
    return {
        "rows": rows,
        "outcome": dataclasses.asdict(outcome),
        "ids": len(ages),
        "milliseconds_to_the_socket": percentiles | {"most": float(ages.max())},
        "cpu_milliseconds_per_id": 1000 * told["cpu_seconds"] / len(ages),
        "server": told,
    }


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    outcome, times = point["outcome"], point["milliseconds_to_the_socket"]
    counts = (point["rows"], outcome["completed"], outcome["wrong"], outcome["cut"])
    return (
        *map(str, counts),
        *(f"{times[name]:.2f} ms" for name in ("p50", "p90", "p99", "most")),
        f"{point['cpu_milliseconds_per_id']:.3f} ms",
    )


async def _measured(port: int, load: Load) -> Outcome:
    await run_load(port, dataclasses.replace(load, streams=2, cut=0))  # what is imported and compiled late
    outcome = await run_load(port, load)
    await settled(port)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
