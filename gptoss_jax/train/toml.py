"""Settings as frozen dataclasses, in TOML and back. Knows types, ranges and names; knows nothing of what they set.

    class Loop(Section, name="loop"):
        steps: Annotated[int, Range(least=1)] = 1000

    [loop]                       "loop.steps=200" as an override
    steps = 500

Every key has a place in a dataclass: one that has none is an error. A key that is absent has its default.
"""

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gptoss_jax.errors import UserError

S = TypeVar("S", bound="Section")

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """What a number may be; both limits are allowed, `above` is not."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value > self.above and math.isfinite(value)

    def __str__(self) -> str:
        low = f"more than {self.above:g}" if self.above > -math.inf else ""
        low = low or (f"at least {self.least:g}" if self.least > -math.inf else "")
        high = f"at most {self.most:g}" if self.most < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "a finite number"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A table of settings. A subclass is a frozen dataclass whose fields are numbers, strings, Literals, tuples of
    these, one of these or None, or further sections. Every one is checked, however it was made.

    Raises:
        UserError: a value of another type, or outside its range.
    """

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str = "") -> None:
        cls.prefix = name and f"{name}."

    def __post_init__(self) -> None:
        for key, hint in hints(type(self)).items():
            _check(f"{self.prefix}{key}", getattr(self, key), hint)


def read(kind: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """The settings in a file, with "dotted.key=value" in place of what it says; values are written as in TOML.

    A value that is no TOML is a string, and where a list is asked for one value is a list, so that shells need no
    second pair of quotes: model.dtype=float32 data.files=train.jsonl

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; it names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, but {error}; correct the file") from error
    for override in overrides:
        _override(kind, table, override)
    try:
        return build(kind, table)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def build(kind: type[S], table: Mapping[str, Any]) -> S:
    """The settings that a table as TOML has it says.

    Raises:
        UserError: a key that is none, one that is missing, or a wrong value.
    """
    known, found = hints(kind), {}
    for key, value in table.items():
        name = f"{kind.prefix}{key}"
        if key not in known:
            raise _unknown(name, [f"{kind.prefix}{key}" for key in known])
        found[key] = _taken(name, value, known[key])
        _check(name, found[key], known[key])
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in found:
            raise UserError(f"{kind.prefix}{field.name} is missing; expected {_described(known[field.name])}")
    return kind(**found)


def write(settings: Section) -> str:
    """The settings as TOML, every one of them; what is None has no key."""
    return "\n".join(_tables(settings)).lstrip("\n") + "\n"


def flat(settings: Section, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key, in the order of the declaration."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        key = f"{prefix}{field.name}"
        found |= flat(value, f"{key}.") if isinstance(value, Section) else {key: value}
    return found


@functools.cache
def hints(kind: type[Section]) -> Mapping[str, Any]:
    """The type of each key, in the order of the declaration."""
    found = get_type_hints(kind, include_extras=True)
    return types.MappingProxyType({field.name: found[field.name] for field in dataclasses.fields(kind)})


# --- reading ----------------------------------------------------------------------------------------------------------


def _override(kind: type[Section], table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise UserError(f"the override {override!r} has no value; expected key=value, as in loop.steps=200")
    hint = _hint_of(kind, key)
    *tables, last = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"{name} of the file is {_shown(table)}; expected a table that {key} lies in")
    table[last] = _parsed(text.strip(), hint)


def _hint_of(kind: type[Section], key: str) -> Any:
    """The type of the dotted key, which must name a value and no table."""
    names = _leaves(kind)
    if key not in names:
        raise _unknown(key, list(names))
    return names[key]


def _leaves(kind: type[Section], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in hints(kind).items():
        found |= _leaves(hint, f"{prefix}{name}.") if _is_section(hint) else {f"{prefix}{name}": hint}
    return found


def _parsed(text: str, hint: Any) -> Any:
    """As TOML where it is TOML; a bare word, and a date where a string is asked for, are strings."""
    plain = _plain(hint)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if get_origin(plain) is tuple and not isinstance(value, list):
        return [_parsed(text, get_args(plain)[0])]
    return text if plain is str and not isinstance(value, str) else value


def _taken(name: str, value: Any, hint: Any) -> Any:
    """The value as the dataclass has it: tables as sections, arrays as tuples, integers as floats where one is due."""
    if _is_section(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {_shown(value)}; expected a table, [{name}]")
        return build(hint, value)
    hint = _plain(hint)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_taken(name, item, get_args(hint)[0]) for item in value)
    return float(value) if hint is float and type(value) is int else value


def _unknown(name: str, known: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=3) or list(known)
    return UserError(f"{name} is no setting; expected one of {', '.join(close)}")


# --- checking ---------------------------------------------------------------------------------------------------------


def _check(name: str, value: Any, hint: Any) -> None:
    if _is_section(hint) or (value is None and _is_optional(hint)):
        return
    plain = _plain(hint)
    if get_origin(plain) is tuple and isinstance(value, tuple):
        for item in value:
            _check(name, item, get_args(plain)[0])
        return
    if get_origin(plain) is Literal:
        allowed = any(type(value) is type(choice) and value == choice for choice in get_args(plain))
    else:
        allowed = type(value) is plain or (plain is float and type(value) is int)
    limits = _limits(hint) or Range()
    if not allowed or (isinstance(value, int | float) and value not in limits):
        raise UserError(f"{name} is {_shown(value)}; expected {_described(hint)}")


def _described(hint: Any) -> str:
    plain, limits = _plain(hint), _limits(hint)
    if _is_section(plain):
        return "a table"
    if get_origin(plain) is tuple:
        return f"a list, each {_described(get_args(plain)[0])}"
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in get_args(plain))
    return _WORDS[plain] + (f", {limits}" if limits is not None else "")


def _plain(hint: Any) -> Any:
    """Without None and without limits."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if _is_optional(hint):
        return _plain(next(kind for kind in get_args(hint) if kind is not types.NoneType))
    return hint


def _limits(hint: Any) -> Range | None:
    if get_origin(hint) is Annotated:
        return next((found for found in get_args(hint)[1:] if isinstance(found, Range)), None)
    return next(filter(None, map(_limits, get_args(hint))), None) if _is_optional(hint) else None


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- writing ----------------------------------------------------------------------------------------------------------


def _tables(settings: Section, name: str = "") -> Iterator[str]:
    """The lines of a table, then those of the tables in it: TOML has no other order."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    sections = {key: value for key, value in values.items() if isinstance(value, Section)}
    if name:
        yield f"\n[{name}]"
    for key, value in values.items():
        if key not in sections and value is not None:
            yield f"{key} = {_value(value)}"
    for key, section in sections.items():
        yield from _tables(section, f"{name}.{key}" if name else key)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON's strings are TOML's, but for one control character that TOML wants escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return repr(value)
