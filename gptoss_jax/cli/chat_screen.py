"""What a conversation looks like in a terminal, and in a pipe. Knows events and streams; knows no engine, no session.

In a terminal all is shown, and what is not the answer is dimmed. In a pipe the answer alone goes to stdout; tools,
times and errors go to stderr. What a model or a tool wrote moves no cursor and changes no colour: see `harmless`.
"""

from typing import Protocol, runtime_checkable

from gptoss_jax.chat import ChatEvent, Part, ToolFinished, ToolStarted, TurnFinished
from gptoss_jax.chat.stops import speaks_to_user
from gptoss_jax.harmony.events import Delta, End, Header, Start

_DIM, _CALL, _ERROR = "2", "36", "31"  # parameters of "select graphic rendition"
_RESULT_LINES, _RESULT_CHARS = 12, 2000  # of a tool's result that are shown

# Control characters are shown by their pictures, as U+241B for escape. Those that turn the direction of writing could
# make a command look like another one. A carriage return alone would let a line overwrite itself.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421, ord("\r"): None}
_HARMLESS = _PICTURES | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def harmless(text: str) -> str:
    """The text without what a terminal would obey."""
    return text.translate(_HARMLESS)


@runtime_checkable
class Writable(Protocol):
    """A stream of text, as sys.stdout."""

    def write(self, text: str, /) -> object:
        """Takes a piece."""
        ...

    def flush(self) -> None:
        """Lets it be seen."""
        ...


class Screen:
    """Shows what happens, as it happens.

    Args:
        out: where answers go.
        notes: where all else goes; the same stream in a terminal.
        colours: whether `notes` takes them.
        reasoning: whether reasoning is shown.
    """

    def __init__(self, out: Writable, notes: Writable, *, colours: bool, reasoning: bool):
        self.reasoning = reasoning
        self._out = out
        self._notes = notes
        self._colours = colours
        self._header = Header()  # of the message that is shown now
        self._is_open = False  # the last line that was written has no end yet

    def show(self, event: ChatEvent) -> None:
        """Shows one event of a turn."""
        match event:
            case Part(Start(header=header)):
                self._header = header
                self._begin(header)
            case Part(Delta(text=text)):
                self._say(harmless(text))
            case Part(End()):
                self.end_line()
            case ToolFinished():
                self._show_result(event)
            case TurnFinished():
                self._show_end(event)
            case Part() | ToolStarted():  # faults have no text of their own, and calls were shown as they were written
                pass

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        self.end_line()
        self._write(self._notes, f"{harmless(text)}\n", _DIM)

    def error(self, text: str) -> None:
        """A line that says what went wrong."""
        self.end_line()
        self._write(self._notes, f"{harmless(text)}\n", _ERROR)

    def end_line(self) -> None:
        """Ends the line that is open."""
        if self._is_open:
            self._write(self._out if speaks_to_user(self._header) else self._notes, "\n")
        self._is_open = False

    def _begin(self, header: Header) -> None:
        self.end_line()
        if header.recipient is not None:
            self._write(self._notes, f"▸ {header.recipient} ", _CALL)
            self._is_open = True
        elif header.channel == "analysis" and not self.reasoning and self._out is self._notes:
            self._write(self._notes, "thinking …", _DIM)
            self._is_open = True

    def _say(self, text: str) -> None:
        header = self._header
        if speaks_to_user(header):
            self._write(self._out, text)
        elif header.recipient is not None:
            self._write(self._notes, text, _CALL)
        elif self.reasoning:
            self._write(self._notes, text, _DIM)
        else:
            return
        self._is_open = not text.endswith("\n")

    def _show_result(self, event: ToolFinished) -> None:
        text = event.result.text.strip("\n")
        shown = "\n".join(text[:_RESULT_CHARS].split("\n")[:_RESULT_LINES])
        lines = [f"◂ {event.result.name} {'failed' if event.failed else 'answered'} in {event.seconds:.2f} s"]
        lines += [f"  {line}" for line in harmless(shown).split("\n")]
        if len(shown) < len(text):
            lines.append(f"  … {len(text) - len(shown):,} more characters")
        self._write(self._notes, "\n".join(lines) + "\n", _DIM)

    def _show_end(self, event: TurnFinished) -> None:
        self.end_line()
        match event.reason:
            case "stop" | "tool_calls":
                return
            case "length":
                self.note(f"the answer is cut: {event.message or '--max-new-tokens or the context is used up'}")
            case reason:
                self.error(f"{reason}: {event.message or 'the engine ended the answer'}")

    def _write(self, where: Writable, text: str, style: str | None = None) -> None:
        if where is self._notes and self._colours and style is not None:
            text = f"\x1b[{style}m{text}\x1b[0m"  # each piece for itself: an interrupt leaves no colour behind
        where.write(text)
        where.flush()
