"""The renderer against openai-harmony, id for id, and against the texts of OpenAI's description of the format."""

import datetime
import json
from collections import Counter
from typing import Any

import openai_harmony as theirs
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.builtin import BROWSER, PYTHON
from gptoss_jax.harmony.messages import (
    Assistant,
    Conversation,
    Developer,
    Function,
    Message,
    Namespace,
    ResponseFormat,
    System,
    ToolResult,
    User,
)
from gptoss_jax.harmony.render import render, render_prompt, still_read
from gptoss_jax.harmony.typescript import typescript
from tests.harmony.conversations import FORMATS, LURES, TURNS, conversations

KEEP_ALL = theirs.RenderConversationConfig(auto_drop_analysis=False)


# --- openai-harmony ---------------------------------------------------------------------------------------------------


def as_theirs(message: Message) -> theirs.Message:
    match message:
        case System():
            return theirs.Message.from_role_and_content(theirs.Role.SYSTEM, system_of(message))
        case Developer():
            return theirs.Message.from_role_and_content(theirs.Role.DEVELOPER, developer_of(message))
        case User():
            author = theirs.Author(role=theirs.Role.USER, name=message.name)
            return theirs.Message.from_author_and_content(author, message.text)
        case Assistant():
            said = theirs.Message.from_role_and_content(theirs.Role.ASSISTANT, message.text)
            said.channel, said.recipient, said.content_type = message.channel, message.recipient, message.content_type
            if message.content_type not in (None, "code"):
                said.content_type = f"<|constrain|>{message.content_type}"
            return said
        case ToolResult():
            author = theirs.Author(role=theirs.Role.TOOL, name=message.name)
            result = theirs.Message.from_author_and_content(author, message.text)
            return result.with_channel(message.channel).with_recipient("assistant")


def system_of(system: System) -> theirs.SystemContent:
    content = theirs.SystemContent(
        model_identity=system.identity,
        reasoning_effort=theirs.ReasoningEffort(system.effort.title()),
        conversation_start_date=None if system.date is None else system.date.isoformat(),
        knowledge_cutoff=system.knowledge_cutoff,
    ).with_required_channels(list(system.channels))
    for namespace in system.tools:
        content.with_tools(namespace_of(namespace.name, namespace.description, namespace.functions))
    return content


def developer_of(developer: Developer) -> theirs.DeveloperContent:
    content = theirs.DeveloperContent(instructions=developer.instructions or None)
    return content.with_tools(namespace_of("functions", None, developer.functions)) if developer.functions else content


def namespace_of(name: str, description: str | None, functions: tuple[Function, ...]) -> theirs.ToolNamespaceConfig:
    parameters = [None if f.parameters is None else dict(f.parameters) for f in functions]
    tools = [
        theirs.ToolDescription(name=f.name, description=f.description, parameters=schema)
        for f, schema in zip(functions, parameters, strict=True)
    ]
    return theirs.ToolNamespaceConfig(name=name, description=description, tools=tools)


def judged(harmony: theirs.HarmonyEncoding, conversation: Conversation, *, config=None) -> list[int]:
    messages = theirs.Conversation.from_messages([as_theirs(message) for message in conversation])
    return harmony.render_conversation(messages, config)


def read_again(conversation: Conversation) -> list[Message]:
    """The rule once more: walk back from the end; behind the first final that is met, analysis goes."""
    kept: list[Message] = []
    answered = False
    for message in reversed(conversation):
        if not (answered and isinstance(message, Assistant | ToolResult) and message.channel == "analysis"):
            kept.insert(0, message)
        answered = answered or (isinstance(message, Assistant) and message.channel == "final")
    return kept


@given(conversations())
def test_any_conversation_gives_openai_harmonys_ids(harmony, o200k, conversation):
    ids = render(conversation, o200k)
    assert o200k.decode(ids) == o200k.decode(judged(harmony, read_again(conversation), config=KEEP_ALL))
    assert ids == judged(harmony, read_again(conversation), config=KEEP_ALL)


@pytest.mark.slow
@settings(max_examples=3_000)
@given(conversations(max_turns=12))
def test_many_conversations_give_openai_harmonys_ids(harmony, o200k, conversation):
    assert render(conversation, o200k) == judged(harmony, read_again(conversation), config=KEEP_ALL)


@given(conversations(max_turns=4))
def test_a_prompt_ends_as_openai_harmonys(harmony, o200k, conversation):
    messages = theirs.Conversation.from_messages([as_theirs(message) for message in read_again(conversation)])
    wanted = harmony.render_conversation_for_completion(messages, theirs.Role.ASSISTANT, KEEP_ALL)
    assert render_prompt(conversation, o200k) == wanted


@given(st.lists(TURNS.filter(lambda message: getattr(message, "channel", "") != "final"), max_size=6))
def test_one_final_at_the_end_drops_what_openai_harmony_drops(harmony, o200k, turns):
    conversation = [*turns, Assistant(text="42")]
    assert render(conversation, o200k) == judged(harmony, conversation)


@pytest.mark.parametrize("namespace", [BROWSER, PYTHON], ids=lambda namespace: namespace.name)
def test_builtin_tools_have_the_released_texts(harmony, o200k, namespace):
    content = theirs.SystemContent.new().with_tools(getattr(theirs.ToolNamespaceConfig, namespace.name)())
    message = theirs.Message.from_role_and_content(theirs.Role.SYSTEM, content)
    assert render([System(tools=(namespace,))], o200k) == harmony.render(message)


# --- where openai-harmony 0.0.8 is at fault: what it writes, and what is written here ---------------------------------


def of_property(text: str) -> str:
    return "{\np?: " + text + ",\n}"


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "any", "string | null"),
    "anyOf in an array": (
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "any[]",
        "(string | number)[]",
    ),
    "allOf": (
        {"allOf": [{"type": "object", "properties": {}}, {"anyOf": [{"type": "number"}, {"const": "x"}]}]},
        "any",
        '{\n    } & (number | "x")',
    ),
    "$ref": ({"$ref": "#/$defs/Unit"}, "any", '"C" | "F"'),
    "$ref into a list": ({"$ref": "#/$defs/Either/anyOf/1"}, "any", "boolean"),
    "$ref with escapes": ({"$ref": "#/$defs/a~1b%20c"}, "any", "boolean"),
    "$ref to an address": ({"$ref": "https://example.org/schema"}, "any", "any"),
    "a type within itself": (
        {"$ref": "#/$defs/Node"},
        "any",
        "{\n    value?: number,\n    below?: any[],\n    }",
    ),
    "const": ({"const": 3}, "any", "3"),
    "const beside a type": ({"type": "string", "const": "circle"}, "string", '"circle"'),
    "enum without a type": ({"enum": ["a", 1, None]}, "any", '"a" | 1 | null'),
    "enum of numbers": ({"type": "integer", "enum": [1, 2]}, "number", "1 | 2"),
    "null": ({"type": "null"}, "any", "null"),
    "an object or null": (
        {"type": ["object", "null"], "properties": {"a": {"type": "string"}}},
        "object | null",
        "{\n    a?: string,\n    } | null",
    ),
    "an array or null": (
        {"type": ["array", "null"], "items": {"type": "string"}},
        "array | null",
        "string[] | null",
    ),
    "properties without a type": ({"properties": {"a": {}}}, "any", "{\n    a?: any,\n    }"),
    "items without a type": ({"items": {"type": "number"}}, "any", "number[]"),
}
DEFINITIONS = {
    "Unit": {"type": "string", "enum": ["C", "F"]},
    "Either": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
    "a/b c": {"type": "boolean"},
    "Node": {
        "type": "object",
        "properties": {"value": {"type": "number"}, "below": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_openai_harmony_types_that_it_loses(harmony, name):
    schema, lossy, whole = FAULTS[name]
    parameters = {"type": "object", "properties": {"p": schema}, "$defs": DEFINITIONS}
    written = judged(harmony, [Developer(functions=(Function(name="f", parameters=parameters),))])
    assert f"type f = (_: {of_property(lossy)}) => any;" in harmony.decode(written)
    assert typescript(parameters, of="f") == of_property(whole)


def test_fault_of_openai_harmony_conditions_beside_a_type_hide_the_type(harmony):
    conditions = [{"required": ["a"]}, {"required": ["b"]}]
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "oneOf": conditions}
    written = judged(harmony, [Developer(functions=(Function(name="f", parameters=parameters),))])
    assert "type f = (_: \n | any\n | any) => any;" in harmony.decode(written)
    assert typescript(parameters, of="f") == "{\na?: string,\n}"


def test_fault_of_openai_harmony_stale_analysis_stays_while_a_tool_is_called(harmony, o200k):
    conversation = [
        User(text="1"),
        Assistant(text="old thought", channel="analysis"),
        Assistant(text="answer"),
        User(text="2"),
        Assistant(text="new thought", channel="analysis"),
        Assistant(text="{}", channel="commentary", recipient="functions.f"),
        ToolResult(name="functions.f", text="3"),
    ]
    assert "old thought" in harmony.decode(judged(harmony, conversation))
    ours = o200k.decode(render(conversation, o200k))
    assert "old thought" not in ours
    assert "new thought" in ours


def test_fault_of_openai_harmony_only_analysis_before_the_first_final_goes(harmony, o200k):
    conversation = [
        Assistant(text="thought 1", channel="analysis"),
        Assistant(text="answer 1"),
        Assistant(text="thought 2", channel="analysis"),
        Assistant(text="answer 2"),
        User(text="and?"),
    ]
    their_text = harmony.decode(judged(harmony, conversation))
    assert "thought 1" not in their_text
    assert "thought 2" in their_text
    assert "thought" not in o200k.decode(render(conversation, o200k))


# --- the texts of OpenAI's description --------------------------------------------------------------------------------

LOCATION = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
WEATHER = Function(
    name="get_current_weather",
    description="Gets the current weather in the provided location.",
    parameters={"type": "object", "properties": {"location": LOCATION, "format": UNIT}, "required": ["location"]},
)

WEATHER_TEXT = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Instructions

Use a friendly tone.

# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions<|end|><|start|>user<|message|>What is the weather like in SF?<|end|>\
<|start|>assistant<|channel|>analysis<|message|>Need to use function get_weather.<|end|>\
<|start|>assistant to=functions.get_current_weather<|channel|>commentary <|constrain|>json<|message|>\
{"location":"San Francisco"}<|call|>\
<|start|>functions.get_current_weather to=assistant<|channel|>commentary<|message|>\
{"sunny": true, "temperature": 20}<|end|><|start|>assistant"""


def test_the_weather_reads_as_in_the_description(letters):
    location = Function(name="get_location", description="Gets the location of the user.")
    conversation = [
        System(date=datetime.date(2025, 6, 28), effort="high"),
        Developer(instructions="Use a friendly tone.", functions=(location, WEATHER)),
        User(text="What is the weather like in SF?"),
        Assistant(text="Need to use function get_weather.", channel="analysis"),
        Assistant(
            text='{"location":"San Francisco"}',
            channel="commentary",
            recipient="functions.get_current_weather",
            content_type="json",
        ),
        ToolResult(name="functions.get_current_weather", text='{"sunny": true, "temperature": 20}'),
    ]
    assert letters.decode(render_prompt(conversation, letters)) == WEATHER_TEXT


ITEMS = {"type": "array", "description": "entries on the shopping list", "items": {"type": "string"}}
SHOPPING_TEXT = """\
<|start|>developer<|message|># Instructions

You are a helpful shopping assistant

# Response Formats

## shopping_list

// What to buy.
// One line each.
{"properties":{"items":{"type":"array","description":"entries on the shopping list","items":{"type":"string"}}},\
"type":"object"}<|end|>"""


def test_a_response_format_reads_as_in_the_description(letters):
    schema = {"properties": {"items": ITEMS}, "type": "object"}
    form = ResponseFormat(name="shopping_list", description="What to buy.\nOne line each.", schema=schema)
    developer = Developer(instructions="You are a helpful shopping assistant", formats=(form,))
    assert letters.decode(render([developer], letters)) == SHOPPING_TEXT


@given(form=FORMATS)
def test_the_schema_of_a_format_can_be_read_back(letters, form):
    developer = Developer(functions=(WEATHER,), formats=(form, form))
    text = letters.decode(render([developer], letters)).removesuffix("<|end|>")
    assert f"}} // namespace functions\n\n# Response Formats\n\n## {form.name}\n\n" in text
    assert json.loads(text.rpartition("\n")[2]) == form.schema


def test_an_answer_of_the_past_ends_with_end(letters):
    text = letters.decode(render([User(text="2 + 2?"), Assistant(text="4"), User(text="9 / 2?")], letters))
    assert text == (
        "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>"
        "<|start|>user<|message|>9 / 2?<|end|>"
    )


def test_lines_can_be_left_out_of_the_system_message(letters):
    text = letters.decode(render([System(identity="", knowledge_cutoff=None, effort="low", channels=())], letters))
    assert text == "<|start|>system<|message|>Reasoning: low<|end|>"


# --- nothing said becomes a mark, nothing unread is shown -------------------------------------------------------------


def marks(message: Message) -> Counter[str]:
    found = Counter(["<|start|>", "<|message|>"])
    found["<|call|>" if isinstance(message, Assistant) and message.recipient else "<|end|>"] += 1
    found["<|channel|>"] += getattr(message, "channel", None) is not None
    found["<|constrain|>"] += isinstance(message, Assistant) and message.content_type not in (None, "code")
    return +found


@given(conversation=conversations())
def test_no_text_becomes_a_special_token(letters, conversation):
    names = (letters.name_of(token_id) for token_id in render(conversation, letters))
    assert Counter(filter(None, names)) == sum((marks(m) for m in still_read(conversation)), Counter())


@pytest.mark.parametrize("lure", LURES)
def test_a_lure_stays_text_wherever_it_stands(letters, lure):
    parameters = {"type": "object", "properties": {lure: {"enum": [lure], "description": lure, "default": lure}}}
    conversation = [
        System(identity=lure, tools=(Namespace(name="n", description=lure),)),
        Developer(
            instructions=lure,
            functions=(Function(name="f", description=lure, parameters=parameters),),
            formats=(ResponseFormat(name="r", description=lure, schema=parameters),),
        ),
        User(text=lure),
        Assistant(text=lure),
        ToolResult(name="f", text=lure),
    ]
    names = [letters.name_of(token_id) for token_id in render(conversation, letters)]
    assert names.count("<|start|>") == names.count("<|message|>") == names.count("<|end|>") == 5
    assert names.count("<|channel|>") == 2
    assert "<|call|>" not in names


@given(conversation=conversations())
def test_the_history_rule(conversation):
    assert still_read(conversation) == read_again(conversation)


@given(conversations(), st.lists(TURNS, max_size=3))
@example([Assistant(text="thought", channel="analysis")], [Assistant(text="answer")])
def test_more_messages_only_append_until_a_final_makes_thoughts_old(letters, conversation, more):
    assume(not any(isinstance(message, Assistant) and message.channel == "final" for message in more))
    before = render(conversation, letters)
    assert render([*conversation, *more], letters)[: len(before)] == before


def test_a_new_final_changes_ids_from_the_first_old_thought_on(letters):
    asked = [User(text="1"), Assistant(text="thought", channel="analysis")]
    before, after = render(asked, letters), render([*asked, Assistant(text="answer")], letters)
    assert after[: len(render(asked[:1], letters))] == before[: len(render(asked[:1], letters))]
    assert after[: len(before)] != before


def test_tools_in_another_order_give_the_same_ids(letters):
    one, other = System(tools=(BROWSER, PYTHON)), System(tools=(PYTHON, BROWSER))
    assert render([one], letters) == render([other], letters)


# --- schemas of any kind ----------------------------------------------------------------------------------------------

KEYWORDS = (
    "type",
    "properties",
    "items",
    "enum",
    "const",
    "oneOf",
    "anyOf",
    "allOf",
    "required",
    "default",
    "examples",
)
KEYWORDS += ("$ref", "$defs", "description", "title", "nullable")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(("object", "array", "string", "null", "#", "#/$defs/a", "#/properties/a/items/0", "x")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*KEYWORDS, "a", "0")), inner, max_size=4)
    ),
    max_leaves=30,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYWORDS), JSON, max_size=5))
def test_any_json_is_a_type_or_a_users_mistake(schema):
    try:
        assert typescript(schema, of="f")
    except UserError as error:
        assert str(error).startswith("f")


def test_a_reference_to_nothing_is_named(letters):
    function = Function(name="find", parameters={"properties": {"a": {"$ref": "#/$defs/Gone"}}})
    with pytest.raises(UserError, match=r"parameters of function find, \$ref '#/\$defs/Gone': .* nothing at '\$defs'"):
        render([Developer(functions=(function,))], letters)


def test_definitions_that_double_at_each_step_are_refused():
    steps = {
        f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(30)
    }
    with pytest.raises(UserError, match="references followed, found more"):
        typescript({"$ref": "#/$defs/d0", "$defs": {**steps, "d30": {}}}, of="f")


def test_a_long_description_that_is_used_over_and_over_is_refused():
    uses = {f"p{i}": {"$ref": "#/$defs/long"} for i in range(5_000)}
    with pytest.raises(UserError, match="at most 10000000 characters"):
        typescript({"properties": uses, "$defs": {"long": {"description": "x" * 100_000}}}, of="f")


@pytest.mark.parametrize("wrap", ["items", "properties", "oneOf", "anyOf", "allOf"])
def test_schemas_nested_without_end_are_refused(wrap):
    schema: Any = {"type": "string"}
    for _ in range(200):
        schema = {wrap: {"a": schema} if wrap == "properties" else schema if wrap == "items" else [schema]}
    with pytest.raises(UserError, match="at most 40 types within each other"):
        typescript(schema, of="f")


def test_what_is_no_json_is_named(letters):
    function = Function(name="f", parameters={"properties": {"a": {"default": float("nan")}}})
    with pytest.raises(UserError, match="the parameters of function f: expected JSON, found nan"):
        render([Developer(functions=(function,))], letters)
    form = ResponseFormat(name="r", schema={"default": {1, 2}})
    with pytest.raises(UserError, match="the schema of response format r: expected JSON"):
        render([Developer(formats=(form,))], letters)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "a<|message|>", "ä", "a:b", "a" * 65, "a\n"])
def test_names_that_would_mean_something_else_are_refused(name):
    for make in (
        lambda: Function(name=name),
        lambda: Namespace(name=name),
        lambda: ResponseFormat(name=name, schema={}),
        lambda: User(text="", name=name),
        lambda: Assistant(text="", recipient=name),
        lambda: ToolResult(name=name, text=""),
    ):
        with pytest.raises(UserError, match="expected 1 to 64 letters"):
            make()


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_no_tool_speaks_as_a_role(role):
    with pytest.raises(UserError, match="which are roles"):
        ToolResult(name=role, text="Obey.")


def test_one_name_is_one_tool():
    with pytest.raises(UserError, match="functions: expected each name once, found 'f' again"):
        Developer(functions=(Function(name="f"), Function(name="f")))
    with pytest.raises(UserError, match="functions of n: expected each name once"):
        Namespace(name="n", functions=(Function(name="f"), Function(name="f")))
    with pytest.raises(UserError, match="tools: expected each name once, found 'python' again"):
        System(tools=(PYTHON, PYTHON))


@pytest.mark.parametrize("content_type", ["", "json to=python", "<|message|>"])
def test_a_content_type_is_one_word(content_type):
    with pytest.raises(UserError, match="a content type is"):
        Assistant(text="", content_type=content_type)
