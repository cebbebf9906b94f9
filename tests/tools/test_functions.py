"""Functions as tools: schemas and conversions against jsonschema and llguidance; docstrings, errors, time."""

import asyncio
import contextvars
import dataclasses
import enum
import json
import threading
import time
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import hypothesis.strategies as st
import jsonschema
import llguidance
import pytest
from hypothesis import given

from gptoss_jax.errors import UserError
from gptoss_jax.tools.base import Tool, ToolError, functions_of, namespaces_of
from gptoss_jax.tools.functions import FunctionTool, FunctionTools, read_docstring, tool
from gptoss_jax.tools.hints import hint_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """A place on the map.

    Not told.
    """

    x: float
    y: float = 0.5


@dataclasses.dataclass(frozen=True)
class Path:
    points: list[Point]
    colour: Colour = Colour.RED


@dataclasses.dataclass(frozen=True)
class Positive:
    n: int

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n is {self.n}; expected at least 1")


class Where(TypedDict):
    a: int
    b: NotRequired[str]


HINTS = (
    str,
    int,
    float,
    bool,
    None,
    Any,
    Literal["a", "b"],
    Literal["a", 1, None],
    Colour,
    Level,
    list,
    list[int],
    set[str],
    frozenset[int],
    tuple,
    tuple[int, ...],
    tuple[float, float],
    tuple[int, str],
    tuple[()],
    dict,
    dict[str, int],
    dict[str, list[float]],
    Point,
    Path,
    Where,
    int | None,
    Literal["a", "b"] | None,
    list[int] | None,
    Point | None,
    int | str,
    float | int,
    int | list[str],
    Point | Where | str,
    Annotated[int, "of metres"],
    Annotated[Point | None, "where"],
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(-3, 3), st.sampled_from(["a", "b", "red", "blue", ""])
)
KEYS = st.sampled_from(["x", "y", "a", "b", "points", "colour", "z"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@pytest.mark.parametrize("hint", HINTS, ids=str)
@given(value=JSON)
def test_a_value_is_read_where_its_schema_allows_it(hint: Any, value: Any):
    compiled = hint_of(hint, place="it")
    faults: list[str] = []
    compiled.read(value, "it", faults)
    assert (not faults) == jsonschema.Draft202012Validator(compiled.schema).is_valid(value), faults


@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint is not tuple[()]], ids=str)
def test_a_grammar_can_hold_the_model_to_the_schema(hint: Any):
    schema = hint_of(hint, place="it").schema
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""


def read(hint: Any, value: Any) -> Any:
    faults: list[str] = []
    result = hint_of(hint, place="it").read(value, "it", faults)
    assert not faults
    return result


def test_values_become_what_the_hint_says():
    assert read(Path, {"points": [{"x": 1}, {"x": 2, "y": 3}]}) == Path([Point(1.0), Point(2.0, 3.0)])
    assert read(Colour, "blue") is Colour.BLUE
    assert read(Level, 2) is Level.HIGH
    assert read(tuple[int, str], [1, "a"]) == (1, "a")
    assert read(set[str], ["a", "a"]) == {"a"}
    for hint, value, kind in ((int, 3.0, int), (float, 3, float), (float | int, 3, int), (float | int, 3.5, float)):
        assert type(read(hint, value)) is kind


def call(a_tool: Tool, recipient: str, text: str) -> str:
    return asyncio.run(a_tool.call(recipient, text))


# What the model is told


def test_a_function_is_told_by_its_hints_and_its_docstring():
    @tool
    def weather(
        city: str,
        unit: Literal["C", "F"] = "C",
        *,
        days: Annotated[int, "1 to 10"] = 3,
        where: Point | None = None,
    ) -> str:
        """The weather of a city.

        It may be wrong.

        Args:
            city (str): its name,
                in English: "Oslo".
            days: not this

        Returns:
            A sentence.
        """
        return f"{city}/{unit}/{days}/{where}"

    told = weather.function
    assert (told.name, told.description, told.strict) == (
        "weather",
        "The weather of a city.\n\nIt may be wrong.",
        False,
    )
    assert told.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": 'its name, in English: "Oslo".'},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "days": {"type": "integer", "description": "1 to 10", "default": 3},
            "where": {
                "type": ["object", "null"],
                "properties": {"x": {"type": "number"}, "y": {"type": "number", "default": 0.5}},
                "required": ["x"],
                "additionalProperties": False,
                "description": "A place on the map.",
            },
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    text = '{"city": "Oslo", "where": {"x": 1}}'
    assert call(weather, "functions.weather", text) == "Oslo/C/3/Point(x=1.0, y=0.5)"
    assert weather("Rome", days=1) == "Rome/C/1/None"
    assert isinstance(weather, Tool)
    assert weather.session() is weather


def test_a_function_without_parameters_takes_no_arguments():
    @tool(name="now", description="The time.", strict=True)
    def read_clock():
        return 7

    assert (read_clock.function.name, read_clock.function.parameters) == ("now", None)
    assert read_clock.function.strict
    assert [call(read_clock, "functions.now", text) for text in ("", "  ", "{}")] == ["7"] * 3


@pytest.mark.parametrize(
    ("doc", "about", "arguments"),
    [
        ("", "", {}),
        ("Does it.", "Does it.", {}),
        ("Does it.\n\nArgs:\n    a: one.\n    *b: two", "Does it.", {"a": "one.", "b": "two"}),
        ("Does.\n\nReturns:\n    x: y\n\nArgs:\n  a:\n    one\n    two: three", "Does.", {"a": "one two: three"}),
        ("Note: this stays.\nExample:\n    f()", "Note: this stays.", {}),
    ],
)
def test_docstrings(doc: str, about: str, arguments: dict[str, str]):
    assert read_docstring(doc) == (about, arguments)


def no_hint(a):
    return a


def many(*a: int):
    return a


def of_bytes(a: bytes):
    return a


def of_numbers(a: dict[int, str]):
    return a


def of_sets(a: set[list[int]]):
    return a


class Odd(enum.Enum):
    A = (1, 2)


def of_odd(a: Odd):
    return a


@dataclasses.dataclass
class Tree:
    children: "list[Tree]"


def of_trees(a: Tree):
    return a


@pytest.mark.parametrize("function", [no_hint, many, of_bytes, of_numbers, of_sets, of_odd, of_trees])
def test_what_json_cannot_carry_is_refused_where_the_tool_is_made(function):
    with pytest.raises(UserError, match="expected"):
        tool(function)


def test_functions_share_a_namespace():
    def add(a: int, b: int) -> int:
        return a + b

    both = FunctionTools(add, tool(of_points))
    assert [function.name for function in both.namespace.functions] == ["add", "of_points"]
    assert both.namespace.name == "functions"
    assert both.handles("functions.add")
    assert not both.handles("functions.sub")
    assert call(both, "functions.add", '{"a": 2, "b": 3}') == "5"
    assert functions_of([both]) == both.namespace.functions
    assert namespaces_of([both]) == ()
    with pytest.raises(UserError, match="two functions are named 'add'"):
        FunctionTools(add, add)


# What the model sent


def of_points(at: Point, colours: list[Colour] = []) -> str:  # noqa: B006
    return f"{at} {colours}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "do not fit: the arguments is an array; expected an object"),
        ("", "do not fit: at is missing; expected an object"),
        ('{"at": {"x": "1", "z": 1}}', 'at.z is not known; expected x, y; at.x is "1"; expected a number'),
        ('{"at": {"x": 1}, "colours": ["red", "RED"]}', 'colours[1] is "RED"; expected one of "red", "blue"'),
        ('{"at": {"x": true}}', "at.x is true; expected a number"),
        ('{"at": ', "are not JSON"),
        ('{"at": {"x": NaN}}', "NaN is no number of JSON's"),
        ('{"at": {"x": -1e400}}', "-1e400 is more than a float holds"),
        ('{"at": {"x": ' + "9" * 5000 + "}}", "are not JSON"),
        ('{"at": {"x": 1' + "0" * 400 + "}}", "expected a number"),
        ("[" * 100_000, "are not JSON"),
        ('{"at": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_arguments_that_do_not_fit_are_explained_to_the_model(text: str, message: str):
    with pytest.raises(ToolError) as error:
        call(tool(of_points), "functions.of_points", text)
    assert message in str(error.value)
    assert str(error.value).startswith("the arguments of functions.of_points ")


def test_a_dataclass_that_refuses_says_why():
    def count(n: Positive) -> int:
        return n.n

    with pytest.raises(ToolError, match="n: n is 0; expected at least 1"):
        call(tool(count), "functions.count", '{"n": {"n": 0}}')


# What comes back


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("plain", "plain"),
        ("é\ud800", "é?"),
        (None, "null"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        (Path([Point(1.0)]), '{"points": [{"x": 1.0, "y": 0.5}], "colour": "red"}'),
        ({1}, "[1]"),
    ],
)
def test_results_are_told_as_text_or_json(result: Any, text: str):
    def give() -> Any:
        return result

    assert call(tool(give), "functions.give", "{}") == text


def test_a_function_may_be_async_and_refuse():
    @tool
    async def ask(question: str) -> str:
        await asyncio.sleep(0)
        raise ToolError(f"nobody knows {question}")

    with pytest.raises(ToolError, match="nobody knows why"):
        call(ask, "functions.ask", '{"question": "why"}')


def test_an_error_of_the_function_is_its_own():
    @tool
    def broken() -> str:
        raise LookupError("secret")

    with pytest.raises(LookupError, match="secret"):
        call(broken, "functions.broken", "{}")


def test_a_function_that_is_not_async_leaves_the_loop_free_and_keeps_the_context():
    there = threading.Event()
    who = contextvars.ContextVar("who", default="nobody")

    @tool
    def wait() -> str:
        assert there.wait(10)
        return who.get()

    async def both() -> str:
        who.set("me")
        waiting = asyncio.create_task(wait.call("functions.wait", "{}"))
        await asyncio.sleep(0.01)
        there.set()  # could not be reached if the call held the loop
        return await waiting

    assert asyncio.run(both()) == "me"


@pytest.mark.parametrize("is_async", [False, True])
def test_time_is_limited(is_async: bool):
    over = threading.Event()

    @tool(timeout_s=0.05)
    async def asleep() -> None:
        await asyncio.sleep(10)

    @tool(timeout_s=0.05)
    def busy() -> None:
        over.wait(10)

    a_tool: FunctionTool = asleep if is_async else busy
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"gave no answer in 0\.05 s"):
        call(a_tool, "functions.f", "{}")
    assert time.monotonic() - began < 5
    over.set()


def test_a_timeout_of_the_function_is_not_the_tools():
    @tool
    async def raising() -> None:
        raise TimeoutError("a database's")

    with pytest.raises(TimeoutError, match="a database's"):
        call(raising, "functions.raising", "{}")


def test_cancelling_a_call_ends_an_async_function():
    ended = []

    @tool
    async def forever() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def cancel() -> None:
        task = asyncio.create_task(forever.call("functions.forever", "{}"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    assert ended == [True]
