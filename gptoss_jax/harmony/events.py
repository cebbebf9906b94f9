"""What a model's ids turn out to say, piece by piece. Knows text and headers; knows no ids and no layout.

Start ─► Delta ─► Delta ─► … ─► End          one message; then the next Start, or nothing more
            │
          Fault                              anywhere: what did not fit the format, said beside
"""

import dataclasses
from typing import Literal, TypeAlias

from gptoss_jax.harmony.messages import Assistant


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Who speaks to whom, as the model wrote it; what it left out or wrote wrongly is None.

    Attributes:
        channel: "analysis", "commentary" or "final"; None where there was none or another word.
        recipient: a valid dotted name, or None.
        content_type: the word behind <|constrain|>.
    """

    channel: Literal["analysis", "commentary", "final"] | None = None
    recipient: str | None = None
    content_type: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """A message's content begins; the n-th has index n - 1."""

    index: int
    header: Header


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """More of its text, whole characters only, never empty."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """The message is over.

    Attributes:
        message: all of it; the Deltas' texts together are its text.
        by: "end" another message follows, "call" a tool is called, "return" the answer is over, "cut" there were no
            more ids.
    """

    index: int
    message: Assistant
    by: Literal["end", "call", "return", "cut"]


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Something that the format does not have: what, for a log or a metric, and the text as it stood there.

    `text` is not lost to who reads Deltas alone, unless it stood inside a header.
    """

    kind: str
    text: str


HarmonyEvent: TypeAlias = Start | Delta | End | Fault
