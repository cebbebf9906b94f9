"""The items of a response as they grow, and the events that tell of it. Knows JSON and messages; knows no numbering.

    reasoning              what the model thinks                 added · part.added · delta… · done · part.done · done
    message                what it says: commentary, final       added · part.added · delta… · done · part.done · done
    function_call          a call for the caller to answer       added · arguments.delta… · arguments.done · done
    code_interpreter_call  Python that runs here                 added · in_progress · code.delta… · code.done
                                                                 · interpreting · completed · done
    web_search_call        a search, a page, a find, run here    added · in_progress · searching · completed · done

An event here is (type, fields); events.py gives each its place in the response and its number.
"""

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from gptoss_jax.harmony.messages import Assistant, Message, ToolResult
from gptoss_jax.server.responses.convert import name_of, new_id

Told: TypeAlias = tuple[str, Mapping[str, Any]]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class Item(abc.ABC):
    """One item of the output: begins, grows by text, and ends.

    Attributes:
        id: told to the client.
        messages: what the model reads of it in the next turn.
        open: whether its last event is still to come.
    """

    def __init__(self, prefix: str):
        self.id = new_id(prefix)
        self.messages: tuple[Message, ...] = ()
        self.open = True
        self.status: Status = "in_progress"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """What there is of it."""
        return "".join(self._texts)

    @abc.abstractmethod
    def body(self) -> dict[str, Any]:
        """The item as it is now."""

    @abc.abstractmethod
    def begin(self) -> Iterator[Told]:
        """It is there, and empty."""

    @abc.abstractmethod
    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        """More of its text."""

    @abc.abstractmethod
    def end(self, message: Assistant, *, cut: bool) -> Iterator[Told]:
        """Its text is complete, or will not be."""

    @abc.abstractmethod
    def give_up(self) -> Iterator[Told]:
        """Nothing more will come, though something should have."""

    def _added(self) -> Told:
        return "response.output_item.added", {"item": self.body()}

    def _done(self, status: Status) -> Told:
        self.open = False
        self.status = status
        return "response.output_item.done", {"item": self.body()}


class HostedItem(Item):
    """An item whose call is answered here."""

    @abc.abstractmethod
    def run(self) -> Iterator[Told]:
        """Its tool begins."""

    @abc.abstractmethod
    def ran(self, result: ToolResult, *, failed: bool) -> Iterator[Told]:
        """Its tool has answered."""


class _TextItem(Item):
    """A text in one content part: reasoning and messages."""

    event: str

    @abc.abstractmethod
    def part(self) -> dict[str, Any]:
        """The content part as it is now."""

    def _extra(self) -> dict[str, Any]:
        return {}

    def begin(self) -> Iterator[Told]:
        yield self._added()
        yield "response.content_part.added", {"content_index": 0, "part": self.part()}

    def end(self, message: Assistant, *, cut: bool) -> Iterator[Told]:
        self.messages = (message,)
        yield from self._close("incomplete" if cut else "completed")

    def give_up(self) -> Iterator[Told]:
        yield from self._close("incomplete")

    def _close(self, status: Status) -> Iterator[Told]:
        yield f"response.{self.event}.done", {"content_index": 0, "text": self.text} | self._extra()
        yield "response.content_part.done", {"content_index": 0, "part": self.part()}
        yield self._done(status)


class Reasoning(_TextItem):
    """The analysis channel. There is no summary of it: the text itself is the content."""

    event = "reasoning_text"

    def __init__(self) -> None:
        super().__init__("rs")

    def body(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" else [self.part()]
        return {"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": self.status}

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        self._texts.append(text)
        yield "response.reasoning_text.delta", {"content_index": 0, "delta": text}


class Spoken(_TextItem):
    """A message to the user: the final answer, or words before a call."""

    event = "output_text"

    def __init__(self, *, phase: Literal["commentary", "final_answer"]):
        super().__init__("msg")
        self.phase = phase
        self._logprobs: list[Mapping[str, Any]] = []

    def body(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" else [self.part()]
        return {
            "type": "message",
            "id": self.id,
            "role": "assistant",
            "content": content,
            "status": self.status,
            "phase": self.phase,
        }

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": []} | self._extra()

    def _extra(self) -> dict[str, Any]:
        return {"logprobs": list(self._logprobs)}

    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        self._texts.append(text)
        self._logprobs.extend(logprobs)
        yield "response.output_text.delta", {"content_index": 0, "delta": text, "logprobs": list(logprobs)}


class FunctionCall(Item):
    """A call that the caller answers."""

    def __init__(self, *, recipient: str):
        super().__init__("fc")
        self.name = name_of(recipient)
        self.call_id = new_id("call")

    def body(self) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self.id,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.text,
            "status": self.status,
        }

    def begin(self) -> Iterator[Told]:
        yield self._added()

    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        self._texts.append(text)
        yield "response.function_call_arguments.delta", {"delta": text}

    def end(self, message: Assistant, *, cut: bool) -> Iterator[Told]:
        self.messages = (message,)
        yield from self._close("incomplete" if cut else "completed")

    def give_up(self) -> Iterator[Told]:
        yield from self._close("incomplete")

    def _close(self, status: Status) -> Iterator[Told]:
        yield "response.function_call_arguments.done", {"name": self.name, "arguments": self.text}
        yield self._done(status)


class CodeInterpreterCall(HostedItem):
    """Python that runs here. Each call has a container of its own: nothing is kept between two."""

    def __init__(self) -> None:
        super().__init__("ci")
        self.container_id = new_id("cntr")
        self.outputs: list[dict[str, Any]] | None = None
        self._written = False

    def body(self) -> dict[str, Any]:
        return {
            "type": "code_interpreter_call",
            "id": self.id,
            "code": self.text,
            "container_id": self.container_id,
            "outputs": self.outputs,
            "status": self.status,
        }

    def begin(self) -> Iterator[Told]:
        yield self._added()
        yield "response.code_interpreter_call.in_progress", {}

    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        self._texts.append(text)
        yield "response.code_interpreter_call_code.delta", {"delta": text}

    def end(self, message: Assistant, *, cut: bool) -> Iterator[Told]:
        self.messages = (message,)
        self._written = True
        yield "response.code_interpreter_call_code.done", {"code": self.text}
        if cut:
            yield self._done("incomplete")

    def run(self) -> Iterator[Told]:
        yield "response.code_interpreter_call.interpreting", {}

    def ran(self, result: ToolResult, *, failed: bool) -> Iterator[Told]:
        self.messages = (*self.messages, result)
        self.outputs = [{"type": "logs", "logs": result.text}]
        if not failed:  # OpenAI has no event for a failure: the item tells of it
            yield "response.code_interpreter_call.completed", {}
        yield self._done("failed" if failed else "completed")

    def give_up(self) -> Iterator[Told]:
        if not self._written:
            yield "response.code_interpreter_call_code.done", {"code": self.text}
        yield self._done("incomplete")


class WebSearchCall(HostedItem):
    """A call of the browser. It is told of when it is complete: what it looks for is part of its first event."""

    def __init__(self, *, recipient: str):
        super().__init__("ws")
        self.recipient = recipient

    def body(self) -> dict[str, Any]:
        return {
            "type": "web_search_call",
            "id": self.id,
            "action": _action(self.recipient, self.text),
            "status": self.status,
        }

    def begin(self) -> Iterator[Told]:
        yield from ()

    def grow(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Told]:
        self._texts.append(text)
        yield from ()

    def end(self, message: Assistant, *, cut: bool) -> Iterator[Told]:
        self.messages = (message,)
        yield self._added()
        yield "response.web_search_call.in_progress", {}
        if cut:
            yield self._done("incomplete")

    def run(self) -> Iterator[Told]:
        yield "response.web_search_call.searching", {}

    def ran(self, result: ToolResult, *, failed: bool) -> Iterator[Told]:
        self.messages = (*self.messages, result)
        if not failed:
            yield "response.web_search_call.completed", {}
        yield self._done("failed" if failed else "completed")

    def give_up(self) -> Iterator[Told]:
        if not self.messages:
            yield self._added()
        yield self._done("incomplete")


def _action(recipient: str, text: str) -> dict[str, Any]:
    """What a call of the browser does, in OpenAI's words. What the model wrote may be anything."""
    try:
        sent = json.loads(text)
    except ValueError:
        sent = None
    arguments = sent if isinstance(sent, dict) else {}
    match recipient.rpartition(".")[2]:
        case "open":
            page = arguments.get("id")
            return {"type": "open_page", "url": page if isinstance(page, str) else None}
        case "find":
            # The page is the one that the model has before it; which it is, only the tool knows.
            return {"type": "find_in_page", "pattern": str(arguments.get("pattern", text)), "url": ""}
        case _:
            query = str(arguments.get("query", text))
            return {"type": "search", "query": query, "queries": [query]}
