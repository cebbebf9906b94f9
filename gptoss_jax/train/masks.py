"""Which tokens of a conversation are trained, and how much. Knows harmony's messages and marks; knows no files.

    <|start|>assistant<|channel|>analysis<|message|>I should look.<|end|>
    ─────── given ────┬─────── header ─────────────┬── analysis ──┬ stop
    <|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"city":"Oslo"}<|call|>
    ───── header ─────┬─────── call ───────┬─────────────────── header ─────────────────────┬──── call ─────┬ stop
    <|start|>functions.weather to=assistant<|channel|>commentary<|message|>12 °C<|end|>
    ──────────────────────────────────── read, never trained ──────────────────────────
    <|start|>assistant<|channel|>final<|message|>12 °C.<|return|>
    ─────── given ────┬────── header ───────────┬ final ┬ stop

What a prompt ends with when the model begins to speak, <|start|>assistant, is given and never trained. Where it goes on
by itself, behind a message that ends in <|end|>, it writes those too: they are header there. Whom it calls is no header
but part of the call, for the name of a function must be learnt.

A message is trained as the model says it, and read as it is shown again, and these differ in two ways:

* An answer is said with <|return|> at its end, and read with <|end|>.
* Analysis is no longer read once the answer to it was given. So a conversation becomes several examples where it has
  to: each answer is trained with its own analysis before it and without that of earlier turns, as it is generated.
  Turns without analysis share an example. Each message is trained once: where it is history, it weighs 0.

      user  analysis  final  user  analysis  final
       ✓       ✓        ✓                              the first example
       ✓       –        ·      ✓      ✓        ✓       the second: – is left out, · weighs 0
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Conversation, Message, ToolResult
from gptoss_jax.harmony.render import render
from gptoss_jax.harmony.tokenizer import Tokenizer

Part: TypeAlias = Literal["given", "header", "analysis", "commentary", "final", "call", "text", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much a token counts, by the part that it is of; 0 is not at all.

    Attributes:
        analysis: the model's reasoning.
        commentary: what it tells the user before a call.
        final: its answers.
        call: whom it calls, and with what.
        text: plain text.
        header: the rest of a header, times the weight of what it stands before. 0 for a released model, which writes
            headers already, and is not to unlearn them where the data has its own; 1 for one that must learn to. Only
            then is it learnt, too, when no call is due: the choice between ` to=` and <|channel|> is a header's.
        stop: the token that ends a message, times the weight of what it ends. Without it a model finds no end.
    """

    analysis: float = 1.0
    commentary: float = 1.0
    final: float = 1.0
    call: float = 1.0
    text: float = 1.0
    header: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"the loss weight of {name} is {weight}; expected a number from 0")

    def of(self, part: Part) -> float:
        return 0.0 if part == "given" else getattr(self, part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Ids in a row that are of one part and count the same.

    Attributes:
        said: what the model says in their place, where that is not what it reads later.
    """

    ids: list[int]
    part: Part
    weight: float
    said: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """The messages that one example trains: from `begin`, with all their analysis, until before `end`. Those before
    `begin` are read as they are shown again."""

    begin: int
    end: int


def message_weights(conversation: Conversation, counts: Sequence[float], loss: LossWeights) -> list[float]:
    """How much the text of each message counts: as much as it is told to, times the weight of its part."""
    return [
        count * loss.of(_part_of(message)) if isinstance(message, Assistant) else 0.0
        for message, count in zip(conversation, counts, strict=True)
    ]


def spans(conversation: Conversation, weights: Sequence[float]) -> list[Span]:
    """How a conversation becomes examples: as few as may be, such that each answer reads what it would have read.

    Args:
        weights: of messages. Where an example has no message that counts, there is none.
    """
    found = []
    begin, has_analysis = 0, False
    for start, end in _eras(conversation):
        if has_analysis:  # which this answer must not read
            found.append(Span(begin, start))
            begin, has_analysis = start, False
        has_analysis = has_analysis or any(map(_is_analysis, conversation[start:end]))
    found.append(Span(begin, len(conversation)))
    return [cut for span in found if (cut := _cut(span, conversation, weights)) is not None]


def conversation_pieces(
    conversation: Conversation, span: Span, weights: Sequence[float], *, tokenizer: Tokenizer, loss: LossWeights
) -> Iterator[Piece]:
    """The tokens of one example, in order."""
    yield Piece(ids=render(conversation[: span.begin], tokenizer), part="given", weight=0.0)
    before: Message | None = None if span.begin == 0 else conversation[span.begin - 1]
    for i in range(span.begin, span.end):
        message = conversation[i]
        ids = render([message], tokenizer)
        if isinstance(message, Assistant):
            is_last = i + 1 == span.end
            for part, read, said in _said(message, ids, tokenizer, is_given=not _goes_on(before), is_last=is_last):
                share = loss.of(part) if part in ("given", "header", "stop") else 1.0
                yield Piece(ids=read, part=part, weight=weights[i] * share, said=said)
        else:
            yield Piece(ids=ids, part="given", weight=0.0)
        before = message


def text_pieces(prompt: str, text: str, *, tokenizer: Tokenizer, loss: LossWeights) -> Iterator[Piece]:
    """Plain text between <|startoftext|> and <|endoftext|>. The prompt is encoded by itself, as it will be in use."""
    yield Piece(ids=[tokenizer.special("<|startoftext|>"), *tokenizer.encode(prompt)], part="given", weight=0.0)
    yield Piece(ids=tokenizer.encode(text), part="text", weight=loss.text)
    yield Piece(ids=[tokenizer.special("<|endoftext|>")], part="stop", weight=loss.text * loss.stop)


# --- which messages ---------------------------------------------------------------------------------------------------


def _eras(conversation: Conversation) -> Iterator[tuple[int, int]]:
    """(start, end) of the messages up to each answer, and of those behind the last: what is read changes in between."""
    start = 0
    for i, message in enumerate(conversation):
        if isinstance(message, Assistant) and message.channel == "final":
            yield start, i + 1
            start = i + 1
    if start < len(conversation):
        yield start, len(conversation)


def _is_analysis(message: Message) -> bool:
    return isinstance(message, Assistant | ToolResult) and message.channel == "analysis"


def _cut(span: Span, conversation: Conversation, weights: Sequence[float]) -> Span | None:
    """From the first message of the assistant's, before which all is history, to the last one that counts."""
    said = [i for i in range(span.begin, span.end) if isinstance(conversation[i], Assistant)]
    counted = [i for i in said if weights[i] > 0]
    return Span(said[0], counted[-1] + 1) if counted else None


def _goes_on(before: Message | None) -> bool:
    """Whether the model writes <|start|>assistant itself: it is not asked again until it has answered or called."""
    return isinstance(before, Assistant) and before.recipient is None and before.channel != "final"


# --- which tokens -----------------------------------------------------------------------------------------------------


def _said(
    message: Assistant, ids: list[int], tokenizer: Tokenizer, *, is_given: bool, is_last: bool
) -> Iterator[tuple[Part, list[int], list[int] | None]]:
    """(part, ids as read, ids as said) of one message; the marks say where parts begin, for no text holds any."""
    role = 1 + len(tokenizer.encode("assistant"))
    text = ids.index(tokenizer.special("<|message|>")) + 1
    marks = {tokenizer.special(name) for name in ("<|channel|>", "<|constrain|>", "<|message|>")}
    name = next(i for i in range(role, text) if ids[i] in marks) if message.recipient is not None else role
    yield "given" if is_given else "header", ids[:role], None
    yield "call", ids[role:name], None
    yield "header", ids[name:text], None
    yield _part_of(message), ids[text:-1], None
    end = ids[-1:]
    said = [tokenizer.special("<|return|>")] if message.channel == "final" and message.recipient is None else end
    yield ("stop", said, None) if is_last or said == end else ("stop", end, said)


def _part_of(message: Assistant) -> Part:
    if message.recipient is not None:
        return "call"
    return message.channel or "final"
