"""Ids of an answer -> events, one id at a time, whatever a model writes. Knows the layout; knows no tools, no engine.

    <|start|>assistant<|channel|>analysis<|message|>6x7.<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>
    └── header ─────────────────────────────────────┘└ content ┘└ header ──────────────────────────────────┘└ content ─┘

Models write other things too. The rules by which no text is lost, and none passes for what it is not:

* A header is what <|message|> closes: a channel, `to=name` and a content type, in any order. Of what is there twice the
  later counts. A word that is none of these is a Fault, and never a name.
* What no <|message|> closes is content: of the channel where <|channel|> and its name precede it, else of a message
  without one. It is told as soon as it cannot become a header any more; never more than 256 characters are held back.
* <|start|> ends an open message. So does <|channel|>, if it begins a whole header.
* <|endoftext|> ends an open message as "cut": it is padding, and a call before it is not one to be run.
* Any other special token never becomes text: it is a Fault with its name.

A Fault's text is what no Delta says, and empty where something is missing. Kinds of faults:

    no header       content that none precedes         unknown channel    behind <|channel|>
    no message      a header without <|message|>       unknown recipient  `to=` what is no name
    no start        a header without <|start|>         nobody called      `to=` a role, which is no tool
    no end          a message without <|end|>          unknown word       in a header
    cut header      no more ids within it              other role         than "assistant"
    special token   one that means nothing there       twice              said again later in the header
    blanks          between messages
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias, cast

from gptoss_jax.harmony.events import Delta, End, Fault, HarmonyEvent, Header, Start
from gptoss_jax.harmony.messages import CHANNELS, Assistant, Channel, is_name
from gptoss_jax.harmony.tokenizer import Tokenizer

By: TypeAlias = Literal["end", "call", "return", "cut"]

LONGEST_HEADER = 256  # characters, special tokens as one; a call to the longest name of a function takes 95

_ENDS: dict[str, By] = {"<|end|>": "end", "<|call|>": "call", "<|return|>": "return", "<|endoftext|>": "cut"}

# A header is matched as text, in which surrogates stand for special tokens: decoded text holds none.
_CHANNEL, _CONSTRAIN, _OTHER = "\ud800", "\ud801", "\ud802"
_MARKS = {"<|channel|>": _CHANNEL, "<|constrain|>": _CONSTRAIN}

_NO_MORE = r"(?![a-z0-9_.-])"  # behind "final", so that it is not the beginning of "finally"
_CHANNEL_NAME = rf"(?:{'|'.join(CHANNELS)})(?:(?=to=)|{_NO_MORE})"
_ROLE = re.compile(rf"\s*assistant(?:(?=to=)|{_NO_MORE})")
_IN_WORD = r"[^\s\ud800-\ud802]"
_ITEM = re.compile(
    rf"""(?P<blank> \s+)
    | {_CHANNEL} \s* (?P<channel> {_CHANNEL_NAME})
    | {_CHANNEL} \s* (?P<unknown_channel> {_IN_WORD}*)
    | {_CONSTRAIN} \s* (?P<content_type> [A-Za-z0-9_./+-]+)
    | to= (?P<recipient> {_IN_WORD}*)
    | (?P<bare_type> json|code) {_NO_MORE}  # without <|constrain|>, as in the released chat template
    | (?P<bare_channel> {_CHANNEL_NAME})
    | (?P<special> [{_CONSTRAIN}{_OTHER}])
    | (?P<word> {_IN_WORD}+)
    """,
    re.VERBOSE,
)
_FIELDS = frozenset(("channel", "recipient", "content_type"))
_WORDS = (*CHANNELS, "json", "code", "to=x")
_NOBODY = frozenset(("all", "assistant", "developer", "system", "user"))
# Faults of what may be a header all the same, before its <|message|> has come.
_LIGHT = frozenset(("nobody called", "other role", "special token", "twice"))


class Parser:
    """Reads one answer. It begins where a prompt ends: behind <|start|>assistant.

    Attributes:
        header: of the message whose content is open now; None in a header and between messages.

    `index` is that of the first message. The cost of an id does not grow with the ids before it: what is looked at
    again is what is held back, and that is bounded.
    """

    def __init__(self, tokenizer: Tokenizer, *, index: int = 0):
        self.header: Header | None = None
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._index = index
        self._open: _Open | None = None  # still while what a <|channel|> in its content begins is held back
        self._held = _Held("prompt")

    def push(self, token_id: int) -> list[HarmonyEvent]:
        """What this id tells.

        Raises:
            UserError: the id is outside the tokenizer's vocabulary.
        """
        name = self._tokenizer.name_of(token_id)
        if name is None:
            return self._push_text(self._decoder.push(token_id))
        events = self._push_text(self._decoder.finish())  # a special token ends an unfinished character
        return events + (self._push_to_header(name) if self.header is None else self._push_to_content(name))

    def finish(self) -> list[HarmonyEvent]:
        """There are no more ids: what is open ends."""
        events = self._push_text(self._decoder.finish())
        if self.header is not None:
            return [*events, self._end("cut")]
        if self._open is None and (self._held.is_blank or self._held.is_cut_short):
            held, self._held = self._held, _Held("nothing")
            kind = "blanks" if held.text.isspace() else "cut header"
            return [Fault(kind, held.shown)] if held.text else []
        return [*events, *self._release(), self._end("cut")]

    def _push_text(self, text: str) -> list[HarmonyEvent]:
        if not text:
            return []
        if self.header is not None:
            return [self._delta(text)]
        self._held.text += text
        return [] if self._held.may_become_header else self._release()

    def _push_to_content(self, name: str) -> list[HarmonyEvent]:
        if name == "<|channel|>":
            self.header = None
            self._held = _Held("content", text=_CHANNEL)
            return []
        if name == "<|start|>" or name in _ENDS:
            return self._end_by(name)
        return [Fault("special token", name)]

    def _push_to_header(self, name: str) -> list[HarmonyEvent]:
        held = self._held
        if name == "<|message|>":
            return self._close_header()
        if name == "<|start|>" or name in _ENDS:
            idle = held.began == "nothing"
            if self._open is None and held.is_blank and (idle or name in ("<|start|>", "<|endoftext|>")):
                return self._skip_blanks(name)
            return self._release() + self._end_by(name)
        held.add(name)
        return [] if held.may_become_header else self._release()

    def _close_header(self) -> list[HarmonyEvent]:
        """<|message|>. Within content it takes a known channel to make a header of what stands before it."""
        held, events = self._held, list[HarmonyEvent]()
        header, faults = held.read()
        if self._open is not None and header.channel is None:
            held.add("<|message|>")
            return self._release()
        if self._open is not None:
            events += [Fault("no end", ""), self._end("end")]
        elif held.began == "nothing":
            events.append(Fault("no start", ""))
        return [*events, *faults, self._start(header)]

    def _skip_blanks(self, name: str) -> list[HarmonyEvent]:
        """A token that would end a message where none has begun."""
        held, self._held = self._held, _Held("start" if name == "<|start|>" else "nothing")
        events: list[HarmonyEvent] = [Fault("blanks", held.text)] if held.text.isspace() else []
        if name != "<|start|>" or held.began != "nothing":
            events.append(Fault("special token", name))
        return events

    def _release(self) -> list[HarmonyEvent]:
        """What is held back is no header. It is content: of the open message, or of one that it begins."""
        held, self._held = self._held, _Held("nothing")
        events = list[HarmonyEvent]()
        if self._open is not None:
            self.header = self._open.header
        else:
            header, faults, held = held.split()
            kind = "no header" if header.channel is None else "no message"
            events += [*faults, Fault(kind, ""), self._start(header)]
        for text, name in held.pieces():
            events.append(Fault("special token", name) if name else self._delta(text))
        return events

    def _start(self, header: Header) -> Start:
        self.header, self._open, self._held = header, _Open(header), _Held("nothing")
        return Start(self._index, header)

    def _delta(self, text: str) -> Delta:
        assert self._open is not None
        self._open.texts.append(text)
        return Delta(self._index, text)

    def _end_by(self, name: str) -> list[HarmonyEvent]:
        if name == "<|start|>":
            end = self._end("end")
            self._held = _Held("start")
            return [Fault("no end", ""), end]
        padding: list[HarmonyEvent] = [Fault("special token", name)] if name == "<|endoftext|>" else []
        return [*padding, self._end(_ENDS[name])]

    def _end(self, by: By) -> End:
        assert self._open is not None
        end = End(self._index, self._open.message(), by)
        self._index += 1
        self.header, self._open, self._held = None, None, _Held("nothing")
        return end


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> list[Assistant]:
    """The messages of a whole answer, which begins behind <|start|>assistant."""
    parser = Parser(tokenizer)
    events = [event for token_id in ids for event in parser.push(token_id)] + parser.finish()
    return [event.message for event in events if isinstance(event, End)]


@dataclasses.dataclass(slots=True)
class _Open:
    """A message that has begun."""

    header: Header
    texts: list[str] = dataclasses.field(default_factory=list)

    def message(self) -> Assistant:
        header = self.header
        return Assistant(
            text="".join(self.texts),
            channel=header.channel,
            recipient=header.recipient,
            content_type=header.content_type,
        )


@dataclasses.dataclass(slots=True)
class _Held:
    """What may become a header, and is held back until that is known.

    Attributes:
        began: behind the prompt's <|start|>assistant, behind <|start|>, behind nothing, or within content.
        text: surrogates in it are special tokens.
        names: of the special tokens that are neither <|channel|> nor <|constrain|>, in order.
        sound: as much of the text is known to be words of a header.
    """

    began: Literal["prompt", "start", "nothing", "content"]
    text: str = ""
    names: list[str] = dataclasses.field(default_factory=list)
    sound: int = 0

    def add(self, name: str) -> None:
        """Adds a special token."""
        mark = _MARKS.get(name, _OTHER)
        self.text += mark
        if mark == _OTHER:
            self.names.append(name)

    @property
    def is_blank(self) -> bool:
        return not self._without_role().strip()

    @property
    def may_become_header(self) -> bool:
        if len(self.text) > LONGEST_HEADER:
            return False
        # A header that has begun by <|channel|> may have odd words. Within content it may not: there is text to go on.
        marked = _CHANNEL in self.text or _CONSTRAIN in self.text
        return (marked and self.began != "content") or self._can_go_on()

    @property
    def is_cut_short(self) -> bool:
        """Whether it is more likely the beginning of a header than text."""
        header_like = any(sign in self.text for sign in (_CHANNEL, _CONSTRAIN, "to="))
        cut_role = self.began == "start" and "assistant".startswith(self.text.strip())
        return cut_role or (header_like and self._can_go_on())

    @property
    def shown(self) -> str:
        return "".join(text or name for text, name in self.pieces())

    def pieces(self) -> Iterator[tuple[str, str]]:
        """Its texts and the names of its special tokens, in order: one of a pair is empty."""
        names = iter(self.names)
        marks = {mark: name for name, mark in _MARKS.items()}
        for piece in re.split(rf"([{_CHANNEL}{_CONSTRAIN}{_OTHER}])", self.text):
            if piece == _OTHER:
                yield "", next(names)
            elif piece in marks:
                yield "", marks[piece]
            elif piece:
                yield piece, ""

    def read(self) -> tuple[Header, list[Fault]]:
        """All of it as a header, and the words that have no place in one."""
        role = _ROLE.match(self.text)
        is_first = self.began == "start" and role is None
        return _read(self.text[role.end() :] if role else self.text, names=self.names, is_first=is_first)

    def split(self) -> tuple[Header, list[Fault], "_Held"]:
        """A header as far as a <|channel|> and what goes with it reach, and the rest, which is content."""
        role = _ROLE.match(self.text)
        begin = role.end() if role else 0
        end = len(self.text)
        for item in _ITEM.finditer(self.text, begin):
            if _is_content(item, self.text[begin : item.start()]):
                end = item.start()
                break
        if _CHANNEL not in self.text[begin:end]:
            return Header(), [], _Held("content", self._without_role(), self.names)
        header, faults = _read(self.text[begin:end], names=(), is_first=False)
        return header, faults, _Held("content", self.text[end:], self.names)

    def _without_role(self) -> str:
        """Only behind <|start|> is "assistant" surely a role and no text."""
        role = _ROLE.match(self.text) if self.began == "start" else None
        return self.text[role.end() :] if role else self.text

    def _can_go_on(self) -> bool:
        """Whether some end of its last word would make it a header."""
        if "assistant".startswith(self.text.strip()):
            return True
        role = _ROLE.match(self.text)
        begin = max(self.sound, role.end() if role else 0)
        items = list(_ITEM.finditer(self.text, begin))
        if not items:
            return True
        last = items[-1]
        is_first = self.began == "start" and role is None and not self.text[:begin].strip()
        if not _may_be_header(self.text[begin : last.start()], is_first=is_first):
            return False
        self.sound = last.start()
        is_first = is_first and not self.text[: self.sound].strip()
        word = last.group().lstrip(_CHANNEL).lstrip()
        endings = ["", "x", *(known.removeprefix(word) for known in _WORDS if known.startswith(word))]
        return any(_may_be_header(last.group() + ending, is_first=is_first) for ending in endings)


def _read(text: str, *, names: Iterable[str], is_first: bool) -> tuple[Header, list[Fault]]:
    """A header and its faults, in the order of their words; `is_first` says that a role may come first."""
    words = list(_words(text, names=iter(names), is_first=is_first))
    found = {kind: word for kind, word in words if kind in _FIELDS}
    places = {kind: place for place, (kind, _) in enumerate(words)}
    faults = [
        Fault("twice" if kind in _FIELDS else kind, word)
        for place, (kind, word) in enumerate(words)
        if kind not in _FIELDS or place < places[kind]
    ]
    channel = cast(Channel | None, found.get("channel"))
    return Header(channel, found.get("recipient"), found.get("content_type")), faults


def _words(text: str, *, names: Iterator[str], is_first: bool) -> Iterator[tuple[str, str]]:
    """What a header says, word by word: a field or the kind of a fault, and the word."""
    has_channel = False
    for item in _ITEM.finditer(text):
        kind = item.lastgroup or ""
        word = item[kind]
        match kind:
            case "blank":
                continue
            case "special":
                yield "special token", next(names) if word == _OTHER else "<|constrain|>"
            case "unknown_channel":
                yield "unknown channel", word
            case "recipient":
                yield _called(word)
            case "bare_type":
                yield "content_type", word
            case "word" | "bare_channel" if kind == "word" or has_channel:
                yield "other role" if is_first and is_name(word, dotted=True) else "unknown word", word
            case _:
                yield kind.removeprefix("bare_"), word
        has_channel = has_channel or (kind.endswith("channel") and kind != "unknown_channel")
        is_first = False


def _called(recipient: str) -> tuple[str, str]:
    if recipient in _NOBODY:
        return "nobody called", f"to={recipient}"
    if is_name(recipient, dotted=True):
        return "recipient", recipient
    return "unknown recipient", f"to={recipient}"


def _may_be_header(text: str, *, is_first: bool) -> bool:
    words = _words(text, names=itertools.repeat(""), is_first=is_first)
    return all(kind in _FIELDS or kind in _LIGHT for kind, _ in words)


def _is_content(item: re.Match[str], before: str) -> bool:
    """Whether a header that no <|message|> closes has ended before this item."""
    match item.lastgroup:
        case "recipient":
            return not is_name(item["recipient"], dotted=True)
        case "bare_type":
            return "to=" not in before
        case kind:
            return kind in ("word", "special", "unknown_channel", "bare_channel")
