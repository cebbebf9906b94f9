"""What can be typed beside messages: /effort, /save and the like. Knows a session and its screen; knows no engine."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from gptoss_jax.cli import chat_session
from gptoss_jax.cli.chat_screen import Screen
from gptoss_jax.cli.chat_session import ChatSession
from gptoss_jax.errors import UserError

Next: TypeAlias = Literal["read", "answer", "quit"]  # what the loop does after a command


@dataclasses.dataclass(frozen=True)
class _Command:
    run: Callable[[ChatSession, Screen, str], Next]
    arguments: str
    help: str


def run(line: str, session: ChatSession, screen: Screen) -> Next:
    """Does what a line that begins with / asks for.

    Raises:
        UserError: there is no such command, or its words make no sense.
    """
    name, _, words = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"there is no {name}; /help tells what there is, and a blank before the / makes it a message")
    return command.run(session, screen, words.strip())


def _effort(session: ChatSession, screen: Screen, words: str) -> Next:
    match words:
        case "low" | "medium" | "high":
            session.effort = words
        case "":
            pass
        case _:
            raise UserError(f"/effort is {words!r}; expected low, medium or high")
    screen.note(f"effort: {session.effort}")
    return "read"


def _system(session: ChatSession, screen: Screen, words: str) -> Next:
    if words:
        session.instructions = "" if words == "none" else chat_session.read_instructions(words)
    screen.note(f"instructions: {session.instructions or 'none'}")
    return "read"


def _tools(session: ChatSession, screen: Screen, words: str) -> Next:
    if words:
        session.tools = {} if words == "none" else chat_session.read_tools(words)
    screen.note(f"tools: {', '.join(session.tools) or 'none'}")
    return "read"


def _reasoning(session: ChatSession, screen: Screen, words: str) -> Next:
    if words not in ("on", "off", ""):
        raise UserError(f"/reasoning is {words!r}; expected on or off")
    screen.reasoning = words == "on" if words else not screen.reasoning
    screen.note(f"reasoning is {'shown' if screen.reasoning else 'hidden'}")
    return "read"


def _save(session: ChatSession, screen: Screen, words: str) -> Next:
    path = _path("/save", words)
    chat_session.save(session, path)
    screen.note(f"saved {len(session.messages)} messages to {path}")
    return "read"


def _load(session: ChatSession, screen: Screen, words: str) -> Next:
    path = _path("/load", words)
    chat_session.load(session, path)
    screen.note(f"loaded {len(session.messages)} messages from {path}; effort: {session.effort}")
    return "read"


def _new(session: ChatSession, screen: Screen, words: str) -> Next:
    session.messages = []
    session.tools = chat_session.read_tools(",".join(session.tools))  # what they remember is forgotten too
    screen.note("a new conversation; instructions, effort and tools stay")
    return "read"


def _retry(session: ChatSession, screen: Screen, words: str) -> Next:
    if not session.take_back_answer():
        raise UserError("there is nothing to answer yet")
    return "answer"


def _undo(session: ChatSession, screen: Screen, words: str) -> Next:
    question = session.take_back()
    if question is None:
        raise UserError("there is nothing to take back")
    screen.note(f"taken back: {question}")
    return "read"


def _help(session: ChatSession, screen: Screen, words: str) -> Next:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        screen.note(f"{f'{name} {command.arguments}':{width}}  {command.help}")
    screen.note(
        'A line that ends with \\ goes on in the next; so do lines between """ and """. Ctrl-C stops an answer; '
        "at the prompt, twice, it leaves, and so does Ctrl-D."
    )
    return "read"


def _quit(session: ChatSession, screen: Screen, words: str) -> Next:
    return "quit"


def _path(name: str, words: str) -> Path:
    if not words:
        raise UserError(f"{name} needs a file; expected {name} FILE")
    return Path(words).expanduser()


COMMANDS: Mapping[str, _Command] = MappingProxyType(
    {
        "/effort": _Command(_effort, "low|medium|high", "how long the model reasons"),
        "/system": _Command(_system, "TEXT|@FILE|none", "instructions before the conversation"),
        "/tools": _Command(_tools, "TOOL,…|none", "what the model may use: python, browser=DIR"),
        "/reasoning": _Command(_reasoning, "on|off", "whether reasoning is shown"),
        "/retry": _Command(_retry, "", "another answer to the last message"),
        "/undo": _Command(_undo, "", "take the last message and its answer back"),
        "/new": _Command(_new, "", "a new conversation"),
        "/save": _Command(_save, "FILE", "write the conversation"),
        "/load": _Command(_load, "FILE", "go on with a written one"),
        "/help": _Command(_help, "", "this"),
        "/quit": _Command(_quit, "", "leave"),
    }
)
