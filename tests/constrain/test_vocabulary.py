"""Masks over all ids of a vocabulary, each compared with what the bytes of each id say."""

import re

import numpy as np
import pytest

from gptoss_jax.constrain import Grammars
from gptoss_jax.engine.request import Constraint
from gptoss_jax.errors import UserError
from tests.constrain.blindly import allowed_ids


class Words:
    """A tokenizer of a few words, with an id that nothing uses and one that is U+FFFD itself."""

    names = ("return", "call", "endoftext", "start", "end", "message", "channel", "constrain")
    words = ("a", "b", "ab", "abc", "c", "\ufffd", "cab")

    def __init__(self):
        self.vocab_size = 32

    def encode(self, text):
        return [self.words.index(piece) for piece in re.findall("cab|abc|ab|a|b|c|\ufffd", text)]

    def decode_bytes(self, ids):
        return b"".join((self.name_of(i) or (*self.words, *[""] * 32)[i] or "\ufffd").encode() for i in ids)

    def name_of(self, token_id):
        return f"<|{self.names[token_id - 24]}|>" if token_id >= 24 else None


def test_ids_are_allowed_by_their_bytes():
    constraint = Grammars.of(Words()).whole(Grammars.of(Words()).regex("a(b|\ufffd)c?a"))()
    assert isinstance(constraint, Constraint)
    assert allowed_ids(constraint.mask()).tolist() == [0, 2, 3]  # a, ab, abc
    constraint.accept(0)
    assert allowed_ids(constraint.mask()).tolist() == [1, 5]  # b, U+FFFD; not the unused ids that are shown by it


def test_a_mask_is_as_long_as_the_models_vocabulary_asks():
    """The library's own is a word longer where 32 divides the vocabulary, as it does the released one."""
    for vocab_size, words in ((None, 1), (32, 1), (33, 2), (64, 2), (100, 4)):
        grammars = Grammars.of(Words(), vocab_size=vocab_size)
        mask = grammars.whole(grammars.regex("[^x]*"))().mask()
        assert (mask.shape, mask.dtype) == ((words,), np.uint32)
        assert allowed_ids(mask).tolist() == [0, 1, 2, 3, 4, 5, 6, 24]
    with pytest.raises(UserError, match="vocab_size is 31; expected at least the 32 ids of the tokenizer"):
        Grammars.of(Words(), vocab_size=31)


def test_text_that_is_the_only_one_possible_is_written_as_the_tokenizer_would():
    """A model has never seen it written otherwise."""
    grammars = Grammars.of(Words())
    constraint = grammars.whole(grammars.regex("abcab"))()
    assert allowed_ids(constraint.mask()).tolist() == [3]
    constraint.accept(3)
    assert allowed_ids(constraint.mask()).tolist() == [2]


def test_a_tokenizer_without_the_formats_tokens_is_refused():
    class Few(Words):
        def name_of(self, token_id):
            return None if token_id == 25 else super().name_of(token_id)

    with pytest.raises(UserError, match=r"the tokenizer has no special token <\|call\|>; expected all of the harmony"):
        Grammars.of(Few())


def test_bytes_that_are_no_text_are_never_allowed(tokenizer, grammars):
    mask = grammars.turn()().mask()
    assert allowed_ids(mask).tolist() == [ord(" "), tokenizer.special("<|channel|>")]
    free = grammars.whole(grammars.regex("(?s:.*)"))()
    first_bytes = {
        i for i in range(256) if any(bytes([i]) == chr(c).encode()[:1] for c in (i, 0x80, 0x7FF, 0xFFF, 0x10FFF))
    }
    assert first_bytes < set(allowed_ids(free.mask()).tolist())
    assert not set(range(0x80, 0xC2)) & set(allowed_ids(free.mask()).tolist())
    assert max(allowed_ids(free.mask())) == 256  # <|return|>; no other special token and none of the unused ids above


def test_the_real_vocabulary(o200k, o200k_grammars):
    """Of all 201,088 ids, those are allowed whose bytes may begin a text of the grammar."""
    constraint = o200k_grammars.whole(o200k_grammars.json_schema({"type": "string", "pattern": "^[a-z]{3}$"}))()
    assert constraint.mask().shape == (6284,)
    opening = {i for i in range(o200k.vocab_size) if re.fullmatch(rb'"[a-z]{0,3}|"[a-z]{3}"', o200k.decode_bytes([i]))}
    assert set(allowed_ids(constraint.mask()).tolist()) == opening
