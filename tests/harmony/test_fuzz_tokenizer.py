"""A tokenizer.json from anywhere either loads and round-trips text or is a UserError: no crash, no hang, no guess."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import load_tokenizer, write_byte_tokenizer

TEXT = "héllo <|end|> 東京 👍🏽\r\n  12345"

# What JSON can hold, Python's own extensions included (NaN, lone surrogates, integers of any size).
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "long" * 1_000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A small tokenizer.json with merges in both forms, as Python objects."""
    path = tmp_path_factory.mktemp("valid") / "tokenizer.json"
    write_byte_tokenizer(path, 352)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {"ll": 300, "llo": 301}
    content["model"]["merges"] = ["l l", ["ll", "o"]]
    return content


def loads_or_user_error(folder, content: bytes) -> bool:
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        message = str(error)
    else:
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT
        assert all(tokenizer.name_of(token_id) is None for token_id in ids)
        return True
    assert str(folder / "tokenizer.json") in message
    assert len(message) < 1_000  # a sentence, not the file
    return False


def places(node, path=()):
    """Every place in the file, but of the 256 byte tokens only a few."""
    yield path
    if isinstance(node, dict):
        keys = [key for key in node if len(node) < 200 or key in {"!", "Ġ", "ll", "llo", "<|end|>"}]
        for key in keys:
            yield from places(node[key], (*path, key))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from places(child, (*path, i))


def test_the_file_to_be_spoiled_is_good(folder, valid):
    assert loads_or_user_error(folder, json.dumps(valid).encode())


@given(st.binary(max_size=40))
def test_bytes(folder, content):
    assert not loads_or_user_error(folder, content)


@given(VALUES)
def test_any_json(folder, value):
    assert not loads_or_user_error(folder, json.dumps(value).encode())


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"model":' * 100_000, b"9" * 5_000, b'{"model": 1e999}'])
def test_deep_or_overlong_json(folder, content):
    assert not loads_or_user_error(folder, content)


@given(st.data())
def test_cut_short(folder, valid, data):
    content = json.dumps(valid).encode()
    assert not loads_or_user_error(folder, content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=500)  # a hundred places, removed or given any of ten kinds of value
@given(st.data())
def test_one_place_replaced_or_removed(folder, valid, data):
    content = copy.deepcopy(valid)
    *parents, last = data.draw(st.sampled_from([path for path in places(valid) if path]))
    node = content
    for key in parents:
        node = node[key]
    if data.draw(st.booleans()):
        del node[last]
    else:
        node[last] = data.draw(VALUES)
    loads_or_user_error(folder, json.dumps(content).encode())


@given(st.text(max_size=3), st.integers(-2, 400))
def test_a_token_more(folder, valid, token, token_id):
    content = copy.deepcopy(valid)
    content["model"]["vocab"][token] = token_id
    loads_or_user_error(folder, json.dumps(content).encode())


@given(st.text(max_size=6), st.integers(-2, 400))
def test_a_special_token_more(folder, valid, name, token_id):
    content = copy.deepcopy(valid)
    content["added_tokens"].append({"id": token_id, "content": name})
    loads_or_user_error(folder, json.dumps(content).encode())
