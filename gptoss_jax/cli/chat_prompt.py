"""A prompt with history, editing of several lines, completion of commands. Knows prompt_toolkit; no conversation."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from gptoss_jax.cli.chat_input import MORE, PROMPT, message_of, needs_more


class PromptReader:
    """Enter sends, Alt-Enter begins a line, pasted text stays as it is, the arrows bring back what was typed before."""

    def __init__(self, commands: Sequence[str]):
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=MORE,
            history=_history(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
        )

    def read(self) -> str:
        return message_of(self._session.prompt())


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if needs_more(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """In a file that only its owner reads; in memory where there can be none."""
    states = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = states / "gptoss_jax" / "chat_history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if os.access(path, os.R_OK | os.W_OK):
            return FileHistory(path)
    return InMemoryHistory()
