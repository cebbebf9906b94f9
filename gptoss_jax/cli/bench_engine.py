"""The parts of `bench` that run an engine: throughput, latency, prefix, overhead, start. Knows options and tables."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptoss_jax.bench import serving
from gptoss_jax.bench.ceilings import Ceilings
from gptoss_jax.bench.load import SPREADS, Lengths, poisson_arrivals
from gptoss_jax.bench.percentiles import DEFINITION
from gptoss_jax.bench.roof import Held, least_work
from gptoss_jax.bench.start import start
from gptoss_jax.cli.terminal import size, table
from gptoss_jax.engine.pools import Pools
from gptoss_jax.engine.request import Request
from gptoss_jax.engine.runner import Runner
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.sharding import MeshShape

PARTS = ("throughput", "latency", "prefix", "overhead", "start")
_SWEEP = (0.25, 0.5, 0.75, 1.0, 1.25)  # of what it can do with all requests there at once: past it queues only grow

Say = Callable[[str], None]


def check(options: argparse.Namespace, parts: Collection[str], config: ModelConfig) -> None:
    """Raises UserError for options that make no sense with these parts or this model."""
    for name in ("prefix_tokens", "new", "rounds", "requests", "first_within", "between_within"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected more than 0")
    settings = engine_settings(options, parts)
    settings.limits(config)
    if "overhead" in parts and max(options.rows) > settings.max_rows:
        raise UserError(
            f"--rows asks for {max(options.rows)} running requests; the engine runs {settings.max_rows}: "
            "give --rows smaller numbers, or --max-rows a greater one"
        )


def engine_settings(options: argparse.Namespace, parts: Collection[str]) -> EngineSettings:
    """As large as these parts ask for, where an option does not say it."""
    longest = _longest_request(options, parts)
    max_rows = max(*options.concurrency, *options.rows) if options.max_rows is None else options.max_rows
    num_requests = max(max_rows, options.requests, *options.concurrency)  # none is to be refused
    settings = EngineSettings(
        max_rows=max_rows,
        max_context=longest if options.max_context is None else options.max_context,
        kv_dtype=options.kv_dtype,
        prefill_tokens=options.prefill_tokens,
        batch_invariant=options.batch_invariant,
        max_queue=num_requests,
        max_queued_tokens=num_requests * longest,
    )
    # Each row's last page is not full, and another one lets the next prompt in before an ended one is forgotten.
    pages = max_rows * (-(-longest // settings.page_size) + 2)
    tokens = pages * settings.page_size if options.cache_tokens is None else options.cache_tokens
    return dataclasses.replace(settings, cache_tokens=tokens)


def measure(
    options: argparse.Namespace, parts: Collection[str], model: GptOss, ceilings: Ceilings, *, say: Say
) -> dict[str, Any]:
    """What the parts found, by part, beside the engine's settings."""
    settings = engine_settings(options, parts)
    result: dict[str, Any] = {"engine": dataclasses.asdict(settings), "seed": options.seed}
    if "start" in parts:
        say("opening an engine, with and without its programs on disk")
        result["start"] = dataclasses.asdict(start(model, settings))
    if not set(parts) - {"start"}:
        return result
    limits = settings.limits(model.config, Pools.of(model, kv_dtype=settings.kv_dtype))
    runner = Runner(model, limits, kv_dtype=settings.kv_dtype)
    say(f"compiling {len(limits.programs)} steps, for {settings.max_rows} requests at most")
    runner.warm_up()
    warm = serving.Warm(runner=runner, limits=limits, vocab_size=model.config.vocab_size)
    rng = np.random.default_rng(options.seed)
    warm.warm_up(rng=rng)
    found = _Measurements(options, warm, _held(model, settings), ceilings, rng, say)
    by_part = {
        "throughput": found.throughput,
        "latency": found.latency,
        "prefix": found.prefix,
        "overhead": found.overhead,
    }
    return result | {part: measure_part() for part, measure_part in by_part.items() if part in parts}


@dataclasses.dataclass(frozen=True)
class _Measurements:
    """Those that share a runner, each as JSON."""

    options: argparse.Namespace
    warm: serving.Warm
    held: Held
    ceilings: Ceilings
    rng: np.random.Generator
    say: Say

    def throughput(self) -> dict[str, Any]:
        points = [
            self._throughput(number, requests=number * self.options.rounds) for number in self.options.concurrency
        ]
        one = next((point["output_tokens_per_second"] for point in points if point["concurrent_requests"] == 1), None)
        for point in points:
            point["ratio_to_one_request"] = None if one is None else point["output_tokens_per_second"] / one
        return {"lengths": self._lengths(), "points": points}

    def latency(self) -> dict[str, Any]:
        goals = serving.Goals(
            first_token_seconds=self.options.first_within, between_tokens_seconds=self.options.between_within
        )
        capacity, rates = None, self.options.rates
        if not rates:
            capacity = self._throughput(self.warm.limits.max_rows, requests=self.options.requests)
            rates = [share * capacity["requests_per_second"] for share in _SWEEP]
        return {
            "lengths": self._lengths(),
            "percentiles": DEFINITION,
            "goals": dataclasses.asdict(goals),
            "capacity": capacity,
            "rates": [dataclasses.asdict(self._latency(rate, goals)) for rate in rates],
        }

    def prefix(self) -> dict[str, Any]:
        self.say(f"prompts of {self.options.prefix_tokens} tokens, new and again")
        return dataclasses.asdict(serving.prefix(self.warm, prompt_tokens=self.options.prefix_tokens, rng=self.rng))

    def overhead(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(self._overhead(running)) for running in self.options.rows]

    def _throughput(self, concurrent: int, *, requests: int) -> dict[str, Any]:
        load = self._load(requests)
        self.say(f"{requests} requests, {concurrent} at a time")
        with self.warm.engine() as engine:
            found = serving.throughput(engine, load, concurrent=concurrent)
        return _beside_roof(found, self._roof_seconds(load, concurrent))

    def _latency(self, rate: float, goals: serving.Goals) -> serving.Latency:
        load = self._load(self.options.requests)
        due = poisson_arrivals(rate, len(load), rng=self.rng)
        self.say(f"{len(load)} requests, {rate:.4g} in a second")
        with self.warm.engine() as engine:
            return serving.latency(engine, load, due=due, rate=rate, goals=goals)

    def _overhead(self, running: int) -> serving.Overhead:
        self.say(f"Python's part of a step, {running} requests running")
        load = self.warm.requests(serving.OVERHEAD_LENGTHS, running, rng=self.rng)
        with self.warm.engine() as engine:
            return serving.overhead(engine, load)

    def _lengths(self) -> dict[str, Any]:
        return dataclasses.asdict(_lengths(self.options)) | {"distribution": SPREADS[self.options.spread]}

    def _load(self, number: int) -> list[Request]:
        return self.warm.requests(_lengths(self.options), number, rng=self.rng)

    def _roof_seconds(self, load: Sequence[Request], concurrent: int) -> float:
        under_way = min(concurrent, self.warm.limits.max_rows, len(load))
        work = least_work(self.held, load, concurrent=under_way)
        return self.ceilings.seconds(nbytes=work.nbytes, flops=work.flops / self.held.shape.num_devices)


def show(result: dict[str, Any]) -> None:
    """Tables of the parts that are there."""
    for part, print_part in (
        ("throughput", _show_throughput),
        ("latency", _show_latency),
        ("prefix", _show_prefix),
        ("overhead", _show_overhead),
        ("start", _show_start),
    ):
        if part in result:
            print_part(result[part])


def _show_throughput(found: dict[str, Any]) -> None:
    rows = [
        [
            str(point["concurrent_requests"]),
            f"{point['output_tokens_per_second']:.1f}",
            "" if point["ratio_to_one_request"] is None else f"{point['ratio_to_one_request']:.2f}",
            f"{point['total_tokens_per_second']:.1f}",
            f"{point['roof_output_tokens_per_second']:.1f}",
            f"{point['share_of_roof']:.1%}",
        ]
        for point in found["points"]
    ]
    columns = ("requests at a time", "new tokens/s", "× one request", "with prompts", "at best", "of the roof")
    table(f"throughput: {_words(found['lengths'])}", columns, rows)


def _show_latency(found: dict[str, Any]) -> None:
    rows = [
        [
            f"{point['offered_requests_per_second']:.3g}",
            f"{point['finished_requests_per_second']:.3g}",
            *(
                _milliseconds(point[what][f"p{p}_seconds"])
                for what in ("first_token", "between_tokens")
                for p in (50, 95, 99)
            ),
            f"{point['found_waiting_requests_mean']:.1f}",
            f"{point['good_share']:.0%}",
        ]
        for point in found["rates"]
    ]
    goals = found["goals"]
    good = f"good: {goals['first_token_seconds']:g} s, then {goals['between_tokens_seconds']:g} s on average"
    columns = (
        "requests/s",
        "finished/s",
        "first p50, ms",
        "p95",
        "p99",
        "between p50, ms",
        "p95",
        "p99",
        "queue",
        "good",
    )
    table(f"latency: {_words(found['lengths'])}; {good}", columns, rows)


def _show_prefix(found: dict[str, Any]) -> None:
    row = [
        f"{found['prompt_tokens']} tokens",
        _milliseconds(found["cold_first_token_seconds"]),
        _milliseconds(found["warm_first_token_seconds"]),
        f"{found['warm_share_of_cold']:.1%}",
        "equal" if found["ids_equal"] else "differ",
    ]
    table("prefix: the same prompt again", ("prompt", "first token, ms", "again, ms", "of it", "ids"), [row])


def _show_overhead(found: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            str(point["running_requests"]),
            f"{point['host_seconds_per_step'] * 1e3:.3f}",
            f"{point['seconds'] / point['steps'] * 1e3:.3f}",
        ]
        for point in found
    ]
    table("overhead: Python's part of a step", ("requests running", "Python, ms", "the whole step, ms"), rows)


def _show_start(found: dict[str, Any]) -> None:
    row = [
        f"{found['programs']}",
        f"{found['cold_seconds']:.2f}",
        f"{found['warm_seconds']:.2f}",
        f"{found['warm_share_of_cold']:.1%}",
        size(found["cache_bytes"]),
    ]
    table("start: until requests are taken", ("programs", "compiled, s", "from disk, s", "of it", "on disk"), [row])


def _beside_roof(found: serving.Throughput, roof_seconds: float) -> dict[str, Any]:
    return dataclasses.asdict(found) | {
        "output_tokens_per_second": found.output_tokens_per_second,
        "total_tokens_per_second": found.total_tokens_per_second,
        "requests_per_second": found.requests_per_second,
        "roof_output_tokens_per_second": found.output_tokens / roof_seconds,
        "share_of_roof": roof_seconds / found.seconds,
    }


def _longest_request(options: argparse.Namespace, parts: Collection[str]) -> int:
    found = [1]
    if {"throughput", "latency", "start"} & set(parts):
        found.append(_lengths(options).longest)
    if "prefix" in parts:
        found.append(options.prefix_tokens + serving.PREFIX_NEW_TOKENS)
    if "overhead" in parts:
        found.append(serving.OVERHEAD_LENGTHS.longest)
    return max(found)


def _lengths(options: argparse.Namespace) -> Lengths:
    return Lengths(prompt_tokens=options.request_prompt, new_tokens=options.new, spread=options.spread)


def _held(model: GptOss, settings: EngineSettings) -> Held:
    return Held(
        config=model.config,
        shape=MeshShape() if model.mesh is None else MeshShape(**model.mesh.shape),
        dtype=model.dtype,
        kv_dtype=model.dtype if settings.kv_dtype is None else jnp.int8,
        experts=model.experts,
        dense=model.dense,
    )


def _words(lengths: dict[str, Any]) -> str:
    spread = ", ± 50 %" if lengths["spread"] == "even" else ""
    return f"prompts of {lengths['prompt_tokens']} and {lengths['new_tokens']} new tokens{spread}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"
