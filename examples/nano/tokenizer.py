"""Trains a byte-level BPE on conversations and writes tokenizer.json. Knows bytes and counts; knows no model.

Text is cut as every gpt-oss cuts it, and merges stay within a piece. Digits are pieces of their own here, so no merge
holds one: what is to be added up digit by digit is read digit by digit. And a word that stands with a blank before it
as well as without one, "in Lima" and {"city":"Lima"}, has the same ids in both: what is to be copied looks alike.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import regex

from gptoss_jax.harmony.messages import Conversation
from gptoss_jax.harmony.render import render
from gptoss_jax.harmony.tokenizer import O200K_PATTERN, Tokenizer, load_tokenizer, write_byte_tokenizer

_NUM_SPECIALS = 9
_ALWAYS = 0.98  # how often a word stands behind a blank before the two become one token
_BLANKS_SHARE = 0.25  # of the merges, at most
Pair = tuple[bytes, bytes]


def train_tokenizer(conversations: Iterable[Conversation], path: Path, *, vocab_size: int) -> Tokenizer:
    """Writes tokenizer.json: 256 bytes, merges, and the special tokens of harmony behind them."""
    counts: Counter[bytes] = Counter()
    for conversation in conversations:
        counts.update(_pieces(conversation))
    words: Counter[bytes] = Counter()
    for piece, times in counts.items():
        words[_bare(piece)] += times
    number = vocab_size - 256 - _NUM_SPECIALS
    merges, most = merged(words, number), int(number * _BLANKS_SHARE)
    made = {left + right for left, right in merges[: number - most]}
    blanks = [(b" ", word) for word in _with_blanks(counts) if word in made][:most]
    _write(path, merges[: number - len(blanks)] + blanks)
    return load_tokenizer(path.parent)


def _bare(piece: bytes) -> bytes:
    """A word without the blank before it."""
    return piece[1:] if piece[:1] == b" " and piece[1:2].isalpha() else piece


def _with_blanks(counts: Counter[bytes]) -> list[bytes]:
    """Words that all but always stand behind a blank, the most frequent first."""
    behind = {piece[1:]: times for piece, times in counts.items() if _bare(piece) != piece}
    found = [word for word, times in behind.items() if times >= _ALWAYS * (times + counts[word])]
    return sorted(found, key=lambda word: (-behind[word], word))


def _pieces(conversation: Conversation) -> Iterator[bytes]:
    texts = _Texts()
    render(conversation, texts)
    for text in texts.seen:
        for piece in regex.findall(O200K_PATTERN, text):
            yield from (sign.encode() for sign in piece) if piece.isnumeric() else (piece.encode(),)


class _Texts(Tokenizer):
    """Stands where the renderer wants a tokenizer, and keeps what it is asked to encode."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.seen.append(text)
        return []

    def special(self, name: str) -> int:
        return 0


def merged(counts: Counter[bytes], number: int) -> list[Pair]:
    """The most frequent pair of neighbours becomes one, again and again; of equal ones the first by its bytes."""
    words = [[word[i : i + 1] for i in range(len(word))] for word in counts]
    times = list(counts.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # in which words a pair stands, or once stood
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[index]
            places[pair].add(index)
    merges: list[Pair] = []
    while len(merges) < number and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] <= 0:
            break
        merges.append(best)
        for index in sorted(places[best]):
            old, new = words[index], _joined(words[index], best)
            pairs.subtract(_pairs(old, times[index]))
            pairs.update(_pairs(new, times[index]))
            for pair in pairwise(new):
                places[pair].add(index)
            words[index] = new
        del pairs[best]
    return merges


def _pairs(word: list[bytes], times: int) -> dict[Pair, int]:
    return {pair: number * times for pair, number in Counter(pairwise(word)).items()}


def _joined(word: list[bytes], pair: Pair) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] = out[-1] + part
        else:
            out.append(part)
    return out


def _write(path: Path, merges: list[Pair]) -> None:
    """As a byte tokenizer is written, with the merges between its bytes and its special tokens."""
    write_byte_tokenizer(path, 256 + _NUM_SPECIALS)
    root = json.loads(path.read_text(encoding="utf-8"))
    vocab = {token: token_id for token, token_id in root["model"]["vocab"].items() if token_id < 256}
    name_of = {token_id: sign for sign, token_id in vocab.items()}  # of a byte, in the byte-level alphabet

    def name(token: bytes) -> str:
        return "".join(name_of[byte] for byte in token)

    vocab |= {name(left + right): 256 + i for i, (left, right) in enumerate(merges)}
    for token in root["added_tokens"]:
        token["id"] += len(merges)
    root["model"]["vocab"] = vocab | {token["content"]: token["id"] for token in root["added_tokens"]}
    root["model"]["merges"] = [[name(left), name(right)] for left, right in merges]
    path.write_text(json.dumps(root, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
