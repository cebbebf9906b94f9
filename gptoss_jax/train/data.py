"""What a run is trained on: files in, batches out, from any place on. Knows lines, examples, rows; knows no model.

    files ─► lines ─► examples, counted, their lengths kept ─► order ─► rows of a window ─► batches ─► share of a host
             └── read once, when the data is opened ──┘        └── as often as it takes, from a position ──┘

Opening reads and renders everything, so that a mistake on the last line is found before the first step. From then on
lengths alone decide what lies where, and only the rows that this host has are made. Examples stay in memory as long as
they are few; beyond that their lines are read again.

With preferences a pair is two rows, the chosen answer and below it the rejected one, each alone in its row.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import System
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.examples import Maker, read_lines
from gptoss_jax.train.index import Dropped, Index, Reason, Unit, examples_of
from gptoss_jax.train.masks import LossWeights, Part
from gptoss_jax.train.order import Position, Share, shuffled
from gptoss_jax.train.packing import Row, first_fit, row_of, stack
from gptoss_jax.train.records import Reader

logger = logging.getLogger(__name__)

BEGINNING = Position()
_ALL_ROWS = Share()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How lines become rows.

    Attributes:
        row_length: tokens of a row.
        loss: how much tokens count.
        too_long: what happens to an example of more tokens: an error, or it is dropped and counted. None is cut.
        system: the first message of conversations; lines may say otherwise.
        ignored: keys of lines and messages that are passed over.
        shuffle: examples come in another order each epoch; otherwise in that of the files.
        seed: of the shuffle.
        window: examples that are packed together. More waste less, and take longer to pack: 4,096 of them 50 ms.
        kept_tokens: examples stay in memory where all together have no more tokens; each takes some 10 bytes.
    """

    row_length: int
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)
    too_long: Literal["error", "drop"] = "error"
    system: System = dataclasses.field(default_factory=System)
    ignored: frozenset[str] = frozenset()
    shuffle: bool = True
    seed: int = 0
    window: int = 1024
    kept_tokens: int = 32_000_000

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.window < 1 or self.seed < 0:
            raise UserError(
                f"row_length is {self.row_length}, window {self.window} and seed {self.seed}; "
                "expected at least 2, 1 and 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What the files hold.

    Attributes:
        lines: that are not blank.
        units: what is shuffled: examples, or pairs of them.
        tokens: of all examples.
        trained: tokens that count, by part.
        longest: tokens of the longest example that is trained.
        dropped: what is not trained, and why.
        rows: of the first epoch; another may have some more or fewer.
        efficiency: tokens of examples / tokens of those rows.
        digest: SHA-256 of the lines.
    """

    lines: int
    units: int
    tokens: int
    trained: Mapping[Part, int]
    longest: int
    dropped: Mapping[Reason, Dropped]
    rows: int
    efficiency: float
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batched:
    """A batch, or a host's share of it.

    Attributes:
        sources: the lines in each of its rows, "file.jsonl:12".
        following: the position of the batch behind it.
    """

    batch: Batch
    sources: tuple[tuple[str, ...], ...]
    following: Position


class Dataset:
    """Rows of examples, in an order that the seed and the position alone decide.

    Attributes:
        settings: as given.
        is_paired: whether it has preferences: rows 2k and 2k + 1 are a chosen answer and a rejected one.
        report: what the files hold.
    """

    def __init__(self, index: Index, settings: Settings):
        self.settings = settings
        self.is_paired = bool(index.is_paired)
        self._index = index
        self._lengths = np.array(index.lengths, np.int64)
        self._latest: tuple[int, Int64[np.ndarray, " n"]] | None = None  # an epoch and its order
        self.report = _report(index, rows=self.num_rows(0), row_length=settings.row_length)

    @classmethod
    def open(cls, files: Sequence[Path], tokenizer: Tokenizer, settings: Settings) -> "Dataset":
        """Reads all files.

        Raises:
            UserError: a file or a line cannot be used, or nothing is left to train.
        """
        reader = Reader(system=settings.system, ignored=settings.ignored)
        maker = Maker(tokenizer=tokenizer, loss=settings.loss, reader=reader)
        index = Index(files, maker, row_length=settings.row_length, kept_tokens=settings.kept_tokens)
        for number, file in enumerate(files):
            for line in read_lines(file):
                index.add(line, file=number)
        _check(index, files, settings)
        return cls(index, settings)

    @property
    def rows_at_once(self) -> int:
        """Rows that stay together: 2 of a pair."""
        return 2 if self.is_paired else 1

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        return self.rows_at_once * sum(len(self._packed(epoch, window)) for window in range(self._num_windows))

    def num_batches(self, rows_per_batch: int, *, epochs: int) -> int:
        """Batches in so many epochs; the last may be filled up with padding."""
        return -(-sum(self.num_rows(epoch) for epoch in range(epochs)) // rows_per_batch)

    def rows(
        self, position: Position = BEGINNING, *, epochs: int | None = None
    ) -> Iterator[tuple[list[Row], Position]]:
        """(a row or the two of a pair, the position behind), from a position on, without end or to that of an epoch.

        Raises:
            UserError: these data have no such position.
        """
        for units, following in self._places(position, epochs):
            yield self._made(units), following

    def batches(
        self,
        position: Position = BEGINNING,
        *,
        rows_per_batch: int,
        epochs: int | None = None,
        share: Share = _ALL_ROWS,
    ) -> Iterator[Batched]:
        """Batches from a position on. They run across the ends of epochs; only the very last is filled with padding.

        Args:
            rows_per_batch: of all hosts together.
            epochs: where they end; None goes on without end.
            share: which rows of each batch are made here.
        """
        together = self.rows_at_once
        own = share.of(rows_per_batch, at_once=together)
        padding = row_of((), length=self.settings.row_length)
        places = self._places(position, epochs)
        while batch := list(itertools.islice(places, rows_per_batch // together)):
            here = batch[own.start // together : own.stop // together]
            rows = [row for units, _ in here for row in self._made(units)]
            rows += [padding] * (own.stop - own.start - len(rows))
            yield Batched(batch=stack(rows), sources=tuple(row.sources for row in rows), following=batch[-1][1])

    def units(self, *, epoch: int = 0) -> Iterator[Unit]:
        """Examples or pairs, one at a time, as an epoch takes them into its windows."""
        return (self._index.fetch(int(unit)) for unit in self._order(epoch))

    @property
    def _num_windows(self) -> int:
        return -(-len(self._lengths) // self.settings.window)

    def _places(self, position: Position, epochs: int | None) -> Iterator[tuple[list[int], Position]]:
        """(the units of a row, the position behind it)."""
        while epochs is None or position.epoch < epochs:
            packed = self._packed(position.epoch, position.window)
            if position.row >= len(packed):
                raise UserError(
                    f"the position in the data is row {position.row} of window {position.window} in epoch "
                    f"{position.epoch}; expected a window below {self._num_windows} and a row below {len(packed)}: "
                    "these are other data than those that it was saved with"
                )
            for units in packed[position.row :]:
                position = self._behind(position, rows=len(packed))
                yield units, position

    def _behind(self, position: Position, *, rows: int) -> Position:
        """The next position; each place has one alone, so that positions can be compared."""
        if position.row + 1 < rows:
            return dataclasses.replace(position, row=position.row + 1)
        if position.window + 1 < self._num_windows:
            return Position(epoch=position.epoch, window=position.window + 1)
        return Position(epoch=position.epoch + 1)

    def _packed(self, epoch: int, window: int) -> list[list[int]]:
        """The units in each row of a window, in the order in which rows come; a pair counts as a row."""
        size = self.settings.window
        units = self._order(epoch)[window * size : (window + 1) * size]
        if self.is_paired:
            return [[int(unit)] for unit in units]
        rows = [[int(units[i]) for i in row] for row in first_fit(self._lengths[units], room=self.settings.row_length)]
        if not self.settings.shuffle:
            return rows
        # First-fit leaves the fullest rows in front, and batches of one window must not tell its beginning.
        return [rows[i] for i in shuffled(len(rows), seed=self.settings.seed, epoch=epoch, window=window)]

    def _order(self, epoch: int) -> Int64[np.ndarray, " n"]:
        if not self.settings.shuffle:
            return np.arange(len(self._lengths))
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, shuffled(len(self._lengths), seed=self.settings.seed, epoch=epoch)
        return self._latest[1]

    def _made(self, units: Sequence[int]) -> list[Row]:
        """The row of these units, or the two of a pair."""
        examples = [example for unit in units for example in examples_of(self._index.fetch(unit))]
        rows = [[example] for example in examples] if self.is_paired else [examples]
        return [row_of(row, length=self.settings.row_length) for row in rows]


def _check(index: Index, files: Sequence[Path], settings: Settings) -> None:
    """Tells of what is dropped. Raises UserError where it must not be, or nothing is left."""
    dropped = index.dropped
    if "too long" in dropped and settings.too_long == "error":
        raise UserError(
            f"{dropped['too long'].count} examples have more than row_length={settings.row_length} tokens, the longest "
            f"{index.longest_dropped} ({dropped['too long']}); make rows longer, or set too_long to drop"
        )
    for reason, found in dropped.items():
        logger.warning("examples that are %s are dropped: %d (%s)", reason, found.count, found)
    if not index.lengths:
        reasons = "".join(f", {found.count} {reason}" for reason, found in dropped.items())
        raise UserError(
            f"{', '.join(map(str, files)) or 'no file'}: expected something to train, found {index.num_lines} lines "
            f"and no example that can be{reasons}; check the files, row_length and the loss weights"
        )


def _report(index: Index, *, rows: int, row_length: int) -> Report:
    return Report(
        lines=index.num_lines,
        units=len(index.lengths),
        tokens=index.num_tokens,
        trained=dict(index.trained),
        longest=max(index.lengths),
        dropped=index.dropped,
        rows=rows,
        efficiency=index.num_tokens / (rows * row_length),
        digest=index.digest,
    )
