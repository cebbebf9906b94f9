"""What a chat body asks for, as turns of a chat. Knows bodies and harmony's messages; runs nothing.

system, developer   Developer, those at the beginning joined       assistant  reasoning   Assistant analysis
user                User                                                      content     Assistant final, commentary
tool                ToolResult, named by the call it answers                  tool_calls  Assistant to=functions.f
"""

import asyncio
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from gptoss_jax.chat import NoSuchTool, TurnSettings
from gptoss_jax.constrain.grammars import Grammar, Grammars
from gptoss_jax.constrain.schema import UnsupportedSchema
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import (
    Assistant,
    Conversation,
    Developer,
    Effort,
    Function,
    Message,
    Namespace,
    ResponseFormat,
    ToolResult,
    User,
)
from gptoss_jax.server.chat_schemas import (
    AssistantMessage,
    ChatBody,
    Content,
    ContentPart,
    FunctionSpec,
    NamedTool,
    OtherMessage,
    SystemMessage,
    ToolCall,
    ToolChoice,
    ToolMessage,
    ToolSpec,
    UserMessage,
    refuse,
)
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.responses.convert import conversation_of
from gptoss_jax.server.sampling import sampling_of
from gptoss_jax.server.service import Service
from gptoss_jax.tools.base import FUNCTIONS, Tool

_ANY_OBJECT = {"type": "object"}
# What OpenAI's other models know, in words of this one's.
_EFFORTS: dict[str, Effort] = {"none": "low", "minimal": "low", "xhigh": "high"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A chat's turns, ready to run.

    Attributes:
        model: the name of the one that answers.
        settings: of each choice, with a seed of its own.
        tools: what answers calls that the client could not.
        shows_reasoning: whether the client is told of it.
        only_final: whether nothing but the final answer is content: it has a form, and words before a call have not.
        checked: what the whole answer has to fit, where it was not held to all of it.
    """

    model: str
    conversation: Conversation
    settings: tuple[TurnSettings, ...]
    tools: tuple[Tool, ...]
    shows_reasoning: bool
    only_final: bool
    checked: Grammar | None


async def ask(body: ChatBody, service: Service) -> Asked:
    """Reads a body. Raises ApiError for what cannot be had, and UserError for what makes no sense."""
    model = service.model_named(body.model)
    refuse(body)
    said = list(_messages(body))
    # A schema takes a millisecond to compile, and a hundred of them must not make others wait.
    offer, form = await asyncio.to_thread(_offered, body, service)
    conversation = conversation_of(
        said,
        instructions=None,
        functions=offer.functions,
        formats=form.formats,
        tools=(),
        effort=_effort(body, default=service.settings.default_effort),
        today=service.settings.today,
    )
    return Asked(
        model=model,
        conversation=conversation,
        settings=_settings(body, offer, form, service),
        tools=(_Unoffered(tuple(f"{FUNCTIONS}.{function.name}" for function in offer.functions)),),
        shows_reasoning=body.include_reasoning is not False and not (body.reasoning and body.reasoning.exclude),
        only_final=form.grammar is not None,
        checked=form.grammar if service.settings.lenient_schemas else None,
    )


def _settings(body: ChatBody, offer: "_Offer", form: "_Form", service: Service) -> tuple[TurnSettings, ...]:
    sampling = sampling_of(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=body.seed,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    limits = (body.max_completion_tokens, body.max_tokens, service.settings.max_new_tokens)
    settings = TurnSettings(
        sampling=sampling,
        max_new_tokens=min((limit for limit in limits if limit is not None), default=None),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        tool_choice=offer.choice,
        parallel_calls=body.parallel_tool_calls is not False,
        final=form.grammar,
        strict=offer.strict,
    )
    return tuple(
        dataclasses.replace(settings, sampling=sampling.of_continuation(index)) for index in range(body.n or 1)
    )


def _effort(body: ChatBody, *, default: Effort) -> Effort:
    """The effort that is asked for, in the model's words."""
    within = body.reasoning.effort if body.reasoning is not None else None
    asked, param = (body.reasoning_effort, "reasoning_effort") if within is None else (within, "reasoning.effort")
    if within is not None and body.reasoning_effort not in (None, within):
        message = f"reasoning.effort is {within!r} and reasoning_effort {body.reasoning_effort!r}; give one"
        raise ApiError(400, message, param="reasoning_effort")
    if asked is None:
        return default
    known: dict[str, Effort] = {effort: effort for effort in get_args(Effort)} | _EFFORTS
    if asked not in known:
        raise ApiError(400, f"{param}: expected one of {', '.join(known)}, found {asked[:100]!r}", param=param)
    return known[asked]


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages(body: ChatBody) -> Iterator[Message]:
    called: dict[str, str] = {}  # recipients, by the ids of calls
    for index, message in enumerate(body.messages):
        place = f"messages.{index}"
        try:
            match message:
                case SystemMessage():
                    yield Developer(instructions=_text(message.content, f"{place}.content"))
                case UserMessage():
                    yield User(text=_text(message.content, f"{place}.content"), name=message.name)
                case AssistantMessage():
                    yield from _said(message, called, place)
                case ToolMessage():
                    yield _result(message, called, place)
                case OtherMessage():
                    known = "system, developer, user, assistant or tool"
                    text = f"{place}.role: expected {known}, found {message.role[:100]!r}"
                    raise ApiError(400, text, param=f"{place}.role")
        except UserError as error:  # a name that cannot stand in a header
            raise ApiError(400, f"{place}: {error}", param=place) from error


def _said(message: AssistantMessage, called: dict[str, str], place: str) -> Iterator[Assistant]:
    """Reasoning, words, calls. Words before a call are commentary, as the model writes them."""
    for name in ("audio", "function_call"):
        if getattr(message, name):
            text = f"{place}.{name}: not supported; gpt-oss reads text, and calls in tool_calls"
            raise ApiError(400, text, code="unsupported_parameter", param=f"{place}.{name}")
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        yield Assistant(text=reasoning, channel="analysis")
    content = _text(message.content or message.refusal or "", f"{place}.content")
    if content:
        yield Assistant(text=content, channel="commentary" if message.tool_calls else "final")
    for index, call in enumerate(message.tool_calls or ()):
        yield _call(call, called, f"{place}.tool_calls.{index}")


def _call(call: ToolCall, called: dict[str, str], place: str) -> Assistant:
    if call.function is None:
        text = f"{place}: expected a call of a function, found one of type {call.type[:100]!r}"
        raise ApiError(400, text, param=f"{place}.type")
    recipient = f"{FUNCTIONS}.{call.function.name}"
    called[call.id] = recipient
    return Assistant(text=call.function.arguments, channel="commentary", recipient=recipient, content_type="json")


def _result(message: ToolMessage, called: Mapping[str, str], place: str) -> ToolResult:
    if message.tool_call_id not in called:
        text = f"{place}.tool_call_id: no assistant message before it has a call {message.tool_call_id[:100]!r}"
        raise ApiError(400, text, param=f"{place}.tool_call_id")
    return ToolResult(name=called[message.tool_call_id], text=_text(message.content, f"{place}.content"))


def _text(content: Content, place: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{place}.{index}") for index, part in enumerate(content))


def _part_text(part: ContentPart, place: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        message = f"{place}: content of type {part.type[:100]!r} is not supported; gpt-oss reads text alone"
        raise ApiError(400, message, code="unsupported_content", param=f"{place}.type")
    if text is None:
        raise ApiError(400, f"{place}: content of type {part.type!r} has no {part.type}", param=f"{place}.{part.type}")
    return text


# --- tools ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Offer:
    """What may be called, what must be, and what holds arguments to their schemas."""

    functions: tuple[Function, ...] = ()
    strict: Mapping[str, Grammar] = dataclasses.field(default_factory=dict)
    choice: str = "auto"


def _offered(body: ChatBody, service: Service) -> "tuple[_Offer, _Form]":
    lenient = service.settings.lenient_schemas
    offer = _offer(body.tools or (), body.tool_choice, grammars=service.grammars, lenient=lenient)
    return offer, _form(body, grammars=service.grammars, lenient=lenient)


def _offer(
    tools: Sequence[ToolSpec],
    choice: str | ToolChoice | None,
    *,
    grammars: Grammars,
    lenient: bool,
) -> _Offer:
    specs = _function_specs(tools)
    chosen, allowed = _chosen(choice, [spec.name for _, spec in specs])
    functions, strict = [], {}
    for place, spec in specs:
        if spec.name not in allowed:
            continue
        recipient = f"{FUNCTIONS}.{spec.name}"
        forced = chosen == "required" or chosen == recipient
        grammar = _arguments(spec, grammars, forced=forced, lenient=lenient, place=f"{place}.parameters")
        if grammar is not None:
            strict[recipient] = grammar
        functions.append(_function(spec, place))
    return _Offer(functions=tuple(functions), strict=strict, choice=chosen if functions else "auto")


def _function_specs(tools: Sequence[ToolSpec]) -> list[tuple[str, FunctionSpec]]:
    """Functions and their places; tools of other types are skipped."""
    specs: dict[str, tuple[str, FunctionSpec]] = {}
    for index, tool in enumerate(tools):
        if tool.type != "function":
            continue
        place = f"tools.{index}.function"
        if tool.function is None:
            raise ApiError(400, f"{place}: a tool of type 'function' needs one", param=place)
        if tool.function.name in specs:
            message = f"{place}.name: there are two functions {tool.function.name[:100]!r}"
            raise ApiError(400, message, param=f"{place}.name")
        specs[tool.function.name] = (place, tool.function)
    return list(specs.values())


def _function(spec: FunctionSpec, place: str) -> Function:
    try:
        return Function(
            name=spec.name,
            description=spec.description or "",
            parameters=spec.parameters,
            strict=bool(spec.strict),
        )
    except UserError as error:
        raise ApiError(400, f"{place}.name: {error}", param=f"{place}.name") from error


def _arguments(spec: FunctionSpec, grammars: Grammars, *, forced: bool, lenient: bool, place: str) -> Grammar | None:
    """What holds the arguments to their schema: of a strict function always, of one that is to be called if it can."""
    if not spec.strict and (spec.strict is False or not forced):
        return None
    try:
        return grammars.json_schema(_ANY_OBJECT if spec.parameters is None else spec.parameters, lenient=lenient)
    except UserError as error:
        if spec.strict:
            raise _bad_schema(error, place) from error
        return None


def _chosen(choice: str | ToolChoice | None, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Auto, none, required or a recipient; and the names of the functions that the model is told of."""
    allowed = names
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = [_named(tool, names) for tool in choice.allowed_tools.tools]
        choice = choice.allowed_tools.mode
    if isinstance(choice, ToolChoice):
        return f"{FUNCTIONS}.{_named(choice, names)}", allowed
    if choice == "required" and not allowed:
        message = "tool_choice is 'required' and tools has no function; expected at least one"
        raise ApiError(400, message, param="tool_choice")
    return choice or "auto", allowed


def _named(choice: ToolChoice | NamedTool, names: Sequence[str]) -> str:
    name = choice.function.name if choice.type == "function" and choice.function is not None else None
    if name is not None and name in names:
        return name
    what = f"a tool of type {choice.type[:100]!r}" if name is None else f"the function {name[:100]!r}"
    message = (
        f"tool_choice names {what}; expected one of the functions of tools: {', '.join(names) or 'there are none'}"
    )
    raise ApiError(400, message, param="tool_choice")


class _Unoffered:
    """Answers calls to what nobody offered: a client could not, and the model reads what there is and goes on."""

    def __init__(self, offered: tuple[str, ...]):
        self._offered = offered
        self._answers = NoSuchTool(known=offered)

    @property
    def namespace(self) -> Namespace:
        """The model is not told of it."""
        return self._answers.namespace

    def handles(self, recipient: str) -> bool:
        """Whether nobody else does."""
        return recipient not in self._offered

    def session(self) -> "_Unoffered":
        """Nothing is kept between calls."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """Raises ToolError, always."""
        return await self._answers.call(recipient, text)


# --- the form of the answer -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What holds the answer to its form, and what tells the model of it."""

    grammar: Grammar | None = None
    formats: tuple[ResponseFormat, ...] = ()


def _form(body: ChatBody, *, grammars: Grammars, lenient: bool) -> _Form:
    form = body.response_format
    if form is None or form.type == "text":
        return _Form()
    if form.type == "json_object":
        return _Form(grammar=grammars.json_schema(_ANY_OBJECT))
    named, place = form.json_schema, "response_format.json_schema"
    if named is None or named.schema_ is None:
        missing = place if named is None else f"{place}.schema"
        raise ApiError(400, f"{missing}: the type json_schema needs one", param=missing)
    try:
        told = ResponseFormat(name=named.name, schema=named.schema_, description=named.description or "")
    except UserError as error:
        raise ApiError(400, f"{place}.name: {error}", param=f"{place}.name") from error
    try:
        grammar = grammars.json_schema(named.schema_, lenient=lenient or named.strict is False)
    except UserError as error:
        raise _bad_schema(error, f"{place}.schema") from error
    return _Form(grammar=grammar, formats=(told,))


def _bad_schema(error: UserError, place: str) -> ApiError:
    code = "unsupported_schema" if isinstance(error, UnsupportedSchema) else "invalid_schema"
    return ApiError(400, f"{place}: {error}", code=code, param=place)
