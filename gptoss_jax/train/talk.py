"""The messages of a line as harmony's, one after the other. Knows messages, in harmony's form and in chats'; no files.

See records.py for the forms. A result takes its name and its channel from the call that it answers, so a conversation
is read in order, and remembers its calls.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import CHANNELS, Assistant, Channel, Developer, Message, ToolResult, User
from gptoss_jax.harmony.typescript import compact_json
from gptoss_jax.train.values import Entry, at, check_arguments, items_of, known, object_of, schema_of, shown, text_of

_FUNCTIONS = "functions."
_THINKING = ("thinking", "reasoning", "reasoning_content")
_OF_HARMONY = ("channel", "recipient", "content_type")
_OF_CHATS = (*_THINKING, "tool_calls")
_MESSAGE_KEYS: dict[str, frozenset[str]] = {
    "system": frozenset(("role", "content")),
    "developer": frozenset(("role", "content")),
    "user": frozenset(("role", "content", "name")),
    "assistant": frozenset(("role", "content", "weight", *_OF_HARMONY, *_OF_CHATS)),
    "tool": frozenset(("role", "content", "name", "tool_call_id", "channel")),
}
_ANY_MESSAGE_KEY = frozenset[str]().union(*_MESSAGE_KEYS.values())


@dataclasses.dataclass
class Talk:
    """A conversation while it is read.

    Attributes:
        offered: names of the functions that may be called; empty where the line tells of none.
        calls: those so far, with their ids; a result takes its name and its channel from one.
        unanswered: those of them that have no result yet.
    """

    messages: list[Message]
    weights: list[float]
    offered: frozenset[str]
    calls: list[tuple[str | None, Assistant]] = dataclasses.field(default_factory=list)
    unanswered: list[Assistant] = dataclasses.field(default_factory=list)

    def copy(self) -> "Talk":
        return Talk(list(self.messages), list(self.weights), self.offered, list(self.calls), list(self.unanswered))

    def is_answered(self, *, since: int) -> bool:
        return any(isinstance(said, Assistant) and said.channel == "final" for said in self.messages[since:])

    def put(self, message: Message, weight: float = 0.0) -> None:
        self.messages.append(message)
        self.weights.append(weight)

    def add(self, entry: Entry) -> None:
        """Adds what one message of a line says: of an assistant's several."""
        match entry["role"]:
            case "system" | "developer":
                self.put(Developer(instructions=content_of(entry)))
            case "user":
                name = None if "name" not in entry else text_of("name", entry["name"])
                self.put(User(text=content_of(entry), name=name))
            case "tool":
                self.put(self._result(entry))
            case _:
                self._say(entry)

    def _say(self, entry: Entry) -> None:
        weight = _weight(entry.get("weight", 1.0))
        of_harmony = [key for key in _OF_HARMONY if key in entry]
        of_chats = [key for key in _OF_CHATS if entry.get(key)]
        if of_harmony and of_chats:
            raise UserError(
                f"{of_harmony[0]!r} stands beside {of_chats[0]!r}; expected one message of harmony (content, "
                f"{', '.join(_OF_HARMONY)}) or one of a chat (content, thinking, tool_calls)"
            )
        said = [(None, _of_harmony(entry))] if of_harmony else list(_of_chat(entry))
        if not said:
            raise UserError("says nothing; expected a content, thinking or tool_calls")
        for call_id, message in said:
            if message.recipient is not None:
                self._check_offered(message.recipient)
                self.calls.append((call_id, message))
                self.unanswered.append(message)
            self.put(message, weight)

    def _check_offered(self, recipient: str) -> None:
        name = recipient.removeprefix(_FUNCTIONS)
        if name != recipient and self.offered and name not in self.offered:
            raise UserError(f"calls {name!r}; expected one of the line's tools, {', '.join(sorted(self.offered))}")

    def _result(self, entry: Entry) -> ToolResult:
        call = self._call_of(entry)
        if call in self.unanswered:
            self.unanswered.remove(call)
        assert call.recipient is not None, "a call has a recipient"
        default: Channel = "analysis" if call.channel == "analysis" else "commentary"
        channel = channel_of(entry["channel"]) if "channel" in entry else default
        return ToolResult(name=call.recipient, text=content_of(entry), channel=channel)

    def _call_of(self, entry: Entry) -> Assistant:
        """The call that a result answers: by its id, else by its name, else the only one that waits."""
        if "tool_call_id" in entry:
            wanted = text_of("tool_call_id", entry["tool_call_id"])
            found = [call for call_id, call in self.calls if call_id == wanted]
            what = f"tool_call_id is {wanted[:80]!r}"
        elif "name" in entry:
            wanted = text_of("name", entry["name"])
            found = [call for _, call in self.calls if call.recipient in (wanted, _FUNCTIONS + wanted)]
            found = [call for call in found if call in self.unanswered][:1] or found
            what = f"name is {wanted[:80]!r}"
        else:
            found = self.unanswered if len(self.unanswered) == 1 else []
            what = f"neither tool_call_id nor name is there, and {len(self.unanswered)} calls wait for a result"
        if not found:
            called = ", ".join(dict.fromkeys(str(call.recipient) for _, call in self.calls)) or "nothing"
            raise UserError(f"{what}; expected a call before it that it answers, found calls of {called}")
        return found[-1]


def message_of(found: Any, *, ignored: frozenset[str]) -> Entry:
    """A message of a line, with a role and the keys that go with it.

    Raises:
        UserError: it is none.
    """
    if not isinstance(found, dict):
        raise UserError(f"expected a message, an object with role and content, found {shown(found)}")
    entry = known(found, _ANY_MESSAGE_KEY, ignored=ignored)
    message = {key: value for key, value in entry.items() if value != []}
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        raise UserError(f"role is {shown(role)}; expected one of {', '.join(_MESSAGE_KEYS)}")
    misplaced = sorted(message.keys() - _MESSAGE_KEYS[role])
    if misplaced:
        expected = ", ".join(sorted(_MESSAGE_KEYS[role] - {"role"}))
        raise UserError(f"a message of role {role} has no {misplaced[0]!r}; expected {expected}")
    return message


def content_of(entry: Entry) -> str:
    """The text of a message; parts are joined by line feeds."""
    content = entry.get("content")
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    return text_of("content", content)


# --- what the model says ----------------------------------------------------------------------------------------------


def _of_harmony(entry: Entry) -> Assistant:
    """One message as harmony has it."""
    recipient = None if "recipient" not in entry else text_of("recipient", entry["recipient"])
    channel = channel_of(entry.get("channel", "final" if recipient is None else "commentary"))
    content_type = None if "content_type" not in entry else text_of("content_type", entry["content_type"])
    text = content_of(entry)
    if recipient is None and not text:
        raise UserError("content is empty; expected what is said")
    if recipient is not None and content_type is None:
        content_type = "json" if recipient.startswith(_FUNCTIONS) else "code"
    if content_type == "json" and recipient is not None:
        check_arguments("content", text)
    return Assistant(text=text, channel=channel, recipient=recipient, content_type=content_type)


def _of_chat(entry: Entry) -> Iterator[tuple[str | None, Assistant]]:
    """What a chat has in one message: thinking, words, calls with their ids."""
    thoughts = [key for key in _THINKING if key in entry]
    if len(thoughts) > 1:
        raise UserError(f"{thoughts[0]!r} stands beside {thoughts[1]!r}; expected one of them")
    calls = items_of("tool_calls", entry.get("tool_calls", []))
    thinking = text_of(thoughts[0], entry[thoughts[0]]) if thoughts else ""
    content = content_of(entry) if "content" in entry else ""
    if thinking:
        yield None, Assistant(text=thinking, channel="analysis")
    if content:
        yield None, Assistant(text=content, channel="commentary" if calls else "final")
    for i, call in enumerate(calls):
        with at(f"tool_calls[{i}]"):
            yield _call(call)


def _call(found: Any) -> tuple[str | None, Assistant]:
    call = object_of("a call", found)
    function = object_of("function", call.get("function", call))
    name = text_of("name", function.get("name"))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        check_arguments("arguments", arguments)
    else:
        arguments = compact_json(schema_of("arguments", arguments), of="arguments")
    call_id = None if call.get("id") is None else text_of("id", call["id"])
    recipient = _FUNCTIONS + name.removeprefix(_FUNCTIONS)
    return call_id, Assistant(text=arguments, channel="commentary", recipient=recipient, content_type="json")


def _part(part: Any) -> str:
    kind = object_of("a part of content", part).get("type")
    if kind != "text":
        raise UserError(f"content has a part of type {shown(kind)}; expected text, which is all that gpt-oss reads")
    return text_of("text", part.get("text"))


def channel_of(found: Any) -> Channel:
    """One of harmony's channels."""
    if found not in CHANNELS:
        raise UserError(f"channel is {shown(found)}; expected one of {', '.join(CHANNELS)}")
    return cast(Channel, found)


def _weight(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise UserError(f"weight is {shown(found)}; expected a number from 0")
    return float(found)
