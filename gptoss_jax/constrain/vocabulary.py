"""A tokenizer as the grammar library asks for it: the bytes of every id. Knows ids and bytes; knows no schemas."""

from typing import Protocol, runtime_checkable

from llguidance import LLMatcher as Matcher
from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

from gptoss_jax.errors import UserError

_REPLACEMENT = "\ufffd"

# Of one matcher. Defaults are for schemas one trusts: 250,000 lexer states alone may take half a gigabyte.
LIMITS = LLParserLimits(
    max_items_in_row=4_000,  # an object with n optional properties has 4 n
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


@runtime_checkable
class AnyTokenizer(Protocol):
    """What a vocabulary is made of; gptoss_jax.harmony's Tokenizer is one."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text."""
        ...

    def decode_bytes(self, ids: list[int], /) -> bytes:
        """The bytes of ids."""
        ...

    def name_of(self, token_id: int, /) -> str | None:
        """The name of a special token; None for any other id."""
        ...


class Vocabulary:
    """The ids of one tokenizer, sorted by their bytes. It takes about a second to make of the released vocabulary.

    Args:
        tokenizer: its unused ids are never allowed.
        vocab_size: the model's, where that has more rows than the tokenizer has ids.

    Attributes:
        words: the length of a mask, ceil(vocab_size / 32).
    """

    def __init__(self, tokenizer: AnyTokenizer, *, vocab_size: int | None = None):
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if size < tokenizer.vocab_size:
            raise UserError(
                f"vocab_size is {size}; expected at least the {tokenizer.vocab_size} ids of the tokenizer: take the "
                "tokenizer that belongs to the model"
            )
        self.words = -(-size // 32)
        self._names = {name: i for i in range(tokenizer.vocab_size) if (name := tokenizer.name_of(i)) is not None}
        # The library adds an id to end every grammar by. Ours end by ids that they name, so it is never the next.
        end = self._special("<|endoftext|>")
        tokens = _Tokens(tokenizer, size, specials=sorted(self._names.values()), end=end)
        self._library = LLTokenizer(TokenizerWrapper(tokens), eos_token=end)

    def check_special(self, name: str) -> None:
        """Raises UserError where the tokenizer has no such token."""
        self._special(name)

    def matcher(self, grammar: str) -> Matcher:
        """A fresh matcher of a grammar in the library's own JSON.

        Raises:
            UserError: the grammar cannot be compiled; the library's reason is the message.
        """
        matcher = Matcher(self._library, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # fails where nothing may come at all; and copies need not do this again
        if matcher.is_error():
            raise UserError(reason(matcher))
        return matcher

    def ids(self, text: str) -> list[int]:
        """Ids that stand for a text, though perhaps not those that a model would write it with."""
        return self._library.greedy_tokenize(text)

    def _special(self, name: str) -> int:
        if name not in self._names:
            raise UserError(
                f"the tokenizer has no special token {name}; expected all of the harmony format's: take the "
                "tokenizer.json of a gpt-oss release"
            )
        return self._names[name]


def reason(matcher: Matcher) -> str:
    """Why a matcher is in error: the first line of what the library says."""
    return matcher.get_error().strip().split("\n", 1)[0][:300]


class _Tokens:
    """The ids as llguidance.TokenizerWrapper asks for them, in its words."""

    def __init__(self, tokenizer: AnyTokenizer, size: int, *, specials: list[int], end: int):
        self._encode = tokenizer.encode
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens = [_bytes_of(tokenizer, i) for i in range(tokenizer.vocab_size)]
        self.tokens += [b""] * (size - tokenizer.vocab_size)
        self.special_token_ids = specials

    def __call__(self, text: bytes | str) -> list[int]:
        """The ids of a text that the grammar leaves no choice about: then only their first is allowed."""
        return self._encode(text.decode("utf-8") if isinstance(text, bytes) else text)


def _bytes_of(tokenizer: AnyTokenizer, token_id: int) -> bytes:
    """What an id stands for; b"" for an id that is not used, which a grammar then never allows."""
    data = tokenizer.decode_bytes([token_id])
    if data == _REPLACEMENT.encode() and tokenizer.encode(_REPLACEMENT) != [token_id]:
        return b""  # decoders show an unused id by this sign; the sign itself may have an id too
    return data
