"""Items to messages, and the conversation that they make. Knows both shapes; knows no engine, no store and no events.

message user                      User                     function_call          Assistant to=functions.f
message system, developer         Developer                function_call_output   ToolResult functions.f
message assistant                 Assistant final, or      code_interpreter_call  Assistant to=python, ToolResult
                                  commentary by its phase  web_search_call        what the store has of it
reasoning                         Assistant analysis       item_reference         what the store has of it
"""

import datetime
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_jax.harmony.messages import (
    Assistant,
    Developer,
    Effort,
    Function,
    Message,
    Namespace,
    ResponseFormat,
    System,
    ToolResult,
    User,
)
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.responses.schemas import (
    CodeInterpreterItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    ItemReference,
    MessageItem,
    Part,
    ReasoningItem,
    WebSearchItem,
)
from gptoss_jax.server.responses.store import StoredItem

FUNCTIONS = "functions."
PYTHON = "python"
BROWSER = "browser"
_SERVED = (
    "message, function_call, function_call_output, reasoning, code_interpreter_call, web_search_call, item_reference"
)


def new_id(prefix: str) -> str:
    """An id that nobody can guess: whoever knows it may read what it stands for."""
    return f"{prefix}_{secrets.token_hex(16)}"


def name_of(recipient: str) -> str:
    """What a client calls a function: "functions.f" is f, and what the model made up stays as it is."""
    return recipient.removeprefix(FUNCTIONS)


def recipient_of(name: str) -> str:
    """The inverse of `name_of`."""
    return name if "." in name else FUNCTIONS + name


# --- items to messages ------------------------------------------------------------------------------------------------


def input_items(body: str | Sequence[InputItem] | None) -> list[InputItem]:
    """The items of `input`; a text is one message of the user's."""
    if body is None:
        return []
    return [MessageItem(role="user", content=body)] if isinstance(body, str) else list(body)


def references(items: Iterable[InputItem]) -> list[str]:
    """The ids of items whose messages the store may know better than the items tell."""
    kinds = (ItemReference, WebSearchItem, CodeInterpreterItem)
    return [item.id for item in items if isinstance(item, kinds) and item.id is not None]


def stored_items(
    items: Sequence[InputItem], *, earlier: Sequence[StoredItem], known: Mapping[str, StoredItem]
) -> list[StoredItem]:
    """Each item as a client may ask for it later, and as the model reads it.

    Args:
        earlier: of the responses that this one continues; an output may answer a call among them.
        known: what the store has of `references(items)`.
    """
    bodies = (*(item.body for item in earlier), *(item.body for item in known.values()))
    calls = {body["call_id"]: body["name"] for body in bodies if body["type"] == "function_call"}
    stored = []
    for index, item in enumerate(items):
        place = f"input.{index}"
        if isinstance(item, FunctionCallItem):
            calls[item.call_id] = item.name
        if isinstance(item, ItemReference):
            stored.append(_referenced(item, known, place=place))
        else:
            stored.append(StoredItem(body=_item_body(item), messages=_messages(item, calls, known, place=place)))
    return stored


def _referenced(item: ItemReference, known: Mapping[str, StoredItem], *, place: str) -> StoredItem:
    if item.id not in known:
        message = f"{place}: there is no item {item.id!r}; it was of a response that was not stored, or was deleted"
        raise ApiError(404, message, code="item_not_found", param=place)
    return known[item.id]


def _messages(
    item: InputItem, calls: Mapping[str, str], known: Mapping[str, StoredItem], *, place: str
) -> tuple[Message, ...]:
    match item:
        case MessageItem():
            return (_said(item, place=place),)
        case ReasoningItem():
            text = _text(item.content or (), place=f"{place}.content")
            return (Assistant(text=text, channel="analysis"),) if text else ()
        case FunctionCallItem():
            return (_call(recipient_of(item.name), item.arguments),)
        case FunctionCallOutputItem():
            if item.call_id not in calls:
                message = f"{place}.call_id: there is no function_call {item.call_id!r} that this output could answer"
                raise ApiError(400, message, code="no_such_call", param=f"{place}.call_id")
            return (ToolResult(name=recipient_of(calls[item.call_id]), text=_output(item, place=f"{place}.output")),)
        case WebSearchItem() | CodeInterpreterItem() if item.id is not None and item.id in known:
            return known[item.id].messages
        case CodeInterpreterItem():
            return _python(item)
        case WebSearchItem():
            return ()  # what it found is nowhere to be had: a search without results would only mislead
        case _:
            message = f"{place}: items of type {item.type!r} are not supported; expected one of {_SERVED}"
            raise ApiError(400, message, code="unsupported_item", param=f"{place}.type")


def _said(item: MessageItem, *, place: str) -> Message:
    text = item.content if isinstance(item.content, str) else _text(item.content, place=f"{place}.content")
    match item.role:
        case "user":
            return User(text=text)
        case "assistant":
            return Assistant(text=text, channel="commentary" if item.phase == "commentary" else "final")
        case _:  # OpenAI's "system" is what harmony calls developer; its own system message is not for callers
            return Developer(instructions=text)


def _call(recipient: str, arguments: str) -> Assistant:
    return Assistant(text=arguments, channel="commentary", recipient=recipient, content_type="json")


def _python(item: CodeInterpreterItem) -> tuple[Message, ...]:
    logs = "".join(str(output.get("logs", "")) for output in item.outputs or ())
    call = Assistant(text=item.code or "", channel="analysis", recipient=PYTHON, content_type="code")
    return call, ToolResult(name=PYTHON, text=logs, channel="analysis")


def _output(item: FunctionCallOutputItem, *, place: str) -> str:
    """What a function gave back; of pictures and files that it shows, that they cannot be seen.

    A refusal would end the conversation for good, since the output stands in every request from here on; and it was the
    model that asked for the picture. Told so, it finds another way.
    """
    if isinstance(item.output, str):
        return item.output
    texts = [
        f"({part.type} left out: this model reads text only)"
        if part.type in ("input_image", "input_file")
        else _text_of(part, place=f"{place}.{index}")
        for index, part in enumerate(item.output)
    ]
    return "\n".join(texts)


def _text(parts: Iterable[Part], *, place: str) -> str:
    return "\n".join(_text_of(part, place=f"{place}.{index}") for index, part in enumerate(parts))


def _text_of(part: Part, *, place: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("input_text", "output_text", "reasoning_text", "summary_text", "refusal", "text"):
        message = f"{place}: content of type {part.type!r} is not supported; gpt-oss reads text alone, as input_text"
        raise ApiError(400, message, code="unsupported_content", param=f"{place}.type")
    if text is None:
        raise ApiError(400, f"{place}: content of type {part.type!r} has no text", param=f"{place}.text")
    return text


_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "code_interpreter_call": "ci",
    "web_search_call": "ws",
}


def _item_body(item: InputItem) -> dict[str, Any]:
    """The item in full, with an id and a status, as /input_items gives it."""
    body = {"status": "completed"} | item.model_dump(mode="json", exclude_none=True) | {"type": item.type}
    body.setdefault("id", new_id(_PREFIXES.get(str(item.type), "item")))
    if isinstance(item, MessageItem):
        body["content"] = _content(item)
    elif isinstance(item, ReasoningItem):
        body.setdefault("summary", [])
    return body


def _content(item: MessageItem) -> list[dict[str, Any]]:
    output = item.role == "assistant"
    if isinstance(item.content, str):
        parts: list[dict[str, Any]] = [{"type": "output_text" if output else "input_text", "text": item.content}]
    else:
        parts = [part.model_dump(mode="json", exclude_none=True) for part in item.content]
    return [{"annotations": []} | part for part in parts] if output else parts


# --- the conversation -------------------------------------------------------------------------------------------------


def conversation_of(
    said: Sequence[Message],
    *,
    instructions: str | None,
    functions: Sequence[Function],
    formats: Sequence[ResponseFormat],
    tools: Sequence[Namespace],
    effort: Effort,
    today: datetime.date | None,
) -> list[Message]:
    """All that the model is to read: the system message, one developer message with all that opens the talk, the rest.

    Instructions and what developers said before anybody else are one text, as the model was trained with one.
    """
    start = next((i for i, message in enumerate(said) if not isinstance(message, Developer)), len(said))
    opening = [message.instructions for message in said[:start] if isinstance(message, Developer)]
    text = "\n\n".join(part for part in (instructions, *opening) if part)
    conversation: list[Message] = [System(date=today, effort=effort, tools=tuple(tools))]
    if text or functions or formats:
        conversation.append(Developer(instructions=text, functions=tuple(functions), formats=tuple(formats)))
    return [*conversation, *said[start:]]


def without_oldest(conversation: Sequence[Message]) -> list[Message] | None:
    """The conversation without its oldest turn: all up to the second message of a user. None where there is one turn.

    System and developer messages at its head stay: they are no part of a turn.
    """
    head = next((i for i, message in enumerate(conversation) if not isinstance(message, System | Developer)), None)
    if head is None:
        return None
    later = next((i for i in range(head + 1, len(conversation)) if isinstance(conversation[i], User)), None)
    return None if later is None else [*conversation[:head], *conversation[later:]]
