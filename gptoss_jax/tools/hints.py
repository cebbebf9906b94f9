"""Python's type hints as JSON schemas, and JSON as values of these types. Knows no functions, no calls, no model.

hint                       schema                                      JSON        value
────────────────────────   ─────────────────────────────────────────   ─────────   ──────────────
str, int, float, bool      {"type": "string"} …                        3.0         3 for an int
Literal["a", "b"], Enum    {"type": "string", "enum": ["a", "b"]}      "a"         Colour.A
list[T], set[T]            {"type": "array", "items": T}               [1, 2]      {1, 2}
tuple[A, B]                … with "prefixItems"                        [1, "x"]    (1, "x")
dict[str, T]               {"type": "object", "additionalProperties"}  {"k": 1}    {"k": 1}
dataclass, TypedDict       {"type": "object", "properties", …}         {"x": 1}    Point(x=1)
A | B, Optional[A]         {"type": [A, B]} or {"anyOf": [A, B]}       null        None
Annotated[T, "words"]      T with "description"
"""

import collections.abc
import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from gptoss_jax.errors import UserError

Schema: TypeAlias = dict[str, Any]
Faults: TypeAlias = list[str]

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARRAYS = {
    list: list,
    set: set,
    frozenset: frozenset,
    tuple: tuple,
    collections.abc.Sequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
    collections.abc.Set: set,
}
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Hint:
    """A type for both sides.

    Attributes:
        schema: what the model is told of it.
        read: (JSON's value, its place, faults) → a value of the type; what is wrong is added to the faults, each a
            sentence that names the place, and then the value means nothing.
    """

    schema: Schema
    read: Callable[[Any, str, Faults], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """One named value of an object; without a default it must be given."""

    hint: Hint
    default: Any = _REQUIRED

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _REQUIRED

    @property
    def schema(self) -> Schema:
        """With the default, where JSON can say it."""
        default = None if self.required else _as_json(self.default)
        return self.hint.schema if default is None else {**self.hint.schema, "default": default}


def hint_of(annotation: Any, *, place: str, within: tuple[type, ...] = ()) -> Hint:
    """The hint for an annotation that stands at `place`; `within` are the classes that it is part of.

    Raises:
        UserError: a type that JSON cannot carry.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return Hint({}, lambda value, where, faults: value)
    if annotation is None or annotation in _scalars():
        return _scalar(type(None) if annotation is None else annotation)
    if origin is typing.Annotated:
        return _described(hint_of(arguments[0], place=place, within=within), arguments[1:])
    if origin is typing.Literal:
        return _choice({value.value if isinstance(value, enum.Enum) else value: value for value in arguments}, place)
    if origin in (typing.Union, types.UnionType):
        return _union([hint_of(one, place=place, within=within) for one in arguments])
    if (origin or annotation) in _ARRAYS:
        return _array(_ARRAYS[origin or annotation], arguments, place=place, within=within)
    if (origin or annotation) in _MAPPINGS:
        return _mapping(arguments, place=place, within=within)
    if isinstance(annotation, type):
        return _class(annotation, place=place, within=within)
    raise _unusable(annotation, place)


def object_of(fields: Mapping[str, Field], build: Callable[[dict[str, Any]], Any]) -> Hint:
    """An object with these fields and no others; `build` gets what was given, without the defaults."""
    schema: Schema = {
        "type": "object",
        "properties": {name: field.schema for name, field in fields.items()},
        "required": [name for name, field in fields.items() if field.required],
        "additionalProperties": False,
    }

    def read(value: Any, where: str, faults: Faults) -> Any:
        if not isinstance(value, dict):
            return _wrong(value, where, "an object", faults)
        before = len(faults)
        for name in (name for name in value if name not in fields):
            known = ", ".join(fields) or "none at all"
            faults.append(f"{_join(where, name)} is not known; expected {known}")
        for name, field in fields.items():
            if field.required and name not in value:
                faults.append(f"{_join(where, name)} is missing; expected {_said(field.hint.schema)}")
        given = {
            name: field.hint.read(value[name], _join(where, name), faults)
            for name, field in fields.items()
            if name in value
        }
        if len(faults) > before:
            return None
        try:
            return build(given)
        except (ValueError, TypeError) as error:  # a dataclass may check itself
            faults.append(f"{where or 'the arguments'}: {error}")

    return Hint(schema, read)


# --- single values ----------------------------------------------------------------------------------------------------


def _scalars() -> tuple[type, ...]:
    return tuple(_NAMES)


def _scalar(kind: type) -> Hint:
    schema = {"type": _NAMES[kind]}

    def read(value: Any, where: str, faults: Faults) -> Any:
        if type(value) is kind:
            return value
        if kind is int and type(value) is float and value.is_integer():
            return int(value)  # 3.0 is an integer to JSON
        if kind is float and type(value) is int and abs(value) < 2**1023:
            return float(value)
        return _wrong(value, where, _said(schema), faults)

    return Hint(schema, read)


def _choice(values: Mapping[Any, Any], place: str) -> Hint:
    """One of the JSON values, told as what stands for it."""
    for value in values:
        if type(value) not in _NAMES:
            raise UserError(
                f"{place} may be {value!r}, a {type(value).__name__}; expected values of str, int, float, bool or None"
            )
    kinds = list(dict.fromkeys(_NAMES[type(value)] for value in values))
    schema: Schema = {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}
    # 1 is True to a dict of Python's, and no boolean to JSON.
    known = {(type(value), value): member for value, member in values.items()}

    def read(value: Any, where: str, faults: Faults) -> Any:
        if type(value) is float and value.is_integer():
            value = int(value)  # 3.0 is 3 to JSON
        key = (type(value), value) if type(value) in _NAMES else None
        return known[key] if key in known else _wrong(value, where, _said(schema), faults)

    return Hint(schema, read)


def _described(hint: Hint, notes: tuple[Any, ...]) -> Hint:
    words = " ".join(note for note in notes if isinstance(note, str))
    return Hint({**hint.schema, "description": words}, hint.read) if words else hint


def _union(members: list[Hint]) -> Hint:
    # 3 is to stay an integer where a float would do as well.
    ordered = sorted(members, key=lambda member: member.schema.get("type") == "number")
    schema = _union_schema([member.schema for member in members])

    def read(value: Any, where: str, faults: Faults) -> Any:
        tried: list[Faults] = []
        for member in ordered:
            wrong: Faults = []
            read = member.read(value, where, wrong)
            if not wrong:
                return read
            tried.append(wrong)
        # Where one member is of the value's own kind, its faults say more than that no member fits.
        inner = [wrong for wrong in tried if not wrong[0].startswith(f"{where or 'the arguments'} is ")]
        faults += inner[0] if len(inner) == 1 else [_sentence(value, where, _said(schema))]
        return None

    return Hint(schema, read)


def _union_schema(schemas: list[Schema]) -> Schema:
    """A list of types where that says all; a type with null beside it stays one schema."""
    if all(set(schema) == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        return {"type": list(dict.fromkeys(schema["type"] for schema in schemas))}
    others = [schema for schema in schemas if schema != {"type": "null"}]
    if len(others) == 1 and isinstance(others[0].get("type"), str):
        nullable = {**others[0], "type": [others[0]["type"], "null"]}
        return nullable | {"enum": [*nullable["enum"], None]} if "enum" in nullable else nullable
    return {"anyOf": schemas}


# --- several values ---------------------------------------------------------------------------------------------------


def _array(build: Callable[[Any], Any], arguments: tuple[Any, ...], *, place: str, within: tuple[type, ...]) -> Hint:
    if build is tuple and arguments and arguments[-1] is not Ellipsis:
        return _fixed_array([hint_of(one, place=place, within=within) for one in arguments if one != ()])
    item = hint_of(arguments[0] if arguments else Any, place=place, within=within)
    if build in (set, frozenset) and item.schema.get("type") not in _NAMES.values():
        raise UserError(f"{place} is a set of what Python may not keep in one; expected a list, or a set of str, int …")
    schema = {"type": "array", "items": item.schema} if item.schema else {"type": "array"}

    def read(value: Any, where: str, faults: Faults) -> Any:
        if not isinstance(value, list):
            return _wrong(value, where, _said(schema), faults)
        before = len(faults)
        items = [item.read(one, f"{where}[{i}]", faults) for i, one in enumerate(value)]
        return build(items) if len(faults) == before else None

    return Hint(schema, read)


def _fixed_array(items: list[Hint]) -> Hint:
    """A tuple of so many values; one schema for all where they have the same, which more readers understand."""
    schemas = [item.schema for item in items]
    same = bool(schemas) and all(schema == schemas[0] for schema in schemas)
    within: Schema = {"items": schemas[0]} if same else {"prefixItems": schemas, "items": False}
    schema = {"type": "array", **within, "minItems": len(items), "maxItems": len(items)}

    def read(value: Any, where: str, faults: Faults) -> Any:
        if not isinstance(value, list):
            return _wrong(value, where, f"an array of {len(items)} items", faults)
        if len(value) != len(items):
            faults.append(f"{where} has {len(value)} items; expected {len(items)}")
            return None
        return tuple(
            item.read(one, f"{where}[{i}]", faults) for i, (item, one) in enumerate(zip(items, value, strict=True))
        )

    return Hint(schema, read)


def _mapping(arguments: tuple[Any, ...], *, place: str, within: tuple[type, ...]) -> Hint:
    key, item = arguments or (str, Any)
    if key is not str:
        raise UserError(f"{place} is a mapping from {_name(key)}; expected keys of str: JSON has no others")
    values = hint_of(item, place=place, within=within)
    schema = {"type": "object", "additionalProperties": values.schema or True}

    def read(value: Any, where: str, faults: Faults) -> Any:
        if not isinstance(value, dict):
            return _wrong(value, where, "an object", faults)
        return {name: values.read(one, _join(where, name), faults) for name, one in value.items()}

    return Hint(schema, read)


# --- classes ----------------------------------------------------------------------------------------------------------


def _class(annotation: type, *, place: str, within: tuple[type, ...]) -> Hint:
    if annotation in within:
        raise UserError(f"{place} holds {annotation.__name__} within itself; expected a type of a depth that is known")
    if issubclass(annotation, enum.Enum):
        return _choice({member.value: member for member in annotation}, place)
    inner = (*within, annotation)
    if dataclasses.is_dataclass(annotation):
        return _with_doc(object_of(_dataclass_fields(annotation, inner), lambda given: annotation(**given)), annotation)
    if typing.is_typeddict(annotation):
        return object_of(_typed_dict_fields(annotation, inner), dict)
    raise _unusable(annotation, place)


def _dataclass_fields(annotation: type, within: tuple[type, ...]) -> dict[str, Field]:
    hints = resolved_hints(annotation)
    fields = {}
    for field in dataclasses.fields(annotation):  # pyright: ignore[reportArgumentType]  (it is a dataclass)
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        place = f"{annotation.__name__}.{field.name}"
        fields[field.name] = Field(hint_of(hints[field.name], place=place, within=within), default)
    return fields


def _typed_dict_fields(annotation: type, within: tuple[type, ...]) -> dict[str, Field]:
    required: frozenset[str] = getattr(annotation, "__required_keys__")  # noqa: B009  (types of TypedDicts are dicts)
    fields = {}
    for name, hint in resolved_hints(annotation).items():
        while typing.get_origin(hint) in (typing.Required, typing.NotRequired):
            (hint,) = typing.get_args(hint)
        default = _REQUIRED if name in required else None
        fields[name] = Field(hint_of(hint, place=f"{annotation.__name__}.{name}", within=within), default)
    return fields


def _with_doc(hint: Hint, annotation: type) -> Hint:
    """A dataclass's own docstring describes it; the one that Python writes is its signature."""
    doc = annotation.__doc__ or ""
    written = "" if doc.startswith(f"{annotation.__name__}(") else " ".join(doc.partition("\n\n")[0].split())
    return _described(hint, (written,))


def resolved_hints(owner: Any) -> dict[str, Any]:
    """The annotations of a class or function, those that are written as strings looked up.

    Raises:
        UserError: a name that is not there.
    """
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError) as error:
        raise UserError(
            f"the type hints of {_name(owner)} cannot be read ({error}); expected names that its module has"
        ) from error


# --- words ------------------------------------------------------------------------------------------------------------


def _said(schema: Schema) -> str:
    """What a schema wants, in words."""
    if "enum" in schema:
        return "one of " + ", ".join(_shown(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_said(one) for one in schema["anyOf"])
    kinds = schema.get("type", "any value")
    words = {
        "integer": "an integer",
        "object": "an object",
        "array": "an array",
        "null": "null",
        "any value": "any value",
    }
    return " or ".join(words.get(kind, f"a {kind}") for kind in (kinds if isinstance(kinds, list) else [kinds]))


def _wrong(value: Any, where: str, expected: str, faults: Faults) -> None:
    faults.append(_sentence(value, where, expected))


def _sentence(value: Any, where: str, expected: str) -> str:
    return f"{where or 'the arguments'} is {_found(value)}; expected {expected}"


def _found(value: Any) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return "an array"
    return _shown(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]} … {text[-16:]}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _as_json(default: Any) -> Any:
    """A default as JSON says it; None where it cannot, or is null, which is no news beside a type with null."""
    if isinstance(default, enum.Enum):
        default = default.value
    if type(default) is float and not math.isfinite(default):
        return None
    return default if type(default) in (str, int, float, bool) else None


def _unusable(annotation: Any, place: str) -> UserError:
    return UserError(
        f"{place} is {_name(annotation)}; expected str, int, float, bool, None, Literal, Enum, list, set, tuple, dict, "
        "a dataclass, a TypedDict, a union of them, or Any"
    )


def _name(thing: Any) -> str:
    return getattr(thing, "__name__", None) or str(thing)
