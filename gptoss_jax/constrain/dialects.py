"""The drafts of JSON Schema, and whether a schema is one of its draft. Knows JSON; knows not what can be held to."""

from collections.abc import Iterable, Mapping
from reprlib import repr as shown
from typing import Any

import jsonschema.exceptions

from gptoss_jax.errors import UserError

_NEWEST = "https://json-schema.org/draft/2020-12/schema"
_DRAFT_4 = jsonschema.Draft4Validator.META_SCHEMA
_DRAFT_7 = jsonschema.Draft7Validator.META_SCHEMA

# What later drafts have beside it. Their own schemas of schemas take six times as long, a second for 3,000 places.
_NAMED = {"additionalProperties": {"$ref": "#"}}
_COUNT = {"$ref": "#/definitions/nonNegativeInteger"}
_LATER: dict[str, Any] = {
    "$defs": _NAMED,
    "dependentSchemas": _NAMED,
    "dependentRequired": {"additionalProperties": {"$ref": "#/definitions/stringArray"}},
    "unevaluatedItems": {"$ref": "#"},
    "unevaluatedProperties": {"$ref": "#"},
    "minContains": _COUNT,
    "maxContains": _COUNT,
}
_LATEST: dict[str, Any] = _LATER | {"prefixItems": {"$ref": "#/definitions/schemaArray"}, "items": {"$ref": "#"}}


def _draft_7_and(keywords: dict[str, Any]) -> dict[str, Any]:
    return _DRAFT_7 | {"properties": _DRAFT_7["properties"] | keywords}


# By name: what checks answers, and the schema that its schemas have to fit.
_DIALECTS: dict[str, tuple[Any, dict[str, Any]]] = {
    kind.META_SCHEMA["$schema"].rstrip("#"): (kind, meta)
    for kind, meta in (
        (jsonschema.Draft4Validator, _DRAFT_4),
        (jsonschema.Draft6Validator, jsonschema.Draft6Validator.META_SCHEMA),
        (jsonschema.Draft7Validator, _DRAFT_7),
        (jsonschema.Draft201909Validator, _draft_7_and(_LATER)),
        (jsonschema.Draft202012Validator, _draft_7_and(_LATEST)),
    )
}


def validator_kind(schema: Mapping[str, Any]) -> Any:
    """jsonschema's kind of validator for the draft that a schema names."""
    return _dialect(schema)[0]


def names_latest(schema: Mapping[str, Any]) -> bool:
    """Whether a schema is of the latest draft, in which lists of items have other keywords."""
    return schema.get("$schema", _NEWEST).rstrip("#") == _NEWEST


def check_well_formed(schema: Mapping[str, Any], *, of: Mapping[str, Any]) -> None:
    """Raises UserError, with the place, for what is no schema of the draft that the whole schema names."""
    _, meta = _dialect(of)
    kind = jsonschema.Draft4Validator if meta is _DRAFT_4 else jsonschema.Draft7Validator
    try:
        error = jsonschema.exceptions.best_match(kind(meta).iter_errors(schema))
    except RecursionError as overflow:
        raise UserError("the schema is nested too deeply; expected some hundred levels at most") from overflow
    if error is not None:
        raise UserError(f"the schema is no JSON schema: {pointer(error.absolute_path)}: {error.message[:200]}")


def pointer(path: Iterable[str | int]) -> str:
    """A JSON pointer from the root."""
    return "/".join(("#", *(str(part).replace("~", "~0").replace("/", "~1") for part in path)))


def _dialect(schema: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    named = schema.get("$schema", _NEWEST)
    dialect = _DIALECTS.get(named.rstrip("#")) if isinstance(named, str) else None
    if dialect is None:
        raise UserError(f"#/$schema is {shown(named)}; expected none, or one of {', '.join(_DIALECTS)}")
    return dialect
