"""Answers the calls of one round, side by side. Knows tools and messages; knows no model and no engine."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from gptoss_jax.chat.events import ToolFinished, ToolStarted
from gptoss_jax.harmony.messages import Assistant, Namespace, ToolResult
from gptoss_jax.tools.base import Tool, ToolError

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NoSuchTool:
    """Stands last among tools, and answers calls to what is not there: the model reads what there is, and goes on.

    Without it such a call ends the turn, for the caller to answer. The model is not told of it.

    Attributes:
        known: what may be called instead.
    """

    known: tuple[str, ...] = ()

    @property
    def namespace(self) -> Namespace:
        return Namespace(name="none")

    def handles(self, recipient: str) -> bool:
        return True

    def session(self) -> "NoSuchTool":
        return self

    async def call(self, recipient: str, text: str) -> str:
        known = f"there is {', '.join(self.known)}" if self.known else "there are no tools: answer without"
        raise ToolError(f"there is no tool {recipient}; {known}")


class Calls:
    """The tools of one turn, each in a session of its own, and the answers they give."""

    def __init__(self, tools: Sequence[Tool], *, timeout_s: float):
        self._tools = [tool.session() for tool in tools]
        self._timeout_s = timeout_s

    def handles(self, call: Assistant) -> bool:
        """Whether one of the tools is called."""
        return self._tool(call) is not None

    async def answer(self, calls: Sequence[Assistant]) -> AsyncGenerator[ToolStarted | ToolFinished, None]:
        """Runs them all, and tells of each when it has its result. Leaving cancels those that still run."""
        running = []
        try:
            for call in calls:
                running.append(asyncio.create_task(self._answer(call)))
                yield ToolStarted(call)
            for finished in asyncio.as_completed(running):
                yield await finished
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, call: Assistant) -> ToolFinished:
        tool, recipient = self._tool(call), call.recipient
        assert tool is not None, "only calls that it handles are given"
        assert recipient is not None, "a call has a recipient"
        started, failed = time.perf_counter(), True
        try:
            async with asyncio.timeout(self._timeout_s):
                text = await tool.call(recipient, call.text)
            if not isinstance(text, str):
                raise TypeError(f"the answer is {type(text).__name__}; expected str")
            failed = False
        except ToolError as error:
            text = f"error: {error}"
        except TimeoutError:
            text = f"error: {recipient} took too long; try something quicker"
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # A SystemExit out of a task takes the whole event loop along; a cancellation out of a tool ends the turn.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # it is the turn that is left
            _logger.exception("tool %s has a mistake; the model is told that it failed", recipient)
            text = f"error: {recipient} failed, by a mistake of its own; do without it"
        # A call in analysis, as python's and the browser's, is answered there: neither is for the user's eyes.
        result = ToolResult(
            name=recipient, text=text, channel="analysis" if call.channel == "analysis" else "commentary"
        )
        return ToolFinished(call, result, time.perf_counter() - started, failed)

    def _tool(self, call: Assistant) -> Tool | None:
        recipient = call.recipient
        return next((tool for tool in self._tools if recipient is not None and tool.handles(recipient)), None)
