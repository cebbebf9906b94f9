"""A conversation as one line of JSONL, as `gptoss-jax train` reads it. Knows messages and JSON; knows no lessons."""

import json
from collections.abc import Sequence
from typing import Any

from gptoss_jax.harmony.messages import (
    CHANNELS,
    IDENTITY,
    KNOWLEDGE_CUTOFF,
    Assistant,
    Conversation,
    Developer,
    Function,
    Message,
    ResponseFormat,
    System,
    ToolResult,
    User,
)


def line_of(conversation: Conversation) -> str:
    """All that the conversation says, without a line feed."""
    line: dict[str, Any] = {"messages": []}
    for message in conversation:
        match message:
            case System():
                line |= _system(message)
            case Developer():
                line |= _developer(message)
                line["messages"] += _instructions(message)
            case _:
                line["messages"].append(_message(message))
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def _system(message: System) -> dict[str, Any]:
    found: dict[str, Any] = {"reasoning_effort": message.effort}
    found |= {} if message.date is None else {"date": message.date.isoformat()}
    found |= {} if message.identity == IDENTITY else {"model_identity": message.identity}
    if message.knowledge_cutoff != KNOWLEDGE_CUTOFF:
        found["knowledge_cutoff"] = message.knowledge_cutoff or ""
    return found | ({} if message.channels == CHANNELS else {"channels": list(message.channels)})


def _developer(message: Developer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if message.functions:
        found["tools"] = [_function(function) for function in message.functions]
    for form in message.formats:
        found["response_format"] = _format(form)
    return found


def _instructions(message: Developer) -> Sequence[dict[str, Any]]:
    return [{"role": "developer", "content": message.instructions}] if message.instructions else []


def _message(message: Message) -> dict[str, Any]:
    match message:
        case User():
            return {"role": "user", "content": message.text}
        case ToolResult():
            return {"role": "tool", "name": message.name, "content": message.text}
        case Assistant(recipient=None):
            return {"role": "assistant", "channel": message.channel, "content": message.text}
        case Assistant():
            call = {"recipient": message.recipient, "content_type": message.content_type}
            return {"role": "assistant", "channel": message.channel, **call, "content": message.text}
    raise AssertionError(message)


def _function(function: Function) -> dict[str, Any]:
    about = {"description": function.description} if function.description else {}
    return {"type": "function", "function": {"name": function.name, **about, "parameters": function.parameters}}


def _format(form: ResponseFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema}}
