"""Reads what the user types, with the standard library alone. Knows lines; knows no conversation."""

import sys
from typing import Protocol, runtime_checkable

PROMPT, MORE = "> ", ". "
_QUOTES = '"""'


@runtime_checkable
class Reader(Protocol):
    """Where messages come from; chat_prompt.py has a richer one."""

    def read(self) -> str:
        """The next message or command. Ctrl-C raises KeyboardInterrupt, the end EOFError."""
        ...


class LineReader:
    """Reads lines; with `readline`, where Python has it, they can be edited and come again."""

    def __init__(self, *, shows_prompt: bool):
        self._shows_prompt = shows_prompt

    def read(self) -> str:
        text = self._line(PROMPT)
        while needs_more(text):
            try:
                text += "\n" + self._line(MORE)
            except EOFError:
                break
        return message_of(text)

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt if self._shows_prompt else "")
        except (EOFError, KeyboardInterrupt):
            if self._shows_prompt:
                print()  # the cursor stands behind the prompt
            raise


def needs_more(text: str) -> bool:
    """Whether a message goes on in the next line."""
    return text.count(_QUOTES) % 2 == 1 or text.endswith("\\")


def message_of(text: str) -> str:
    """What was meant, without the signs that join lines."""
    whole = text.strip()
    if len(whole) >= 2 * len(_QUOTES) and whole.startswith(_QUOTES) and whole.endswith(_QUOTES):
        return whole[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return text.replace("\\\n", "\n")


def is_typed() -> bool:
    """Whether somebody sits there."""
    return sys.stdin.isatty() and sys.stdout.isatty()
