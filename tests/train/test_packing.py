"""Packing: nothing is lost, nothing twice, nothing across a border; and what each token has behind it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.train.examples import Example
from gptoss_jax.train.packing import first_fit, row_of, stack

ROOMS = st.integers(1, 40)


@st.composite
def lengths_in_a_room(draw: st.DrawFn) -> tuple[list[int], int]:
    room = draw(ROOMS)
    return draw(st.lists(st.integers(1, room), max_size=60)), room


def example_of(length: int, *, first: int, differs: bool = False) -> Example:
    """Ids that no other example has, weights that tell their places."""
    ids = np.arange(first, first + length, dtype=np.int32)
    weights = np.arange(length, dtype=np.float32)
    said = ids + 1000 if differs else None
    return Example(ids=ids, weights=weights, source=f"f:{first}", said=said)


def segments(row) -> list[tuple[int, int]]:
    """(begin, end) of each segment, read off the row alone."""
    begins = [i for i in range(len(row.tokens)) if row.is_real[i] and row.starts[i] == i]
    ends = [*begins[1:], int(row.is_real.sum())] if begins else []
    return list(zip(begins, ends, strict=True))


@given(lengths_in_a_room())
def test_every_example_lies_in_one_row_whole(case):
    lengths, room = case
    rows = first_fit(np.array(lengths, np.int64), room=room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= room for total in sums)
    # First-fit opens no row while another has room: so no two rows could be one, and all but one are over half full.
    assert sum(2 * total <= room for total in sums) <= 1


@given(lengths_in_a_room())
def test_no_token_is_lost_and_none_is_twice(case):
    lengths, room = case
    offsets = np.cumsum([0, *lengths])
    examples = [example_of(length, first=int(offset)) for length, offset in zip(lengths, offsets, strict=False)]
    rows = [
        row_of([examples[i] for i in row], length=room) for row in first_fit(np.array(lengths, np.int64), room=room)
    ]
    found = []
    for row in rows:
        for begin, end in segments(row):
            assert (row.starts[begin:end] == begin).all()
            assert (np.diff(row.tokens[begin:end]) == 1).all()  # one example, in order
            assert int(row.tokens[begin]) in offsets
            found.append(row.tokens[begin:end])
        assert row.is_real.sum() == sum(end - begin for begin, end in segments(row))
    assert sorted(np.concatenate(found).tolist() if found else []) == list(range(int(offsets[-1])))


def test_a_row_in_full():
    """As the picture in batch.py: what follows, what counts, where a segment begins, what is padding."""
    examples = [example_of(4, first=10), example_of(1, first=20), example_of(3, first=30, differs=True)]
    row = row_of(examples, length=10)
    assert row.tokens.tolist() == [10, 11, 12, 13, 20, 30, 31, 32, 0, 0]
    assert row.targets.tolist() == [11, 12, 13, 0, 0, 1031, 1032, 0, 0, 0]
    assert row.weights.tolist() == [1, 2, 3, 0, 0, 1, 2, 0, 0, 0]
    assert row.starts.tolist() == [0, 0, 0, 0, 4, 5, 5, 5, 8, 9]
    assert row.is_real.tolist() == [True] * 8 + [False] * 2
    assert row.sources == ("f:10", "f:20", "f:30")


def test_a_row_of_padding_counts_nothing():
    row = row_of((), length=3)
    assert not row.is_real.any()
    assert not row.weights.any()
    assert row.starts.tolist() == [0, 1, 2]


def test_rows_as_a_batch():
    rows = [row_of([example_of(3, first=1)], length=4), row_of([], length=4)]
    batch = stack(rows)
    assert np.asarray(batch.tokens).tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]
    kinds = [np.asarray(leaf).dtype.name for leaf in (batch.tokens, batch.targets, batch.weights, batch.starts)]
    assert kinds == ["int32", "int32", "float32", "int32"]
    assert np.asarray(batch.is_real).dtype == bool


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 4, 3, 3, 1], [[0, 2], [1, 3, 4]]),
        ([1, 3, 3, 4, 5], [[4, 1], [3, 2, 0]]),
        ([8, 8], [[0], [1]]),
        ([], []),
    ],
)
def test_the_longest_come_first(lengths, rows):
    assert first_fit(np.array(lengths, np.int64), room=8) == rows
