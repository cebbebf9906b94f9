"""An OpenAPI schema as a page to read, without a script and without anything from elsewhere. Knows JSON schemas."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
code { font: .9em ui-monospace, monospace; }
section { border-top: 1px solid #8885; margin-top: 2rem; }
h2 { font: 600 1.1rem ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8883; }
"""


def page_of(schema: Mapping[str, Any]) -> str:
    """HTML: every operation, its parameters and the fields of its body, and the schemas that those name."""
    info = schema["info"]
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    named = schema.get("components", {}).get("schemas", {})
    schemas = "".join(_schema(name, each) for name, each in sorted(named.items()))
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{escape(info.get('description', ''))} "
        'For programs: <a href="/openapi.json">openapi.json</a>.</p>'
        f"{operations}<h1>Schemas</h1>{schemas}</body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        _row(each["name"], each["schema"], f"in the {each['in']}", required=each.get("required", False))
        for each in operation.get("parameters", ())
    ]
    bodies = [each["schema"] for each in operation.get("requestBody", {}).get("content", {}).values()]
    body = "".join(f"<p>Body: {_type(each)}</p>" for each in bodies)
    return (
        f"<section><h2>{method.upper()} {escape(path)}</h2><p><b>{escape(operation.get('summary', ''))}.</b> "
        f"{escape(operation.get('description', ''))}</p>{body}{_table(rows)}</section>"
    )


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [_row(field, each, "", required=field in required) for field, each in schema.get("properties", {}).items()]
    shape = "" if rows else f"<p>{_type(schema)}</p>"
    description = escape(schema.get("description", ""))
    return f'<section id="{escape(name)}"><h2>{escape(name)}</h2><p>{description}</p>{shape}{_table(rows)}</section>'


def _table(rows: list[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _row(name: str, schema: Mapping[str, Any], place: str, *, required: bool) -> str:
    notes = [place, "required" if required else "", escape(schema.get("description", "")), *_limits(schema)]
    told = "; ".join(note for note in notes if note)
    return f"<tr><td><code>{escape(name)}</code></td><td>{_type(schema)}</td><td>{told}</td></tr>"


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    """What a value has to be, where the schema or one of its alternatives says so."""
    for each in (schema, *schema.get("anyOf", ())):
        for key, text in (("minimum", "at least"), ("maximum", "at most")):
            if key in each:
                yield f"{text} {each[key]}"
    if schema.get("default") is not None:
        yield f"default {escape(str(schema['default']))}"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_type(each) for each in schema[key])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"<code>{escape(str(each))}</code>" for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything")))
