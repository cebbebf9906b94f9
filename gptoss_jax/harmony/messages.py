"""What a conversation is made of. Knows text, names and schemas; knows no ids and no layout.

System      who the model is, how hard it thinks, the tools it was trained with (browser, python)
Developer   instructions, the caller's functions, formats that an answer must have
User        what somebody says
Assistant   what the model says: analysis (its reasoning), commentary (calls, and words before them), final
ToolResult  what a tool gave back
"""

import dataclasses
import datetime
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from gptoss_jax.errors import UserError

Effort: TypeAlias = Literal["low", "medium", "high"]
Channel: TypeAlias = Literal["analysis", "commentary", "final"]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")
# Names stand in headers, where a blank, a "<|" or "to=" would mean something else.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DOTTED_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})*")
_CONTENT_TYPE = re.compile(r"[A-Za-z0-9_./+-]+")
# A tool's result begins with the tool's name where other messages have a role: one of these would speak as that role.
_ROLES = ("system", "developer", "user", "assistant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """Something that the model may call.

    Attributes:
        name: letters, digits, _ and -, at most 64.
        parameters: a JSON schema of an object; None for a function without arguments.
        strict: arguments are held to the schema while they are generated.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    strict: bool = False

    def __post_init__(self) -> None:
        _check_name("a function's name", self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Namespace:
    """Functions under one name, as `browser` has them; `python` has none and takes what it is sent as it is."""

    name: str
    description: str = ""
    functions: tuple[Function, ...] = ()

    def __post_init__(self) -> None:
        _check_name("a namespace's name", self.name)
        _check_once(f"functions of {self.name}", (function.name for function in self.functions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """A form that the final answer must have: stands in the developer message, under `# Response Formats`."""

    name: str
    schema: Mapping[str, Any] = dataclasses.field(hash=False)
    description: str = ""

    def __post_init__(self) -> None:
        _check_name("a response format's name", self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """The first message.

    Attributes:
        date: of the conversation's start; None leaves the line out. A text that changes every day is a prefix that is
            cached for a day.
        effort: how long the model reasons.
        tools: those that the model was trained with; functions of the caller's own stand in `Developer`.
    """

    identity: str = IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF
    date: datetime.date | None = None
    effort: Effort = "medium"
    channels: tuple[Channel, ...] = CHANNELS
    tools: tuple[Namespace, ...] = ()

    def __post_init__(self) -> None:
        if self.effort not in ("low", "medium", "high"):
            raise UserError(f"effort is {self.effort!r}; expected low, medium or high")
        _check_once("the system message's tools", (namespace.name for namespace in self.tools))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Developer:
    """What elsewhere is called the system prompt, and what the caller's side can do."""

    instructions: str = ""
    functions: tuple[Function, ...] = ()
    formats: tuple[ResponseFormat, ...] = ()

    def __post_init__(self) -> None:
        _check_once("functions", (function.name for function in self.functions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class User:
    """What somebody says; `name` tells several of them apart."""

    text: str
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_name("a user's name", self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assistant:
    """What the model says.

    Attributes:
        channel: None where a model left it out.
        recipient: whom it calls, "functions.f" or "python"; None where it speaks to the user.
        content_type: of the text: "json" as a rule for calls, "code" for calls of python.
    """

    text: str
    channel: Channel | None = "final"
    recipient: str | None = None
    content_type: str | None = None

    def __post_init__(self) -> None:
        if self.recipient is not None:
            _check_name("a recipient", self.recipient, dotted=True)
        if self.content_type is not None and not _CONTENT_TYPE.fullmatch(self.content_type):
            raise UserError(f"a content type is {self.content_type!r}; expected letters, digits and _ . / + -")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolResult:
    """What a tool gave back.

    Attributes:
        name: the recipient of the call that it answers, "functions.f".
        channel: that of the call: what a tool said to the model's analysis is forgotten with the analysis.
    """

    name: str
    text: str
    channel: Channel = "commentary"

    def __post_init__(self) -> None:
        _check_name("a tool's name", self.name, dotted=True)
        if self.name in _ROLES:
            raise UserError(
                f"a tool's name is {self.name!r}; expected another than {', '.join(_ROLES)}, which are roles"
            )


Message: TypeAlias = System | Developer | User | Assistant | ToolResult
Conversation: TypeAlias = Sequence[Message]


def is_name(text: str, *, dotted: bool = False) -> bool:
    """Whether a text may stand in a header as a name."""
    return (_DOTTED_NAME if dotted else _NAME).fullmatch(text) is not None


def _check_name(what: str, name: str, *, dotted: bool = False) -> None:
    if not is_name(name, dotted=dotted):
        dots = ", parts joined by dots" if dotted else ""
        raise UserError(f"{what} is {name!r}; expected 1 to 64 letters, digits, _ or -{dots}")


def _check_once(what: str, names: Iterable[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{what}: expected each name once, found {twice[0]!r} again; rename one")
