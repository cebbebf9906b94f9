"""Schemas that answers are held to, of every kind that the README of structured output names."""

STRING = {"type": "string", "maxLength": 12}


def obj(properties: dict, *, optional: tuple[str, ...] = (), **more) -> dict:
    """An object as OpenAI's clients ask for it: everything required but `optional`, nothing else allowed."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


PERSON = obj({"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 130}})

SCHEMAS: dict[str, dict] = {
    # plain types
    "string": {"type": "string", "minLength": 2, "maxLength": 9},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["integer", "null", "boolean"]},
    # numbers
    "range": {"type": "integer", "minimum": -17, "maximum": 4211},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10_000},
    # strings
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}(x|y)?$"},
    "free pattern": {"type": "string", "pattern": "a[bc]", "maxLength": 40},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email", "maxLength": 40},
    "ipv4": {"type": "string", "format": "ipv4"},
    "unbounded string": obj({"text": {"type": "string"}}),
    # enum and const
    "enum": {"enum": ["red", "green", "déjà vu", 3, None, True, {"a": [1, "b"]}]},
    "enum of strings": obj({"colour": {"type": "string", "enum": ["rouge", "rot", "röd", 'quo"te', "back\\slash"]}}),
    "const": obj({"kind": {"const": "circle"}, "radius": {"type": "number", "minimum": 0}}),
    "const object": {"const": {"a": [1, 2.5, "<|return|>"], "b": None}},
    # objects
    "person": PERSON,
    "optional": obj({"a": {"type": "integer"}, "b": STRING, "c": {"type": "null"}}, optional=("b", "c")),
    "empty": obj({}),
    "deep": obj({"a": obj({"b": obj({"c": obj({"d": obj({"e": {"type": "boolean"}})})})})}),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "at least one": {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "minProperties": 1,
        "maxProperties": 4,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {
            "^n_[a-z]{1,4}$": {"type": "integer"},
            "^s_[a-z]{1,4}$": {"type": "string", "maxLength": 3},
        },
        "additionalProperties": False,
    },
    "odd names": obj({'a "b"': {"type": "integer"}, "c\\d": {"type": "integer"}, "é\n<|end|>": {"type": "null"}}),
    # arrays
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 6},
    "array of objects": {"type": "array", "items": PERSON, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, STRING], "items": False, "minItems": 2},
    "nested arrays": {
        "type": "array",
        "maxItems": 3,
        "items": {"type": "array", "maxItems": 3, "items": {"type": "boolean"}},
    },
    # alternatives
    "anyOf": {
        "anyOf": [{"type": "integer"}, obj({"error": STRING}), {"type": "array", "items": STRING, "maxItems": 2}]
    },
    "tagged union": {
        "oneOf": [
            obj({"kind": {"const": "circle"}, "radius": {"type": "number"}}),
            obj({"kind": {"const": "square"}, "side": {"type": "number"}}),
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"minimum": 5}, "b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "nullable": obj({"a": {"anyOf": [PERSON, {"type": "null"}]}}),
    # references
    "$ref": {**obj({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}}), "$defs": {"p": PERSON}},
    "list by $ref": {
        "$ref": "#/definitions/node",
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {
            "node": obj(
                {"value": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/definitions/node"}]}}
            )
        },
    },
    "tree by #": obj(
        {"leaf": {"type": "boolean"}, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}}
    ),
    # as pydantic writes it
    "pydantic": {
        "$defs": {
            "Step": obj({"explanation": STRING, "output": STRING}, title="Step"),
            "Unit": {"enum": ["celsius", "fahrenheit"], "title": "Unit", "type": "string"},
        },
        **obj(
            {
                "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array", "maxItems": 3},
                "unit": {"$ref": "#/$defs/Unit", "description": "of the answer"},
                "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Limit"},
            },
            title="Answer",
        ),
    },
}
