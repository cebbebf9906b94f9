"""One line of JSONL as what it says: conversation, text, completion or comparison. Knows JSON and messages; no ids.

The keys of a line say what it is:

    {"messages": [...]}                                 a conversation; every answer in it is trained
    {"text": "..."}                                     plain text, outside the harmony format
    {"prompt": "...", "completion": "..."}              plain text of which the completion is trained
    {"prompt": [...], "completion": "..." or [...]}     a conversation of which the last answer is trained
    {"prompt": "..." or [...], "chosen": "..." or [...], "rejected": "..." or [...]}     two answers to one conversation

A list is one of messages; a text in its place is a user's message in `prompt`, a final answer elsewhere. What opens a
conversation stands beside it:

    tools               functions: {"type": "function", "function": {...}}, or name, description and parameters bare
    builtin_tools       ["browser", "python"]
    response_format     {"type": "json_schema", "json_schema": {"name", "schema", "description"}}
    reasoning_effort    low, medium or high
    model_identity, knowledge_cutoff, date ("2025-08-05"); the first two leave their lines out where they are empty
    channels            those that the system message names; [] leaves that section out

A message has a role and, by role:

    system, developer   content                     instructions; those that open a conversation are joined
    user                content, name
    assistant           content, channel, recipient, content_type       one message of harmony, or
                        content, thinking, tool_calls                   several, as in OpenAI's and Hugging Face's chats
                        weight                      how much it counts, 0 for an answer that is only read
    tool                content, tool_call_id or name, channel          the result of a call before it

`thinking` may be called `reasoning` or `reasoning_content`, and is analysis. `content` beside it is final, or before
calls commentary; each call is a message to functions.NAME. A content may be a list of {"type": "text", "text": ...}. A
null is as absent, and in a message an empty list too: files whose columns all lines share are full of them. Any other
key is a mistake, unless it is to be ignored.
"""

import dataclasses
import datetime
import itertools
from typing import Any, TypeAlias, cast, get_args

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.builtin import BROWSER, PYTHON
from gptoss_jax.harmony.messages import (
    Developer,
    Effort,
    Function,
    Message,
    Namespace,
    ResponseFormat,
    System,
)
from gptoss_jax.train.talk import Talk, channel_of, content_of, message_of
from gptoss_jax.train.values import Entry, at, items_of, known, object_of, schema_of, shown, text_of

_KINDS = (("messages",), ("text",), ("prompt", "completion"), ("prompt", "chosen", "rejected"))
_OPENING = frozenset(
    (
        "tools",
        "builtin_tools",
        "response_format",
        "reasoning_effort",
        "model_identity",
        "knowledge_cutoff",
        "date",
        "channels",
    )
)
_LINE_KEYS = _OPENING.union(*_KINDS)
_BUILTIN: dict[str, Namespace] = {"browser": BROWSER, "python": PYTHON}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, and how much each of its messages counts; only an assistant's can."""

    messages: tuple[Message, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """Plain text that is read, and plain text that is to follow."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A conversation, and two ways to go on: one that is wanted, and one that is not."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


Record: TypeAlias = Chat | Text | Completion | Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """What lines do not say.

    Attributes:
        system: the first message of every conversation; a line may say otherwise. It has no date, so that the same file
            gives the same ids tomorrow.
        ignored: keys of lines and of messages that are passed over.
    """

    system: System = dataclasses.field(default_factory=System)
    ignored: frozenset[str] = frozenset()

    def read(self, entry: Entry) -> Record:
        """Raises UserError for a line that says nothing known: the place in it, what is there, what was expected."""
        line = known(entry, _LINE_KEYS, ignored=self.ignored)
        match _kind_of(line):
            case ("messages",):
                talk = self._talk(line, "messages")
                return Chat(messages=tuple(talk.messages), weights=tuple(talk.weights))
            case ("text",):
                return Text(text_of("text", line["text"]))
            case ("prompt", "completion"):
                return self._completion(line)
            case _:
                prompt = self._talk(line, "prompt")
                chosen, rejected = (self._answer(line, key, prompt).messages for key in ("chosen", "rejected"))
                length = len(prompt.messages)
                return Comparison(
                    prompt=tuple(prompt.messages), chosen=tuple(chosen[length:]), rejected=tuple(rejected[length:])
                )

    def _completion(self, line: Entry) -> Record:
        if isinstance(line["prompt"], str):
            if not isinstance(line["completion"], str):
                raise UserError("prompt is a text and completion none; expected both as texts, or prompt as messages")
            return Completion(text_of("prompt", line["prompt"]), text_of("completion", line["completion"]))
        prompt = self._talk(line, "prompt")
        talk = self._answer(line, "completion", prompt)
        length = len(prompt.messages)
        return Chat(messages=tuple(talk.messages), weights=(0.0,) * length + tuple(talk.weights[length:]))

    def _talk(self, line: Entry, key: str) -> Talk:
        """The conversation under a key, its system message first."""
        found = line[key]
        is_text = key == "prompt" and isinstance(found, str)
        entries = [{"role": "user", "content": found}] if is_text else found
        functions = _functions(line.get("tools"))
        formats = _formats(line.get("response_format"))
        messages = list(enumerate(self._messages(key, entries)))
        opening = list(itertools.takewhile(lambda message: message[1]["role"] in ("system", "developer"), messages))
        instructions = []
        for i, message in opening:
            with at(f"{key}[{i}]"):
                instructions.append(content_of(message))
        talk = Talk([], [], offered=frozenset(function.name for function in functions))
        talk.put(_system(line, self.system))
        if any(instructions) or functions or formats:
            text = "\n\n".join(filter(None, instructions))
            talk.put(Developer(instructions=text, functions=functions, formats=formats))
        for i, message in messages[len(opening) :]:
            with at(f"{key}[{i}]"):
                talk.add(message)
        return talk

    def _answer(self, line: Entry, key: str, prompt: Talk) -> Talk:
        """The conversation under "prompt" with what the model says to it under another key."""
        found, talk = line[key], prompt.copy()
        entries = [{"role": "assistant", "content": found}] if isinstance(found, str) else found
        for i, message in enumerate(self._messages(key, entries)):
            with at(f"{key}[{i}]"):
                if message["role"] != "assistant":
                    raise UserError(f"role is {message['role']!r}; expected assistant: all else stands in prompt")
                if talk.is_answered(since=len(prompt.messages)):
                    raise UserError("the answer goes on behind its final message; expected nothing behind that")
                talk.add(message)
        return talk

    def _messages(self, key: str, entries: Any) -> list[Entry]:
        messages = []
        for i, entry in enumerate(items_of(key, entries)):
            with at(f"{key}[{i}]"):
                messages.append(message_of(entry, ignored=self.ignored))
        return messages


# --- what opens a conversation ----------------------------------------------------------------------------------------


def _system(line: Entry, system: System) -> System:
    changes: dict[str, Any] = {}
    if "reasoning_effort" in line:
        changes["effort"] = _effort(line["reasoning_effort"])
    if "model_identity" in line:
        changes["identity"] = text_of("model_identity", line["model_identity"])
    if "knowledge_cutoff" in line:
        changes["knowledge_cutoff"] = text_of("knowledge_cutoff", line["knowledge_cutoff"]) or None
    if "channels" in line:
        changes["channels"] = tuple(channel_of(name) for name in items_of("channels", line["channels"]))
    if "date" in line:
        changes["date"] = _date(line["date"])
    if "builtin_tools" in line:
        changes["tools"] = tuple(_builtin(name) for name in items_of("builtin_tools", line["builtin_tools"]))
    return dataclasses.replace(system, **changes)


def _effort(found: Any) -> Effort:
    if found not in get_args(Effort):
        raise UserError(f"reasoning_effort is {shown(found)}; expected one of {', '.join(get_args(Effort))}")
    return cast(Effort, found)


def _builtin(name: Any) -> Namespace:
    if not isinstance(name, str) or name not in _BUILTIN:
        raise UserError(f"builtin_tools has {shown(name)}; expected {' or '.join(_BUILTIN)}")
    return _BUILTIN[name]


def _date(found: Any) -> datetime.date:
    text = text_of("date", found)
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"date is {text[:80]!r}; expected a day, as in '2025-08-05'") from error


def _functions(found: Any) -> tuple[Function, ...]:
    functions = []
    for i, tool in enumerate(items_of("tools", [] if found is None else found)):
        with at(f"tools[{i}]"):
            functions.append(_function(object_of("a tool", tool)))
    return tuple(functions)


def _function(tool: Entry) -> Function:
    kind = tool.get("type", "function")
    if kind != "function":
        raise UserError(f"type is {shown(kind)}; expected function, or for the model's own tools builtin_tools")
    spec = object_of("function", tool.get("function", tool))
    parameters = spec.get("parameters")
    return Function(
        name=text_of("name", spec.get("name")),
        description=text_of("description", spec.get("description") or ""),
        parameters=None if parameters is None else schema_of("parameters", parameters),
    )


def _formats(found: Any) -> tuple[ResponseFormat, ...]:
    """As a chat completion has it: only a schema with a name is something that the model is told of."""
    if found is None:
        return ()
    with at("response_format"):
        form = object_of("it", found)
        if form.get("type") in ("text", "json_object"):
            return ()
        if form.get("type") != "json_schema":
            raise UserError(f"type is {shown(form.get('type'))}; expected text, json_object or json_schema")
        spec = object_of("json_schema", form.get("json_schema"))
        schema = schema_of("schema", spec.get("schema"))
        description = text_of("description", spec.get("description") or "")
        return (ResponseFormat(name=text_of("name", spec.get("name")), schema=schema, description=description),)


def _kind_of(line: Entry) -> tuple[str, ...]:
    found = tuple(key for key in dict.fromkeys(key for kind in _KINDS for key in kind) if key in line)
    if found not in _KINDS:
        expected = "; ".join(" and ".join(kind) for kind in _KINDS)
        raise UserError(f"it has {' and '.join(found) or 'none of the keys that say what it is'}; expected {expected}")
    besides = sorted(line.keys() & _OPENING)
    if besides and not any(isinstance(line[key], list) for key in found) and "chosen" not in found:
        raise UserError(f"{besides[0]!r} stands beside plain text, which has no system message; leave it out")
    return found
