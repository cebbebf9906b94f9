"""Values out of JSON, each of the kind that it has to be. Knows JSON; knows no line and no message.

An error says which key it is, what is there and what was expected; `at` puts the place before it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.typescript import compact_json

Entry: TypeAlias = Mapping[str, Any]


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Says where a mistake is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def known(entry: Entry, keys: frozenset[str], *, ignored: frozenset[str]) -> Entry:
    """The entry without what is null or to be ignored; what is left has to be one of the keys."""
    kept = {key: value for key, value in entry.items() if value is not None and key not in ignored}
    unknown = sorted(kept.keys() - keys)
    if unknown:
        raise UserError(
            f"there is no key {unknown[0][:80]!r}; expected {', '.join(sorted(keys))}; "
            "correct it, or add it to the keys that are ignored"
        )
    return kept


def text_of(key: str, found: Any) -> str:
    """A text of whole characters."""
    if not isinstance(found, str):
        raise UserError(f"{key} is {shown(found)}; expected a text")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key} holds half of a surrogate pair, which is no character; write the text anew") from error
    return found


def items_of(key: str, found: Any) -> Sequence[Any]:
    """A list."""
    if not isinstance(found, list):
        raise UserError(f"{key} is {shown(found)}; expected a list")
    return found


def object_of(key: str, found: Any) -> Entry:
    """An object."""
    if not isinstance(found, dict):
        raise UserError(f"{key} is {shown(found)}; expected an object")
    return found


def schema_of(key: str, found: Any) -> dict[str, Any]:
    """An object whose texts, however deep, are texts."""
    text_of(key, compact_json(object_of(key, found), of=key))
    return found


def check_arguments(key: str, text: str) -> None:
    """A text that is a JSON object: a call whose arguments are none teaches calls that fail."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key} is {shown(text)}; expected JSON, the arguments of a call ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{key} is {shown(text)}; expected a JSON object, the arguments of a call")


def shown(value: Any) -> str:
    """A value in an error: its beginning, if it is long."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
