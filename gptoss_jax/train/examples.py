"""What is trained on, as ids and weights, from lines of JSONL. Knows files and records; knows no rows and no order."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from gptoss_jax.convert.json_file import parse_object
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Message
from gptoss_jax.harmony.render import render
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.train.masks import LossWeights, Part, Piece, conversation_pieces, message_weights, spans, text_pieces
from gptoss_jax.train.records import Chat, Comparison, Completion, Reader, Record, Text


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Ids, and how much each of them counts where it is to be foretold.

    Attributes:
        ids: what the model reads.
        weights: of ids[i] as a target; the first is 0, for nothing stands before it.
        source: the line it comes from, "file.jsonl:12".
        said: what the model is to say at each place, where that is not `ids`: <|return|> for an <|end|> in the middle.
        trained: how many tokens count, by part.
    """

    ids: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    source: str
    said: Int[np.ndarray, " n"] | None = None
    trained: Mapping[Part, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> Int[np.ndarray, " n"]:
        return self.ids if self.said is None else self.said


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preference:
    """Two answers to one prompt; the prompt weighs 0 in both."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        """Tokens of the longer one: each has a row to itself."""
        return max(len(self.chosen), len(self.rejected))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a file, and where it lies there."""

    file: Path
    number: int
    offset: int
    content: bytes

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes examples of lines."""

    tokenizer: Tokenizer
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)
    reader: Reader = dataclasses.field(default_factory=Reader)

    def make(self, line: Line) -> list[Example] | Preference:
        """The examples of a line: of a conversation none to several.

        Raises:
            UserError: the line is no JSON or says nothing known; file and number are named.
        """
        place = f"{line.file}, line {line.number}"
        entry = parse_object(line.content, name=place)
        try:
            return self._examples(self.reader.read(entry), line.source)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error

    def _examples(self, record: Record, source: str) -> list[Example] | Preference:
        match record:
            case Text():
                return self._of_text("", record.text, source)
            case Completion():
                return self._of_text(record.prompt, record.completion, source)
            case Chat():
                return self._of_chat(record, source)
            case Comparison():
                chosen, rejected = (
                    next(iter(self._of_chat(_answered(record, answer), source)), example((), source=source))
                    for answer in (record.chosen, record.rejected)
                )
                return Preference(chosen=chosen, rejected=rejected)

    def _of_text(self, prompt: str, text: str, source: str) -> list[Example]:
        if not text:
            return []
        return [example(text_pieces(prompt, text, tokenizer=self.tokenizer, loss=self.loss), source=source)]

    def _of_chat(self, chat: Chat, source: str) -> list[Example]:
        """All that a conversation has to train."""
        found = []
        weights = message_weights(chat.messages, chat.weights, self.loss)
        for span in spans(chat.messages, weights):
            pieces = conversation_pieces(chat.messages, span, weights, tokenizer=self.tokenizer, loss=self.loss)
            found.append(example(pieces, source=source))
        if not found and any(isinstance(message, Assistant) for message in chat.messages):
            masked = Piece(ids=render(chat.messages, self.tokenizer), part="given", weight=0.0)
            return [example([masked], source=source)]  # so that it is told apart from a conversation without an answer
        return found


def example(pieces: Iterable[Piece], *, source: str) -> Example:
    """One example of its pieces."""
    ids, said, weights, trained = list[int](), list[int](), list[float](), Counter[Part]()
    for piece in pieces:
        ids += piece.ids
        said += piece.said or piece.ids
        weights += [piece.weight] * len(piece.ids)
        if piece.weight > 0:
            trained[piece.part] += len(piece.ids)
    return Example(
        ids=np.array(ids, np.int32),
        weights=np.array(weights, np.float32),
        source=source,
        said=np.array(said, np.int32) if said != ids else None,
        trained={part: count for part, count in trained.items() if count},
    )


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of a file that are not blank.

    Raises:
        UserError: the file cannot be read.
    """
    offset = 0
    try:
        with file.open("rb") as lines:
            for number, content in enumerate(lines, start=1):
                if content.strip():
                    yield Line(file=file, number=number, offset=offset, content=content)
                offset += len(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; expected lines of JSON") from error


def _answered(record: Comparison, answer: tuple[Message, ...]) -> Chat:
    weights = (0.0,) * len(record.prompt) + (1.0,) * len(answer)
    return Chat(messages=(*record.prompt, *answer), weights=weights)
