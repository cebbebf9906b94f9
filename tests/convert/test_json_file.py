"""JSON documents from strangers and of our own: one object or an error, written whole or not at all."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.convert.json_file import parse_object, read_object, write_object
from gptoss_jax.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES))
def test_what_the_json_library_writes_is_read(document):
    assert parse_object(json.dumps(document).encode(), name="it") == document


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789-.eEntf\\ul ', max_size=200).map(str.encode))
def test_whatever_the_bytes_are_an_object_or_a_user_error_comes(text):
    try:
        found = parse_object(text, name="it")
    except UserError as error:
        assert str(error).startswith("it: ")
    else:
        assert json.loads(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON, but"),
        (b'{"a": 1', "expected JSON, but Expecting ',' delimiter: line 1 column 8 (char 7); copy or download it again"),
        (b"[1]", "expected a JSON object, found b'[1]'"),
        (b"3", "expected a JSON object, found b'3'"),
        (b'{"a": 1, "b": 2, "a": 3}', "expected JSON, but key 'a' stands twice"),
        (b'{"outer": {"a": 1, "a": 1}}', "expected JSON, but key 'a' stands twice"),
        (b'{"a": NaN}', "expected JSON, but NaN is no JSON number"),
        (b'{"a": -Infinity}', "expected JSON, but -Infinity is no JSON number"),
        (b'{"a": "\xff"}', "expected JSON, but 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "expected JSON, but it is nested too deeply"),
        (b'{"a": ' + b"9" * (sys.get_int_max_str_digits() + 1) + b"}", "expected JSON, but"),
    ],
)
def test_a_bad_document_is_named_with_its_fault(text, message):
    with pytest.raises(UserError) as caught:
        parse_object(text, name="config.json")
    assert str(caught.value).startswith(f"config.json: {message}")
    assert len(str(caught.value)) < 400


def test_a_long_key_does_not_bury_the_message():
    text = json.dumps({"k" * 10_000: 1})[:-1] + ', "' + "k" * 10_000 + '": 2}'
    with pytest.raises(UserError, match="stands twice") as caught:
        parse_object(text.encode(), name="it")
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for path, reason in ((tmp_path / "none.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"{path}: cannot be read: {reason}"):
            read_object(path)


def test_a_huge_file_is_not_read(tmp_path: Path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(100_000_001)  # a hole: it takes no room on the disk
    with pytest.raises(UserError, match=r"has 100,000,001 bytes; expected a JSON document of at most 100,000,000"):
        read_object(tmp_path / "huge.json")


def test_a_document_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "plan.json"
    write_object(path, {"a": 1})
    with pytest.raises(TypeError):
        write_object(path, {"a": [2] * 1000, "b": object()})  # fails halfway
    assert read_object(path) == {"a": 1}
    write_object(path, {"a": "ü"})
    assert read_object(path) == {"a": "ü"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
