"""Many streams at a server at once over real sockets, some cut short: what it adds to an engine, and what it keeps.

What it adds: a process serves a scripted engine, which says of each id when it was made, where a logprob would stand.
Another one, this one, opens the streams, and cuts a part of them after some ids. The server's own time for an id is
from its making to the moment when its event was given to the socket; what the client takes is not in it.

    engine's thread   ids of all streams ──► streams ─► chunks ─► JSON ─► socket
                      made                                              sent

What it keeps: `gptoss-jax serve` runs a small model, and is loaded several times. The streams that were not cut must
say what the same request says alone; the pages and the memory that it holds afterwards are told.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import process, report
from benchmarks.many_streams import Choice, Load, Outcome, read_stream, run_load, settled
from gptoss_jax.cli.terminal import table
from gptoss_jax.engine.request import Request
from gptoss_jax.engine.stream import Stream
from gptoss_jax.harmony.tokenizer import load_tokenizer, write_byte_tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine

VOCAB_SIZE = 352
_ORIGIN = time.perf_counter()
_MADE = re.compile(rb'"token_logprobs":\[-([0-9.e+-]+)\]')
_WARMING = 2  # streams, before those that count
_REAL_ROWS, _REAL_TOKENS = 64, 40
# What is said then does not depend, to the last bit, on what runs beside it.
_EXACTLY = ("--max-context", "256", "--dtype", "float32", "--impl", "moe_matmul=cpu-invariant", "--batch-invariant")


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

    def submit(self, request: Request) -> Stream:
        """Forgets what was asked for: looking for a common prompt among all that came before takes the loop's time."""
        self.requests.clear()
        return super().submit(request)

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
        gc.collect()
        gc.freeze()  # as `gptoss-jax serve` does
        began = time.process_time()
        _Server(config).run(sockets=[listener])
        cpu_seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"open_streams": engine.num_open, "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak}
        print(json.dumps(told | _figures(ages[options.tokens * _WARMING :])), flush=True)
    return 0


def _figures(ages: Sequence[float]) -> dict[str, Any]:
    """Of those that a load is, without what warmed the server."""
    if not ages:
        return {"ids": 0}
    milliseconds = np.array(ages) * 1000
    percentiles = {f"p{percent}": float(np.percentile(milliseconds, percent)) for percent in (50, 90, 99)}
    return {"ids": len(ages), "milliseconds_to_the_socket": percentiles | {"most": float(milliseconds.max())}}


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends without raising the signal again: what was measured is yet to be told."""
        self.should_exit = True


# ---- the clients' process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*, tokens: int, step_ms: float, rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """A server's port, and what it tells when it has ended: filled in behind the block."""
    command = [sys.executable, "-m", "benchmarks.server_load", "--serve"]
    command += ["--tokens", str(tokens), "--step-ms", str(step_ms), "--rows", str(rows)]
    told: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=report.ROOT) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline()), told
        finally:
            server.terminate()
            last = server.stdout.read()
    told |= json.loads(last)


def body_of(number: int) -> dict[str, Any]:
    """What a stream asks a scripted engine for."""
    return {"prompt": f"stream {number}", "max_tokens": 100_000, "logprobs": 0}


async def run_scripted(port: int, load: Load) -> Outcome:
    """A load on a scripted engine."""

    def is_right(number: int, told: Sequence[Choice]) -> bool:
        return "".join(choice["text"] for choice in told) == answer_of(f"stream {number}", load.tokens)

    return await run_load(port, load, body=body_of, is_right=is_right)


# ---- a real server ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a server of a model does with several loads, one after the other, and what it holds after each.

    Attributes:
        rss_bytes: resident memory after the requests alone, then after each load.
        peak_rss_bytes: the most during each load.
        held_pages: after each load, of full and sliding layers together.
        alone_seconds: that all requests took, one after the other.
    """

    outcomes: tuple[Outcome, ...]
    rss_bytes: tuple[int, ...]
    peak_rss_bytes: tuple[int, ...]
    held_pages: tuple[int, ...]
    alone_seconds: float


@contextlib.contextmanager
def serving_tiny(*, rows: int) -> Iterator[tuple[int, int]]:
    """Port and process id of `gptoss-jax serve` with a small model, whose scores company does not change."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "tiny")
        process.run(process.gptoss_jax("init", "--model", "tiny", checkpoint))
        command = process.gptoss_jax("serve", checkpoint, "--port", "0", "--max-rows", str(rows), *_EXACTLY)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                yield _port_when_ready(server), server.pid
            finally:
                server.terminate()


def _port_when_ready(server: subprocess.Popen[str]) -> int:
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        address = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        if "ready after" in line and address is not None:
            return int(address[1])
    raise process.CommandFailed(f"the server ended before it was ready:\n{said}")


async def run_real(port: int, pid: int, loads: Sequence[Load]) -> Kept:
    """Asks for every stream alone, then runs the loads."""
    numbers = range(max(load.streams for load in loads))
    tokens = max(load.tokens for load in loads)

    def body(number: int) -> dict[str, Any]:  # greedy and drawn in turn
        return {
            "prompt": f"stream {number}",
            "max_tokens": tokens,
            "logprobs": 0,
            "temperature": number % 2,
            "seed": number,
        }

    began = time.perf_counter()
    alone = [await read_stream(port, body(number)) for number in numbers]
    seconds = time.perf_counter() - began
    await settled(port)
    rss, peaks, pages, outcomes = [_rss(pid)], list[int](), list[int](), list[Outcome]()
    for load in loads:
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        told = await run_load(port, load, body=body, is_right=lambda number, told: _ids(told) == _ids(alone[number]))
        counts = await settled(port)
        outcomes.append(told)
        rss.append(_rss(pid))
        peaks.append(_rss(pid, "VmHWM"))
        pages.append(int(sum(counts[f"gptoss_engine_held_{kind}_pages"] for kind in ("full", "sliding"))))
    return Kept(
        outcomes=tuple(outcomes),
        rss_bytes=tuple(rss),
        peak_rss_bytes=tuple(peaks),
        held_pages=tuple(pages),
        alone_seconds=seconds,
    )


def _ids(told: Sequence[Choice]) -> list[Any]:
    """Every id by its name, with how likely it was, to the bit; and how it ended."""
    lists = [(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]) for choice in told]
    return [*lists, told[-1]["finish_reason"] if told else None]


def _rss(pid: int, field: str = "VmRSS") -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = report.parser("server_load", "Opens many streams of a server at once, and cuts a part of them.")
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
    parser.add_argument(
        "--real-loads", type=int, default=4, metavar="N", help="on `serve` of a small model; default: %(default)s"
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
    if options.real_loads:
        kept = _real(load, options.real_loads)
        result["real"] = {"options": ["--max-rows", str(_REAL_ROWS), *_EXACTLY], **dataclasses.asdict(kept)}
        columns = ("load", "whole", "wrong", "cut", "seconds", "pages held", "peak RSS", "RSS after")
        table(f"`serve` of a small model; RSS before {kept.rss_bytes[0] / 1e6:.1f} MB", columns, _real_rows(kept))
    report.write(options.out, result)


def _point(load: Load, rows: int, step_ms: float) -> dict[str, Any]:
    with running(tokens=load.tokens, step_ms=step_ms, rows=rows) as (port, told):
        outcome = asyncio.run(_measured(port, load))
    return {
        "rows": rows,
        "outcome": dataclasses.asdict(outcome),
        "cpu_milliseconds_per_id": 1000 * told["cpu_seconds"] / (told["ids"] + _WARMING * load.tokens),
        **told,
    }


def _real(load: Load, number: int) -> Kept:
    """Each load cuts other streams."""
    loads = [dataclasses.replace(load, tokens=_REAL_TOKENS, seed=load.seed + i) for i in range(number)]
    with serving_tiny(rows=_REAL_ROWS) as (port, pid):
        return asyncio.run(run_real(port, pid, loads))


def _real_rows(kept: Kept) -> list[tuple[str, ...]]:
    after = zip(kept.outcomes, kept.held_pages, kept.peak_rss_bytes, kept.rss_bytes[1:], strict=True)
    return [
        (
            *map(str, (number, outcome.completed, outcome.wrong, outcome.cut)),
            f"{outcome.seconds:.1f}",
            str(pages),
            f"{peak / 1e6:.1f} MB",
            f"{rss / 1e6:.1f} MB",
        )
        for number, (outcome, pages, peak, rss) in enumerate(after, start=1)
    ]


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    outcome, times = point["outcome"], point["milliseconds_to_the_socket"]
    counts = (point["rows"], outcome["completed"], outcome["wrong"], outcome["cut"])
    return (
        *map(str, counts),
        *(f"{times[name]:.2f} ms" for name in ("p50", "p90", "p99", "most")),
        f"{point['cpu_milliseconds_per_id']:.3f} ms",
    )


async def _measured(port: int, load: Load) -> Outcome:
    await run_scripted(port, dataclasses.replace(load, streams=_WARMING, cut=0))  # what is imported late
    outcome = await run_scripted(port, load)
    await settled(port)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
