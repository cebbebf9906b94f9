"""What the model may call and which form its answer has. Knows bodies, tools and grammars; knows no conversation.

A type of tool that OpenAI has and that runs here is refused where the server does not run it. Types that clients answer
themselves by means of their own (custom, local_shell, namespace, mcp …) are skipped: the model is not told of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.constrain import Grammar, Grammars, UnsupportedSchema
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Function, ResponseFormat
from gptoss_jax.server.errors import ApiError, unsupported
from gptoss_jax.server.responses.convert import BROWSER, PYTHON, name_of, recipient_of
from gptoss_jax.server.responses.schemas import Format, FunctionTool, OtherTool, ToolChoice, ToolSpec
from gptoss_jax.tools.base import Tool, ToolError

_HOSTED = {
    "code_interpreter": PYTHON,
    "web_search": BROWSER,
    "web_search_2025_08_26": BROWSER,
    "web_search_preview": BROWSER,
    "web_search_preview_2025_03_11": BROWSER,
}
# Built-in tools that would run on a server, and that this one does not have.
_NEVER_HOSTED = ("file_search", "image_generation", "computer", "computer_use_preview")
_FIRST_RECIPIENT = {PYTHON: "python", BROWSER: "browser.search"}
_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What a turn is offered.

    Attributes:
        functions: of the caller's.
        strict: the grammars of their arguments, by recipient.
        tools: that are run here.
        choice: auto, none, required or a recipient.
        echo: the tools as the response repeats them.
    """

    functions: tuple[Function, ...] = ()
    strict: Mapping[str, Grammar] = dataclasses.field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    echo: tuple[Mapping[str, Any], ...] = ()


def offer_of(
    specs: Sequence[ToolSpec],
    choice: str | ToolChoice | None,
    *,
    grammars: Grammars,
    server_tools: Sequence[Tool],
    lenient: bool,
) -> Offer:
    """Reads `tools` and `tool_choice`.

    Raises:
        ApiError: a tool, a schema or a choice that cannot be had.
    """
    functions: dict[str, Function] = {}
    strict: dict[str, Grammar] = {}
    tools: dict[str, Tool] = {}
    echo: list[Mapping[str, Any]] = []
    for index, spec in enumerate(specs):
        place = f"tools.{index}"
        if isinstance(spec, FunctionTool):
            if spec.name in functions:
                raise ApiError(400, f"{place}.name: there are two functions {spec.name!r}", param=f"{place}.name")
            grammar = _arguments(spec, grammars, lenient=lenient, place=place)
            if grammar is not None:
                strict[recipient_of(spec.name)] = grammar
            functions[spec.name] = _function(spec, strict=grammar is not None)
            echo.append(_echo(spec, strict=grammar is not None))
        elif (tool := _hosted(spec, server_tools, place=place)) is not None:
            tools[tool.namespace.name] = tool
            echo.append(spec.model_dump(mode="json", exclude_none=True))
    offer = Offer(functions=tuple(functions.values()), strict=strict, tools=tuple(tools.values()), echo=tuple(echo))
    return _chosen(offer, choice)


def _arguments(spec: FunctionTool, grammars: Grammars, *, lenient: bool, place: str) -> Grammar | None:
    """What holds its arguments to their schema; None where they are not held.

    `strict` left out means as far as it goes: a schema that cannot be held to is then only shown to the model.
    """
    if spec.strict is False:
        return None
    schema = _NO_ARGUMENTS if spec.parameters is None else spec.parameters
    try:
        return grammars.json_schema(schema, lenient=lenient)
    except UserError as error:
        if spec.strict:
            raise _schema_error(error, f"{place}.parameters") from error
        return None


def _schema_error(error: UserError, place: str) -> ApiError:
    code = "unsupported_schema" if isinstance(error, UnsupportedSchema) else "invalid_schema"
    return ApiError(400, f"{place}: {error}", code=code, param=place)


def _function(spec: FunctionTool, *, strict: bool) -> Function:
    return Function(name=spec.name, description=spec.description or "", parameters=spec.parameters, strict=strict)


def _echo(spec: FunctionTool, *, strict: bool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": spec.name,
        "description": spec.description,
        "parameters": spec.parameters,
        "strict": strict,
    }


def _hosted(spec: OtherTool, server_tools: Sequence[Tool], *, place: str) -> Tool | None:
    """The server's tool for this type; None where the type is skipped."""
    extra = spec.model_extra or {}
    name = _HOSTED.get(spec.type)
    tool = next((tool for tool in server_tools if tool.namespace.name == name), None)
    # Codex puts a search that must not leave the machine into every request, whether its user wants to search or not.
    if tool is None and extra.get("external_web_access") is False:
        return None
    if spec.type in _NEVER_HOSTED or (name is not None and tool is None):
        running = sorted(kind for kind, name in _HOSTED.items() if any(t.namespace.name == name for t in server_tools))
        has = f"it runs {', '.join(running)}" if running else "it runs none; see --tools of gptoss-jax serve"
        raise ApiError(400, f"{place}: this server does not run {spec.type}; {has}", param=f"{place}.type")
    _refuse_options(spec.type, extra, place=place)
    return tool


def _refuse_options(kind: str, extra: Mapping[str, Any], *, place: str) -> None:
    if kind == "code_interpreter":
        container = extra.get("container", "auto")
        if container != "auto" and not (isinstance(container, Mapping) and container.get("type") == "auto"):
            raise unsupported(f"{place}.container", 'containers are not kept; expected {"type": "auto"}')
        options = container if isinstance(container, Mapping) else {}
        refused = [name for name in ("file_ids", "memory_limit", "network_policy") if options.get(name)]
        place = f"{place}.container"
    elif kind in _HOSTED:
        refused = [name for name in ("filters", "user_location") if extra.get(name)]
    else:
        return
    if refused:
        raise unsupported(f"{place}.{refused[0]}", "not supported; the server's settings decide it")


# --- tool_choice ------------------------------------------------------------------------------------------------------


def _chosen(offer: Offer, choice: str | ToolChoice | None) -> Offer:
    if choice is None or isinstance(choice, str):
        return _checked(dataclasses.replace(offer, choice=choice or "auto"))
    if choice.type == "allowed_tools":
        return _checked(dataclasses.replace(_allowed(offer, choice.tools or ()), choice=choice.mode or "auto"))
    return dataclasses.replace(offer, choice=_recipient(offer, choice.type, choice.name))


def _checked(offer: Offer) -> Offer:
    if offer.choice == "required" and not offer.functions and not offer.tools:
        message = "tool_choice is 'required' and there is no tool that could be called; expected at least one in tools"
        raise ApiError(400, message, param="tool_choice")
    return offer


def _allowed(offer: Offer, allowed: Sequence[Mapping[str, Any]]) -> Offer:
    """The offer without what is not allowed; the model is not told of the rest."""
    recipients = {_recipient(offer, str(entry.get("type")), entry.get("name")) for entry in allowed}
    return dataclasses.replace(
        offer,
        functions=tuple(function for function in offer.functions if recipient_of(function.name) in recipients),
        strict={name: grammar for name, grammar in offer.strict.items() if name in recipients},
        tools=tuple(tool for tool in offer.tools if _FIRST_RECIPIENT[tool.namespace.name] in recipients),
    )


def _recipient(offer: Offer, kind: str, name: Any) -> str:
    if kind == "function" and any(function.name == name for function in offer.functions):
        return recipient_of(str(name))
    namespace = _HOSTED.get(kind)
    if any(tool.namespace.name == namespace for tool in offer.tools):
        return _FIRST_RECIPIENT[str(namespace)]
    names = [function.name for function in offer.functions] + [tool.namespace.name for tool in offer.tools]
    what = f"function {name!r}" if kind == "function" else repr(kind)
    message = f"tool_choice names {what}; expected one of tools: {', '.join(names) or 'there are none'}"
    raise ApiError(400, message, param="tool_choice")


# --- text.format ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The form of the answer: what holds it to it, what tells the model, what the response repeats."""

    grammar: Grammar | None = None
    formats: tuple[ResponseFormat, ...] = ()
    echo: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "text"})


def form_of(form: Format | None, *, grammars: Grammars, lenient: bool) -> Form:
    """Reads `text.format`.

    A schema that cannot be held to in full is an error, unless `strict` is false: then it is held to as far as it goes.

    Raises:
        ApiError: there is no name, no schema, or one that cannot be held to; it lists the keywords.
    """
    if form is None or form.type == "text":
        return Form()
    if form.type == "json_object":
        return Form(grammar=grammars.json_schema(_ANY_OBJECT), echo={"type": "json_object"})
    for name, value in (("name", form.name), ("schema", form.schema_)):
        if value is None:
            raise ApiError(400, f"text.format.{name}: json_schema needs one", param=f"text.format.{name}")
    schema, name = form.schema_ or {}, form.name or ""
    told = ResponseFormat(name=name, schema=schema, description=form.description or "")
    return Form(
        grammar=_answer_grammar(form, schema, grammars, lenient=lenient),
        formats=(told,),
        echo={
            "type": "json_schema",
            "name": name,
            "schema": schema,
            "description": form.description,
            "strict": bool(form.strict),
        },
    )


def _answer_grammar(form: Format, schema: Mapping[str, Any], grammars: Grammars, *, lenient: bool) -> Grammar:
    try:
        return grammars.json_schema(schema, lenient=lenient or form.strict is False)
    except UserError as error:
        raise _schema_error(error, "text.format.schema") from error


# --- max_tool_calls ---------------------------------------------------------------------------------------------------


class Limited:
    """A tool that answers a number of calls in a turn, shared with others; then it says that there are no more."""

    def __init__(self, tool: Tool, left: list[int]):
        self._tool = tool
        self._left = left  # one number, the same list for all tools of a turn

    @property
    def namespace(self) -> Any:
        """The tool's."""
        return self._tool.namespace

    def handles(self, recipient: str) -> bool:
        """The tool's."""
        return self._tool.handles(recipient)

    def session(self) -> "Limited":
        """The tool's, with what is left of the calls."""
        return Limited(self._tool.session(), self._left)

    async def call(self, recipient: str, text: str) -> str:
        """The tool's answer, while there are calls left."""
        if not self._left[0]:
            raise ToolError(
                f"{name_of(recipient)} was not run: no more tool calls may be made; answer with what is known"
            )
        self._left[0] -= 1
        return await self._tool.call(recipient, text)


def limited(tools: Sequence[Tool], most: int | None) -> tuple[Tool, ...]:
    """The tools with so many calls in all; None for as many as the turn has rounds."""
    if most is None:
        return tuple(tools)
    left = [most]
    return tuple(Limited(tool, left) for tool in tools)
