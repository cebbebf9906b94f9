"""The order of examples: the same at every attempt, on every machine; resumed where it stopped; shared out whole."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.train.data import BEGINNING, Dataset, Settings
from gptoss_jax.train.order import Position, Share, shuffled

ROW = 48
SHORT = Settings(row_length=ROW, window=7, seed=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """30 texts of 2 to 40 letters in two files."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": chr(97 + i % 26) * int(rng.integers(2, 40))}) for i in range(30)]
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    files[0].write_text("\n".join(lines[:11]) + "\n")
    files[1].write_text("\n".join(lines[11:]))
    return files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """9 pairs of answers."""
    file = tmp_path_factory.mktemp("pairs") / "p.jsonl"
    lines = [{"prompt": "q", "chosen": "a" * (i + 1), "rejected": "b" * (2 * i + 1)} for i in range(9)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return [file]


@pytest.fixture(scope="module")
def dataset(texts, letters):
    return Dataset.open(texts, letters, SHORT)


def lines_of(rows) -> list[tuple[str, ...]]:
    return [row.sources for row in rows]


def stream(dataset, position=BEGINNING, *, count: int):
    """(rows, position behind each) of the next `count` rows."""
    return list(itertools.islice(dataset.rows(position), count))


def test_an_order_that_no_version_may_change():
    assert shuffled(8, seed=0, epoch=0).tolist() == [7, 6, 3, 2, 4, 1, 5, 0]
    assert shuffled(8, seed=0, epoch=1).tolist() == [4, 6, 3, 5, 2, 1, 0, 7]
    assert shuffled(8, seed=2**40, epoch=0, window=0).tolist() == [3, 4, 0, 5, 6, 2, 7, 1]


@given(st.integers(0, 50), st.integers(0, 2**64), st.integers(0, 5), st.none() | st.integers(0, 3))
def test_each_number_comes_once(count, seed, epoch, window):
    assert sorted(shuffled(count, seed=seed, epoch=epoch, window=window).tolist()) == list(range(count))


def test_orders_differ():
    keys = itertools.product((0, 1), (0, 1), (None, 0, 1))
    orders = {tuple(shuffled(20, seed=seed, epoch=epoch, window=window)) for seed, epoch, window in keys}
    assert len(orders) == 12


def test_every_epoch_has_every_line_once_in_another_order(dataset, texts):
    everything = {
        f"{file}:{number}" for file, count in zip(texts, (11, 19), strict=True) for number in range(1, count + 1)
    }
    epochs = []
    for epoch in range(3):
        rows = [row for rows, _ in dataset.rows(Position(epoch=epoch), epochs=epoch + 1) for row in rows]
        assert len(rows) == dataset.num_rows(epoch)
        epochs.append([source for row in rows for source in row.sources])
        assert sorted(epochs[-1]) == sorted(everything)
    assert epochs[0] != epochs[1] != epochs[2]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_a_resumed_stream_is_the_uninterrupted_one(dataset, cuts):
    """Cut anywhere, also between epochs; the position goes through JSON each time."""
    whole = stream(dataset, count=70)
    position, done = BEGINNING, 0
    for cut in sorted(cuts):
        position = [position, *(behind for _, behind in stream(dataset, position, count=cut - done))][-1]
        done = cut
        position = Position.from_json(json.loads(json.dumps(position.as_json())))
    for (rows, behind), (wanted, wanted_behind) in zip(
        stream(dataset, position, count=70 - done), whole[done:], strict=True
    ):
        assert behind == wanted_behind
        for row, other in zip(rows, wanted, strict=True):
            assert lines_of([row]) == lines_of([other])
            assert (row.tokens == other.tokens).all()
            assert (row.weights == other.weights).all()


def test_positions_grow_and_no_place_has_two(dataset):
    positions = [BEGINNING, *(position for _, position in stream(dataset, count=60))]
    assert positions == sorted(set(positions))
    assert positions[dataset.num_rows(0)] == Position(epoch=1)


def test_lines_that_are_read_again_give_the_same_rows(dataset, texts, letters):
    again = Dataset.open(texts, letters, dataclasses.replace(SHORT, kept_tokens=0))
    assert again.report == dataset.report
    for (rows, _), (wanted, _) in zip(stream(again, count=40), stream(dataset, count=40), strict=True):
        assert (rows[0].tokens == wanted[0].tokens).all()


def test_without_shuffling_units_come_as_in_the_files(texts, letters):
    dataset = Dataset.open(texts, letters, Settings(row_length=ROW, window=4, shuffle=False))
    sources = [unit.source for unit in dataset.units()]
    assert sources == [f"{texts[0]}:{i}" for i in range(1, 12)] + [f"{texts[1]}:{i}" for i in range(1, 20)]
    first_window = {
        source
        for rows, position in dataset.rows(epochs=1)
        for row in rows
        for source in row.sources
        if position <= Position(window=1)
    }
    assert first_window == set(sources[:4])


# --- batches and hosts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_the_hosts_shares_are_the_batch(dataset, num_hosts):
    whole = list(dataset.batches(rows_per_batch=8, epochs=2))
    shares = [
        list(dataset.batches(rows_per_batch=8, epochs=2, share=Share(host=host, num_hosts=num_hosts)))
        for host in range(num_hosts)
    ]
    assert len(whole) == dataset.num_batches(8, epochs=2)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {part.following for part in parts} == {batch.following}
        assert tuple(itertools.chain(*(part.sources for part in parts))) == batch.sources
        joined = np.concatenate([np.asarray(part.batch.tokens) for part in parts])
        assert joined.shape == (8, ROW)
        assert (joined == np.asarray(batch.batch.tokens)).all()


def test_batches_are_the_stream_and_the_last_is_filled_up(dataset):
    rows = [row for rows, _ in dataset.rows(epochs=2) for row in rows]
    batches = list(dataset.batches(rows_per_batch=4, epochs=2))
    sources = [row for batch in batches for row in batch.sources]
    assert sources[: len(rows)] == lines_of(rows)
    missing = -len(rows) % 4
    assert sources[len(rows) :] == [()] * missing
    assert not np.asarray(batches[-1].batch.is_real)[4 - missing :].any()
    assert batches[-1].following == Position(epoch=2)


def test_a_batch_goes_on_where_the_last_one_ended(dataset):
    first, second, third = itertools.islice(dataset.batches(rows_per_batch=6), 3)
    again = next(iter(dataset.batches(first.following, rows_per_batch=6)))
    assert again.sources == second.sources
    assert again.following == second.following < third.following


def test_pairs_are_two_rows_and_stay_together(pairs, letters):
    dataset = Dataset.open(pairs, letters, Settings(row_length=256, window=4))
    assert dataset.is_paired
    assert dataset.num_rows(0) == 18
    sources = []
    for host in range(2):
        for batch in dataset.batches(rows_per_batch=4, epochs=1, share=Share(host=host, num_hosts=2)):
            for chosen, rejected in [batch.sources]:
                assert chosen == rejected
                sources += chosen
            texts = [letters.decode(np.asarray(row).tolist()) for row in np.asarray(batch.batch.tokens)]
            if batch.sources[0]:
                assert "final<|message|>a" in texts[0]
                assert "final<|message|>b" in texts[1]
    assert sorted(sources) == sorted(f"{pairs[0]}:{i}" for i in range(1, 10))


def test_a_batch_that_hosts_cannot_share(dataset):
    with pytest.raises(UserError, match="a batch has 6 rows, for 4 hosts; expected a multiple of 4"):
        next(dataset.batches(rows_per_batch=6, share=Share(host=0, num_hosts=4)))
    with pytest.raises(UserError, match="host 2 of 2: expected a number from 0 to 1"):
        Share(host=2, num_hosts=2)


# --- positions that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"epoch": 0, "window": 0}, "has epoch, window; expected epoch, window, row"),
        ({"epoch": 0, "window": 0, "row": -1}, "has row -1; expected a number from 0"),
        ({"epoch": 0, "window": "1", "row": 0}, "has window '1'; expected a number from 0"),
        ({"epoch": True, "window": 0, "row": 0}, "has epoch True; expected a number from 0"),
    ],
)
def test_a_saved_position_that_is_none(found, message):
    with pytest.raises(UserError, match=re.escape(f"the position in the data {message}")):
        Position.from_json(found)


@pytest.mark.parametrize("position", [Position(window=9), Position(row=99)])
def test_a_position_of_other_data(dataset, position):
    with pytest.raises(UserError, match="these are other data than those that it was saved with"):
        next(dataset.rows(position))
