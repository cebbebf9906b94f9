"""Text <-> ids: a tiktoken.Encoding built from a checkpoint's own tokenizer.json. Knows no model and no jax."""

import base64
import codecs
import hashlib
import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as shown  # cut to a few dozen characters: a file may hold anything
from typing import Any, TypeVar

import tiktoken

from gptoss_jax import nano
from gptoss_jax.errors import UserError

logger = logging.getLogger(__name__)

O200K_RANKS = 199_998
O200K_VOCAB_SIZE = 201_088  # the rows of the released embeddings; openai-harmony 0.0.8 counts one id too many
# Of the published o200k_base.tiktoken, and what tiktoken's cache calls that file: the sha1 of its address.
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
O200K_CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"

# How o200k cuts text into pieces before it merges bytes; tiktoken's pattern and the one in the released tokenizer.json.
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

_NAMED_SPECIALS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
    # tiktoken 0.14 also lists <|reserved_200018|>; one id has one name here, the one that the released file gives it.
    "<|endofprompt|>": 200_018,
}

_STOPS = ("<|return|>", "<|call|>")  # end of an answer, end of a tool call

# fancy-regex keeps one backtracking entry per character of `\s+(?!\S)` and panics at a million of them.
_LONGEST_WHITESPACE = 500_000

_T = TypeVar("_T")
_JSON_KINDS: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}


class Tokenizer:
    """Text to ids and back. Text never becomes a special token: those are only had by name, from `special`.

    Attributes:
        vocab_size: of all ids, those that are unused too.
        stop_ids: of harmony, where a model stops to speak: the end of an answer and that of a call.
        end_ids: those and the end of a text, of what the tokenizer has: a generation ends there.
    """

    def __init__(self, encoding: tiktoken.Encoding, *, specials: Mapping[str, int], vocab_size: int):
        self._encoding = encoding
        self._specials = dict(specials)
        self._names = {token_id: name for name, token_id in specials.items()}
        self.vocab_size = vocab_size
        self.stop_ids = frozenset(specials[name] for name in _STOPS if name in specials)
        self.end_ids = self.stop_ids | {specials[name] for name in ("<|endoftext|>",) if name in specials}

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text: "<|end|>" in it is seven characters like any others."""
        # Python's \s holds everything that the pattern's does, so no run that could panic slips through.
        longest = _longest_whitespace(text) if len(text) > _LONGEST_WHITESPACE else 0
        if longest > _LONGEST_WHITESPACE:
            raise UserError(
                f"text: expected at most {_LONGEST_WHITESPACE} whitespace characters in a row, "
                f"found {longest}; shorten the run"
            )
        return self._encoding.encode_ordinary(text)

    def special(self, name: str) -> int:
        """The id of a special token, such as "<|start|>"."""
        if name not in self._specials:
            raise UserError(
                f"special token {shown(name)}: expected one of the {len(self._specials)} that this tokenizer has, "
                "found no such name; the checkpoint needs the tokenizer.json of a gpt-oss release"
            )
        return self._specials[name]

    def name_of(self, token_id: int) -> str | None:
        """The name of a special token; None for an id of ordinary text or of no token."""
        return self._names.get(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which may end in the middle of a character."""
        return b"".join(map(self._bytes_of, ids))

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def _bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise UserError(
                f"token id {token_id}: expected 0 to {self.vocab_size - 1}, found an id outside the vocabulary of "
                f"{self.vocab_size}; use the tokenizer.json that belongs to this model"
            )
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except KeyError:  # a small tokenizer leaves ids unused, and a random model emits them
            return "\ufffd".encode()


class StreamDecoder:
    """Ids in, text out at the boundaries of UTF-8: a character cut over several tokens comes with its last one."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; often "" inside a character."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD. The decoder is then ready for a new text."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: str | Path | None, *, cache_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder; where it has no tokenizer.json, o200k from tiktoken's cache. No network.

    `cache_dir` is where tiktoken keeps its downloads, by default the place that tiktoken itself would look in.
    """
    path = None if folder is None else nano.find(folder) / "tokenizer.json"
    if path is not None and os.path.lexists(path):  # a dangling link is a damaged checkpoint, not a missing file
        return _from_json(path)
    return _from_cache(cache_dir or _tiktoken_cache_dir(), wanted=path)


def write_byte_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes a tokenizer.json whose ordinary tokens are the 256 bytes: for synthetic checkpoints, with no real one.

    From 201,088 ids on, special tokens have the released ids; below, they follow the bytes. Ids between are unused.
    """
    if vocab_size >= O200K_VOCAB_SIZE:
        specials = o200k_specials()
    else:
        order = ("return", "call", "endoftext", "start", "end", "message", "channel", "constrain", "startoftext")
        specials = {f"<|{word}|>": 256 + i for i, word in enumerate(order)}
    if vocab_size < 256 + len(specials):
        raise UserError(
            f"vocab_size={vocab_size} of a byte tokenizer: expected at least {256 + len(specials)} (256 bytes and "
            f"{len(specials)} special tokens), found {vocab_size}; choose a larger vocabulary"
        )
    if vocab_size - 1 > max(specials.values()):  # the highest id tells a reader how large the vocabulary is
        specials[f"<|reserved_{vocab_size - 1}|>"] = vocab_size - 1
    path.write_text(json.dumps(_byte_tokenizer_json(specials), ensure_ascii=False, indent=1), encoding="utf-8")


def o200k_specials() -> dict[str, int]:
    """Name -> id of o200k_harmony's special tokens, 199,998 to 201,087, one name for each."""
    names = {token_id: name for name, token_id in _NAMED_SPECIALS.items()}
    return {names.get(i, f"<|reserved_{i}|>"): i for i in range(O200K_RANKS, O200K_VOCAB_SIZE)}


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _from_json(path: Path) -> Tokenizer:
    root = _expect(path, "the file", _read_json(path), dict)
    model = _expect(path, "model", root.get("model"), dict)
    _check_settings(path, root, model)
    _check_pieces(path, root.get("pre_tokenizer"))
    specials = _read_specials(path, root.get("added_tokens", []))
    vocab = _read_vocab(path, model.get("vocab"), specials)
    ranks = _byte_ranks(path, vocab)
    if len(ranks) == O200K_RANKS:
        # The hash vouches for ids and order, so the file's half million merges need no second look.
        _check_o200k(path, ranks)
        specials = _with_reserved(path, specials)
    else:
        _check_merges(path, model.get("merges"), vocab)
    return _tokenizer(str(path), ranks, specials)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _broken(path, f"expected a readable file, found {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and overlong integers are ValueErrors too
        raise _broken(path, f"expected JSON, found {error}") from error


def _check_settings(path: Path, root: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuses whatever would make the file mean other ids than byte-level BPE gives. Post-processors are left alone:
    what goes around a text is the harmony format's to say."""
    if model.get("type") != "BPE":
        raise _broken(path, f"model.type: expected 'BPE', found {shown(model.get('type'))}")
    unset = {"normalizer": root.get("normalizer")}
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        unset[f"model.{key}"] = model.get(key)
    for key, value in unset.items():
        if value:
            raise _broken(path, f"{key}: expected none, as gpt-oss has none, found {shown(value)}")


def _check_pieces(path: Path, pre_tokenizer: Any) -> None:
    """The text must be cut by o200k's pattern, then mapped to the byte-level alphabet.

    Another pattern is refused, not tried: tiktoken silently drops text that a pattern leaves out, and panics on one
    that backtracks too far.
    """
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if not (isinstance(steps, list) and len(steps) == 2 and all(isinstance(step, dict) for step in steps)):
        raise _broken(path, "pre_tokenizer: expected a Sequence of Split and ByteLevel, found something else")
    split, byte_level = steps
    if (split.get("type"), byte_level.get("type")) != ("Split", "ByteLevel"):
        found = f"{shown(split.get('type'))} and {shown(byte_level.get('type'))}"
        raise _broken(path, f"pre_tokenizer: expected a Sequence of Split and ByteLevel, found {found}")
    if split.get("pattern") != {"Regex": O200K_PATTERN}:
        raise _broken(path, f"pre_tokenizer pattern: expected that of o200k, found {shown(split.get('pattern'))}")
    # The pattern matches every character, so keeping the rest as pieces of its own and dropping it are the same.
    if (split.get("behavior"), split.get("invert")) not in (("Isolated", False), ("Removed", True)):
        found = f"{shown(split.get('behavior'))} with invert={shown(split.get('invert'))}"
        raise _broken(path, f"pre_tokenizer Split: expected 'Isolated' with invert=False, found {found}")
    if byte_level.get("add_prefix_space") is not False or byte_level.get("use_regex") is not False:
        raise _broken(path, "pre_tokenizer ByteLevel: expected add_prefix_space and use_regex false, found otherwise")


def _read_specials(path: Path, added_tokens: Any) -> dict[str, int]:
    specials: dict[str, int] = {}
    for i, entry in enumerate(_expect(path, "added_tokens", added_tokens, list)):
        entry = _expect(path, f"added_tokens[{i}]", entry, dict)
        name = _expect(path, f"added_tokens[{i}].content", entry.get("content"), str)
        _check_ids(path, f"added_tokens[{i}].id", [entry.get("id")])
        if not name or not name.isprintable():
            raise _broken(path, f"added_tokens[{i}].content: expected a printable name, found {shown(name)}")
        if name in specials:
            raise _broken(path, f"added_tokens[{i}]: expected each name once, found {shown(name)} again")
        specials[name] = entry["id"]
    return specials


def _read_vocab(path: Path, vocab: Any, specials: dict[str, int]) -> dict[str, int]:
    """model.vocab without the special tokens, which some files list there as well."""
    vocab = _expect(path, "model.vocab", vocab, dict)
    _check_ids(path, "model.vocab", vocab.values())
    for name, token_id in specials.items():
        if vocab.get(name, token_id) != token_id:
            raise _broken(
                path, f"model.vocab[{shown(name)}]: expected id {token_id} as in added_tokens, found {vocab[name]}"
            )
    return {token: token_id for token, token_id in vocab.items() if token not in specials}


def _byte_ranks(path: Path, vocab: dict[str, int]) -> dict[bytes, int]:
    byte_of = _byte_level_alphabet()
    ranks: dict[bytes, int] = {}
    for token, token_id in vocab.items():
        try:
            ranks[bytes([byte_of[char] for char in token])] = token_id
        except KeyError as error:
            raise _broken(
                path, f"model.vocab: expected the byte-level alphabet, found {error.args[0]!r} in {shown(token)}"
            ) from error
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise _broken(path, f"model.vocab: expected all 256 single bytes, found none for byte {absent[0]}")
    if b"" in ranks:
        raise _broken(path, f"model.vocab: expected tokens of one byte or more, found an empty one, id {ranks[b'']}")
    return ranks


def _check_o200k(path: Path, ranks: dict[bytes, int]) -> None:
    found = _ranks_sha256(ranks)
    if found != O200K_SHA256:
        raise _broken(
            path, f"{O200K_RANKS} ranks claim to be o200k: expected sha256 {O200K_SHA256} of them, found {found}"
        )


def _with_reserved(path: Path, specials: dict[str, int]) -> dict[str, int]:
    """The file's names, and o200k's for the ids up to 201,087 that it leaves out (the release ends at 200,018)."""
    beyond = [name for name, token_id in specials.items() if token_id >= O200K_VOCAB_SIZE]
    if beyond:
        raise _broken(path, f"{shown(beyond[0])}: expected an id below {O200K_VOCAB_SIZE}, found {specials[beyond[0]]}")
    named = set(specials.values())
    return specials | {
        name: token_id for name, token_id in o200k_specials().items() if token_id not in named and name not in specials
    }


def _check_merges(path: Path, merges: Any, vocab: dict[str, int]) -> None:
    """tiktoken merges any two neighbours that form a token, lowest id first. That is what the file says where merges
    come in the order of the ids that they make and every longer token is made, as in any trained BPE."""
    made: set[int] = set()
    last = -1
    for i, merge in enumerate(_expect(path, "model.merges", merges, list)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            raise _broken(path, f"model.merges[{i}]: expected two tokens, found {shown(merge)}")
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise _broken(path, f"model.merges[{i}]: expected tokens of model.vocab, found {shown(token)}")
        if vocab[left + right] < last:
            raise _broken(
                path,
                f"model.merges[{i}]: expected merges in the order of the ids they make, "
                f"found id {vocab[left + right]} after id {last}",
            )
        last = vocab[left + right]
        made.add(last)
    unmade = [token for token, token_id in vocab.items() if len(token) > 1 and token_id not in made]
    if unmade:
        raise _broken(path, f"model.merges: expected a merge for every longer token, found none for {shown(unmade[0])}")


# --- tiktoken's cache -------------------------------------------------------------------------------------------------


def _tiktoken_cache_dir() -> Path | None:
    """Where tiktoken looks for its downloads: its own variables decide here too, or the two would disagree."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            return Path(os.environ[name]) if os.environ[name] else None  # empty: caching is off
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _from_cache(cache_dir: Path | None, *, wanted: Path | None) -> Tokenizer:
    """o200k_harmony from the file alone: tiktoken's own loader would delete a bad file and go to the network."""
    path = None if cache_dir is None else cache_dir / O200K_CACHE_NAME
    if path is None or not path.is_file():
        raise UserError(
            f"no tokenizer: expected {wanted or 'tokenizer.json in the checkpoint folder'} or tiktoken's cached "
            f"{path or O200K_CACHE_NAME}, found neither; copy the release's tokenizer.json into the checkpoint folder, "
            f"or put o200k_base.tiktoken, named {O200K_CACHE_NAME}, into a folder and set TIKTOKEN_CACHE_DIR to it"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found {error.strerror}; change its permissions") from error
    found = hashlib.sha256(content).hexdigest()
    if found != O200K_SHA256:
        raise UserError(
            f"{path}: expected o200k_base.tiktoken with sha256 {O200K_SHA256}, found {found}; replace the file"
        )
    lines = (line.split() for line in content.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return _tokenizer(str(path), ranks, o200k_specials())


# --- shared -----------------------------------------------------------------------------------------------------------


def _tokenizer(source: str, ranks: dict[bytes, int], specials: dict[str, int]) -> Tokenizer:
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) != len(ids):
        twice = next(token_id for token_id, times in Counter(ids).items() if times > 1)
        raise _broken(Path(source), f"expected one token for each id, found two with id {twice}")
    encoding = tiktoken.Encoding(source, pat_str=O200K_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    vocab_size = max(ids) + 1
    logger.info("tokenizer from %s: %d tokens, %d ids", source, len(ids), vocab_size)
    return Tokenizer(encoding, specials=specials, vocab_size=vocab_size)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's alphabet: visible latin-1 stands for itself, the other 68 bytes for U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def _ranks_sha256(ranks: dict[bytes, int]) -> str:
    """The hash of the .tiktoken file that would hold these ranks: a line "base64(token) rank" for each, in order."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = (b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in by_rank)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _byte_tokenizer_json(specials: dict[str, int]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": name, **flags} for name, token_id in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            # Hugging Face numbers added tokens in a row unless the vocabulary holds them too.
            "vocab": _byte_level_alphabet() | specials,
            "merges": [],
        },
    }


def _longest_whitespace(text: str) -> int:
    return max((len(run) for run in re.findall(r"\s+", text)), default=0)


def _expect(path: Path, where: str, value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise _broken(path, f"{where}: expected {_JSON_KINDS[kind]}, found {shown(value)}")
    return value


def _check_ids(path: Path, where: str, ids: Iterable[Any]) -> None:
    for value in ids:
        if type(value) is not int or not 0 <= value < 2**31:  # a bool is an int to isinstance; ids travel as int32
            raise _broken(path, f"{where}: expected an id from 0 to {2**31 - 1}, found {shown(value)}")


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; copy tokenizer.json again from the release that the checkpoint comes from")
