"""What the files hold is counted, what cannot be trained is told of, and mistakes name their line."""

import dataclasses
import hashlib
import json
import logging
import re

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import System
from gptoss_jax.train.data import Dataset, Settings
from gptoss_jax.train.index import Dropped
from gptoss_jax.train.masks import LossWeights

# Letters and marks are tokens: CHAT has 26 of the system message, 8 of the user's and 19 of the assistant's.
ROW = 60
BARE = System(identity="", knowledge_cutoff=None, channels=())
SHORT = Settings(row_length=ROW, system=BARE)
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LONG = {"messages": [{"role": "user", "content": "q" * ROW}, {"role": "assistant", "content": "a"}]}
MASKED = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
EMPTY = {"text": ""}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture
def written(tmp_path):
    """Writes entries as the lines of a file."""

    def write(*entries, name: str = "a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
        return path

    return write


def test_what_the_files_hold(written, letters):
    first, second = written(CHAT, {"text": "abc"}), written({"prompt": "ab", "completion": "c"}, CHAT, name="b.jsonl")
    report = Dataset.open([first, second], letters, SHORT).report
    assert report.lines == report.units == 4
    assert report.trained == {"final": 2, "text": 4, "stop": 4}
    assert report.dropped == {}
    assert (report.tokens, report.longest) == (53 + 5 + 5 + 53, 53)
    assert report.rows == 2
    assert report.efficiency == 116 / 120
    assert report.digest == hashlib.sha256(first.read_bytes() + second.read_bytes()).hexdigest()


def test_what_is_dropped_is_counted_and_told(written, letters, caplog):
    path = written(CHAT, EMPTY, LONG, MASKED, EMPTY, LONG, LONG, LONG)
    with caplog.at_level(logging.WARNING):
        report = Dataset.open([path], letters, dataclasses.replace(SHORT, too_long="drop")).report
    assert (report.lines, report.units) == (8, 1)
    assert report.dropped == {
        "empty": Dropped(2, (f"{path}:2", f"{path}:5")),
        "too long": Dropped(4, (f"{path}:3", f"{path}:6", f"{path}:7")),
        "masked": Dropped(1, (f"{path}:4",)),
    }
    assert [record.getMessage() for record in caplog.records] == [
        f"examples that are empty are dropped: 2 ({path}:2, {path}:5)",
        f"examples that are too long are dropped: 4 ({path}:3, {path}:6, {path}:7, …)",
        f"examples that are masked are dropped: 1 ({path}:4)",
    ]


def test_of_a_conversation_one_example_may_be_too_long(written, letters):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}]
    path = written({"messages": turn + turn})
    settings = dataclasses.replace(SHORT, row_length=80, too_long="drop")
    dataset = Dataset.open([path], letters, settings)
    assert dataset.report.units == 1
    assert dataset.report.dropped == {"too long": Dropped(1, (f"{path}:1",))}
    (kept,) = dataset.units()
    again = next(Dataset.open([path], letters, dataclasses.replace(settings, kept_tokens=0)).units())
    assert again.ids.tolist() == kept.ids.tolist()


def test_a_pair_is_dropped_whole(written, letters):
    path = written(PAIR, {**PAIR, "rejected": "b" * ROW})
    dataset = Dataset.open([path], letters, dataclasses.replace(SHORT, too_long="drop"))
    assert dataset.report.dropped == {"too long": Dropped(1, (f"{path}:2",))}
    assert (dataset.report.units, dataset.report.rows) == (1, 2)
    assert dataset.report.trained == {"final": 2, "stop": 2}


def test_what_is_too_long_is_an_error_unless_it_is_to_be_dropped(written, letters):
    path = written(CHAT, *[LONG] * 5)
    with pytest.raises(UserError) as error:
        Dataset.open([path], letters, SHORT)
    assert str(error.value) == (
        f"5 examples have more than row_length=60 tokens, the longest 112 "
        f"({path}:2, {path}:3, {path}:4, …); make rows longer, or set too_long to drop"
    )


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([], "found 0 lines and no example that can be; check"),
        ([EMPTY, MASKED], "found 2 lines and no example that can be, 1 empty, 1 masked; check"),
        ([LONG], "found 1 lines and no example that can be, 1 too long; check"),
    ],
)
def test_nothing_is_left(written, letters, entries, found):
    path = written(*entries)
    with pytest.raises(UserError, match=re.escape(f"{path}: expected something to train, {found}")):
        Dataset.open([path], letters, dataclasses.replace(SHORT, too_long="drop"))


def test_loss_weights_that_leave_nothing(written, letters):
    with pytest.raises(
        UserError, match=r"no example that can be, 1 masked; check the files, row_length and the loss weights"
    ):
        Dataset.open([written(CHAT)], letters, dataclasses.replace(SHORT, loss=LossWeights(final=0)))


def test_preferences_have_files_of_their_own(written, letters):
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: expected no chosen and rejected as in the lines before, found"
    ):
        Dataset.open([written(CHAT, PAIR)], letters, SHORT)
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: expected chosen and rejected as in the lines before, found n"
    ):
        Dataset.open([written(PAIR, CHAT)], letters, SHORT)


def test_the_last_line_is_read_before_anything_is_trained(written, letters):
    path = written(*[CHAT] * 20, {"messages": "none"})
    with pytest.raises(UserError, match=re.escape(f"{path}, line 21: messages is 'none'; expected a list")):
        Dataset.open([path], letters, SHORT)


def test_a_file_that_changes_is_noticed(written, letters):
    path = written(CHAT, CHAT)
    dataset = Dataset.open([path], letters, dataclasses.replace(SHORT, kept_tokens=0))
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(
        UserError, match=r"a\.jsonl, line [12]: it has changed since the data were opened; begin the run anew"
    ):
        list(dataset.units())


@pytest.mark.parametrize("wrong", [{"row_length": 1}, {"window": 0}, {"seed": -1}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match="expected at least 2, 1 and 0"):
        Settings(**({"row_length": 8} | wrong))
