"""What the files hold, where it lies in them, and what of it cannot be trained. Knows lines; knows no rows, no order.

lines ─► examples, or pairs: the units ─► length, place ─┬─► all in memory as long as they are few
                      └─► dropped, counted               └─► else made anew when they are asked for
"""

import array
import dataclasses
import hashlib
import itertools
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from gptoss_jax.errors import UserError
from gptoss_jax.train.examples import Example, Line, Maker, Preference
from gptoss_jax.train.masks import Part

Unit: TypeAlias = Example | Preference
Reason: TypeAlias = Literal["too long", "empty", "masked"]

_SHOWN_SOURCES = 3


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Examples that are not trained for one reason: how many, and the first few lines that they come from."""

    count: int
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join((*self.sources, "…") if self.count > len(self.sources) else self.sources)


class Index:
    """Every unit, by its number; lines are added in the order of the files.

    Args:
        files: their lines come with the numbers of theirs among these.
        maker: makes examples of lines.
        row_length: tokens of an example at most.
        kept_tokens: examples stay in memory where all together have no more.

    Attributes:
        lengths: tokens of each unit.
        is_paired: whether units are preferences; None before the first line.
        num_lines: that were added.
        num_tokens: of all units.
        longest_dropped: tokens of the longest that is too long.
        trained: tokens that count, by part.
    """

    def __init__(self, files: Sequence[Path], maker: Maker, *, row_length: int, kept_tokens: int):
        self.lengths = array.array("q")
        self.is_paired: bool | None = None
        self.num_lines = self.num_tokens = self.longest_dropped = 0
        self.trained = Counter[Part]()
        self._files = list(files)
        self._maker = maker
        self._row_length = row_length
        self._kept_tokens = kept_tokens
        # Of each unit: its file, the number of its line, where that begins, which of the line's examples it is, and the
        # line's checksum.
        self._places = tuple(array.array("q") for _ in range(5))
        self._kept: list[Unit] | None = []
        self._dropped: dict[Reason, Counter[str]] = {}
        self._digest = hashlib.sha256()

    def add(self, line: Line, *, file: int) -> None:
        """Takes what a line has to train.

        Raises:
            UserError: the line cannot be used, or is a comparison among others, or the other way round.
        """
        self.num_lines += 1
        self._digest.update(line.content)
        made = self._maker.make(line)
        self._check_kind(isinstance(made, Preference), line)
        units, checksum = _units_of(made), zlib.crc32(line.content)
        if not units:
            self._drop("empty", line)
        for part, unit in enumerate(units):
            reason = self._reason(unit)
            if reason is None:
                self._take(unit, (file, line.number, line.offset, part, checksum))
            else:
                self._drop(reason, line)

    def fetch(self, unit: int) -> Unit:
        """The example or the pair; its line is read again unless all are in memory.

        Raises:
            UserError: the line is not what it was.
        """
        if self._kept is not None:
            return self._kept[unit]
        file, number, offset, part, checksum = (column[unit] for column in self._places)
        path = self._files[file]
        with path.open("rb") as lines:
            lines.seek(offset)
            line = Line(file=path, number=number, offset=offset, content=lines.readline())
        if zlib.crc32(line.content) != checksum:
            raise UserError(f"{path}, line {number}: it has changed since the data were opened; begin the run anew")
        return _units_of(self._maker.make(line))[part]

    @property
    def digest(self) -> str:
        """SHA-256 of the lines."""
        return self._digest.hexdigest()

    @property
    def dropped(self) -> Mapping[Reason, Dropped]:
        return {
            reason: Dropped(sum(sources.values()), tuple(itertools.islice(sources, _SHOWN_SOURCES)))
            for reason, sources in self._dropped.items()
        }

    def _check_kind(self, is_paired: bool, line: Line) -> None:
        if self.is_paired is not None and is_paired != self.is_paired:
            expected, found = ("chosen and rejected", "none") if self.is_paired else ("no chosen and rejected", "both")
            raise UserError(
                f"{line.file}, line {line.number}: expected {expected} as in the lines before, found {found}; "
                "keep preferences in files of their own"
            )
        self.is_paired = is_paired

    def _reason(self, unit: Unit) -> Reason | None:
        """Why it cannot be trained."""
        examples = examples_of(unit)
        if not all(map(len, examples)):
            return "empty"
        if not all(example.weights.any() for example in examples):
            return "masked"
        if len(unit) > self._row_length:
            self.longest_dropped = max(self.longest_dropped, len(unit))
            return "too long"
        return None

    def _take(self, unit: Unit, place: tuple[int, ...]) -> None:
        self.lengths.append(len(unit))
        for column, value in zip(self._places, place, strict=True):
            column.append(value)
        for example in examples_of(unit):
            self.num_tokens += len(example)
            self.trained.update(example.trained)
        if self._kept is not None:
            self._kept.append(unit)
        if self.num_tokens > self._kept_tokens:
            self._kept = None

    def _drop(self, reason: Reason, line: Line) -> None:
        self._dropped.setdefault(reason, Counter())[line.source] += 1


def examples_of(unit: Unit) -> tuple[Example, ...]:
    """One, or the two of a pair, the chosen one first."""
    return (unit.chosen, unit.rejected) if isinstance(unit, Preference) else (unit,)


def _units_of(made: list[Example] | Preference) -> Sequence[Unit]:
    return [made] if isinstance(made, Preference) else made
