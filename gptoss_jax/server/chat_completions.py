"""`/v1/chat/completions`: a chat's events as OpenAI's chunks and messages. Knows events and JSON; knows no engine.

    analysis                      reasoning, and reasoning_content, which is the same under its other name
    final, commentary, no channel content; two messages in a row are two paragraphs of it
    a call of functions.f         tool_calls, the n-th call with index n - 1
    any other call                answered here: there is no such tool

Where the answer has a form, the final message alone is content, and words before it are reasoning.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptoss_jax.chat import ChatEvent, Part, TurnFinished, TurnSettings, Usage
from gptoss_jax.engine.request import Token
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.events import Delta, Fault, Header, Start
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.server.chat_ask import Asked, ask
from gptoss_jax.server.chat_schemas import ChatBody
from gptoss_jax.server.errors import ApiError, of_end
from gptoss_jax.server.sampling import logprob_body
from gptoss_jax.server.service import Service, TheService
from gptoss_jax.server.sse import stream_events, while_connected
from gptoss_jax.tools.base import FUNCTIONS

router = APIRouter(tags=["chat"])

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
_PARAGRAPH = "\n\n"


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def complete(body: ChatBody, request: Request, service: TheService) -> Response:
    """Answers `n` times; at once or streamed."""
    completion = _Completion(body, await ask(body, service), service)
    if body.stream:
        return stream_events(request, completion.chunks(), done=True)
    return JSONResponse(await while_connected(request, completion.whole()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """More of one choice.

    Attributes:
        call: which call `name` and `text` belong to; a call begins by its name.
        tokens: that the text was said with.
    """

    field: Literal["content", "reasoning", "call"]
    text: str = ""
    call: int = 0
    name: str = ""
    tokens: tuple[Token, ...] = ()


class _Completion:
    """One request on its way: a turn of the chat for each choice."""

    def __init__(self, body: ChatBody, asked: Asked, service: Service):
        self._asked = asked
        self._service = service
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._wants_logprobs = bool(body.logprobs)
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._choices = [_Choice(asked) for _ in asked.settings]

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        messages = [_Message() for _ in self._choices]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for number, piece in pieces:
                messages[number].add(piece)
        choices = [
            {
                "index": number,
                "message": message.body,
                "logprobs": self._logprobs(message.tokens),
                "finish_reason": choice.finish_reason,
            }
            for number, (choice, message) in enumerate(zip(self._choices, messages, strict=True))
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[tuple[None, Mapping[str, Any]], None]:
        """The answer as it comes. All choices begin in their order before one goes on: OpenAI's client counts on it."""
        begun = False
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for number, piece in pieces:
                if not begun:
                    begun = True
                    for each in range(len(self._choices)):
                        yield None, self._chunk(each, {"role": "assistant"})
                if piece is not None:
                    yield None, self._chunk(number, _delta(piece), piece)
                else:
                    yield None, self._chunk(number, {}, finish_reason=self._choices[number].finish_reason)
        if self._wants_usage:
            yield None, self._head("chat.completion.chunk") | {"choices": [], "usage": self._usage()}

    async def _pieces(self) -> "AsyncGenerator[tuple[int, _Piece | None], None]":
        """What there is more of a choice, whenever there is, and None at its end. Leaving it ends all turns."""
        turns = [self._turn(settings) for settings in self._asked.settings]
        async with contextlib.aclosing(_merged(turns)) as events:
            async for number, event in events:
                if isinstance(event, TurnFinished):
                    await asyncio.to_thread(self._choices[number].finish, event)  # a schema may be checked for long
                    yield number, None
                elif isinstance(event, Part):
                    if isinstance(event.event, Fault):
                        self._service.metrics.fault(event.event.kind)
                    piece = self._choices[number].push(event)
                    if piece is not None:
                        yield number, piece

    async def _turn(self, settings: TurnSettings) -> AsyncGenerator[ChatEvent, None]:
        asked, begun = self._asked, False
        turn = self._service.chat_of(asked.model).stream(asked.conversation, settings=settings, tools=asked.tools)
        try:
            async with contextlib.aclosing(turn):
                async for event in turn:
                    begun = True
                    yield event
        except UserError as error:
            if not begun:
                await self._explain(error)
            raise

    async def _explain(self, error: UserError) -> None:
        """Says of a prompt that is too long so by OpenAI's code, which clients look for to shorten it."""
        num_ids = len(await asyncio.to_thread(render_prompt, self._asked.conversation, self._service.tokenizer))
        if num_ids >= self._service.engine.max_context:
            raise ApiError(400, str(error), code="context_length_exceeded", param="messages") from error

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _chunk(
        self,
        number: int,
        delta: Mapping[str, Any],
        piece: _Piece | None = None,
        *,
        finish_reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens) if piece is not None and piece.field == "content" else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._wants_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {"content": [logprob_body(token, self._service.tokenizer) for token in tokens], "refusal": None}

    def _usage(self) -> dict[str, Any]:
        """The choices have one prompt, which counts once."""
        usages = [choice.usage for choice in self._choices]
        completion = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": usages[0].prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": usages[0].prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
        }


class _Choice:
    """One turn, from events to pieces.

    Attributes:
        finish_reason: None until it has ended.
    """

    def __init__(self, asked: Asked):
        self.finish_reason: FinishReason | None = None
        self.usage = Usage()
        self._asked = asked
        self._field: Literal["content", "reasoning", "call"] | None = None  # of the open message; None: it is not told
        self._num_calls = 0
        self._written: set[str] = set()  # fields that have text
        self._gap = ""  # before the next text
        self._answer: list[str] = []

    def push(self, part: Part) -> _Piece | None:
        """What the client is told of this part."""
        match part.event:
            case Start(header=header):
                return self._begin(header)
            case Delta(text=text) if self._field == "call":
                return _Piece(field="call", text=text, call=self._num_calls - 1)
            case Delta(text=text) if self._field is not None:
                if self._field == "content":
                    self._answer.append(text)
                text, self._gap = self._gap + text, ""
                self._written.add(self._field)
                return _Piece(field=self._field, text=text, tokens=part.tokens)
        return None

    def finish(self, finished: TurnFinished) -> None:
        """The turn is over. Raises ApiError where that is no answer."""
        self.usage = finished.usage
        match finished.reason:
            case "stop" | "length" | "tool_calls" as reason:
                self.finish_reason = reason
            case reason:
                raise of_end(reason, finished.message)
        if self._asked.checked is not None and self.finish_reason == "stop":
            wrong = self._asked.checked.check("".join(self._answer))
            if wrong:
                message = f"the answer does not fit the schema: {'; '.join(wrong)}"
                raise ApiError(500, message, code="schema_mismatch", type="server_error")

    def _begin(self, header: Header) -> _Piece | None:
        self._field = self._field_of(header)
        if self._field == "call":
            self._num_calls += 1
            name = (header.recipient or "").removeprefix(f"{FUNCTIONS}.")
            return _Piece(field="call", call=self._num_calls - 1, name=name)
        self._gap = _PARAGRAPH if self._field in self._written else ""
        return None

    def _field_of(self, header: Header) -> Literal["content", "reasoning", "call"] | None:
        if header.recipient is not None:
            answered_here = any(tool.handles(header.recipient) for tool in self._asked.tools)
            return None if answered_here else "call"
        aside = header.channel == "commentary" and self._asked.only_final
        if header.channel == "analysis" or aside:
            return "reasoning" if self._asked.shows_reasoning else None
        return "content"


class _Message:
    """A choice's message as it grows."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []  # of content
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[dict[str, Any], list[str]]] = []  # with the pieces of its arguments

    def add(self, piece: _Piece | None) -> None:
        if piece is None:
            return
        match piece.field:
            case "content":
                self._content.append(piece.text)
                self.tokens += piece.tokens
            case "reasoning":
                self._reasoning.append(piece.text)
            case "call" if piece.name:
                self._calls.append((_new_call(piece.name), []))
            case "call":
                self._calls[piece.call][1].append(piece.text)

    @property
    def body(self) -> dict[str, Any]:
        content = "".join(self._content)
        body: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self._calls else ""),
            "refusal": None,
        }
        if self._reasoning:
            body |= _reasoning("".join(self._reasoning))
        if self._calls:
            body["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": "".join(pieces)}} for call, pieces in self._calls
            ]
        return body


def _delta(piece: _Piece) -> dict[str, Any]:
    match piece.field:
        case "content":
            return {"content": piece.text}
        case "reasoning":
            return _reasoning(piece.text)
        case "call" if piece.name:
            return {"tool_calls": [{"index": piece.call} | _new_call(piece.name)]}
    return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients know."""
    return {"reasoning": text, "reasoning_content": text}


def _new_call(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


async def _merged(turns: Sequence[AsyncGenerator[ChatEvent, None]]) -> AsyncGenerator[tuple[int, ChatEvent], None]:
    """The events of all turns as they come, each with its turn's number. The first error of any is raised."""
    if len(turns) == 1:
        async with contextlib.aclosing(turns[0]) as turn:
            async for event in turn:
                yield 0, event
        return
    events: asyncio.Queue[tuple[int, ChatEvent | Exception]] = asyncio.Queue()
    readers = [asyncio.create_task(_read(number, turn, events)) for number, turn in enumerate(turns)]
    num_open = len(readers)
    try:
        while num_open:
            number, event = await events.get()
            if isinstance(event, Exception):
                raise event
            num_open -= isinstance(event, TurnFinished)
            yield number, event
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)  # until the turns have let go of the engine


async def _read(
    number: int, turn: AsyncGenerator[ChatEvent, None], events: "asyncio.Queue[tuple[int, ChatEvent | Exception]]"
) -> None:
    try:
        async with contextlib.aclosing(turn):
            async for event in turn:
                events.put_nowait((number, event))
    except Exception as error:  # for whoever merges, to raise it there
        events.put_nowait((number, error))
