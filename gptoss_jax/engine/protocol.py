"""What chat and server ask of an engine: `Engine`, or what stands in for it. Knows requests; runs none."""

from typing import Protocol, runtime_checkable

from gptoss_jax.engine.request import Request
from gptoss_jax.engine.stats import Stats
from gptoss_jax.engine.stream import Stream


@runtime_checkable
class AnyEngine(Protocol):
    """Takes requests from any thread and any event loop, and answers by streams."""

    @property
    def vocab_size(self) -> int:
        """Ids are smaller than this."""
        ...

    @property
    def max_context(self) -> int:
        """The most ids of one request, prompt and continuation."""
        ...

    def submit(self, request: Request) -> Stream:
        """Queues a request.

        Raises:
            QueueFull: as many wait as may; try again later.
            UserError: the request asks for what this engine cannot do, or the engine is closed.
        """
        ...

    def stats(self) -> Stats:
        """What it does and has done."""
        ...

    def close(self) -> None:
        """Ends everything that runs or waits, by Finished("abort")."""
        ...
