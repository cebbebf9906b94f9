"""Schemas, expressions and grammars become masks over ids. Knows bytes, ids and text; knows no model and no jax.

grammars = Grammars.of(tokenizer)
answer = grammars.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
Request(prompt=ids, max_new_tokens=1000, constraint=grammars.turn(final=answer))
"""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from reprlib import repr as shown
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt32

from gptoss_jax.constrain.judge import Judge
from gptoss_jax.constrain.schema import (
    MAX_PATTERN_CHARS,
    UnsupportedSchema,
    patterns,
    read_schema,
    unsupported,
    without_unheld,
)
from gptoss_jax.constrain.turn import SPECIALS, turn_grammar
from gptoss_jax.constrain.vocabulary import LIMITS, AnyTokenizer, Matcher, Vocabulary, reason
from gptoss_jax.errors import UserError

# Of a grammar in Lark's syntax. The compiler's stack of 8 MiB was seen to overflow at 2,700 rules one in another.
MAX_LARK_CHARS = 16 * 1024
MAX_LARK_LINES = 1000


class Grammar:
    """A form of text, compiled once; made by `Grammars`.

    Attributes:
        entry: what stands for it in the library's list of grammars.
    """

    def __init__(self, vocabulary: Vocabulary, entry: dict[str, Any], judge: Judge | None = None):
        self.entry = entry
        self._judge = judge
        self._vocabulary = vocabulary
        self._matcher = vocabulary.matcher(_one_grammar(entry))

    def check(self, text: str) -> list[str]:
        """What is wrong with a text; nothing if it fits. Of a schema all keywords count, those not held to as well."""
        if self._judge is not None:
            return self._judge.complaints(text)
        return [] if self.fits(text) else ["the text does not fit the grammar"]

    def fits(self, text: str) -> bool:
        """Whether an answer held to this grammar could be exactly this text."""
        matcher = self._matcher.deep_copy()
        try:
            ids = self._vocabulary.ids(text)
        except UnicodeEncodeError:  # half of a surrogate pair, which no ids stand for
            return False
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


class Held:
    """A continuation that is held to a grammar: an engine's Constraint."""

    def __init__(self, matcher: Matcher, *, words: int):
        self._matcher = matcher
        self._words = words

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """The ids that may come next, as bits."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise UserError(f"the grammar cannot be followed any further: {reason(self._matcher)}")
        return np.frombuffer(bits, np.uint32)[: self._words]  # the library adds a word where 32 divides the vocabulary

    def accept(self, token_id: int, /) -> None:
        """Goes on by an id that the mask allowed."""
        if not self._matcher.consume_token(token_id):
            raise UserError(f"id {token_id} does not follow the grammar: {reason(self._matcher)}")


class Grammars:
    """Makes grammars for one tokenizer. Any thread may use it; compiling lets other threads run.

    Args:
        vocabulary: the tokenizer's ids.
    """

    def __init__(self, vocabulary: Vocabulary):
        for name in SPECIALS:
            vocabulary.check_special(name)
        self._vocabulary = vocabulary

    @classmethod
    def of(cls, tokenizer: AnyTokenizer, *, vocab_size: int | None = None) -> "Grammars":
        """For a tokenizer; `vocab_size` is the model's, where that is larger. Takes about a second."""
        return cls(Vocabulary(tokenizer, vocab_size=vocab_size))

    def json_schema(self, schema: Mapping[str, Any] | bool, *, lenient: bool = False) -> Grammar:
        """JSON without whitespace between its parts, properties in the order of the schema.

        Args:
            lenient: keywords that cannot be held to are left out; `Grammar.check` tells what they say of an answer.

        Raises:
            UnsupportedSchema: the schema has such keywords, and `lenient` is not set.
            UserError: no schema, or one that is too large, refers to another document, or that nothing fits.
        """
        plain = read_schema(schema)
        self._check_patterns(plain)
        try:
            held, unheld = without_unheld(plain)
        except RecursionError as error:
            raise UserError(
                "the schema holds a value that is nested too deeply; expected 120 levels at most"
            ) from error
        if unheld and not lenient:
            raise UnsupportedSchema(unsupported(plain, compiles=self._compiles))
        try:
            return self._named("the schema", _json_entry(held, lenient=lenient), Judge(plain, self._fits_pattern))
        except UserError as error:
            keywords = [] if lenient else unsupported(plain, compiles=self._compiles)
            if keywords:
                raise UnsupportedSchema(keywords) from error
            raise

    def regex(self, pattern: str) -> Grammar:
        """Text that an expression matches as a whole; the syntax is that of Rust's `regex`, without look-around."""
        if len(pattern) > MAX_PATTERN_CHARS:
            raise UserError(f"the expression has {len(pattern)} characters; expected at most {MAX_PATTERN_CHARS}")
        try:
            (entry,) = json.loads(Matcher.grammar_from_regex(pattern))["grammars"]
        except UnicodeEncodeError as error:
            raise UserError(f"the expression is {shown(pattern)}; expected text, found half of a character") from error
        return self._named("the expression", entry)

    def lark(self, text: str) -> Grammar:
        """Text of a grammar in llguidance's variant of Lark, without special tokens and embedded schemas."""
        lines = text.count("\n") + 1
        if len(text) > MAX_LARK_CHARS or lines > MAX_LARK_LINES:
            raise UserError(
                f"the grammar has {len(text)} characters in {lines} lines; expected at most {MAX_LARK_CHARS} in "
                f"{MAX_LARK_LINES}"
            )
        if "%json" in text:
            raise UserError("the grammar holds %json; expected a JSON schema to be given as one, not within a grammar")
        entry = {"lark_grammar": text}
        # Without a vocabulary the library warns of every special token: in an answer one would end its message.
        _, warnings = Matcher.validate_grammar_with_warnings(json.dumps({"grammars": [entry]}), limits=LIMITS)
        if any("no tokenizer" in warning for warning in warnings):
            raise UserError("the grammar names special tokens or ids of tokens; expected text alone")
        return self._named("the grammar", entry)

    def turn(
        self,
        *,
        final: Grammar | None = None,
        calls: Mapping[str, Grammar | None] | None = None,
        choice: Literal["auto", "none", "required"] | str = "auto",
        recipients: Collection[str] | None = None,
        parallel: bool = True,
    ) -> Callable[[], Held]:
        """Constraints for a whole assistant turn, from behind `<|start|>assistant`: what a Request calls `constraint`.

        Args:
            final: of the answer in the final channel; None leaves it free, as reasoning always is.
            calls: of the arguments of calls, by recipient ("functions.f"); None leaves them free.
            choice: "none" allows no call. "required" has the turn end in one; so does a recipient, in one to it.
            recipients: all that may be called; None for any name.
            parallel: whether a call may follow <|call|>, where the request does not stop at that.

        Raises:
            UserError: a recipient that is no name, nobody to be called where somebody has to be, or grammars that are
                too large together.
        """
        grammar = turn_grammar(
            final=None if final is None else final.entry,
            calls={name: None if body is None else body.entry for name, body in (calls or {}).items()},
            choice=choice,
            recipients=recipients,
            parallel=parallel,
        )
        return self._copies("the turn", grammar)

    def whole(self, grammar: Grammar) -> Callable[[], Held]:
        """Constraints for a continuation that is a text of this grammar and <|return|>, without headers."""
        entries = [{"lark_grammar": "start: @body <|return|>"}, {**grammar.entry, "name": "body"}]
        return self._copies("the text", json.dumps({"grammars": entries}))

    def _copies(self, what: str, grammar: str) -> Callable[[], Held]:
        with _naming(what):
            matcher = self._vocabulary.matcher(grammar)
        return lambda: Held(matcher.deep_copy(), words=self._vocabulary.words)

    def _named(self, what: str, entry: dict[str, Any], judge: Judge | None = None) -> Grammar:
        with _naming(what):
            return Grammar(self._vocabulary, entry, judge)

    def _fits_pattern(self, pattern: str) -> Callable[[str], bool]:
        return self._named("the pattern", _json_entry({"type": "string", "pattern": pattern})).fits

    def _compiles(self, schema: dict[str, Any]) -> bool:
        try:
            self._vocabulary.matcher(_one_grammar(_json_entry(schema)))
        except UserError:
            return False
        return True

    def _check_patterns(self, schema: dict[str, Any]) -> None:
        """Refuses expressions that are too large once they are begun, which would be in the midst of an answer."""
        for pattern in patterns(schema):
            if "{" not in pattern:  # without counts it is no larger than it is long
                continue
            try:
                matcher = self._vocabulary.matcher(_one_grammar(_json_entry({"type": "string", "pattern": pattern})))
            except UserError:
                continue  # told with its place in the schema
            matcher.consume_tokens(self._vocabulary.ids('"'))
            matcher.compute_bitmask()
            if matcher.is_error():
                raise UserError(f"the pattern {shown(pattern)} is too large: {reason(matcher)}")


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{what} cannot be held to: {error}") from error


def _one_grammar(entry: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [entry]})


def _json_entry(schema: dict[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A schema with the compiler's options: by default it allows blanks without end, which a model may never leave."""
    return {"json_schema": {**schema, "x-guidance": {"whitespace_flexible": False, "lenient": lenient}}}
