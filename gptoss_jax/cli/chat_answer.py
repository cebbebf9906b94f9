"""One answer in the terminal: how quick it was, what is kept of it if it is stopped. Knows events; prints nothing."""

import dataclasses
import time
from collections.abc import Sequence

from gptoss_jax.chat import ChatEvent, Part, ToolFinished, ToolStarted, TurnFinished
from gptoss_jax.chat.stops import speaks_to_user
from gptoss_jax.cli.chat_session import settled
from gptoss_jax.harmony.events import Delta, End, Header, Start
from gptoss_jax.harmony.messages import Assistant, Message


@dataclasses.dataclass
class Pace:
    """When ids came. What tools took, and the prompts of later rounds, is nobody's pace: there it starts again."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None  # seconds to the first id
    num_tokens: int = 0
    _last: float | None = None
    _spans: int = 0  # between ids that followed each other
    _seconds: float = 0.0

    def count(self, num_tokens: int) -> None:
        """So many ids came now."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now - self.started
        if self._last is not None:
            self._spans += num_tokens
            self._seconds += now - self._last
        self._last = now
        self.num_tokens += num_tokens

    def pause(self) -> None:
        """The next id has nothing to do with the last one."""
        self._last = None

    def describe(self) -> str:
        """For people."""
        parts = [f"{self.num_tokens:,} tokens"]
        if self._seconds > 0:
            parts.append(f"{self._spans / self._seconds:.1f} tokens/s")
        if self.first is not None:
            parts.append(f"the first after {self.first:.2f} s")
        return " · ".join(parts)


class Answer:
    """What came of one turn so far.

    Attributes:
        pace: how quick it was.
        finished: its end; None as long as there is none, and for ever if it was stopped.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self.finished: TurnFinished | None = None
        self._messages: list[Message] = []  # that have ended
        self._header = Header()
        self._text: list[str] = []  # of the message that is open

    def take(self, event: ChatEvent) -> None:
        """Goes on by an event."""
        match event:
            case Part(harmony_event, tokens):
                if tokens:
                    self.pace.count(len(tokens))
                self._take_part(harmony_event)
            case ToolStarted():
                self.pace.pause()
            case ToolFinished(result=result):
                self._messages.append(result)
            case TurnFinished():
                self.finished = event

    def kept(self) -> list[Message]:
        """What belongs into the conversation: of an answer that was stopped, what the user has seen of it."""
        if self.finished is not None:
            return settled(self.finished.messages)
        messages, text = list(self._messages), "".join(self._text)
        if text and speaks_to_user(self._header):
            messages.append(Assistant(text=text, channel=self._header.channel))
        return settled(_without_loose_thoughts(messages))

    def _take_part(self, event: object) -> None:
        match event:
            case Start(header=header):
                self._header, self._text = header, []
            case Delta(text=text):
                self._text.append(text)
            case End(message=message):
                self._messages.append(message)
                self._text = []


def _without_loose_thoughts(messages: Sequence[Message]) -> list[Message]:
    """Without the reasoning that led to nothing yet."""
    kept = list(messages)
    while kept and isinstance(kept[-1], Assistant) and kept[-1].channel == "analysis" and not kept[-1].recipient:
        kept.pop()
    return kept
