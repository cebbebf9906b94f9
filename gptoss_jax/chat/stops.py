"""Ends an answer at a stop string. Knows the events of one round; knows no ids' meaning and no engine.

The engine could look for stop strings too, but in all bytes of a continuation: one that stands in the reasoning, or in
the arguments of a call, would end the turn before there is an answer. Here they are looked for where the user is spoken
to, each message for itself, and what one may yet swallow is held back:

    stop "END"     deltas   │ the │  EN │ D.  │      told: " the", " ", then the end of the message
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from gptoss_jax.chat.events import Part
from gptoss_jax.engine.stops import StopSearch, StopStrings
from gptoss_jax.harmony.events import Delta, End, Header, Start
from gptoss_jax.harmony.messages import Assistant


@dataclasses.dataclass(slots=True)
class _Held:
    """A part that may yet be swallowed, and how many bytes of the message's text are told before and with it."""

    part: Part
    begin: int
    end: int


class AnswerStops:
    """The search through the messages of one round.

    Attributes:
        found: whether a stop string was; no part may be fed after it.
    """

    def __init__(self, stops: Sequence[str]):
        self.found = False
        self._stops = StopStrings(text.encode() for text in stops) if stops else None
        self._search: StopSearch | None = None  # in the open message, if the user is to read it
        self._header = Header()
        self._text: list[str] = []  # of the open message, as far as it was told
        self._held: deque[_Held] = deque()

    def feed(self, part: Part) -> list[Part]:
        """What may be told now: parts from earlier and this one, as they were fed, or cut at the stop string."""
        if self._stops is None:
            return [part]
        match part.event:
            case Start(header=header):
                self._search = StopSearch(self._stops) if speaks_to_user(header) else None
                self._header, self._text = header, []
            case End():
                told = [held.part for held in self._held]
                self._held.clear()
                self._search = None
                return [*told, part]
        return [part] if self._search is None else self._look(part, self._search)

    def _look(self, part: Part, search: StopSearch) -> list[Part]:
        """Holds the part back, and tells those that are out of every stop string's reach."""
        begin, found = search.num_bytes, None
        if isinstance(part.event, Delta):
            found = search.feed(part.event.text.encode())
        self._held.append(_Held(part, begin, search.num_bytes))
        told = []
        while self._held and self._held[0].end <= search.num_clear:
            told.append(self._tell(self._held.popleft().part))
        if found is not None:
            told += self._cut(found.begin)
        return told

    def _cut(self, begin: int) -> list[Part]:
        """The end of the message where the stop string begins; the ids that hold some of it are not told."""
        self.found = True
        cut, told = self._held[0], []
        self._held.clear()
        assert isinstance(cut.part.event, Delta), "a stop string begins in text"
        index = cut.part.event.index
        rest = cut.part.event.text.encode()[: begin - cut.begin].decode()
        if rest:
            told.append(self._tell(Part(Delta(index, rest), ())))
        message = Assistant(
            text="".join(self._text), channel=self._header.channel, content_type=self._header.content_type
        )
        return [*told, Part(End(index, message, "return"), ())]

    def _tell(self, part: Part) -> Part:
        if isinstance(part.event, Delta):
            self._text.append(part.event.text)
        return part


def speaks_to_user(header: Header) -> bool:
    """Whether a message is for the user: no reasoning and no call."""
    return header.recipient is None and header.channel != "analysis"
