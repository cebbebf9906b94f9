"""A conversation with its settings, in memory and in a file. Knows messages and tools; knows no model and no screen."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from gptoss_jax.chat import NoSuchTool
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Channel, Developer, Effort, Message, System, ToolResult, User
from gptoss_jax.tools.base import Tool, namespaces_of
from gptoss_jax.tools.browser import BrowserTool
from gptoss_jax.tools.folder import FolderBackend
from gptoss_jax.tools.python import PythonTool

_FORMAT = "gptoss_jax chat"  # what a file of ours says first, and its version
_VERSION = 1
_EFFORTS = ("low", "medium", "high")
_CHANNELS = ("analysis", "commentary", "final", None)


@dataclasses.dataclass
class ChatSession:
    """What was said, and how it is to go on.

    Attributes:
        instructions: what stands in the developer message.
        effort: how long the model reasons.
        date: what the model is told; None for no date.
        tools: by the words that asked for them.
        messages: behind the system and the developer message.
    """

    instructions: str = ""
    effort: Effort = "medium"
    date: datetime.date | None = None
    tools: dict[str, Tool] = dataclasses.field(default_factory=dict)
    messages: list[Message] = dataclasses.field(default_factory=list)

    def conversation(self) -> list[Message]:
        """All that the model is told."""
        system = System(effort=self.effort, date=self.date, tools=namespaces_of(self.tools.values()))
        developer = [Developer(instructions=self.instructions)] if self.instructions else []
        return [system, *developer, *self.messages]

    def runnable_tools(self) -> list[Tool]:
        """The tools of a turn; the last of them tells the model what there is when it calls what is not there."""
        spaces = namespaces_of(self.tools.values())
        known = [f"{space.name}.{each.name}" for space in spaces for each in space.functions]
        known += [space.name for space in spaces if not space.functions]
        return [*self.tools.values(), NoSuchTool(tuple(known))]

    def take_back(self) -> str | None:
        """Forgets the last thing that the user said, and all that came of it; None where there is nothing."""
        place = self._last_question()
        if place is None:
            return None
        question = self.messages[place]
        del self.messages[place:]
        assert isinstance(question, User)
        return question.text

    def take_back_answer(self) -> bool:
        """Forgets what came of the last thing that the user said; False where there is nothing to answer."""
        place = self._last_question()
        if place is None:
            return False
        del self.messages[place + 1 :]
        return True

    def _last_question(self) -> int | None:
        places = [place for place, message in enumerate(self.messages) if isinstance(message, User)]
        return places[-1] if places else None


def settled(messages: Sequence[Message]) -> list[Message]:
    """The messages without calls that nobody has answered: a model that sees one waits for its result."""
    waiting = [message.name for message in messages if isinstance(message, ToolResult)]
    kept: list[Message] = []
    for message in messages:
        if isinstance(message, Assistant) and message.recipient is not None:
            if message.recipient not in waiting:
                continue
            waiting.remove(message.recipient)
        kept.append(message)
    return kept


# --- what options and commands say ------------------------------------------------------------------------------------


def read_instructions(words: str) -> str:
    """The words themselves, or the text of the file that @FILE names."""
    if not words.startswith("@"):
        return words
    path = Path(words[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 at byte {error.start}; expected a text") from error


def read_tools(words: str | None) -> dict[str, Tool]:
    """What `--tools python,browser=DIR` asks for. A session of each: it remembers from turn to turn."""
    found: dict[str, Tool] = {}
    for word in filter(None, (word.strip() for word in (words or "").split(","))):
        name, _, value = word.partition("=")
        if word == "python":
            found[word] = PythonTool().session()
        elif name == "browser" and value:
            found[word] = BrowserTool(FolderBackend(Path(value).expanduser())).session()
        else:
            raise UserError(f"there is no tool {word!r}; expected python or browser=DIR, with commas between")
    return found


def read_date(words: str | None) -> datetime.date | None:
    """What --date says; today where it says nothing."""
    if words is None:
        return datetime.date.today()
    if words == "none":
        return None
    try:
        return datetime.date.fromisoformat(words)
    except ValueError:
        raise UserError(f"--date is {words!r}; expected a date as in 2026-11-23, or none") from None


# --- files ------------------------------------------------------------------------------------------------------------


def save(session: ChatSession, path: Path) -> None:
    """Writes what was said, and the instructions and effort with it; not the tools."""
    document = {"format": _FORMAT, "version": _VERSION, "effort": session.effort, "system": session.instructions}
    document |= {"messages": [_as_json(message) for message in session.messages]}
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")  # a tool may answer with half of a character


def load(session: ChatSession, path: Path) -> None:
    """Puts what `save` wrote in place of what was said; nothing changes where the file cannot be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); expected a file that /save wrote") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise UserError(f"{path} is no conversation; expected a file that /save wrote")
    if document.get("version") != _VERSION:
        raise UserError(
            f"{path} has version {document.get('version')!r}; expected {_VERSION}: load it with the gptoss-jax that "
            "wrote it"
        )
    effort, instructions, messages = (document.get(key) for key in ("effort", "system", "messages"))
    if effort not in _EFFORTS or not isinstance(instructions, str) or not isinstance(messages, list):
        raise UserError(f"{path} is damaged; expected an effort, a system text and a list of messages in it")
    read = [_from_json(message, where=f"{path}, messages[{place}]") for place, message in enumerate(messages)]
    session.effort, session.instructions, session.messages = cast(Effort, effort), instructions, read


def _as_json(message: Message) -> dict[str, Any]:
    match message:
        case User():
            return {"role": "user", "text": message.text}
        case Assistant():
            return {"role": "assistant", **dataclasses.asdict(message)}
        case ToolResult():
            return {"role": "tool", **dataclasses.asdict(message)}
    raise AssertionError(f"a session holds no {type(message).__name__}")


def _from_json(value: Any, *, where: str) -> Message:
    """A message, each of its fields checked: a file may come from anywhere."""
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise UserError(f"{where} is {type(value).__name__} without a text; expected an object with one")
    role, text, channel, name = value.get("role"), value["text"], value.get("channel"), value.get("name")
    recipient, content_type = value.get("recipient"), value.get("content_type")
    optional_texts = all(each is None or isinstance(each, str) for each in (recipient, content_type))
    try:
        if role == "user":
            return User(text=text)
        if role == "assistant" and channel in _CHANNELS and optional_texts:
            return Assistant(
                text=text, channel=cast(Channel | None, channel), recipient=recipient, content_type=content_type
            )
        if role == "tool" and channel in _CHANNELS[:3] and isinstance(name, str):
            return ToolResult(name=name, text=text, channel=cast(Channel, channel))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    raise UserError(f"{where} has the role {role!r}; expected user, assistant or tool, and their fields")
