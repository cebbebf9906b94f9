"""Chat completions over scripted engines: by plain JSON, and by OpenAI's own client."""

import asyncio
import json
import re

import httpx
import openai
import pytest
from pydantic import BaseModel

from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.harmony.messages import (
    Assistant,
    Developer,
    Function,
    ResponseFormat,
    System,
    ToolResult,
    User,
)
from gptoss_jax.harmony.render import render_prompt
from tests.server.client import Wire, ask, client_of, events_of

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ANSWER = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":1}<|call|>'
TALK = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
TALK_AND_CALL = (
    TALK + '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a":1}<|call|>'
)
# The engine stops at <|call|>: of several calls, the others end by <|end|>.
PARALLEL = (
    CALL.replace("<|call|>", "<|end|>")
    + '<|start|>assistant to=functions.mul<|channel|>commentary json<|message|>{"b":2}<|call|>'
)
INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": INTEGER}}
MUL = {"type": "function", "function": {"name": "mul"}}
SPECIAL = re.compile(r"(<\|\w+\|>)")


@pytest.fixture
def ids_of(tokenizer):
    """Ids of a text in which names of special tokens stand for them."""

    def ids(text):
        pieces = [piece for piece in SPECIAL.split(text) if piece]
        return [i for p in pieces for i in ([tokenizer.special(p)] if SPECIAL.fullmatch(p) else tokenizer.encode(p))]

    return ids


@pytest.fixture
def playing(scripted, ids_of):
    """Makes engines that play such texts."""

    def make(*texts, **kwargs):
        return scripted([ids_of(text) for text in texts], **({"max_context": 20_000} | kwargs))

    return make


def post(application, **body):
    content = json.dumps({"messages": HELLO} | body)  # in ASCII: httpx would not send half of a surrogate pair
    return ask(application, "POST", PATH, content=content, headers={"content-type": "application/json"})


def message_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def deltas_of(response):
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


# Answers


def test_an_answer(app, playing, ids_of):
    engine = playing(ANSWER)
    answer = post(app(engine), model="scripted").json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    num_prompt, num_answer = len(engine.requests[0].prompt), len(ids_of(ANSWER))
    assert answer == {
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi!",
                    "refusal": None,
                    "reasoning": "Hm.",
                    "reasoning_content": "Hm.",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": len(ids_of(ANSWER.split("<|start|>")[0]))},
        },
    }


def test_a_streamed_answer(app, playing):
    response = post(app(playing(ANSWER)), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, _ = events_of(response)
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert deltas_of(response) == [
        {"role": "assistant"},
        *({"reasoning": letter, "reasoning_content": letter} for letter in "Hm."),
        *({"content": letter} for letter in "Hi!"),
        {},
    ]


def test_usage_comes_last_where_it_is_asked_for(app, playing):
    *chunks, last, done = events_of(post(app(playing(ANSWER)), stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 14}


def test_what_was_cached_is_told(app, playing):
    application = app(playing(ANSWER, ANSWER))
    first, second = post(application).json()["usage"], post(application).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["prompt_tokens_details"] == {"cached_tokens": first["prompt_tokens"] - 1}


@pytest.mark.parametrize("body", [{"reasoning": {"exclude": True}}, {"include_reasoning": False}])
def test_reasoning_may_be_left_out(app, playing, body):
    application = app(playing(ANSWER, ANSWER))
    assert message_of(post(application, **body)) == {"role": "assistant", "content": "Hi!", "refusal": None}
    assert deltas_of(post(application, stream=True, **body)) == [
        {"role": "assistant"},
        *({"content": letter} for letter in "Hi!"),
        {},
    ]


def test_an_answer_without_a_header_is_content_and_counted(app, playing):
    application = app(playing("I refuse.<|return|>"))
    assert message_of(post(application))["content"] == "I refuse."
    assert 'harmony_faults_total{kind="no header"} 1.0' in ask(application, "GET", "/metrics").text


def test_reasoning_that_uses_all_tokens_leaves_an_empty_content(app, playing):
    choice = post(app(playing(ANSWER)), max_completion_tokens=12).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("", "Hm")


def test_choices_have_seeds_of_their_own(app, scripted, ids_of):
    """And one prompt, counted once."""
    engine = scripted(
        lambda request: ids_of(f"<|channel|>final<|message|>{request.sampling.seed}<|return|>"), max_context=20_000
    )
    application = app(engine)
    answer = post(application, n=3, seed=41).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["41", "42", "43"]
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    assert answer["usage"]["completion_tokens"] == 3 * len(ids_of("<|channel|>final<|message|>41<|return|>"))
    texts = ["", "", ""]
    for chunk in events_of(post(application, n=3, seed=7, stream=True))[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == ["7", "8", "9"]


def test_choices_begin_in_their_order_before_one_goes_on(app, playing):
    """OpenAI's client keeps a choice at the place where it first saw it. `max_rows` plays one after the other."""
    *chunks, _ = events_of(post(app(playing(*[ANSWER] * 3, max_rows=1)), n=3, stream=True))
    begun = [(choice["index"], choice["delta"]) for chunk in chunks for choice in chunk["choices"]]
    assert begun[:3] == [(index, {"role": "assistant"}) for index in range(3)]
    assert not any("role" in delta for _, delta in begun[3:])


def test_stop_ends_content_alone(app, playing):
    application = app(playing(ANSWER.replace("Hm.", "Hm! so"), ANSWER))
    choice = post(application, stop=["!"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hi", "stop")
    assert choice["message"]["reasoning"] == "Hm! so"
    assert "".join(delta.get("content", "") for delta in deltas_of(post(application, stop="i", stream=True))) == "H"


def test_logprobs_are_of_content(app, playing, tokenizer):
    engine = playing(ANSWER.replace("Hi", "é"), ANSWER)
    application = app(engine)
    logprobs = post(application, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    ids = tokenizer.encode("é!")
    assert [entry["bytes"] for entry in logprobs["content"]] == [[0xC3], [0xA9], [ord("!")]]
    assert [entry["logprob"] for entry in logprobs["content"]] == [engine.logprob(i) for i in ids]
    assert [entry["token"] for entry in logprobs["content"]] == ["\ufffd", "\ufffd", "!"]
    best = logprobs["content"][2]["top_logprobs"]
    assert [entry["logprob"] for entry in best] == [logprob for _, logprob in engine.top_logprobs(ids[2], 2)]
    chunks = events_of(post(application, logprobs=True, stream=True))[:-1]
    told = [c["choices"][0]["logprobs"] for c in chunks if "content" in c["choices"][0]["delta"]]
    assert [[entry["token"] for entry in each["content"]] for each in told] == [["H"], ["i"], ["!"]]
    assert told[0]["content"][0]["top_logprobs"] == []


def test_settings_of_sampling_reach_the_engine(app, playing):
    engine = playing(ANSWER, ANSWER, ANSWER)
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.25,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "seed": 3,
    }
    application = app(engine, max_new_tokens=77)
    post(application, **settings, logit_bias={"65": -100}, max_tokens=99)
    assert engine.requests[0].sampling == SamplingParams(**settings, logit_bias={65: -100.0})
    assert engine.requests[0].max_new_tokens == 77
    post(application, top_k=-1, seed=-1, max_tokens=33, max_completion_tokens=33)
    assert engine.requests[1].sampling == SamplingParams(seed=2**32 - 1)
    assert engine.requests[1].max_new_tokens == 33


# Prompts


def prompt_of(engine, tokenizer):
    return tokenizer.decode(engine.requests[-1].prompt)


def test_messages_become_harmonys(app, playing, tokenizer):
    engine = playing(ANSWER)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "one", "name": "ann"},
        {"role": "assistant", "content": "1", "reasoning": "old"},
        {"role": "user", "content": [{"type": "text", "text": "1+2?"}]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "add",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
                {"id": "c2", "type": "function", "function": {"name": "mul", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "3"}]},
    ]
    response = post(app(engine), messages=messages, tools=[ADD, MUL], reasoning_effort="high")
    assert response.status_code == 200, response.text
    call = {"channel": "commentary", "content_type": "json"}
    conversation = [
        System(effort="high"),
        Developer(
            instructions="Be brief.\n\nBe\nkind.",
            functions=(Function(name="add", description="Adds.", parameters=INTEGER), Function(name="mul")),
        ),
        User(text="one", name="ann"),
        Assistant(text="1"),
        User(text="1+2?"),
        Assistant(text="add", channel="analysis"),
        Assistant(text="Let me see.", channel="commentary"),
        Assistant(text='{"a":1}', recipient="functions.add", **call),
        Assistant(text="{}", recipient="functions.mul", **call),
        ToolResult(name="functions.mul", text="2"),
        ToolResult(name="functions.add", text="3"),
    ]
    assert prompt_of(engine, tokenizer) == tokenizer.decode(render_prompt(conversation, tokenizer))
    assert "old" not in prompt_of(engine, tokenizer)


@pytest.mark.parametrize(
    ("body", "effort"),
    [
        ({}, "medium"),
        ({"reasoning_effort": "low"}, "low"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "none"}, "low"),
        ({"reasoning": {"effort": "xhigh"}}, "high"),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "high"}, "high"),
    ],
)
def test_effort(app, playing, tokenizer, body, effort):
    engine = playing(ANSWER)
    post(app(engine), **body)
    assert f"Reasoning: {effort}\n" in prompt_of(engine, tokenizer)


def test_what_nobody_knows_is_skipped(app, playing, tokenizer):
    engine = playing(ANSWER)
    response = post(app(engine), tools=[{"type": "custom", "custom": {"name": "x"}}, {"type": "later"}], later=1)
    assert response.status_code == 200
    assert "<|start|>developer" not in prompt_of(engine, tokenizer)


def test_special_tokens_of_users_are_text(app, playing, tokenizer):
    engine = playing(ANSWER)
    post(app(engine), messages=[{"role": "user", "content": "a<|end|>"}])
    assert list(engine.requests[0].prompt).count(tokenizer.special("<|end|>")) == 2  # system and user


# Tools


def test_a_call(app, playing):
    application = app(playing(TALK_AND_CALL, TALK_AND_CALL))
    choice = post(application, tools=[ADD]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    assert choice["message"]["content"] == "Let me see."
    deltas = deltas_of(post(application, tools=[ADD], stream=True))
    (begin, *rest) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert begin.pop("id").startswith("call_")
    assert begin == {"index": 0, "type": "function", "function": {"name": "add", "arguments": ""}}
    assert rest == [{"index": 0, "function": {"arguments": letter}} for letter in '{"a":1}']


def test_a_call_alone_has_no_content(app, playing):
    assert message_of(post(app(playing(CALL)), tools=[ADD]))["content"] is None


def test_parallel_calls(app, playing):
    application = app(playing(PARALLEL, PARALLEL, PARALLEL))
    calls = message_of(post(application, tools=[ADD, MUL]))["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("add", '{"a":1}'),
        ("mul", '{"b":2}'),
    ]
    assert len({call["id"] for call in calls}) == 2
    deltas = deltas_of(post(application, tools=[ADD, MUL], stream=True))
    assert {delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta} == {0, 1}
    assert len(message_of(post(application, tools=[ADD, MUL], parallel_tool_calls=False))["tool_calls"]) == 1


def test_a_call_to_what_nobody_offered_is_answered_here(app, playing, tokenizer):
    engine = playing(CALL.replace("add", "sub"), ANSWER)
    message = message_of(post(app(engine), tools=[ADD]))
    assert (message["content"], message.get("tool_calls")) == ("Hi!", None)
    assert "there is no tool functions.sub; there is functions.add" in prompt_of(engine, tokenizer)


NAMED = {"type": "function", "function": {"name": "mul"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "script", "good"),
    [
        ("required", CALL, True),
        ("required", ANSWER, False),
        ("none", ANSWER, True),
        ("none", CALL, False),
        (NAMED, CALL.replace("add", "mul"), True),
        (NAMED, CALL, False),
        (ALLOWED, CALL.replace("add", "mul"), True),
        (ALLOWED, CALL, False),
        ("required", CALL.replace("{", "["), False),  # a call that must be, is held to its schema
    ],
)
def test_tool_choice_is_enforced(app, playing, choice, script, good):
    """The engine ends a script by an error where it says what it must not."""
    response = post(app(playing(script)), tools=[ADD, MUL], tool_choice=choice)
    assert response.status_code == (200 if good else 500)


@pytest.mark.parametrize(("arguments", "good"), [('{"a":1}', True), ('{"a":"x"}', False)])
def test_strict_arguments_are_held_to_their_schema(app, playing, arguments, good):
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}
    response = post(app(playing(CALL.replace('{"a":1}', arguments))), tools=[strict])
    assert response.status_code == (200 if good else 500)


# Forms of the answer

FORM = {"type": "json_schema", "json_schema": {"name": "number", "schema": INTEGER, "description": "A number."}}
JSON_ANSWER = (
    '<|channel|>commentary<|message|>Well.<|end|><|start|>assistant<|channel|>final<|message|>{"a":1}<|return|>'
)


def test_a_schema_is_told_and_held_to(app, playing, tokenizer):
    engine = playing(JSON_ANSWER, JSON_ANSWER.replace("1}", '"x"}'))
    application = app(engine)
    message = message_of(post(application, response_format=FORM))
    assert json.loads(message["content"]) == {"a": 1}
    assert message["reasoning"] == "Well."
    told = Developer(formats=(ResponseFormat(name="number", schema=INTEGER, description="A number."),))
    expected = tokenizer.decode(render_prompt([System(), told, User(text="hello")], tokenizer))
    assert prompt_of(engine, tokenizer) == expected
    assert post(application, response_format=FORM).status_code == 500


def test_json_of_any_schema(app, playing):
    application = app(playing(JSON_ANSWER, ANSWER, ANSWER))
    form = {"type": "json_object"}
    assert message_of(post(application, response_format=form))["content"] == '{"a":1}'
    assert post(application, response_format=form).status_code == 500
    assert message_of(post(application, response_format={"type": "text"}))["content"] == "Hi!"


def test_a_schema_that_cannot_be_held_to(app, playing):
    """It is refused, held to as far as it goes, or judged when the answer is there."""
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    lax = {"type": "json_schema", "json_schema": form["json_schema"] | {"strict": False}}
    answers = [f"<|channel|>final<|message|>{text}<|return|>" for text in ("[1,1]", "[1,1]", "[1,2]", "[1,1]")]
    application = app(playing(*answers[:1]))
    refused = post(application, response_format=form)
    assert error_of(refused) == (400, "response_format.json_schema.schema", "unsupported_schema")
    assert "uniqueItems" in refused.json()["error"]["message"]
    assert message_of(post(application, response_format=lax))["content"] == "[1,1]"
    lenient = app(playing(*answers[1:]), lenient_schemas=True)
    assert error_of(post(lenient, response_format=form)) == (500, None, "schema_mismatch")
    assert message_of(post(lenient, response_format=form))["content"] == "[1,2]"
    last = events_of(post(lenient, response_format=form, stream=True))[-2]
    assert last["error"]["code"] == "schema_mismatch"


# What is refused

REFUSED = {
    "audio": {"voice": "x"},
    "best_of": 2,
    "continue_final_message": True,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "guided_json": {"type": "object"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "x"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_supported_is_refused_by_name(app, playing, name):
    engine = playing(ANSWER)
    assert error_of(post(app(engine), **{name: REFUSED[name]})) == (400, name, "unsupported_parameter")
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning": {"enabled": False}}, "reasoning.enabled"),
        ({"reasoning": {"max_tokens": 9}}, "reasoning.max_tokens"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": [ADD]}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools.1.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x<|end|>"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools.0.function.parameters",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "a b"}]}, "messages.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages.0.audio"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(app, playing, body, param):
    engine = playing(ANSWER)
    status, found, _ = error_of(post(app(engine), **body))
    assert (status, found) == (400, param)
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.user.content"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"tool_choice": "maybe"}, None),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
)
def test_a_body_that_does_not_validate(app, playing, body, param):
    status, found, _ = error_of(post(app(playing(ANSWER)), **body))
    assert status == 422
    assert param is None or found == param


@pytest.mark.parametrize("body", [{"logit_bias": {"9999": 1}}, {"stop": [""]}, {"logit_bias": {"65": 101}}])
def test_what_the_engine_refuses(app, playing, body):
    assert post(app(playing(ANSWER)), **body).status_code == 400


def test_another_model_is_not_here(app, playing):
    assert error_of(post(app(playing(ANSWER)), model="gpt-7")) == (404, "model", "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(app, playing, stream):
    response = post(app(playing(ANSWER, max_context=100)), stream=stream)
    assert error_of(response) == (400, "messages", "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(app, playing, stream):
    response = post(app(playing(ANSWER, max_open=0)), stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_a_model_that_still_loads(app):
    assert post(app(None)).status_code == 503


@pytest.mark.parametrize(("stream", "n"), [(False, 1), (True, 1), (True, 3)])
def test_a_client_that_goes_away_frees_the_engine(app, scripted, ids_of, stream, n):
    async def run():
        body = {"messages": HELLO, "stream": stream, "n": n}
        wire = Wire(application, PATH, body)
        async with asyncio.timeout(10):
            while engine.num_open < n or (stream and len(wire.sent) < 3):
                await asyncio.sleep(0.001)
            wire.go_away()
            await wire.task
            while engine.num_open:
                await asyncio.sleep(0.001)

    endless = ids_of("<|channel|>final<|message|>" + "x" * 15_000)
    engine = scripted(lambda request: endless, max_context=20_000, seconds_per_token=0.001)
    application = app(engine)
    asyncio.run(run())


# OpenAI's own client


class Number(BaseModel):
    a: int


def by_client(application, use):
    async def run():
        transport = httpx.ASGITransport(application)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="-", http_client=http, max_retries=0) as client,
        ):
            return await use(client.chat.completions)

    return asyncio.run(run())


def test_openais_client_reads_an_answer(app, playing):
    async def use(completions):
        return await completions.create(model="scripted", messages=HELLO, logprobs=True, top_logprobs=1)

    answer = by_client(app(playing(ANSWER)), use)
    assert answer.choices[0].message.content == "Hi!"
    assert answer.choices[0].message.reasoning == "Hm."
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["H", "i", "!"]
    assert answer.usage.completion_tokens_details.reasoning_tokens == 14


def test_openais_client_gathers_a_stream(app, playing):
    async def use(completions):
        async with completions.stream(
            model="scripted", messages=HELLO, tools=[ADD, MUL], stream_options={"include_usage": True}
        ) as stream:
            kinds = {event.type async for event in stream}
            return kinds, await stream.get_final_completion()

    kinds, answer = by_client(app(playing(TALK + "<|start|>assistant" + PARALLEL)), use)
    assert {"content.delta", "tool_calls.function.arguments.done"} <= kinds
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["add", "mul"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.prompt_tokens > 100


def test_openais_client_parses_an_answer_and_a_call(app, playing):
    async def use(completions):
        tool = openai.pydantic_function_tool(Number, name="add")
        answer = await completions.parse(model="scripted", messages=HELLO, response_format=Number)
        call = await completions.parse(model="scripted", messages=HELLO, tools=[tool], tool_choice="required")
        return answer.choices[0].message.parsed, call.choices[0].message.tool_calls[0].function.parsed_arguments

    assert by_client(app(playing(JSON_ANSWER, CALL)), use) == (Number(a=1), Number(a=1))


def test_openais_client_loops_over_tools(app, playing, tokenizer):
    """The message that it was given goes back as it is, reasoning included."""

    async def use(completions):
        messages = [*HELLO]
        first = await completions.create(model="scripted", messages=messages, tools=[ADD])
        messages.append(first.choices[0].message)
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "3"} for call in first.choices[0].message.tool_calls
        ]
        return await completions.create(model="scripted", messages=messages, tools=[ADD])

    engine = playing(TALK_AND_CALL, ANSWER)
    answer = by_client(app(engine), use)
    assert answer.choices[0].message.content == "Hi!"
    assert prompt_of(engine, tokenizer).endswith(
        TALK_AND_CALL.replace("<|channel|>analysis", "<|start|>assistant<|channel|>analysis")
        + "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|><|start|>assistant"
    )


def test_openais_client_knows_errors_by_their_status(app, playing):
    async def use(completions):
        with pytest.raises(openai.BadRequestError) as caught:
            await completions.create(model="scripted", messages=HELLO, store=True)
        return caught.value

    error = by_client(app(playing(ANSWER)), use)
    assert (error.param, error.code) == ("store", "unsupported_parameter")


def test_the_route_is_described(app, playing):
    async def run():
        async with client_of(app(playing(ANSWER))) as client:
            return (await client.get("/openapi.json")).json()

    assert PATH in asyncio.run(run())["paths"]
