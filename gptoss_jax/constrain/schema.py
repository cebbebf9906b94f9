"""Which JSON schemas an answer can be held to, and which are refused and why. Knows JSON; knows no ids, no grammars.

A schema comes from whoever sends a request. So its size and depth are bounded before anything else looks at it, it may
refer to nothing outside itself, and it decides nothing but the form of the answer.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from reprlib import repr as shown
from typing import Any
from urllib.parse import unquote

from gptoss_jax.constrain.dialects import check_well_formed, names_latest, pointer
from gptoss_jax.errors import UserError

MAX_CHARS = 128 * 1024  # of a schema as JSON
MAX_PATTERN_CHARS = 4000  # half a second to compile, if it is made for it; the time grows with the square
# Of all definitions that it uses, one in another: the compiler's stack of 8 MiB was seen to overflow at 2,000, which
# ends the process.
MAX_LEVELS = 400
MAX_TRIED = 300  # keywords that are tried by themselves to find those that a refused schema is refused for
MAX_OPTIONAL = 500  # properties of one object that may be left out: each is a choice at every place

# Where schemas stand within a schema: a keyword's value is one, a list of them, or an object of them.
_ONE = frozenset(("items", "additionalItems", "additionalProperties"))
_LIST = frozenset(("items", "allOf", "anyOf", "oneOf", "prefixItems"))
_NAMED = frozenset(("properties", "patternProperties"))
# The same for keywords that no grammar holds to, and those with no schema in them.
_UNHELD_ONE = frozenset(
    ("not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
)
_UNHELD_NAMED = frozenset(("dependentSchemas", "dependencies"))
_UNHELD = (
    frozenset(("minContains", "maxContains", "dependentRequired", "$dynamicRef", "$recursiveRef"))
    | _UNHELD_ONE
    | _UNHELD_NAMED
)
# Held to in part: only the compiler knows whether one of these is. Some depend on the keywords beside them.
_SUSPECTS = ("format", "pattern", "patternProperties", "multipleOf", "minProperties", "maxProperties", "oneOf", "allOf")
_BESIDE = {
    "minProperties": ("properties", "required", "additionalProperties", "patternProperties"),
    "maxProperties": ("properties", "required", "additionalProperties", "patternProperties"),
    "patternProperties": ("properties", "additionalProperties"),
}
# Say nothing by themselves; the compiler does not know them.
_IDLE = ("$dynamicAnchor", "$recursiveAnchor")


class UnsupportedSchema(UserError):
    """A schema with keywords that an answer cannot be held to.

    Attributes:
        keywords: all of them, as JSON pointers: "#/properties/name/not".
    """

    def __init__(self, keywords: Iterable[str]):
        self.keywords = tuple(keywords)
        names = ", ".join(self.keywords[:20]) + (", …" if len(self.keywords) > 20 else "")
        super().__init__(
            f"the schema has keywords that an answer cannot be held to, {len(self.keywords)} in all: {names}; "
            "leave them out, or ask for the lenient mode, which does"
        )


def read_schema(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """The schema as plain JSON, an object.

    Raises:
        UserError: it is no schema, too large or too deep, or refers to another document.
    """
    plain = _plain(schema)
    plain.pop("x-guidance", None)  # options of the compiler: who sends a schema has no say in them
    check_well_formed(plain, of=plain)
    for place in [*_places(plain)]:
        if place.level == 1 and place.definition != "#":  # a reference may lead to where no schema is looked for
            check_well_formed(place.schema, of=plain)
        _check_sizes(place)
        _simplify(place.schema, latest=names_latest(plain))
    return plain


def without_unheld(schema: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The schema without the keywords that no grammar holds to, and pointers to those."""
    rest = copy.deepcopy(schema)
    found = []
    for place in [*_places(rest)]:
        for keyword in _unheld(place) if place.is_held else ():
            found.append(f"{place.path}/{keyword}")
            del place.schema[keyword]
    return rest, found


def unsupported(schema: dict[str, Any], *, compiles: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Pointers to all keywords that cannot be held to.

    They are taken out of a copy, from the inside to the outside, so that each that is left can be tried by itself.
    """
    rest, found = without_unheld(schema)
    left = MAX_TRIED
    definitions = {key: rest[key] for key in ("$schema", "$defs", "definitions") if key in rest}
    for place in reversed([*_places(rest)]):
        for keyword in _SUSPECTS:
            tried = {key: place.schema[key] for key in (keyword, *_BESIDE.get(keyword, ())) if key in place.schema}
            if not (place.is_held and keyword in tried and left):
                continue
            left -= 1
            if not compiles(definitions | tried):
                found.append(f"{place.path}/{keyword}")
                del place.schema[keyword]
    return sorted(found)


def patterns(schema: dict[str, Any]) -> set[str]:
    """The expressions that strings and names of properties are held to."""
    places = [place.schema for place in _places(schema) if place.is_held]
    return {place["pattern"] for place in places if "pattern" in place}.union(
        *(place.get("patternProperties", ()) for place in places)
    )


def resolve(root: dict[str, Any], reference: str) -> Any:
    """What stands at "#/…". Raises LookupError where nothing does."""
    found: Any = root
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and re.fullmatch("[0-9]{1,9}", key):
            found = found[int(key)]
        elif isinstance(found, dict):
            found = found[key]
        else:
            raise LookupError(key)
    return found


# --- what is asked of every schema ------------------------------------------------------------------------------------


def _plain(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_CHARS:
            raise UserError(f"the schema has {len(text)} characters as JSON; expected at most {MAX_CHARS}")
        plain = json.loads(text)
    except RecursionError as error:
        raise UserError(f"the schema is nested too deeply; expected at most {MAX_LEVELS} levels") from error
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"the schema is no JSON: {error}") from error
    if plain is False:
        raise UserError("the schema is false, which no answer fits; expected one that some answer fits")
    return {} if plain is True else plain


def _check_sizes(place: "_Place") -> None:
    schema = place.schema
    for pattern in (schema.get("pattern", ""), *schema.get("patternProperties", ())):
        if len(pattern) > MAX_PATTERN_CHARS:
            raise UserError(
                f"{place.path} has a pattern of {len(pattern)} characters; expected at most {MAX_PATTERN_CHARS}"
            )
    optional = len(schema.get("properties", {}).keys() - set(schema.get("required", ())))
    if optional > MAX_OPTIONAL:
        raise UserError(
            f"{place.path}/properties has {optional} that are not required; expected at most {MAX_OPTIONAL}: "
            "require some, or make an object of them"
        )


def _simplify(schema: dict[str, Any], *, latest: bool) -> None:
    """Puts what the compiler does not know, or does badly, in other words."""
    for keyword in (*_IDLE, "additionalItems" if latest else "prefixItems"):  # of another draft, the last two
        schema.pop(keyword, None)
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if _is_whole(schema.get("multipleOf")) and "type" in schema:  # of a whole number only whole numbers are multiples
        types = schema["type"]
        whole = ["integer" if each == "number" else each for each in ([types] if isinstance(types, str) else types)]
        schema["type"] = whole[0] if isinstance(types, str) else [*dict.fromkeys(whole)]


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | float) and number == int(number)


def _is_exact(value: Any) -> bool:
    """Whether the compiler, for which numbers are doubles and whole ones have 64 bits, knows a value as it is."""
    if isinstance(value, list | dict):
        return all(map(_is_exact, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or (abs(value) < 2**63 and float(value) == value)


def _unheld(place: "_Place") -> list[str]:
    """The keywords of one schema that no grammar holds to."""
    schema = place.schema
    found = [keyword for keyword in schema if keyword in _UNHELD]
    if schema.get("uniqueItems"):
        found.append("uniqueItems")
    found += [keyword for keyword in ("const", "enum") if not _is_exact(schema.get(keyword))]
    if _is_whole(schema.get("multipleOf")) and "type" not in schema:  # the compiler fails in the midst of an answer
        found.append("multipleOf")
    if place.path != "#":  # below the root these would change what references and keywords mean
        found += [keyword for keyword in ("$id", "$schema") if keyword in schema]
    # A name that does not stand in `properties` may come twice in the text, and once in what is read of it.
    if schema.get("minProperties", 0) > max(1, len(schema.get("required", ()))):
        found.append("minProperties")
    return found


# --- walking ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """A schema within the schema.

    Attributes:
        path: a JSON pointer to it; behind a `$ref`, from where that leads to.
        is_held: whether a grammar holds to it: what stands below `not` is none's.
        definition: the path of the definition that it stands in.
        level: how deep in that, from 1.
    """

    path: str
    schema: dict[str, Any]
    is_held: bool = True
    definition: str = "#"
    level: int = 1


def _places(root: dict[str, Any]) -> Iterator[_Place]:
    """Every schema that the root uses. Definitions that nothing refers to are not among them."""
    waiting = [_Place("#", root)]
    seen: set[tuple[int, bool]] = set()
    levels: dict[str, int] = {}  # the depth of each definition
    while waiting:
        place = waiting.pop()
        if not seen.isdisjoint(((id(place.schema), True), (id(place.schema), place.is_held))):
            continue
        seen.add((id(place.schema), place.is_held))
        levels[place.definition] = max(levels.get(place.definition, 0), place.level)
        if sum(levels.values()) > MAX_LEVELS:
            raise UserError(
                f"the schema and the definitions that it uses have more than {MAX_LEVELS} levels, one in another; "
                "expected fewer: leave definitions out or make them flatter"
            )
        target = _target(root, place)
        waiting += [*([] if target is None else [target]), *reversed([*_below(place)])]
        yield place


def _below(place: _Place) -> Iterator[_Place]:
    for keyword, value in place.schema.items():
        below: list[tuple[str, Any]] = []
        if keyword in _NAMED | _UNHELD_NAMED and isinstance(value, dict):
            below = [(pointer((keyword, name)), schema) for name, schema in value.items()]
        elif keyword in _LIST and isinstance(value, list):
            below = [(pointer((keyword, i)), schema) for i, schema in enumerate(value)]
        elif keyword in _ONE | _UNHELD_ONE:
            below = [(pointer((keyword,)), value)]
        for path, schema in below:
            if isinstance(schema, dict):
                is_held = place.is_held and keyword not in _UNHELD
                yield _Place(place.path + path[1:], schema, is_held, place.definition, place.level + 1)


def _target(root: dict[str, Any], place: _Place) -> _Place | None:
    """What `$ref` leads to."""
    reference = place.schema.get("$ref")
    if reference is None:
        return None
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise UserError(
            f"{place.path}/$ref is {shown(reference)}; expected '#' or '#/…', a place in this schema: no other "
            "document is fetched, and anchors are not looked up"
        )
    try:
        found = resolve(root, reference)
    except LookupError as error:
        raise UserError(
            f"{place.path}/$ref is {shown(reference)}; expected a place in this schema, found none there"
        ) from error
    if not isinstance(found, dict | bool):
        raise UserError(f"{place.path}/$ref is {shown(reference)}; expected a schema there, found {shown(found)}")
    return _Place(reference, found, place.is_held, reference) if isinstance(found, dict) else None
