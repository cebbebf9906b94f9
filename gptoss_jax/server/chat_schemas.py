"""The body that /v1/chat/completions takes. Knows JSON's shapes; knows no harmony, and serves nothing.

A field of OpenAI's that is not served is listed too, to be refused by its name. A field that nobody knows is skipped,
and so is a tool of another type than "function".
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from gptoss_jax.engine.request import MAX_LOGPROBS
from gptoss_jax.server.errors import ApiError, unsupported

_MAX_CHOICES = 128
_MAX_STOPS = 16


class _Object(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


# --- messages ---------------------------------------------------------------------------------------------------------


class ContentPart(_Object):
    """A piece of content; only text is read."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content: TypeAlias = str | list[ContentPart]


class CalledFunction(_Object):
    """Which function, and with what, as the model wrote it."""

    name: str
    arguments: str = ""


class ToolCall(_Object):
    """A call that an assistant made."""

    id: str
    type: str = "function"
    function: CalledFunction | None = None


class SystemMessage(_Object):
    """Instructions; OpenAI's two names for them mean the same here."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Object):
    """What somebody says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Object):
    """What the model said earlier. Its reasoning is read under either name, if no final answer follows it."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    audio: Any = Field(default=None, description="refused")
    function_call: Any = Field(default=None, description="refused: use tool_calls")


class ToolMessage(_Object):
    """What a function gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


class OtherMessage(_Object):
    """Of a role that is not served."""

    role: str


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _role(message: object) -> str:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return role if isinstance(role, str) and role in _ROLES else "other"


ChatMessage: TypeAlias = Annotated[
    Annotated[SystemMessage, Tag("system")]
    | Annotated[SystemMessage, Tag("developer")]
    | Annotated[UserMessage, Tag("user")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")]
    | Annotated[OtherMessage, Tag("other")],
    Discriminator(_role),
]


# --- tools and formats ------------------------------------------------------------------------------------------------


class FunctionSpec(_Object):
    """A function of the caller's."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="arguments are held to the schema; if null, those of a required call"
    )


class ToolSpec(_Object):
    """A tool; any type but "function" is skipped."""

    type: str
    function: FunctionSpec | None = None


class NamedFunction(_Object):
    """A function by its name."""

    name: str


class NamedTool(_Object):
    """A tool by its name."""

    type: str
    function: NamedFunction | None = None


class AllowedTools(_Object):
    """Some of the tools."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool]


class ToolChoice(_Object):
    """A function that is to be called, or the tools that may be."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class NamedSchema(_Object):
    """A JSON schema, and what it is called."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="false: the answer is held to it as far as it goes")


class ResponseForm(_Object):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ReasoningOptions(_Object):
    """How long the model reasons, and whether that is told."""

    effort: str | None = None
    exclude: bool | None = None
    enabled: bool | None = Field(default=None, description="false is refused: the model always reasons")
    max_tokens: Any = Field(default=None, description="refused")


class StreamOptions(_Object):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="refused if true")


# --- the body ---------------------------------------------------------------------------------------------------------


class ChatBody(_Object):
    """What is asked for."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES, description="answers, each with a seed of its own")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_completion_tokens: int | None = Field(default=None, ge=1, description="reasoning included")
    max_tokens: int | None = Field(default=None, ge=1, description="the older name of max_completion_tokens")
    stop: str | list[str] | None = Field(default=None, description=f"at most {_MAX_STOPS}; looked for in content")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="an extension; 0 or -1 is off")
    min_p: float | None = Field(default=None, ge=0, le=1, description="an extension; 0 is off")
    repetition_penalty: float | None = Field(default=None, gt=0, description="an extension; 1 is off")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, description="the same seed, the same answer; any otherwise")
    logprobs: bool | None = Field(default=None, description="of the tokens of content")
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="only with logprobs")

    reasoning_effort: str | None = Field(default=None, description="low, medium or high; none and minimal are low")
    reasoning: ReasoningOptions | None = None
    include_reasoning: bool | None = Field(default=None, description="false is reasoning.exclude")
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseForm | None = None

    metadata: dict[str, Any] | None = Field(default=None, description="not used")
    prompt_cache_key: str | None = Field(default=None, description="not used: beginnings in common are always found")
    safety_identifier: str | None = Field(default=None, description="not used")
    user: str | None = Field(default=None, description="not used")

    service_tier: str | None = Field(default=None, description="refused unless auto or default")
    prompt_cache_retention: str | None = Field(default=None, description="refused unless in_memory")
    verbosity: str | None = Field(default=None, description="refused unless medium")
    modalities: list[str] | None = Field(default=None, description='refused unless ["text"]')
    store: bool | None = Field(default=None, description="refused if true: /v1/responses keeps answers")
    audio: Any = Field(default=None, description="refused")
    function_call: Any = Field(default=None, description="refused: use tool_choice")
    functions: Any = Field(default=None, description="refused: use tools")
    moderation: Any = Field(default=None, description="refused")
    prediction: Any = Field(default=None, description="refused")
    prompt_cache_options: Any = Field(default=None, description="refused")
    web_search_options: Any = Field(default=None, description="refused")
    best_of: Any = Field(default=None, description="refused; so are the following, which other servers have")
    continue_final_message: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    prompt_logprobs: Any = None
    stop_token_ids: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None


_FORMS = "not supported; a JSON schema goes into response_format"
_REFUSED = {
    "audio": "not supported; gpt-oss writes text alone",
    "best_of": "not supported",
    "continue_final_message": "not supported; the model begins a message of its own",
    "function_call": "not supported, since it was replaced by tool_choice",
    "functions": "not supported, since it was replaced by tools",
    "guided_choice": _FORMS,
    "guided_grammar": _FORMS,
    "guided_json": _FORMS,
    "guided_regex": _FORMS,
    "ignore_eos": "not supported",
    "min_tokens": "not supported",
    "moderation": "not supported",
    "prediction": "not supported",
    "prompt_cache_options": "not supported; beginnings that prompts have in common are cached anyway",
    "prompt_logprobs": "not supported; /v1/completions tells them, with echo and logprobs",
    "stop_token_ids": "not supported; give texts in stop",
    "store": "not supported; /v1/responses keeps answers",
    "structured_outputs": _FORMS,
    "use_beam_search": "not supported",
    "web_search_options": "not supported; /v1/responses takes the tool web_search",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
}


def refuse(body: ChatBody) -> None:
    """Raises ApiError for the first thing that is asked for and cannot be had, or that makes no sense."""
    for name, why in _REFUSED.items():
        if getattr(body, name):  # false, 0 and an empty list ask for nothing
            raise unsupported(name, why)
    for name, served in _ONLY.items():
        value = getattr(body, name)
        if value is not None and value not in served:
            raise unsupported(name, f"expected {' or '.join(map(repr, served))}, found {str(value)[:100]!r}")
    _refuse_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not; set logprobs too", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one"
        raise ApiError(400, message, param="max_tokens")
    _check_stop([body.stop] if isinstance(body.stop, str) else body.stop or [])


def _refuse_options(body: ChatBody) -> None:
    if body.stream_options is not None:
        if not body.stream:
            raise ApiError(400, "stream_options is given and stream is not; set stream too", param="stream_options")
        if body.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation", "not supported")
    if body.reasoning is not None:
        if body.reasoning.enabled is False:
            raise unsupported("reasoning.enabled", "the model always reasons; effort low makes it short")
        if body.reasoning.max_tokens is not None:
            raise unsupported("reasoning.max_tokens", "not supported; effort says how long the model reasons")


def _check_stop(stop: list[str]) -> None:
    if len(stop) > _MAX_STOPS:
        raise ApiError(400, f"stop: expected at most {_MAX_STOPS} texts, found {len(stop)}", param="stop")
    for text in stop:
        if any("\ud800" <= character <= "\udfff" for character in text):  # JSON's \u can say it, UTF-8 cannot
            raise ApiError(400, f"stop: expected text, found half of a surrogate pair in {text[:100]!r}", param="stop")
