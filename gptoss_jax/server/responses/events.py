"""A turn's events as OpenAI's events of a response, numbered. Knows the chat's events; runs no turn, stores nothing.

response.created ─► response.in_progress ─► … each item, see items.py … ─► response.completed
     0                    1                   sequence_number 2, 3, …       incomplete · failed
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from gptoss_jax.chat import ChatEvent, Part, ToolFinished, ToolStarted, TurnFinished, Usage
from gptoss_jax.engine.request import Token
from gptoss_jax.harmony.events import Delta, End, Header, Start
from gptoss_jax.harmony.messages import Assistant
from gptoss_jax.server.responses.convert import BROWSER, PYTHON
from gptoss_jax.server.responses.items import (
    CodeInterpreterCall,
    FunctionCall,
    HostedItem,
    Item,
    Reasoning,
    Spoken,
    Told,
    WebSearchCall,
)
from gptoss_jax.server.responses.store import StoredItem

Event: TypeAlias = Mapping[str, Any]
Ending: TypeAlias = Literal["completed", "incomplete", "failed", "cancelled"]


class Writer:
    """One response as it is written: chat's events in, the client's out. `response` is always what it is now.

    Args:
        response: the body of a response without output.
        hosted: namespaces of the tools that are run here, python or browser.
        logprobs: what a client is told of a token; None where it did not ask.
    """

    def __init__(
        self,
        response: Mapping[str, Any],
        *,
        hosted: Iterable[str] = (),
        logprobs: Callable[[Token], Mapping[str, Any]] | None = None,
    ):
        self._response = dict(response)
        self._hosted = frozenset(hosted)
        self._logprobs = logprobs
        self._items: list[Item] = []  # in the order of output_index
        self._open: dict[int, Item] = {}  # by the index of the message that it is made of
        self._waiting: list[tuple[Assistant, HostedItem]] = []  # calls that a tool here has to answer
        self._running: list[tuple[Assistant, HostedItem]] = []
        self._number = 0

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now; a copy."""
        return copy.deepcopy(self._response) | {"output": [item.body() for item in self._items if not item.open]}

    @property
    def final_text(self) -> str:
        """What the final channel says."""
        return "".join(item.text for item in self._items if isinstance(item, Spoken) and item.phase == "final_answer")

    @property
    def stored(self) -> tuple[StoredItem, ...]:
        """The output for the store."""
        return tuple(StoredItem(body=item.body(), messages=item.messages) for item in self._items)

    def begin(self, status: Literal["queued", "in_progress"]) -> Iterator[Event]:
        """The first event, and the second unless the response has to wait."""
        self._response["status"] = status
        yield self._event("response.created", {"response": self.response})
        yield self._event(f"response.{status}", {"response": self.response})

    def go(self) -> Iterator[Event]:
        """A response that waited does so no longer."""
        self._response["status"] = "in_progress"
        yield self._event("response.in_progress", {"response": self.response})

    def push(self, event: ChatEvent) -> Iterator[Event]:
        """What a chat event comes to. `TurnFinished` brings the usage; the caller decides what it means, by `close`."""
        match event:
            case Part(event=Start(index=index, header=header)):
                yield from self._start(index, header)
            case Part(event=Delta(index=index, text=text), tokens=tokens):
                item = self._open[index]
                yield from self._tell(item, item.grow(text, self._told_logprobs(tokens)))
            case Part(event=End(index=index, message=message, by=by)):
                yield from self._end(self._open.pop(index), message, cut=by == "cut")
            case ToolStarted(call=call):
                item = _take(self._waiting, call)
                self._running.append((call, item))
                yield from self._tell(item, item.run())
            case ToolFinished(call=call, result=result, failed=failed):
                item = _take(self._running, call)
                yield from self._tell(item, item.ran(result, failed=failed))
            case TurnFinished(usage=usage):
                self._response["usage"] = usage_body(usage)

    def close(self, status: Ending, *, error: Mapping[str, str] | None = None) -> Iterator[Event]:
        """Ends the items that are open, then the response. After it `response` is final, and `last` tells of it."""
        for item in self._items:
            if item.open:
                yield from self._tell(item, item.give_up())
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        self._response |= {"status": status, "error": error, "incomplete_details": reason}
        self._response["completed_at"] = int(time.time()) if status == "completed" else None

    def last(self) -> Event:
        """The event that ends the stream."""
        status = self._response["status"]
        # OpenAI has no event of its own for a response that was cancelled.
        name = "incomplete" if status == "cancelled" else status
        return self._event(f"response.{name}", {"response": self.response})

    def set_stored(self, stored: bool) -> None:
        """Whether it can be had again."""
        self._response["store"] = stored

    def _start(self, index: int, header: Header) -> Iterator[Event]:
        item = self._item(header)
        self._open[index] = item
        self._items.append(item)
        yield from self._tell(item, item.begin())

    def _item(self, header: Header) -> Item:
        if header.recipient is not None:
            namespace = header.recipient.partition(".")[0]
            if namespace == PYTHON and namespace in self._hosted:
                return CodeInterpreterCall()
            if namespace == BROWSER and namespace in self._hosted:
                return WebSearchCall(recipient=header.recipient)
            return FunctionCall(recipient=header.recipient)
        if header.channel == "analysis":
            return Reasoning()
        return Spoken(phase="commentary" if header.channel == "commentary" else "final_answer")

    def _end(self, item: Item, message: Assistant, *, cut: bool) -> Iterator[Event]:
        if isinstance(item, HostedItem) and not cut:
            self._waiting.append((message, item))
        yield from self._tell(item, item.end(message, cut=cut))

    def _told_logprobs(self, tokens: Sequence[Token]) -> list[Mapping[str, Any]]:
        return [] if self._logprobs is None else [self._logprobs(token) for token in tokens]

    def _tell(self, item: Item, told: Iterable[Told]) -> Iterator[Event]:
        place = {"output_index": self._items.index(item)}
        for name, fields in told:
            # Events of the item as a whole carry the item itself; all others its id.
            yield self._event(name, place | ({} if "item" in fields else {"item_id": item.id}) | dict(fields))

    def _event(self, name: str, fields: Mapping[str, Any]) -> Event:
        event = {"type": name, "sequence_number": self._number} | dict(fields)
        self._number += 1
        return event


def usage_body(usage: Usage) -> dict[str, Any]:
    """What was read and written, in OpenAI's form. Nothing is charged for writing to a cache, so that is 0."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _take(pairs: list[tuple[Assistant, HostedItem]], call: Assistant) -> HostedItem:
    """The oldest of these calls that says the same; two that say the same are as good as each other."""
    index = next(i for i, (waiting, _) in enumerate(pairs) if waiting == call)
    return pairs.pop(index)[1]
