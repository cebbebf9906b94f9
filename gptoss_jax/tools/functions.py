"""Python functions as tools: what the model is told of one, and its call. Knows no other tool, no model.

What stands here is what the model reads and may write, {"city": "Oslo"}:

    @tool                                                       // The weather of a city, now.
    def weather(city: str, unit: Literal["C", "F"] = "C"):      type weather = (_: {
        '''The weather of a city, now.                   ─►      // its name, in English.
                                                                city: string,
        Args:                                                   unit?: "C" | "F", // default: C
            city: its name, in English.                         }) => any;
        '''
"""

import asyncio
import dataclasses
import enum
import functools
import inspect
import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, overload

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Function, Namespace
from gptoss_jax.tools.base import FUNCTIONS, ToolError
from gptoss_jax.tools.hints import Faults, Field, Hint, hint_of, object_of, resolved_hints
from gptoss_jax.tools.thread import in_thread

_MOST_FAULTS = 8  # told at once
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Return|Yields|Raises|Examples?|Notes?|Attributes):\s*")
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


class FunctionTool:
    """A function that the model may call, and that is called here. `tool` makes it.

    Called as a function it is what it was. What the function returns is told as it is if it is a str, else as JSON.
    A `ToolError` that it raises is told to the model; another exception is raised to who runs the turn.

    Attributes:
        function: what the model is told.
    """

    def __init__(self, call: Callable[..., Any], *, function: Function, arguments: Hint, timeout_s: float | None):
        functools.update_wrapper(self, call)
        self.function = function
        self._call = call
        self._arguments = arguments
        self._timeout_s = timeout_s

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def namespace(self) -> Namespace:
        """This one function in the namespace "functions"."""
        return Namespace(name=FUNCTIONS, functions=(self.function,))

    def handles(self, recipient: str) -> bool:
        """Whether the recipient is this function."""
        return recipient == f"{FUNCTIONS}.{self.function.name}"

    def session(self) -> "FunctionTool":
        """Itself: a function remembers nothing of a conversation."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """Calls the function with arguments that the model wrote as a JSON object.

        Raises:
            ToolError: arguments that do not fit, or no answer in time. A function that is not `async` runs on in its
                thread after that.
        """
        arguments = read_arguments(text, self._arguments, called=recipient)
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                if inspect.iscoroutinefunction(self._call):
                    result = await self._call(**arguments)
                else:
                    result = await in_thread(functools.partial(self._call, **arguments))
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ToolError(
                f"{recipient} gave no answer in {self._timeout_s:g} s and was left; try something else"
            ) from None
        return _text_of(result)


class FunctionTools:
    """Several functions as one tool: those that `tool` made, or plain ones.

    Raises:
        UserError: two functions of one name.
    """

    def __init__(self, *functions: Callable[..., Any]):
        tools = [one if isinstance(one, FunctionTool) else tool(one) for one in functions]
        self._tools = {f"{FUNCTIONS}.{one.function.name}": one for one in tools}
        if len(self._tools) < len(tools):
            names = [one.function.name for one in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two functions are named {twice!r}; expected names that differ: give one `name=`")

    @property
    def namespace(self) -> Namespace:
        """The functions in the order they were given, in the namespace "functions"."""
        return Namespace(name=FUNCTIONS, functions=tuple(one.function for one in self._tools.values()))

    def handles(self, recipient: str) -> bool:
        """Whether the recipient is one of the functions."""
        return recipient in self._tools

    def session(self) -> "FunctionTools":
        """Itself: functions remember nothing of a conversation."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """As `FunctionTool.call` of the one that is meant."""
        return await self._tools[recipient].call(recipient, text)


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, strict: bool = False, timeout_s: float | None = 60.0
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool = False,
    timeout_s: float | None = 60.0,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a tool of a function whose parameters have type hints (tools/hints.py says which). It may be `async`.

    Args:
        function: described by its docstring; an `Args:` section describes the parameters, and so does
            `Annotated[int, "in metres"]`. A parameter with a default may be left out by the model.
        name: in place of the function's own.
        description: in place of the docstring's.
        strict: whether arguments are held to the schema while the model writes them.
        timeout_s: how long a call may take; None for as long as it wants.

    Raises:
        UserError: a parameter without a hint, or of a type that JSON cannot carry.
    """
    if function is None:
        return functools.partial(tool, name=name, description=description, strict=strict, timeout_s=timeout_s)  # type: ignore[return-value]
    about, of_arguments = read_docstring(inspect.getdoc(function) or "")
    name = function.__name__ if name is None else name
    arguments = object_of(_fields(function, name, of_arguments), dict)
    told = Function(
        name=name,
        description=about if description is None else description,
        parameters=arguments.schema if arguments.schema["properties"] else None,
        strict=strict,
    )
    return FunctionTool(function, function=told, arguments=arguments, timeout_s=timeout_s)


def read_arguments(text: str, hint: Hint, *, called: str) -> Any:
    """What the model wrote, as the hint's type.

    Raises:
        ToolError: all that is wrong with it.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite) if text.strip() else {}
        json.dumps(value, ensure_ascii=False).encode()  # fails at half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ToolError(f"the arguments of {called} are not JSON ({error}); write one JSON object") from None
    faults: Faults = []
    arguments = hint.read(value, "", faults)
    if faults:
        raise ToolError(f"the arguments of {called} do not fit: " + "; ".join(faults[:_MOST_FAULTS]))
    return arguments


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and what the `Args:` section says of each parameter."""
    about: list[str] = []
    arguments: dict[str, str] = {}
    section, current, indent = "", "", 0
    for line in doc.splitlines():
        if heading := _SECTION.fullmatch(line):
            section, current, indent = heading[1], "", 0
        elif not section:
            about.append(line.rstrip())
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            if depth <= indent and (entry := _ARGUMENT.fullmatch(line.strip())):
                current = entry[1]
                arguments[current] = entry[2].strip()
            elif current:
                arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    return "\n".join(about).strip(), arguments


def _fields(function: Callable[..., Any], name: str, descriptions: dict[str, str]) -> dict[str, Field]:
    hints = resolved_hints(inspect.unwrap(function))
    fields = {}
    for parameter in inspect.signature(function).parameters.values():
        place = f"the parameter {parameter.name!r} of {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{place} is {parameter.kind.description}; expected one that is given by its name")
        if parameter.name not in hints:
            raise UserError(f"{place} has no type hint; expected one, as `{parameter.name}: str`")
        hint = hint_of(hints[parameter.name], place=place)
        words = descriptions.get(parameter.name, "")
        if words and not _is_annotated(hints[parameter.name]):
            hint = Hint({**hint.schema, "description": words}, hint.read)
        default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = Field(hint, default)
    return fields


def _is_annotated(annotation: Any) -> bool:
    """Whether words of its own stand in the annotation."""
    return any(isinstance(note, str) for note in getattr(annotation, "__metadata__", ()))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:20]} is more than a float holds")
    return value


def _text_of(result: Any) -> str:
    """A result as the model reads it; half of a surrogate pair, which no tokenizer takes, becomes a question mark."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=_plain)
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return list(value)
    raise TypeError(f"a function's result holds {type(value).__name__}; expected what JSON can say, or a str")
