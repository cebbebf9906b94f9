"""The bodies that /v1/responses takes. Knows JSON's shapes; knows no harmony, and serves nothing.

A field that OpenAI has and that is not served is listed here too, so that run.py can refuse it by its name. A field
that nobody knows, and a tool of a type that nobody knows, are let through and skipped.
"""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from gptoss_jax.server.errors import ApiError

MAX_LOGPROBS = 20  # of the engine, and of OpenAI
MAX_DEPTH = 100  # of JSON within JSON; what walks over it recurses
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
Key: TypeAlias = Annotated[str, Field(max_length=64)]
Value: TypeAlias = Annotated[str, Field(max_length=512)]
Role: TypeAlias = Literal["user", "assistant", "system", "developer"]


class Body(BaseModel):
    """A JSON object; fields beyond those named here are let through."""

    model_config = ConfigDict(extra="allow")


def check_json(body: object) -> None:
    """Raises ApiError for what Python reads as JSON and cannot write again: it is given back, stored and rendered."""
    level: list[object] = [body]
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, str) and not value.isascii() and _HALF_A_PAIR.search(value):
                raise ApiError(422, "the body holds half of a surrogate pair; expected Unicode", code="invalid_body")
            if isinstance(value, float) and not math.isfinite(value):
                raise ApiError(422, f"the body holds {value}; JSON has finite numbers alone", code="invalid_body")
        level = [part for value in level for part in _parts(value)]
        if not level:
            return
    raise ApiError(422, f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_body")


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list) else ()


# --- items ------------------------------------------------------------------------------------------------------------


class Part(Body):
    """A piece of content: input_text, output_text, reasoning_text, refusal, or what cannot be read, as input_image."""

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageItem(Body):
    """What somebody said; `type` may be left out."""

    type: Literal["message"] = "message"
    id: str | None = None
    role: Role
    content: str | list[Part]
    phase: Literal["commentary", "final_answer"] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _null_is_left_out(cls, value: object) -> object:
        return "message" if value is None else value


class FunctionCallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Body):
    """What the caller's function gave back."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str
    output: str | list[Part]


class ReasoningItem(Body):
    """What the model thought. Its text stands in `content`; an item with a summary or a cipher alone is skipped."""

    type: Literal["reasoning"]
    id: str | None = None
    content: list[Part] | None = None


class CodeInterpreterItem(Body):
    """Python that the server ran, and what it printed."""

    type: Literal["code_interpreter_call"]
    id: str | None = None
    code: str | None = None
    outputs: list[dict[str, Any]] | None = None


class WebSearchItem(Body):
    """A search that the server ran. What it found is not part of the item."""

    type: Literal["web_search_call"]
    id: str | None = None


class ItemReference(Body):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] | None = None
    id: str


class OtherItem(Body):
    """An item of a type that is not served."""

    type: str


_ITEMS = (
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "code_interpreter_call",
    "web_search_call",
    "item_reference",
)


def _item_kind(item: object) -> str:
    fields = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    kind = fields.get("type")
    if kind is None:
        return "item_reference" if "id" in fields and "role" not in fields else "message"
    return kind if isinstance(kind, str) and kind in _ITEMS else "other"


InputItem: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CodeInterpreterItem, Tag("code_interpreter_call")]
    | Annotated[WebSearchItem, Tag("web_search_call")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]


# --- tools and formats ------------------------------------------------------------------------------------------------


class FunctionTool(Body):
    """A function of the caller's own. `strict` left out: held to its schema if that can be done."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Body):
    """A tool that the server runs (web_search, code_interpreter), or one of a type that is skipped."""

    type: str


def _tool_kind(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "function" if kind == "function" else "other"


ToolSpec: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_kind)
]


class ToolChoice(Body):
    """A function by name, a tool of the server's by its type, or a choice among `allowed_tools`."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class Format(Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """How the answer is written."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How long the model thinks. `effort` is checked where it is mapped to what the model knows."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    mode: str | None = None
    context: str | None = None


class StreamOptions(Body):
    """Nothing of it is served."""

    include_obfuscation: bool | None = None


# --- bodies -----------------------------------------------------------------------------------------------------------


class CountTokens(Body):
    """The body of POST /v1/responses/input_tokens: what goes into a prompt."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_written_again(cls, body: object) -> object:
        check_json(body)
        return body

    model: str | None = None
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # refused unless null
    conversation: Any = None
    personality: Any = None


class CreateResponse(CountTokens):
    """The body of POST /v1/responses."""

    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(default=None, ge=1)
    metadata: dict[Key, Value] | None = Field(default=None, max_length=16)
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    top_p: float | None = Field(default=None, gt=0, le=1)
    user: str | None = None
    # refused unless null
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
