"""What a server counts, for Prometheus. Knows numbers; knows no text: nothing of a prompt or an answer gets in here."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.engine.stats import Stats

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_NOW = {
    "running": "Sequences that have a row of the step.",
    "waiting": "Sequences that wait for one.",
    "queued_tokens": "Ids of those that wait.",
    "held_full_pages": "Pages of full layers that a sequence holds.",
    "held_sliding_pages": "Pages of sliding layers that a sequence holds.",
    "cached_full_pages": "Pages of full layers that only the prefix cache keeps.",
    "cached_sliding_pages": "Pages of sliding layers that only the prefix cache keeps.",
}
_SINCE = {
    "prefilled_tokens": "Prompt positions that were computed.",
    "preemptions": "Times that a sequence lost its pages to another.",
}
_STEPS = {
    "steps": "Calls of a compiled program.",
    "failed_steps": "Calls that raised.",
    "proposed_tokens": "Guessed ids that steps checked.",
    "accepted_tokens": "Guessed ids that were right.",
}


class Metrics:
    """The numbers of one server, in a registry of their own.

    Attributes:
        requests: prompts that the engine took, by the model that they were for.
        prompt_tokens: ids of prompts.
        cached_tokens: those of them that were found in the prefix cache.
        generated_tokens: ids of answers.
        first_token: seconds from a request at the engine to its first id.
        between_tokens: seconds from one id to the next.
        faults: what did not fit harmony, by kind.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("http_requests", "Requests by route and status.", "method", "route", "status")
        self._open_requests = Gauge("gptoss_http_open_requests", "Requests under way.", registry=self._registry)
        self.requests = self._counter("model_requests", "Prompts that the engine took, by model.", "model")
        self.prompt_tokens = self._counter("prompt_tokens", "Ids of prompts.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Ids of prompts found in the prefix cache.")
        self.generated_tokens = self._counter("generated_tokens", "Ids of answers.")
        self.faults = self._counter("harmony_faults", "What a model wrote that does not fit harmony.", "kind")
        self.first_token = self._histogram("first_token_seconds", "From request to first id.", _FIRST)
        self.between_tokens = self._histogram("between_tokens_seconds", "From one id to the next.", _BETWEEN)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Tells of an engine too."""
        self._registry.register(_EngineCollector(stats))

    def fault(self, kind: str) -> None:
        """Counts something that did not fit harmony."""
        self.faults.labels(kind).inc()

    def request_began(self) -> None:
        """Counts a request as under way."""
        self._open_requests.inc()

    def request_ended(self, method: str, route: str, status: int) -> None:
        """Counts a request as answered."""
        self._open_requests.dec()
        self._requests.labels(method, route, str(status)).inc()

    def exposition(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"gptoss_{name}", documentation, labels, registry=self._registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gptoss_{name}", documentation, registry=self._registry, buckets=buckets)


class _EngineCollector(Collector):
    """Asks the engine when somebody asks."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text in _NOW.items():
            yield GaugeMetricFamily(f"gptoss_engine_{name}", text, value=getattr(stats.queue, name))
        for name, text in _SINCE.items():
            yield CounterMetricFamily(f"gptoss_engine_{name}", text, value=getattr(stats.queue, name))
        for name, text in _STEPS.items():
            yield CounterMetricFamily(f"gptoss_engine_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily("gptoss_engine_host_seconds", "Of a step outside the runner.", value=stats.host_seconds)


class CountRequests:
    """Counts requests by the route that took them; a path that no route knows is not told, it may be anything."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client went away before it was answered

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.request_began()
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" else "other"
            self._metrics.request_ended(method, route, status)


class Stopwatch:
    """Times the ids of one stream."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last = time.perf_counter()
        self._has_begun = False

    def token(self) -> None:
        """An id came."""
        now = time.perf_counter()
        histogram = self._metrics.between_tokens if self._has_begun else self._metrics.first_token
        histogram.observe(now - self._last)
        self._metrics.generated_tokens.inc()
        self._last, self._has_begun = now, True
