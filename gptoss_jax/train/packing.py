"""Examples in rows of one length, several in each. Knows lengths and arrays; knows no files and no order.

Every token of every example lies in one row, once, and an example lies in one row whole. Longest first, each goes into
the first row that has room (first-fit decreasing): what is left over is short and fills the gaps.

    room 8      5 4 3 3 1     ─►     5 3 | 4 3 1      what is no example is padding
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from gptoss_jax.train.batch import Batch
from gptoss_jax.train.examples import Example


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row of a batch, as batch.Batch has them, and the lines that lie in it."""

    tokens: Int32[np.ndarray, " T"]
    targets: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]
    starts: Int32[np.ndarray, " T"]
    is_real: Bool[np.ndarray, " T"]
    sources: tuple[str, ...] = ()


def first_fit(lengths: Int[np.ndarray, " n"], *, room: int) -> list[list[int]]:
    """Rows of numbers of `lengths`, each number once; a row's lengths sum up to at most `room`."""
    assert lengths.size == 0 or lengths.max() <= room, "what is too long is sorted out before"
    rows: list[list[int]] = []
    left = np.empty(lengths.size, np.int64)  # room of each row; there are no more rows than lengths
    for i in np.argsort(-lengths, kind="stable"):
        fits = left[: len(rows)] >= lengths[i]
        first = int(fits.argmax()) if fits.any() else len(rows)
        if first == len(rows):
            rows.append([])
            left[first] = room
        rows[first].append(int(i))
        left[first] -= lengths[i]
    return rows


def row_of(examples: Sequence[Example], *, length: int) -> Row:
    """One row with these examples one behind the other; without any, a row of padding."""
    tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
    weights, is_real = np.zeros(length, np.float32), np.zeros(length, bool)
    starts = np.arange(length, dtype=np.int32)
    begin = 0
    for example in examples:
        end = begin + len(example)
        assert end <= length, f"{end} tokens in a row of {length}"
        tokens[begin:end] = example.ids
        targets[begin : end - 1] = example.targets[1:]  # behind the last token of a segment there is nothing
        weights[begin : end - 1] = example.weights[1:]
        starts[begin:end] = begin
        is_real[begin:end] = True
        begin = end
    return Row(
        tokens=tokens,
        targets=targets,
        weights=weights,
        starts=starts,
        is_real=is_real,
        sources=tuple(example.source for example in examples),
    )


def stack(rows: Sequence[Row]) -> Batch:
    """The rows as a batch of NumPy arrays."""
    names = [field.name for field in dataclasses.fields(Batch)]
    arrays: dict[str, Any] = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    return Batch(**arrays)
