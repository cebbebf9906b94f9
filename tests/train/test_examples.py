"""Lines of JSONL: what each kind says in harmony's messages, and what is said of lines that cannot be used."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.builtin import BROWSER, PYTHON
from gptoss_jax.harmony.messages import (
    Assistant,
    Developer,
    Function,
    Message,
    ResponseFormat,
    System,
    ToolResult,
    User,
)
from gptoss_jax.harmony.render import render
from gptoss_jax.train.examples import Line, Maker, Preference, read_lines
from gptoss_jax.train.masks import LossWeights
from gptoss_jax.train.records import Chat, Comparison, Completion, Reader, Text

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "What the weather is.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": WEATHER}]
OFFERED = Function(name="weather", description="What the weather is.", parameters=SCHEMA)
Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
CALLED = Assistant(text='{"city": "Oslo"}', channel="commentary", recipient="functions.weather", content_type="json")
RESULT = ToolResult(name="functions.weather", text="12 °C")


def line_of(entry: Any) -> Line:
    content = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return Line(file=Path("file.jsonl"), number=12, offset=0, content=content)


# --- conversations ----------------------------------------------------------------------------------------------------

GOOD: dict[str, tuple[dict[str, Any], list[Message]]] = {
    "question and answer": ({"messages": [Q, A]}, [User(text="q"), Assistant(text="a")]),
    "harmony": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "q", "name": "ann"},
                {"role": "assistant", "channel": "analysis", "content": "hm"},
                {"role": "assistant", "channel": "commentary", "content": "wait"},
                {"role": "assistant", "recipient": "functions.weather", "content": "{}"},
                {"role": "tool", "name": "functions.weather", "content": "12 °C"},
                {"role": "assistant", "channel": "final", "content": "a"},
            ]
        },
        [
            Developer(instructions="Be brief."),
            User(text="q", name="ann"),
            Assistant(text="hm", channel="analysis"),
            Assistant(text="wait", channel="commentary"),
            Assistant(text="{}", channel="commentary", recipient="functions.weather", content_type="json"),
            RESULT,
            Assistant(text="a"),
        ],
    ),
    "python in analysis, whose result is there too": (
        {
            "messages": [
                Q,
                {"role": "assistant", "channel": "analysis", "recipient": "python", "content": "print(1)"},
                {"role": "tool", "content": "1"},
                A,
            ],
            "builtin_tools": ["browser", "python"],
        },
        [
            System(tools=(BROWSER, PYTHON)),
            User(text="q"),
            Assistant(text="print(1)", channel="analysis", recipient="python", content_type="code"),
            ToolResult(name="python", text="1", channel="analysis"),
            Assistant(text="a"),
        ],
    ),
    "OpenAI's chat, with calls": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                Q,
                {**CALLING, "content": "I look.", "thinking": "hm"},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "12 °C"}]},
                {**A, "reasoning_content": "warm"},
            ],
            "tools": TOOLS,
        },
        [
            Developer(instructions="Be brief.", functions=(OFFERED,)),
            User(text="q"),
            Assistant(text="hm", channel="analysis"),
            Assistant(text="I look.", channel="commentary"),
            CALLED,
            RESULT,
            Assistant(text="warm", channel="analysis"),
            Assistant(text="a"),
        ],
    ),
    "Hugging Face's chat: nulls, functions and calls without their wrapping, results by name": (
        {
            "messages": [
                {"role": "system", "content": "Be brief.", "thinking": None, "tool_calls": None},
                {**Q, "thinking": None, "name": None, "tool_calls": [], "audio": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"name": "weather", "arguments": {"city": "Ås"}}],
                },
                {"role": "tool", "name": "weather", "content": "12 °C"},
                {**A, "channel": "final", "thinking": "", "tool_calls": []},
            ],
            "tools": [WEATHER],
            "reasoning_effort": None,
        },
        [
            Developer(instructions="Be brief.", functions=(OFFERED,)),
            User(text="q"),
            Assistant(text='{"city":"Ås"}', channel="commentary", recipient="functions.weather", content_type="json"),
            RESULT,
            Assistant(text="a"),
        ],
    ),
    "what the system message says": (
        {
            "messages": [Q, A],
            "reasoning_effort": "high",
            "date": "2025-08-05",
            "knowledge_cutoff": "2025-01",
            "model_identity": "You are nano.",
        },
        [
            System(
                effort="high",
                date=datetime.date(2025, 8, 5),
                knowledge_cutoff="2025-01",
                identity="You are nano.",
            ),
            User(text="q"),
            Assistant(text="a"),
        ],
    ),
    "a system message without what is empty": (
        {"messages": [Q, A], "model_identity": "", "knowledge_cutoff": "", "channels": []},
        [System(identity="", knowledge_cutoff=None, channels=()), User(text="q"), Assistant(text="a")],
    ),
    "what opens a conversation is one text; what comes later is not": (
        {
            "messages": [
                {"role": "system", "content": "One."},
                {"role": "developer", "content": "Two."},
                Q,
                {"role": "system", "content": "Three."},
                A,
            ]
        },
        [
            Developer(instructions="One.\n\nTwo."),
            User(text="q"),
            Developer(instructions="Three."),
            Assistant(text="a"),
        ],
    ),
    "a form that the answer has": (
        {
            "messages": [Q, A],
            "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}},
        },
        [Developer(formats=(ResponseFormat(name="place", schema=SCHEMA),)), User(text="q"), Assistant(text="a")],
    ),
    "results of two calls, each by its id": (
        {
            "messages": [
                Q,
                {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c2", "function": {"name": "hour"}}]},
                {"role": "tool", "tool_call_id": "c2", "content": "noon"},
                {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
                A,
            ]
        },
        [
            User(text="q"),
            CALLED,
            Assistant(text="{}", channel="commentary", recipient="functions.hour", content_type="json"),
            ToolResult(name="functions.hour", text="noon"),
            RESULT,
            Assistant(text="a"),
        ],
    ),
}


@pytest.mark.parametrize(("entry", "expected"), GOOD.values(), ids=GOOD)
def test_a_conversation_in_harmonys_messages(entry, expected):
    found = Reader().read(entry)
    assert isinstance(found, Chat)
    assert list(found.messages) == (expected if isinstance(expected[0], System) else [System(), *expected])
    assert found.weights == tuple(float(isinstance(message, Assistant)) for message in found.messages)


def test_a_weight_is_that_of_all_that_one_message_says():
    messages = [Q, {**A, "thinking": "hm", "weight": 0}, Q, {**A, "weight": 0.5}]
    found = Reader().read({"messages": messages})
    assert isinstance(found, Chat)
    assert found.weights == (0, 0, 0, 0, 0, 0.5)


def test_the_system_message_of_all_and_of_a_line():
    reader = Reader(system=System(date=datetime.date(2025, 8, 5), effort="low"))
    plain, own = reader.read({"messages": [Q, A]}), reader.read({"messages": [Q, A], "reasoning_effort": "high"})
    assert isinstance(plain, Chat)
    assert isinstance(own, Chat)
    assert plain.messages[0] == reader.system
    assert own.messages[0] == System(date=datetime.date(2025, 8, 5), effort="high")


def test_no_line_has_todays_date(o200k):
    (made,) = _made({"messages": [Q, A]}, o200k)
    assert "Current date" not in o200k.decode(made.ids.tolist())


def test_keys_that_are_to_be_ignored():
    entry = {"messages": [{**Q, "id": 1}, A], "score": 0.5, "id": 7}
    with pytest.raises(UserError, match=re.escape("there is no key 'id'")):
        Reader().read(entry)
    assert Reader(ignored=frozenset(("id", "score"))).read(entry) == Reader().read({"messages": [Q, A]})


def test_a_public_data_set_as_it_is_published():
    """HuggingFaceH4/Multilingual-Thinking has its columns twice: in messages, and each by itself."""
    columns = ("reasoning_language", "developer", "user", "analysis", "final")
    entry = dict.fromkeys(columns, "said again in messages") | {
        "messages": [
            {"role": "system", "content": "reasoning language: French\n\nBe brief.", "thinking": None},
            {"role": "user", "content": "q", "thinking": None},
            {"role": "assistant", "content": "a", "thinking": "hm"},
        ]
    }
    found = Reader(ignored=frozenset(columns)).read(entry)
    assert isinstance(found, Chat)
    assert found.messages == (
        System(),
        Developer(instructions="reasoning language: French\n\nBe brief."),
        User(text="q"),
        Assistant(text="hm", channel="analysis"),
        Assistant(text="a"),
    )


# --- the other kinds --------------------------------------------------------------------------------------------------


def test_plain_text():
    assert Reader().read({"text": "Once"}) == Text("Once")
    assert Reader().read({"prompt": "Once", "completion": " upon"}) == Completion("Once", " upon")


@pytest.mark.parametrize("completion", ["b", [{"role": "assistant", "channel": "final", "content": "b"}]])
def test_of_a_conversation_with_a_completion_the_completion_is_trained(completion):
    found = Reader().read({"prompt": [Q, A, Q], "completion": completion})
    asked = [User(text="q"), Assistant(text="a"), User(text="q")]
    assert found == Chat(messages=(System(), *asked, Assistant(text="b")), weights=(0, 0, 0, 0, 1))


@pytest.mark.parametrize("prompt", ["q", [Q]])
def test_a_comparison(prompt):
    found = Reader().read(
        {"prompt": prompt, "chosen": [{**A, "thinking": "hm"}], "rejected": "no", "reasoning_effort": "low"}
    )
    assert found == Comparison(
        prompt=(System(effort="low"), User(text="q")),
        chosen=(Assistant(text="hm", channel="analysis"), Assistant(text="a")),
        rejected=(Assistant(text="no"),),
    )


def test_two_answers_to_one_prompt(letters):
    entry = {"prompt": [Q, {**A, "thinking": "hm"}, Q], "chosen": [{**A, "thinking": "ah"}], "rejected": "no"}
    made = Maker(tokenizer=letters).make(line_of(entry))
    assert isinstance(made, Preference)
    asked = [System(), User(text="q"), Assistant(text="a"), User(text="q")]
    prompt = [*render(asked, letters), *_ids("<|start|>assistant<|channel|>", letters)]
    for found, said in (
        (made.chosen, "analysis<|message|>ah<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"),
        (made.rejected, "final<|message|>no<|return|>"),
    ):
        assert found.ids.tolist() == [*prompt, *_ids(said, letters)]
        assert not found.weights[: len(prompt)].any()
    assert made.chosen.trained == {"analysis": 2, "final": 1, "stop": 2}
    assert made.rejected.trained == {"final": 2, "stop": 1}
    assert len(made) == len(made.chosen)


def test_plain_texts_in_ids(o200k):
    (text,) = _made({"text": "Once upon"}, o200k)
    assert text.ids.tolist() == [199_998, *o200k.encode("Once upon"), 199_999]
    assert text.weights.tolist() == [0, *[1] * (len(text) - 1)]
    (completed,) = _made({"prompt": "Once", "completion": " upon"}, o200k)
    assert completed.ids.tolist() == text.ids.tolist()
    assert completed.weights.tolist() == [0, *[0] * len(o200k.encode("Once")), *[1] * len(o200k.encode(" upon")), 1]
    assert completed.source == "file.jsonl:12"


@pytest.mark.parametrize(
    "entry", [{"text": ""}, {"prompt": "a", "completion": ""}, {"messages": []}, {"messages": [Q]}]
)
def test_an_empty_line_has_no_example(letters, entry):
    assert _made(entry, letters) == []


def test_of_what_is_masked_nothing_counts(letters):
    for entry, loss in (
        ({"messages": [Q, {**A, "weight": 0}]}, LossWeights()),
        ({"messages": [Q, A]}, LossWeights(final=0)),
        ({"text": "a"}, LossWeights(text=0)),
    ):
        (found,) = _made(entry, letters, loss=loss)
        assert len(found) > 0
        assert not found.weights.any()
        assert found.trained == {}


def _made(entry: Any, tokenizer, loss: LossWeights | None = None):
    found = Maker(tokenizer=tokenizer, loss=loss or LossWeights()).make(line_of(entry))
    assert isinstance(found, list)
    assert all(example.ids.dtype == np.int32 and example.weights.dtype == np.float32 for example in found)
    return found


def _ids(text: str, tokenizer) -> list[int]:
    pieces = re.split(r"(<\|\w+\|>)", text)
    return [i for p in pieces for i in ([tokenizer.special(p)] if p.startswith("<|") else tokenizer.encode(p))]


# --- lines that cannot be used ----------------------------------------------------------------------------------------


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [Q, {"role": "assistant", **message}]}


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b'{"text": "a"', "expected JSON, but Expecting ',' delimiter"),
    "no UTF-8": (b'{"text": "\xff"}', "expected JSON, but 'utf-8' codec can't decode byte 0xff"),
    "a key twice": (b'{"text": "a", "text": "b"}', "expected JSON, but key 'text' stands twice"),
    "no object": (["a"], "expected a JSON object, found b'[\"a\"]'"),
    "no kind": (
        {"tools": []},
        ": it has none of the keys that say what it is; expected messages; text; prompt and com",
    ),
    "two kinds": ({"text": "a", "messages": []}, ": it has messages and text; expected messages; text; prompt and"),
    "half a kind": ({"prompt": "a"}, ": it has prompt; expected"),
    "an unknown key": (
        {"messages": [Q, A], "source": "x"},
        ": there is no key 'source'; expected builtin_tools, channels",
    ),
    "a tool beside a text": ({"text": "a", "tools": TOOLS}, ": 'tools' stands beside plain text, which has no system"),
    "no text": ({"text": 7}, ": text is 7; expected a text"),
    "half a character": (b'{"text": "\\ud800"}', ": text holds half of a surrogate pair"),
    "no list": ({"messages": {"role": "user"}}, ": messages is {'role': 'user'}; expected a list"),
    "messages of a text": ({"messages": "q"}, ": messages is 'q'; expected a list"),
    "no message": (
        {"messages": ["q"]},
        ": messages[0]: expected a message, an object with role and content, found 'q'",
    ),
    "no role": (
        {"messages": [{"content": "q"}]},
        ": messages[0]: role is missing; expected one of system, developer, ",
    ),
    "an unknown role": (
        {"messages": [{"role": "human", "content": "q"}]},
        ": messages[0]: role is 'human'; expected one of system, developer, user, assistant, tool",
    ),
    "an unknown key of a message": ({"messages": [{**Q, "text": "q"}]}, ": messages[0]: there is no key 'text'"),
    "a key of another role": (
        {"messages": [{**Q, "channel": "final"}]},
        ": messages[0]: a message of role user has no 'channel'; expected content, name",
    ),
    "no content": ({"messages": [{"role": "user"}]}, ": messages[0]: content is missing; expected a text"),
    "content of numbers": (
        {"messages": [{"role": "user", "content": 3}]},
        ": messages[0]: content is 3; expected a text",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        ": messages[0]: content has a part of type 'image_url'; expected text",
    ),
    "a name with a blank": (
        {"messages": [{**Q, "name": "a b"}]},
        ": messages[0]: a user's name is 'a b'; expected 1 to",
    ),
    "an unknown channel": (
        said(content="a", channel="finale"),
        ": messages[1]: channel is 'finale'; expected one of analysis, commentary, final",
    ),
    "a channel of a list": (said(content="a", channel=["final"]), ": messages[1]: channel is ['final']; expected one"),
    "nothing said": (said(), ": messages[1]: says nothing; expected a content, thinking or tool_calls"),
    "an empty answer": (said(content=""), ": messages[1]: says nothing; expected a content, thinking or tool_calls"),
    "an empty message": (said(content="", channel="final"), ": messages[1]: content is empty; expected what is said"),
    "both forms": (
        said(content="a", channel="final", thinking="hm"),
        ": messages[1]: 'channel' stands beside 'thinking'; expected one message of harmony",
    ),
    "thoughts twice": (
        said(content="a", reasoning="hm", thinking="hm"),
        ": messages[1]: 'thinking' stands beside 'reasoning'; expected one of them",
    ),
    "a weight below 0": (said(content="a", weight=-1), ": messages[1]: weight is -1; expected a number from 0"),
    "a weight of words": (said(content="a", weight="1"), ": messages[1]: weight is '1'; expected a number from 0"),
    "a recipient with a blank": (
        said(content="{}", recipient="functions.a b"),
        ": messages[1]: a recipient is 'functions.a b'; expected 1 to 64 letters",
    ),
    "arguments that are no JSON": (
        said(tool_calls=[{"function": {"name": "weather", "arguments": "{"}}]),
        ": messages[1]: tool_calls[0]: arguments is '{'; expected JSON, the arguments of a call",
    ),
    "arguments that are no object": (
        said(content="[]", recipient="functions.weather"),
        ": messages[1]: content is '[]'; expected a JSON object, the arguments of a call",
    ),
    "a call without a name": (
        said(tool_calls=[{"function": {}}]),
        ": messages[1]: tool_calls[0]: name is missing; expected a text",
    ),
    "a call of what is not offered": (
        {**said(tool_calls=[{"function": {"name": "hour"}}]), "tools": TOOLS},
        ": messages[1]: calls 'hour'; expected one of the line's tools, weather",
    ),
    "a result of no call": (
        {"messages": [Q, CALLING, {"role": "tool", "tool_call_id": "c9", "content": "x"}]},
        ": messages[2]: tool_call_id is 'c9'; expected a call before it that it answers, found calls of functions.w",
    ),
    "a result of another name": (
        {"messages": [Q, {"role": "tool", "name": "hour", "content": "x"}]},
        ": messages[1]: name is 'hour'; expected a call before it that it answers, found calls of nothing",
    ),
    "a result of one of two": (
        {"messages": [Q, CALLING, CALLING, {"role": "tool", "content": "x"}]},
        ": messages[3]: neither tool_call_id nor name is there, and 2 calls wait for a result; expected a call bef",
    ),
    "an unknown effort": (
        {"messages": [Q, A], "reasoning_effort": "max"},
        ": reasoning_effort is 'max'; expected one of low, medium, high",
    ),
    "an unknown channel of the system message": (
        {"messages": [Q, A], "channels": ["final", "answer"]},
        ": channel is 'answer'; expected one of analysis, commentary, final",
    ),
    "no date": ({"messages": [Q, A], "date": "today"}, ": date is 'today'; expected a day, as in '2025-08-05'"),
    "an unknown tool of the model's": (
        {"messages": [Q, A], "builtin_tools": ["search"]},
        ": builtin_tools has 'search'; expected browser or python",
    ),
    "a tool of another type": (
        {"messages": [Q, A], "tools": [{"type": "mcp"}]},
        ": tools[0]: type is 'mcp'; expected func",
    ),
    "a tool's name": (
        {"messages": [Q, A], "tools": [{"name": "a b"}]},
        ": tools[0]: a function's name is 'a b'; expected 1 to 64 letters",
    ),
    "two tools of a name": ({"messages": [Q, A], "tools": [WEATHER, WEATHER]}, ": functions: expected each name once"),
    "a form without a schema": (
        {"messages": [Q, A], "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ": response_format: schema is missing; expected an object",
    ),
    "a completion of messages to a text": (
        {"prompt": "q", "completion": [A]},
        ": prompt is a text and completion none; expected both as texts, or prompt as messages",
    ),
    "an answer of the user's": (
        {"prompt": [Q], "chosen": "a", "rejected": [Q]},
        ": rejected[0]: role is 'user'; expected assistant: all else stands in prompt",
    ),
    "an answer behind the answer": (
        {"prompt": [Q, A], "chosen": [{**A, "thinking": "hm"}, A], "rejected": "a"},
        ": chosen[1]: the answer goes on behind its final message; expected nothing behind that",
    ),
}


@pytest.mark.parametrize(("entry", "message"), BAD.values(), ids=BAD)
def test_a_line_that_cannot_be_used(letters, entry, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Maker(tokenizer=letters).make(line_of(entry))
    assert str(error.value).startswith("file.jsonl, line 12: ")


KEYS = ("messages", "text", "prompt", "completion", "chosen", "rejected", "tools", "response_format", "date", "role")
KEYS += (
    "content",
    "channel",
    "recipient",
    "content_type",
    "thinking",
    "tool_calls",
    "weight",
    "name",
    "type",
    "function",
)
KEYS += ("arguments", "parameters", "json_schema", "schema", "tool_call_id", "builtin_tools", "reasoning_effort", "id")
WORDS = (
    "system",
    "user",
    "assistant",
    "tool",
    "final",
    "analysis",
    "functions.f",
    "f",
    "json",
    "\ud800",
    "{}",
    "",
    "2025-08-05",
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "tool", "system"))},
    optional=dict.fromkeys(("content", "channel", "recipient", "thinking", "tool_calls", "name"), ANYTHING),
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.just("f"), "arguments": ANYTHING})})
SAID = st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(CALLS, max_size=2)})
LINES = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5),
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGES | SAID, max_size=4)},
        optional={"tools": st.lists(st.fixed_dictionaries({"name": st.just("f"), "parameters": ANYTHING}), max_size=1)},
    ),
    st.fixed_dictionaries({"prompt": st.lists(MESSAGES, max_size=2), "chosen": ANYTHING, "rejected": ANYTHING}),
)


@given(LINES)
def test_any_line_is_read_or_refused(letters, entry):
    _check_read_or_refused(letters, entry)


@pytest.mark.slow
@settings(max_examples=500)
@given(LINES)
def test_any_of_many_lines_is_read_or_refused(letters, entry):
    _check_read_or_refused(letters, entry)


def _check_read_or_refused(letters, entry):
    try:
        made = Maker(tokenizer=letters).make(line_of(entry))
    except UserError as error:
        assert str(error).startswith("file.jsonl, line 12: ")
    else:
        examples = [made.chosen, made.rejected] if isinstance(made, Preference) else made
        assert all(example.weights[:1].sum() == 0 for example in examples)


def test_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n \r\n{"text": "b"}')
    first, second = read_lines(path)
    assert (first.number, first.offset, second.number, second.offset) == (1, 0, 4, 18)
    assert (second.source, second.content) == (f"{path}:4", b'{"text": "b"}')


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read: No such file or directory"):
        list(read_lines(tmp_path / "missing.jsonl"))
