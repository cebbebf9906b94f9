"""What one conversation for nano consists of, and which problems are kept for the score. Knows harmony's messages."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, TypeAlias

from gptoss_jax.harmony.messages import (
    Assistant,
    Conversation,
    Developer,
    Effort,
    Function,
    Message,
    ResponseFormat,
    System,
    ToolResult,
    User,
)

_HELD_OUT_OF_256 = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """Something that is asked, and how nano is to answer.

    Attributes:
        kind: of the task, for the score.
        problem: what is asked whatever the words; it decides whether the lesson is held out. None: it never is.
        said: the turn, from the user's message to the final answer.
        functions: what may be called.
        formats: what form the answer must have.
        instructions: of the caller's side.
        needs_date: the answer follows from the date in the system message.
    """

    kind: str
    problem: str | None
    said: tuple[Message, ...]
    functions: tuple[Function, ...] = ()
    formats: tuple[ResponseFormat, ...] = ()
    instructions: str = ""
    needs_date: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the system message says of a conversation."""

    effort: Effort
    date: datetime.date | None
    is_brief: bool = False  # nothing but the effort: half the tokens of a short conversation are the system message's

    def system(self) -> System:
        if self.is_brief:
            return System(identity="", knowledge_cutoff=None, effort=self.effort, channels=())
        return System(effort=self.effort, date=self.date)


Maker: TypeAlias = Callable[[Random, Setting], Lesson]


def answer(thought: str, text: str) -> tuple[Message, ...]:
    """Reasoning, and the final answer."""
    return Assistant(text=thought, channel="analysis"), Assistant(text=text)


def call(function: str, arguments: Mapping[str, Any]) -> Assistant:
    return Assistant(
        text=compact(arguments), channel="commentary", recipient=f"functions.{function}", content_type="json"
    )


def result(function: str, value: Any) -> ToolResult:
    return ToolResult(name=f"functions.{function}", text=compact(value))


def compact(value: Any) -> str:
    """JSON without blanks: the fewest tokens."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def is_held_out(problem: str | None) -> bool:
    """One problem in twenty, by its hash: whatever the words around it, it is in no conversation for training."""
    return problem is not None and hashlib.sha256(problem.encode()).digest()[0] < _HELD_OUT_OF_256


def conversation(lessons: Sequence[Lesson], setting: Setting) -> Conversation:
    """Lessons as the turns of one conversation; the developer message has the functions of all."""
    last = lessons[-1]
    functions = {function.name: function for lesson in lessons for function in lesson.functions}
    developer = Developer(instructions=last.instructions, functions=tuple(functions.values()), formats=last.formats)
    opening: list[Message] = [setting.system()]
    opening += [developer] if developer != Developer() else []
    return [*opening, *(message for lesson in lessons for message in lesson.said)]


def prompt(lesson: Lesson, setting: Setting) -> Conversation:
    """The conversation up to the user's message."""
    whole = list(conversation([lesson], setting))
    return whole[: next(i for i, message in enumerate(whole) if isinstance(message, User)) + 1]


def varied(rng: Random, text: str) -> str:
    """As people type: sometimes without capital, full stop or question mark, sometimes with a word around it."""
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = rng.choice(("Please: ", "Hi! ", "Hello, ", "Quick question: ", "Ok, ", "Thanks. ", "And now: ")) + text
    return text
