"""Schemas that are refused: each says where and why. Hostile ones are refused before they cost anything."""

import json
import threading
import time

import jsonschema
import pytest

from gptoss_jax.constrain import Grammars, UnsupportedSchema
from gptoss_jax.constrain.schema import MAX_CHARS, MAX_LEVELS, MAX_OPTIONAL, MAX_PATTERN_CHARS
from gptoss_jax.errors import UserError


def message_of(grammars: Grammars, schema: object, **settings) -> str:
    with pytest.raises(UserError) as raised:
        grammars.json_schema(schema, **settings)
    return str(raised.value)


def unsupported(grammars: Grammars, schema: dict) -> tuple[str, ...]:
    with pytest.raises(UnsupportedSchema) as raised:
        grammars.json_schema(schema)
    for keyword in raised.value.keywords:
        assert keyword in str(raised.value)
    return raised.value.keywords


def test_all_unsupported_keywords_are_told_with_their_places(grammars):
    schema = {
        "type": "object",
        "properties": {
            "a": {"not": {"type": "null"}},
            "b/c": {"type": "array", "uniqueItems": True, "contains": {"not": {}}},
            "d": {"$ref": "#/$defs/d"},
            "e": {"type": "string", "pattern": "(?=x)y", "format": "iri"},
            "f": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "g": {"items": [True, {"if": True, "then": {}, "else": {}}]},
            "h": {"anyOf": [{"dependentRequired": {"x": ["y"]}}, {"unevaluatedProperties": False}]},
            "i": {"type": "object", "properties": {"x": {}}, "minProperties": 1},
        },
        "propertyNames": {"pattern": "^[a-z]"},
        "$defs": {"d": {"minContains": 1}, "nobody's": {"not": {}}},
        "$schema": "http://json-schema.org/draft-07/schema",
    }
    assert unsupported(grammars, schema) == (
        "#/$defs/d/minContains",
        "#/properties/a/not",
        "#/properties/b~1c/contains",
        "#/properties/b~1c/uniqueItems",
        "#/properties/e/format",
        "#/properties/e/pattern",
        "#/properties/f/oneOf",
        "#/properties/g/items/1/else",
        "#/properties/g/items/1/if",
        "#/properties/g/items/1/then",
        "#/properties/h/anyOf/0/dependentRequired",
        "#/properties/h/anyOf/1/unevaluatedProperties",
        "#/properties/i/minProperties",
        "#/propertyNames",
    )


@pytest.mark.parametrize(
    ("schema", "keywords"),
    [
        # what stands within an alternative that is unsupported itself
        ({"oneOf": [{"pattern": "(?!a)"}, {"type": "string"}]}, ("#/oneOf", "#/oneOf/0/pattern")),
        # a name that is not in `properties` may come twice
        ({"type": "object", "additionalProperties": True, "minProperties": 2}, ("#/minProperties",)),
        # would change what "#/…" means below
        ({"properties": {"a": {"$id": "https://example.org/a"}}}, ("#/properties/a/$id",)),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$dynamicRef": "#b"}}}, ("#/$defs/a/$dynamicRef",)),
        # numbers that the compiler would round, and one that it takes only of whole numbers
        ({"const": 2**60 + 1}, ("#/const",)),
        ({"enum": [2**60, [{"a": 1e20}]]}, ("#/enum",)),
        ({"multipleOf": 7}, ("#/multipleOf",)),
        # seen first where it is not held to, and then where it is
        (
            {"not": {"$ref": "#/$defs/a"}, "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"uniqueItems": True}}},
            ("#/$defs/a/uniqueItems", "#/not"),
        ),
    ],
)
def test_unsupported_keywords(grammars, schema, keywords):
    assert unsupported(grammars, schema) == keywords


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "T", "description": "d", "default": 3, "examples": [1], "deprecated": True, "$comment": "c"},
        {"type": "integer", "x-order": 3, "nullable": True, "readOnly": True, "example": {"not": {}}},
        {"type": "object", "properties": {"not": {"type": "null"}, "if": True, "$ref": {"type": "string"}}},
        {"enum": [{"not": {}}, {"$ref": "http://example.org"}]},
        {"type": "array", "uniqueItems": False, "$dynamicAnchor": "a"},
        {"$id": "https://example.org/root", "$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}, "b": {"not": {}}}},
        {"type": "object", "required": ["a"], "properties": {"a": {}}, "minProperties": 1},
    ],
)
def test_what_changes_nothing_is_no_hindrance(grammars, schema):
    grammars.json_schema(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (False, "the schema is false, which no answer fits"),
        ({"const": float("nan")}, "the schema is no JSON: "),
        ({"const": {1, 2}}, "the schema is no JSON: "),
        ({"type": "text"}, "the schema is no JSON schema: #/type: 'text' is not valid"),
        (
            {"properties": {"a": {"minimum": "3"}}},
            "the schema is no JSON schema: #/properties/a/minimum: '3'",
        ),
        ({"$schema": "http://example.org/mine"}, "#/$schema is 'http://example.org/mine'; expected none, or one of "),
        ({"enum": []}, "the schema cannot be held to: Unsatisfiable schema"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "the schema cannot be held to: Unsatisfiable schema"),
        (
            {"items": {"$ref": "http://example.org/s.json"}},
            "#/items/$ref is 'http://example.org/s.json'; expected '#'",
        ),
        ({"not": {"$ref": "file:///etc/passwd"}}, "#/not/$ref is 'file:///etc/passwd'; expected '#' or"),
        ({"$ref": "#/$defs/a"}, "#/$ref is '#/$defs/a'; expected a place in this schema, found none there"),
        ({"$ref": "#/title", "title": "t"}, "#/$ref is '#/title'; expected a schema there, found 't'"),
        ({"$ref": "#/default", "default": {"pattern": 3}}, "the schema is no JSON schema: #/pattern: 3 is not of type"),
        ({"$ref": "#anchor"}, "#/$ref is '#anchor'; expected '#' or '#/…', a place in this schema"),
        ({"$ref": "#"}, "the schema cannot be held to: "),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_is_no_schema_is_refused(grammars, schema, message, lenient):
    assert message_of(grammars, schema, lenient=lenient).startswith(message)


def test_the_lenient_mode_does_not_take_patterns_that_cannot_be_held_to(grammars):
    """They could only be checked by an engine that goes back and forth, which a pattern of a stranger may keep busy."""
    assert "cannot be held to" in message_of(grammars, {"pattern": "(?=a)b"}, lenient=True)


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"type": "text"}}},
        {"prefixItems": {}},
        {"items": [{}]},
        {"minContains": -1},
        {"dependentRequired": {"a": [1]}},
        {"dependentSchemas": {"a": {"minLength": "x"}}},
        {"unevaluatedItems": 3},
        {"required": [1]},
    ],
)
def test_what_jsonschema_calls_no_schema_is_refused(grammars, schema):
    """Ours is another schema of schemas, for speed."""
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema(schema)
    assert message_of(grammars, schema).startswith("the schema is no JSON schema: #/")


# Hostile


def chain(length: int) -> dict:
    definitions = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "null"}}}


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"const": "x" * MAX_CHARS},
            f"the schema has {MAX_CHARS + 13} characters as JSON; expected at most {MAX_CHARS}",
        ),
        (chain(2000), f"the schema and the definitions that it uses have more than {MAX_LEVELS} levels"),
        (nested(5000), "the schema is nested too deeply"),
        ({"default": json.loads("[" * 500 + "]" * 500)}, "the schema holds a value that is nested too deeply"),
        ({"pattern": "a?" * 2001}, f"# has a pattern of 4002 characters; expected at most {MAX_PATTERN_CHARS}"),
        (
            {"properties": {f"p{i}": {} for i in range(MAX_OPTIONAL + 1)}},
            f"#/properties has {MAX_OPTIONAL + 1} that are not required; expected at most {MAX_OPTIONAL}",
        ),
        (
            {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(4)]} for i in range(12)]},
            "the schema ",
        ),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_a_hostile_schema_is_refused_in_no_time(grammars, schema, message, lenient):
    started = time.perf_counter()
    assert message_of(grammars, schema, lenient=lenient).startswith(message)
    assert time.perf_counter() - started < 3


def test_a_pattern_that_would_fail_in_the_midst_of_an_answer_is_refused(o200k_grammars):
    schema = {"type": "array", "items": {"type": "string", "pattern": "^(a{1000}){1000}$"}}
    assert message_of(o200k_grammars, schema).startswith("the pattern '^(a{1000}){1000}$' is too large: ")


def test_a_schema_that_holds_itself_is_refused(grammars):
    schema: dict = {"type": "object"}
    schema["properties"] = {"a": schema}
    assert message_of(grammars, schema) == "the schema is no JSON: Circular reference detected"


def test_the_deepest_schema_does_not_overflow_the_stack_of_a_thread(grammars):
    deepest = chain((MAX_LEVELS - 1) // 2 - 1)
    made = []
    thread = threading.Thread(target=lambda: made.append(grammars.json_schema(deepest)))
    thread.start()
    thread.join()
    assert made[0].fits("[[[]]]")
    with pytest.raises(UserError, match="levels"):
        grammars.json_schema(chain((MAX_LEVELS - 1) // 2 + 1))


def test_large_schemas_that_are_honest_are_taken(grammars):
    column = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(60)}}
    table = {"type": "object", "properties": {f"t{i}": {**column, "required": ["p0"]} for i in range(40)}}
    table["required"] = [*table["properties"]]
    assert len(json.dumps(table)) > 60_000
    grammars.json_schema(table)
    grammars.json_schema({"enum": [f"value {i}" for i in range(5000)]})
    grammars.json_schema({"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**9})
