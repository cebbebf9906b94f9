"""The tokenizer against tiktoken, openai-harmony and Hugging Face's tokenizers, on the real ranks where they lie."""

import base64
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import (
    O200K_CACHE_NAME,
    O200K_PATTERN,
    Tokenizer,
    load_tokenizer,
    write_byte_tokenizer,
)

SPECIALS = ("<|return|>", "<|call|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")

# What tokenizers get wrong: cut words, contractions, digits in threes, runs of blanks, marks, scripts without blanks,
# emoji of several code points, and text that looks like a special token.
SAMPLES = (
    "",
    " ",
    "I'll say it's 1234567.89, SHE'D said; don't o'clock 'tis",
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # three\r\n\r\n\n   \n    pass\n",
    "ÄÖÜ straße ǅ naïve cafe\u0301 ﬃ Ⅷ ²³ ١٢٣٤",
    "東京は日本の首都です。 人工智能改变世界 한국어 문장",
    "नमस्ते दुनिया שָׁלוֹם مرحبا ไทยไม่มีช่องว่าง",
    "👩‍👩‍👧‍👦 🏳️‍🌈🇫🇷 👍🏽 \U0001f9ff",
    "a" * 300 + "  " * 77 + "\n" * 50 + "=" * 200,
    "https://example.org/a/b?c=d&e=%20#f //\n///\r\n",
    "\x00\x01\x7f\x85\xa0\xad\u200b\u2028\u3000\ufeff\ufffd\U0010ffff",
    "<|start|>system<|message|>no<|end|><|endofprompt|><|reserved_200018|> <|return",
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="aA'sStT09 \t\r\n/.-é東\u0301<|end>", max_size=60),
    st.lists(st.sampled_from(SAMPLES + SPECIALS), max_size=4).map("".join),
)


# --- the real ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ranks(ranks_file) -> dict[bytes, int]:
    lines = (line.split() for line in ranks_file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="session")
def judge(ranks_file) -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks_file.parent))
        return tiktoken.get_encoding("o200k_harmony")


@pytest.fixture(scope="session")
def release_json(ranks) -> dict:
    """tokenizer.json as the release has it, but for its merges: 199,998 tokens and names up to 200,018."""
    names = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>"}
    names |= {200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>"}
    names |= {200018: "<|endofprompt|>"}
    added = [added_token(i, names.get(i, f"<|reserved_{i}|>")) for i in range(199998, 200019)]
    return tokenizer_json({byte_level(token): rank for token, rank in ranks.items()}, [], added)


@pytest.fixture(scope="session")
def release(ranks, release_json, tmp_path_factory) -> Path:
    """A folder with that file and its 446,189 merges."""
    folder = tmp_path_factory.mktemp("release")
    merges = all_merges(ranks)
    assert len(merges) == 446_189
    write_json(folder, release_json | {"model": release_json["model"] | {"merges": merges}})
    return folder


@pytest.fixture(scope="session")
def real(release) -> Tokenizer:
    return load_tokenizer(release)


def all_merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every way to make a token of two others, as `transformers` converts tiktoken files."""
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += [[byte_level(a), byte_level(b)] for a, b in sorted(cuts, key=lambda c: (ranks[c[0]], ranks[c[1]]))]
    return merges


def tokenizer_json(vocab: dict[str, int], merges: list, added_tokens: list[dict]) -> dict:
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": bytes_,
        "decoder": bytes_,
        "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges},
    }


def added_token(token_id: int, name: str) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": name, **flags}


def byte_level(token: bytes) -> str:
    return token.decode("latin-1").translate(BYTE_LEVEL)


def byte_level_table() -> dict[int, str]:
    """GPT-2's: a byte whose latin-1 character is visible stands for itself, the others count on from U+0100."""
    hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte).isspace()]
    return {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


BYTE_LEVEL = byte_level_table()


def write_json(folder: Path, content: dict) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_pattern_is_tiktokens(judge):
    assert judge._pat_str == O200K_PATTERN


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_agree_with_every_judge(real, judge, harmony, text):
    ids = real.encode(text)
    assert ids == judge.encode_ordinary(text)
    assert ids == harmony.encode(text, disallowed_special=())
    assert real.decode(ids) == text


@given(TEXTS)
def test_text_agrees_with_tiktoken_and_harmony(real, judge, harmony, text):
    ids = real.encode(text)
    assert ids == judge.encode_ordinary(text)
    assert ids == harmony.encode(text, disallowed_special=())
    assert real.decode(ids) == text
    assert all(real.name_of(token_id) is None for token_id in ids)


@given(st.lists(st.integers(0, 201_087), max_size=30))
def test_any_ids_decode_as_in_tiktoken(real, judge, ids):
    assert real.decode_bytes(ids) == judge.decode_bytes(ids)
    assert real.decode(ids) == judge.decode(ids, errors="replace")
    assert streamed(real, ids) == real.decode(ids)


def test_hugging_face_reads_the_same_ids_from_the_same_file(real, release):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(release / "tokenizer.json"))
    for text in SAMPLES[:-1]:  # it turns "<|end|>" in a text into the special token, which is the point of ours
        assert real.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    for name in SPECIALS:
        assert real.special(name) == theirs.token_to_id(name)


def test_specials_are_those_of_tiktoken_and_harmony(real, judge, harmony):
    assert real.vocab_size == judge.n_vocab == 201_088
    for token_id in range(199_998, 201_088):
        name = judge.decode([token_id])
        assert real.name_of(token_id) == name
        assert real.special(name) == token_id
        if token_id != 200_018:  # harmony has the reserved name there, tiktoken both; the release's file has this one
            assert harmony.decode([token_id]) == name
    assert real.name_of(200_018) == "<|endofprompt|>"
    with pytest.raises(UserError, match="reserved_200018"):
        real.special("<|reserved_200018|>")
    assert real.stop_ids == set(harmony.stop_tokens_for_assistant_actions())


def test_there_is_no_id_201088(real, harmony):
    assert harmony.decode([201_088])  # one too many: the release's embedding has no such row
    with pytest.raises(UserError, match=r"201088.*0 to 201087"):
        real.decode([201_088])


def test_a_special_token_beyond_the_embedding_is_refused(release_json, tmp_path):
    added = [*release_json["added_tokens"], added_token(201_088, "<|reserved_201088|>")]
    write_json(tmp_path, release_json | {"added_tokens": added})
    with pytest.raises(UserError, match="below 201088, found 201088"):
        load_tokenizer(tmp_path)


def test_a_file_that_claims_to_be_o200k_is_checked(release_json, tmp_path):
    vocab = release_json["model"]["vocab"]
    swapped = vocab | {"hello": vocab["Ġworld"], "Ġworld": vocab["hello"]}
    write_json(tmp_path, release_json | {"model": release_json["model"] | {"vocab": swapped}})
    with pytest.raises(UserError, match="claim to be o200k: expected sha256 446a9538"):
        load_tokenizer(tmp_path)


def test_without_tokenizer_json_tiktokens_cache_serves(real, ranks_file, tmp_path, monkeypatch):
    named = load_tokenizer(tmp_path, cache_dir=ranks_file.parent)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks_file.parent))
    found = load_tokenizer(None)
    for tokenizer in (named, found):
        assert tokenizer.vocab_size == real.vocab_size
        assert tokenizer.stop_ids == real.stop_ids
        assert all(tokenizer.name_of(i) == real.name_of(i) for i in range(199_990, 201_088))
        assert [tokenizer.encode(text) for text in SAMPLES] == [real.encode(text) for text in SAMPLES]


# --- no tokenizer to be had -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_with_neither_the_error_says_which_file_to_put_where(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    for part in (tmp_path / "tokenizer.json", tmp_path / "cache" / O200K_CACHE_NAME, "TIKTOKEN_CACHE_DIR"):
        assert str(part) in str(raised.value)


def test_with_caching_switched_off_nothing_is_looked_up(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(None)


def test_the_default_cache_is_tiktokens(tmp_path, monkeypatch):
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match=f"data-gym-cache/{O200K_CACHE_NAME}"):
        load_tokenizer(None)


def test_a_damaged_cache_file_is_named_and_left_alone(tmp_path):
    cached = tmp_path / O200K_CACHE_NAME
    cached.write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"expected o200k_base\.tiktoken with sha256"):
        load_tokenizer(None, cache_dir=tmp_path)
    assert cached.exists()  # tiktoken would have deleted it and gone to the network


def test_a_dangling_link_is_an_error_and_no_reason_to_look_elsewhere(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="expected a readable file"):
        load_tokenizer(tmp_path)


# --- the byte tokenizer -----------------------------------------------------------------------------------------------


@given(TEXTS)
def test_bytes_are_ids_and_text_never_becomes_special(letters, text):
    assert letters.encode(text) == list(text.encode())
    assert letters.decode(letters.encode(text)) == text


@pytest.mark.parametrize("vocab_size", [265, 352, 201_088, 201_091])
def test_a_written_tokenizer_has_the_size_asked_for(tmp_path, vocab_size):
    write_byte_tokenizer(tmp_path / "tokenizer.json", vocab_size)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert {tokenizer.name_of(i) for i in tokenizer.stop_ids} == {"<|return|>", "<|call|>"}
    expected = range(256, 265) if vocab_size < 201_088 else range(199_998, 201_088)
    assert all(tokenizer.special(name) in expected for name in (*SPECIALS, "<|constrain|>", "<|startoftext|>"))
    assert tokenizer.decode([vocab_size - 1])
    with pytest.raises(UserError, match=f"{vocab_size}: expected 0 to {vocab_size - 1}"):
        tokenizer.decode([vocab_size])


def test_large_byte_tokenizers_have_the_released_special_ids(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json", 201_088)
    tokenizer = load_tokenizer(tmp_path)
    released = {"<|return|>": 200_002, "<|start|>": 200_006, "<|end|>": 200_007, "<|call|>": 200_012}
    assert {name: tokenizer.special(name) for name in released} == released


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected at least 265.*found 264"):
        write_byte_tokenizer(tmp_path / "tokenizer.json", 264)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [265, 352, 201_088])
def test_hugging_face_loads_what_is_written(tmp_path, vocab_size):
    tokenizers = pytest.importorskip("tokenizers")
    write_byte_tokenizer(tmp_path / "tokenizer.json", vocab_size)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in SAMPLES[:-1]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert theirs.decode(ids) == text
    for name in SPECIALS:
        assert theirs.encode(name).ids == [ours.special(name)]
        assert theirs.id_to_token(ours.special(name)) == name


def test_unused_ids_decode_to_the_replacement_character(letters):
    assert letters.decode([104, 300, 105, 301]) == "h\ufffdi\ufffd"
    assert letters.name_of(300) is None


@pytest.mark.parametrize("token_id", [-1, 352, 2**40])
def test_ids_outside_the_vocabulary_are_named(letters, token_id):
    with pytest.raises(UserError, match=f"token id {token_id}: expected 0 to 351.*vocabulary of 352"):
        letters.decode([104, token_id])


def test_an_unknown_special_name_is_an_error(letters):
    with pytest.raises(UserError, match="refuse"):
        letters.special("<|refuse|>")


def test_lone_surrogates_become_the_replacement_character(letters):
    assert letters.decode(letters.encode("a\ud83db")) == "a\ufffdb"


def test_a_run_of_blanks_that_would_crash_the_pattern_is_refused(letters):
    with pytest.raises(UserError, match="at most 500000 whitespace characters in a row, found 1000000"):
        letters.encode("a" + " " * 1_000_000 + "b")
    text = ("a" + " " * 299_999) * 3 + "b"  # a long text of shorter runs goes through
    assert letters.encode(text) == list(text.encode())


# --- streaming --------------------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(token_id) for token_id in ids) + stream.finish()


@given(st.lists(st.one_of(st.integers(0, 351), st.sampled_from([0xE6, 0x9D, 0xB1, 0xF0, 0x9F])), max_size=40))
def test_a_stream_gives_what_decode_gives(letters, ids):
    assert streamed(letters, ids) == letters.decode(ids)


def test_a_stream_speaks_at_the_end_of_each_character(letters):
    stream = letters.stream()
    pieces = [stream.push(token_id) for token_id in "a東🇫".encode()]
    assert pieces == ["a", "", "", "東", "", "", "", "🇫"]
    assert stream.finish() == ""


def test_a_stream_can_be_used_again_after_its_end(letters):
    stream = letters.stream()
    assert stream.push(0xE6) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(0x61) == "a"


# --- other vocabularies -----------------------------------------------------------------------------------------------


def small_json(words: list[str], merges: list) -> dict:
    """256 bytes at ids 0..255, then `words`, then one special token."""
    vocab = {byte_level(bytes([byte])): byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    return tokenizer_json(vocab, merges, [added_token(len(vocab), "<|return|>")])


@pytest.mark.parametrize("merges", [["t h", "Ġ th"], [["t", "h"], ["Ġ", "th"]]], ids=["text", "pairs"])
def test_merges_are_read_in_both_forms(tmp_path, merges):
    write_json(tmp_path, small_json(["th", "Ġth"], merges))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the th") == [256, 101, 257]
    assert tokenizer.decode([256, 101, 257]) == "the th"
    assert tokenizer.stop_ids == {258}


@pytest.mark.parametrize(
    ("words", "merges", "message"),
    [
        (["th", "he"], ["h e", "t h"], r"merges\[1\]: expected merges in the order .* found id 256 after id 257"),
        (["th", "he"], ["t h"], "expected a merge for every longer token, found none for 'he'"),
        (["th"], ["t h", "h e"], r"merges\[1\]: expected tokens of model.vocab, found 'he'"),
        (["th"], ["t h e"], r"merges\[0\]: expected two tokens, found 't h e'"),
        (["th"], [["t", 1]], r"merges\[0\]: expected two tokens"),
        (["th"], {"t": "h"}, "model.merges: expected an array"),
        (["t h"], [], "expected the byte-level alphabet, found ' ' in 't h'"),
        ([""], [], "expected tokens of one byte or more"),
    ],
)
def test_a_vocabulary_that_tiktoken_would_read_otherwise_is_refused(tmp_path, words, merges, message):
    write_json(tmp_path, small_json(words, merges))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "type"), "Unigram", "model.type: expected 'BPE', found 'Unigram'"),
        (("model", "byte_fallback"), True, "model.byte_fallback: expected none"),
        (("normalizer",), {"type": "NFC"}, "normalizer: expected none"),
        (("pre_tokenizer",), {"type": "ByteLevel"}, "expected a Sequence of Split and ByteLevel"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"\p{L}+"}, "expected that of o200k"),
        (("pre_tokenizer", "pretokenizers", 0, "behavior"), "MergedWithNext", "expected 'Isolated'"),
        (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "expected add_prefix_space"),
        (("added_tokens", 0, "id"), 12, "expected one token for each id, found two with id 12"),
        (("added_tokens", 0, "id"), True, "expected an id from 0 to 2147483647, found True"),
        (("added_tokens", 0, "content"), "\n", "expected a printable name"),
        (("model", "vocab", "!"), 34, "expected one token for each id"),
        (("model", "vocab", "!"), 2**31, "expected an id from 0 to 2147483647, found 2147483648"),
        (("model", "vocab", "<|return|>"), 7, "expected id 257 as in added_tokens, found 7"),
    ],
)
def test_a_file_that_means_something_else_is_refused(tmp_path, path, value, message):
    content = small_json(["th"], ["t h"])
    *parents, last = path
    node = content
    for key in parents:
        node = node[key]
    node[last] = value
    write_json(tmp_path, content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_dropping_what_the_pattern_leaves_out_is_the_same_split(tmp_path):
    content = small_json(["th"], ["t h"])
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    write_json(tmp_path, content)
    assert load_tokenizer(tmp_path).encode("the\x00") == [256, 101, 0]


def test_a_missing_byte_is_named(tmp_path):
    content = small_json([], [])
    del content["model"]["vocab"]["A"]
    write_json(tmp_path, content)
    with pytest.raises(UserError, match="expected all 256 single bytes, found none for byte 65"):
        load_tokenizer(tmp_path)


def test_a_trained_vocabulary_gives_hugging_faces_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_json(tmp_path, small_json([], []) | {"added_tokens": []})
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(SAMPLES[1:-1] * 3, trainer)
    theirs.add_special_tokens(["<|return|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 421
    for text in SAMPLES[:-1]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert not text or len(ids) < len(text.encode()) or len(text) < 2
