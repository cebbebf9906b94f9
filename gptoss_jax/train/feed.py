"""The batches of a run, from its data. Knows datasets and settings; knows no devices and no model."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.data import Dataset
from gptoss_jax.train.loop import Fed
from gptoss_jax.train.order import Position, Share
from gptoss_jax.train.settings import data_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFeed:
    """What steps and evaluations read.

    Attributes:
        train: shuffled anew each epoch.
        held_out: in the order of its files; None where there are none.
        rows: of a batch, of all processes together.
        accumulate: batches of a step.
        share: of this process.
        epochs: at whose end the data ends; None goes on for ever.
    """

    train: Dataset
    held_out: Dataset | None
    rows: int
    accumulate: int
    share: Share
    epochs: int | None

    @classmethod
    def open(cls, config: TrainConfig, tokenizer: Tokenizer, *, share: Share) -> "DataFeed":
        """Reads all files.

        Raises:
            UserError: a file or a line cannot be used, nothing is left to train, or it is of another objective.
        """
        settings = data_settings(config.data, seed=config.loop.seed)
        train = Dataset.open([Path(file) for file in config.data.files], tokenizer, settings)
        held_out = None
        if config.data.evaluation:
            in_order = dataclasses.replace(settings, shuffle=False)
            held_out = Dataset.open([Path(file) for file in config.data.evaluation], tokenizer, in_order)
        for name, dataset in (("data.files", train), ("data.evaluation", held_out)):
            if dataset is not None:
                _check_objective(name, dataset, config)
        loop = config.loop
        return cls(
            train=train,
            held_out=held_out,
            rows=loop.rows,
            accumulate=loop.accumulate,
            share=share,
            epochs=loop.epochs,
        )

    def num_steps(self) -> int:
        """Of all epochs."""
        assert self.epochs is not None
        return self.train.num_batches(self.rows * self.accumulate, epochs=self.epochs)

    def start(self) -> Mapping[str, Any]:
        return self._said(Position())

    def batches(self, position: Mapping[str, Any]) -> Iterator[Fed]:
        """
        Raises:
            UserError: the position is of other data.
        """
        if position.get("digest") != self.train.report.digest:
            raise UserError(
                "data.files have changed since the run was saved: put back what they were, or begin another run"
            )
        begin = Position.from_json({key: value for key, value in position.items() if key != "digest"})
        together = self.rows * self.accumulate
        for found in self.train.batches(begin, rows_per_batch=together, epochs=self.epochs, share=self.share):
            yield Fed(
                batch=jax.tree.map(self._apart, found.batch),
                sources=[source for row in found.sources for source in row],
                position=self._said(found.following),
                epoch=self._epoch(found.following),
            )

    def evaluation(self) -> Iterator[Batch]:
        """All of it, once; the last batch is filled up with padding."""
        if self.held_out is not None:
            for found in self.held_out.batches(rows_per_batch=self.rows, epochs=1, share=self.share):
                yield found.batch

    def _apart(self, rows: np.ndarray) -> np.ndarray:
        """[A·B T] as [A B T]."""
        return rows.reshape(self.accumulate, -1, rows.shape[-1])

    def _said(self, position: Position) -> Mapping[str, Any]:
        return position.as_json() | {"digest": self.train.report.digest}

    def _epoch(self, position: Position) -> float:
        """How often the data has been seen, as if all windows had as many rows."""
        windows = -(-self.train.report.units // self.train.settings.window)
        rows_of_window = self.train.report.rows / self.train.rows_at_once / windows
        return position.epoch + (position.window + min(position.row / rows_of_window, 1)) / windows


def _check_objective(name: str, dataset: Dataset, config: TrainConfig) -> None:
    if dataset.is_paired and config.objective != "dpo":
        raise UserError(f'{name} holds preferences, chosen and rejected; expected objective = "dpo" for these')
    if not dataset.is_paired and config.objective == "dpo":
        raise UserError(f'{name} holds no preferences; with objective = "dpo" expected lines of chosen and rejected')
