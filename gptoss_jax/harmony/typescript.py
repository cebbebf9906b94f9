"""A JSON schema as the TypeScript type that the model reads. Knows JSON; knows no ids and no messages.

    {"type": "object", "required": ["place"],                            {
     "properties": {                                                     // Where to look.
       "place": {"type": "string", "description": "Where to look."},     place: string,
       "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},   unit?: "C" | "F", // default: C
       "day": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}        day?: string | null,
                                                                         }

The layout is openai-harmony's to the character. Where that library writes `any`, or loses what a schema says ($ref,
anyOf, allOf, const, enums of more than strings, null, lists of types, properties or items without a type), the type is
written out.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from reprlib import repr as shown
from typing import Any
from urllib.parse import unquote

from gptoss_jax.errors import UserError

_DEEPEST = 40  # each level takes up to seven calls
# A schema of a kilobyte whose definitions each use the next one twice would be a type of gigabytes.
_MOST_TYPES = 10_000
_MOST_CHARACTERS = 10_000_000  # counted at each level anew; a context holds fewer in any case
_SAYS_A_TYPE = ("type", "enum", "const", "$ref", "oneOf", "anyOf", "allOf", "properties", "items")


def typescript(schema: Mapping[str, Any], *, of: str) -> str:
    """The type of what the schema describes; `of` says in errors whose schema it is."""
    return _Writer(schema, of).type_of(schema, _Place())


def compact_json(value: Any, *, of: str) -> str:
    """JSON in one line, without a blank between its signs."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{of}: expected JSON, found {shown(value)} ({error}); give what json.loads gives") from error


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the type the pen stands: the blanks before a line, and the references that are being followed."""

    indent: str = ""
    depth: int = 0
    following: frozenset[str] = frozenset(("#",))

    def inside(self, blanks: int) -> "_Place":
        return dataclasses.replace(self, indent=self.indent + " " * blanks, depth=self.depth + 1)


class _Writer:
    """Writes the types of one document, to whose root references point."""

    def __init__(self, root: Mapping[str, Any], of: str):
        self._root = root
        self._of = of
        self._types = 0
        self._characters = 0

    def type_of(self, schema: Any, place: _Place) -> str:
        schema, place = self._followed(schema, place)
        self._count_type(place)
        return self._counted(self._written(schema, place))

    def _written(self, schema: Mapping[str, Any], place: _Place) -> str:
        kind = schema.get("type")
        if variants := _variants(schema, "oneOf"):
            return "".join(f"\n{place.indent} | {self._variant(variant, place)}" for variant in variants)
        if literals := self._literals(schema):
            return " | ".join(literals)
        if kinds := [one for one in kind if isinstance(one, str)] if isinstance(kind, list) else []:
            return " | ".join(self._listed(schema, one, place) for one in kinds)
        if isinstance(kind, str):
            return self._plain(schema, kind, place)
        if variants := _variants(schema, "anyOf"):
            return " | ".join(self._nullable(variant, place.inside(0)) for variant in variants)
        if variants := _variants(schema, "allOf"):
            return " & ".join(self._factor(variant, place.inside(0)) for variant in variants)
        return self._plain(schema, "object" if "properties" in schema else "array" if "items" in schema else "", place)

    def _plain(self, schema: Mapping[str, Any], kind: str, place: _Place) -> str:
        match kind:
            case "object":
                return self._object(schema, place)
            case "array":
                return self._array(schema, place)
            case "integer":
                return "number"
            case "string" | "number" | "boolean" | "null":
                return kind
        return "any"

    def _listed(self, schema: Mapping[str, Any], kind: str, place: _Place) -> str:
        """One of a list of types, by its name where the schema says no more of it."""
        says_more = (kind == "object" and "properties" in schema) or (kind == "array" and "items" in schema)
        return self._plain(schema, kind, place) if says_more or kind == "integer" else kind

    def _factor(self, schema: Any, place: _Place) -> str:
        """One of the types that all hold at once."""
        schema, place = self._followed(schema, place)
        return _grouped(self.type_of(schema, place), schema)

    def _array(self, schema: Mapping[str, Any], place: _Place) -> str:
        if "items" not in schema:
            return "Array<any>"
        items, inner = self._followed(schema["items"], place)
        text = self.type_of(items, inner.inside(0))
        # For an array of strings with an enum openai-harmony writes "a" | "b"[], and so it is written here.
        kind = items.get("type")
        as_it_does = _variants(items, "oneOf") or kind == "string" or (isinstance(kind, list) and "enum" not in items)
        return f"{text if as_it_does else _grouped(text, items)}[]"

    # --- objects ------------------------------------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any], place: _Place) -> str:
        description = schema.get("description")
        lines = [f"{place.indent}// {description}\n"] if isinstance(description, str) else []
        lines.append("{\n")
        properties = schema.get("properties")
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        for name, value in properties.items() if isinstance(properties, Mapping) else ():
            text = self._property(name if name in required else f"{name}?", value, place)
            lines.append(self._counted(text))
        return "".join(lines) + f"{place.indent}}}"

    def _property(self, name: str, schema: Any, place: _Place) -> str:
        schema, place = self._followed(schema, place)
        if variants := _variants(schema, "oneOf"):
            return self._property_of_variants(name, schema, variants, place)
        above = "".join(
            f"{place.indent}{line}\n" for line in (*_title(schema), *_description(schema), *_examples(schema))
        )
        default = f" // {self._default(schema)}" if "default" in schema else ""
        return f"{above}{place.indent}{name}: {self._nullable(schema, place.inside(4))},{default}\n"

    def _property_of_variants(self, name: str, schema: Mapping[str, Any], variants: list[Any], place: _Place) -> str:
        """One variant a line. A description that the first variant repeats is told once, beside that variant."""
        first, _ = self._followed(variants[0], place)
        description = schema.get("description")
        told = isinstance(description, str) and description != first.get("description")
        above = [*_title(schema), *_examples(schema)]
        above += [f"// {description}"] if told else []
        above += [f"// {self._default(schema)}"] if "default" in schema else []
        lines = [*above, f"{name}:"]
        for i, variant in enumerate(variants):
            skipped = (description, first.get("description")) if told and i == 0 else (description,)
            lines.append(f" | {self._variant(variant, place, skipped=skipped, bare=True)}")
        return "".join(f"{place.indent}{line}\n" for line in (*lines, ","))

    def _variant(self, schema: Any, place: _Place, *, skipped: tuple[Any, ...] = (), bare: bool = False) -> str:
        """One of several types, what is said of it behind it."""
        schema, place = self._followed(schema, place)
        said = [text for text in (schema.get("description"),) if isinstance(text, str) and text not in skipped]
        said += [self._default(schema, bare=bare)] if "default" in schema else []
        return " // ".join((self._nullable(schema, place.inside(3)), *([" ".join(said)] if said else ())))

    def _nullable(self, schema: Any, place: _Place) -> str:
        schema, place = self._followed(schema, place)
        text = self.type_of(schema, place)
        return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text

    # --- values -------------------------------------------------------------------------------------------------------

    def _literals(self, schema: Mapping[str, Any]) -> list[str]:
        """The only values that are allowed, as TypeScript writes them."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        values = values if isinstance(values, list) else []
        if schema.get("type") == "string":
            values = [value for value in values if isinstance(value, str)]
        return [f'"{value}"' if isinstance(value, str) else compact_json(value, of=self._of) for value in values]

    def _default(self, schema: Mapping[str, Any], *, bare: bool = True) -> str:
        """`bare`: one of an enum's strings goes without quotation marks."""
        value = schema["default"]
        if not isinstance(value, str):
            text = self._number(value) if isinstance(value, float) else compact_json(value, of=self._of)
        elif not (isinstance(schema.get("enum"), list) and schema["enum"]):
            text = f'"{value}"'
        else:
            text = value if bare else compact_json(value, of=self._of)
        return f"default: {text}"

    def _number(self, value: float) -> str:
        """0.00001, 1e-6 and 1e16, where Python writes 1e-05, 1e-06 and 1e+16."""
        if 1e-5 <= abs(value) < 1e-4:
            return format(Decimal(repr(value)), "f")
        return re.sub(r"e\+?(-?)0*", r"e\1", compact_json(value, of=self._of))

    # --- references and bounds ----------------------------------------------------------------------------------------

    def _followed(self, schema: Any, place: _Place) -> tuple[Mapping[str, Any], _Place]:
        """The schema with what its $ref points to; of a type within itself only what stands beside the reference."""
        schema = schema if isinstance(schema, Mapping) else {}
        while isinstance(reference := schema.get("$ref"), str):
            beside = {key: value for key, value in schema.items() if key != "$ref"}
            if reference in place.following or not reference.startswith("#"):
                return beside, place
            schema = {**self._target(reference), **beside}
            place = dataclasses.replace(place, following=place.following | {reference})
        return schema, place

    def _target(self, reference: str) -> Mapping[str, Any]:
        found: Any = self._root
        for part in reference[1:].removeprefix("/").split("/"):
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and re.fullmatch(r"[0-9]{1,9}", key) and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, Mapping) and key in found:
                found = found[key]
            else:
                raise UserError(
                    f"{self._of}, $ref {shown(reference)}: expected a path inside the schema, as '#/$defs/Name', "
                    f"found nothing at {shown(key)}; add the definition"
                )
        return found if isinstance(found, Mapping) else {}

    def _count_type(self, place: _Place) -> None:
        self._types += 1
        if place.depth > _DEEPEST:
            raise UserError(f"{self._of}: expected at most {_DEEPEST} types within each other, found more; flatten it")
        if self._types > _MOST_TYPES:
            raise UserError(
                f"{self._of}: expected at most {_MOST_TYPES} types, references followed, found more; "
                "let definitions use each other less often"
            )

    def _counted(self, text: str) -> str:
        self._characters += len(text)
        if self._characters > _MOST_CHARACTERS:
            raise UserError(
                f"{self._of}: expected at most {_MOST_CHARACTERS} characters, references followed, found more; "
                "shorten descriptions, or let definitions be used less often"
            )
        return text


# --- pieces -----------------------------------------------------------------------------------------------------------


def _variants(schema: Mapping[str, Any], key: str) -> list[Any]:
    """The variants under oneOf, anyOf or allOf; none where they only add conditions to a type given beside them."""
    variants = schema.get(key)
    if not isinstance(variants, list):
        return []
    has_type = "type" in schema or "properties" in schema
    tell = any(isinstance(variant, Mapping) and any(word in variant for word in _SAYS_A_TYPE) for variant in variants)
    return [] if has_type and not tell else variants


def _grouped(text: str, schema: Mapping[str, Any]) -> str:
    """In parentheses where another sign beside it would bind to one of its parts only."""
    kind = schema.get("type")
    compounds = ("enum", "oneOf") if isinstance(kind, str) else ("enum", "oneOf", "anyOf", "allOf")
    is_compound = isinstance(kind, list) or any(key in schema for key in compounds)
    return f"({text})" if is_compound and (" | " in text or " & " in text) else text


def _title(schema: Mapping[str, Any]) -> list[str]:
    title = schema.get("title")
    return [f"// {title}", "//"] if isinstance(title, str) else []


def _description(schema: Mapping[str, Any]) -> list[str]:
    description = schema.get("description")
    return [f"// {description}"] if isinstance(description, str) else []


def _examples(schema: Mapping[str, Any]) -> list[str]:
    examples = schema.get("examples")
    if not (isinstance(examples, list) and examples):
        return []
    return ["// Examples:", *(f'// - "{example}"' for example in examples if isinstance(example, str))]
