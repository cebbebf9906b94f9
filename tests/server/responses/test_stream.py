"""Streams of /v1/responses: every event of every kind of item, in OpenAI's order, as OpenAI's client reads it."""

from random import Random

import openai
import pytest
from pydantic import BaseModel

from tests.server.responses.fake import (
    GO,
    MODEL,
    Browser,
    Python,
    asks,
    calls,
    check_response,
    events_of,
    in_loop,
    says,
    scripted,
    squeezed,
    thinks,
)

BEGIN = ["created", "in_progress"]
REASONING = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]
MESSAGE = [name.replace("reasoning", "output") for name in REASONING]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
CODE = [
    "output_item.added",
    "code_interpreter_call.in_progress",
    "code_interpreter_call_code.delta",
    "code_interpreter_call_code.done",
    "code_interpreter_call.interpreting",
    "code_interpreter_call.completed",
    "output_item.done",
]
SEARCH = [
    "output_item.added",
    "web_search_call.in_progress",
    "web_search_call.searching",
    "web_search_call.completed",
    "output_item.done",
]
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def streamed(client: openai.AsyncOpenAI, **body) -> list[dict]:
    return await events_of(await client.responses.create(**{"model": MODEL, "input": "Hi", "stream": True} | body))


def joined(events: list[dict], name: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{name}.delta")


@in_loop
async def test_an_answer_with_reasoning():
    async with scripted(thinks("Greet.") + says("Grüße! 🦦")) as (client, _):
        events = await streamed(client)
    assert squeezed(events) == [*BEGIN, *REASONING, *MESSAGE, "completed"]
    assert joined(events, "reasoning_text") == "Greet."
    assert joined(events, "output_text") == "Grüße! 🦦"
    response = check_response(events[-1]["response"])
    assert response.status == "completed"
    assert response.output_text == "Grüße! 🦦"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert all(item["status"] == "completed" for item in done)


@in_loop
async def test_the_first_events_show_the_response_without_output():
    async with scripted(says("Hi")) as (client, _):
        events = await streamed(client)
    for event in events[:2]:
        assert event["response"]["status"] == "in_progress"
        assert event["response"]["output"] == []
        assert event["response"]["usage"] is None
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]


@in_loop
async def test_deltas_name_their_item():
    async with scripted(thinks("a") + says("b")) as (client, _):
        events = await streamed(client)
    ids = {event["output_index"]: event["item"]["id"] for event in events if "item" in event}
    named = [event for event in events if "item_id" in event]
    assert len(named) > 6
    assert all(event["item_id"] == ids[event["output_index"]] for event in named)
    assert all(event["content_index"] == 0 for event in named)


@in_loop
async def test_words_before_a_call_are_a_message_of_their_own():
    preamble = f"<|channel|>commentary<|message|>Let me look.<|end|>{GO}"
    async with scripted(thinks("Weather.") + preamble + calls("weather", '{"city":"Oslo"}')) as (client, _):
        events = await streamed(client, tools=[WEATHER])
    assert squeezed(events) == [*BEGIN, *REASONING, *MESSAGE, *CALL, "completed"]
    assert joined(events, "function_call_arguments") == '{"city":"Oslo"}'
    _, message, call = events[-1]["response"]["output"]
    assert message["phase"] == "commentary"
    assert (call["name"], call["arguments"]) == ("weather", '{"city":"Oslo"}')
    added = next(event["item"] for event in events if event["type"] == "response.output_item.added")
    assert added["status"] == "in_progress"


@in_loop
async def test_python_runs_on_the_server():
    async with scripted(asks("python", "print(6*7)"), says("42"), settings={"tools": [Python()]}) as (client, engine):
        events = await streamed(client, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    assert squeezed(events) == [*BEGIN, *CODE, *MESSAGE, "completed"]
    assert joined(events, "code_interpreter_call_code") == "print(6*7)"
    call = events[-1]["response"]["output"][0]
    assert (call["code"], call["outputs"]) == ("print(6*7)", [{"type": "logs", "logs": "42\n"}])
    assert call["status"] == "completed"
    assert "<|start|>python to=assistant<|channel|>analysis<|message|>42\n<|end|>" in engine.prompts[1]


@in_loop
async def test_a_tool_that_fails_is_told_to_the_model_and_in_the_item():
    async with scripted(asks("python", "bad"), says("Sorry"), settings={"tools": [Python()]}) as (client, engine):
        events = await streamed(client, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    assert squeezed(events) == [*BEGIN, *(name for name in CODE if "completed" not in name), *MESSAGE, "completed"]
    assert events[-1]["response"]["output"][0]["status"] == "failed"
    assert "NameError: bad" in engine.prompts[1]


@in_loop
async def test_a_search_on_the_server():
    search, page = (
        asks("browser.search", '{"query": "otters"}'),
        asks("browser.open", '{"id": "https://otter.example"}'),
    )
    async with scripted(search, page, says("Otters."), settings={"tools": [Browser()]}) as (client, _):
        events = await streamed(client, tools=[{"type": "web_search"}])
    assert squeezed(events) == [*BEGIN, *SEARCH, *SEARCH, *MESSAGE, "completed"]
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["action"] for item in added[:2]] == [
        {"type": "search", "query": "otters", "queries": ["otters"]},
        {"type": "open_page", "url": "https://otter.example"},
    ]


@in_loop
async def test_an_answer_cut_at_max_output_tokens_is_incomplete():
    async with scripted(thinks("Hm.") + says("A long answer")) as (client, _):
        cut = len("<>analysis<>Hm.<><>assistant<>final<>A lo".replace("<>", "|"))
        events = await streamed(client, max_output_tokens=cut)
    assert squeezed(events) == [*BEGIN, *REASONING, *MESSAGE, "incomplete"]
    response = check_response(events[-1]["response"])
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["completed", "incomplete"]
    assert response.output_text == "A lo"
    assert response.usage.output_tokens == cut


@in_loop
async def test_an_engine_that_breaks_fails_the_response():
    # The script says a final answer where a call is required: the engine ends it with an error.
    async with scripted(says("No.")) as (client, _):
        events = await streamed(client, tools=[WEATHER], tool_choice="required")
    assert events[-1]["type"] == "response.failed"
    response = check_response(events[-1]["response"])
    assert response.status == "failed"
    assert response.error.code == "server_error"
    assert "constraint" in response.error.message


@pytest.mark.parametrize(
    "said",
    [
        "just words",
        "<|channel|>",
        "<|channel|>final<|channel|>final<|message|>x<|return|>",
        "<|start|><|start|><|message|>",
        " to=functions.<|channel|>commentary<|message|>{<|call|>",
        " to=browser.search<|channel|>analysis<|message|>no json<|call|>",
        " to=python<|channel|>analysis<|message|>1+1<|call|>",
        "<|channel|>final <|constrain|>json<|message|><|return|>",
        "<|message|>" * 5 + "<|call|>",
    ],
)
@in_loop
async def test_no_output_of_a_model_is_an_error(said):
    async with scripted(said) as (client, _):
        events = await streamed(client)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    check_response(events[-1]["response"])


@in_loop
async def test_a_call_of_a_tool_that_is_not_here_is_the_callers():
    async with scripted(asks("browser.search", '{"query": "x"}')) as (client, _):
        events = await streamed(client)
    assert squeezed(events) == [*BEGIN, *CALL, "completed"]
    assert events[-1]["response"]["output"][0]["name"] == "browser.search"


@in_loop
async def test_logprobs_of_every_delta_add_up():
    async with scripted(thinks("Hm") + says("ab")) as (client, engine):
        events = await streamed(client, include=["message.output_text.logprobs"], top_logprobs=2)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    told = [entry for event in deltas for entry in event["logprobs"]]
    (content,) = events[-1]["response"]["output"][1]["content"]
    assert content["logprobs"] == told
    assert [entry["token"] for entry in told] == ["a", "b"]
    assert told[0]["logprob"] == engine.logprob(ord("a"))
    assert [(top["bytes"], top["logprob"]) for top in told[0]["top_logprobs"]] == [
        ([token_id], logprob) for token_id, logprob in engine.top_logprobs(ord("a"), 2)
    ]


@in_loop
async def test_the_clients_own_accumulation_agrees():
    script = thinks("Look.") + calls("weather", '{"city":"Oslo"}')
    async with (
        scripted(script) as (client, _),
        client.responses.stream(model=MODEL, input="Weather?", tools=[WEATHER | {"strict": True}]) as stream,
    ):
        async for event in stream:
            if event.type == "response.function_call_arguments.delta":
                snapshot = event.snapshot
        response = await stream.get_final_response()
    assert snapshot == response.output[1].arguments == '{"city":"Oslo"}'
    assert response.output[1].parsed_arguments == {"city": "Oslo"}


class City(BaseModel):
    name: str


@in_loop
async def test_the_client_parses_what_is_streamed():
    async with (
        scripted(thinks("A city.") + says('{"name":"Oslo"}')) as (client, _),
        client.responses.stream(model=MODEL, input="A city", text_format=City) as stream,
    ):
        response = await stream.get_final_response()
    assert response.output_parsed == City(name="Oslo")


PIECES = (
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", GO),
    *("analysis", "commentary", "final", "json", " to=functions.weather", " to=python", " to=browser.find", " to="),
    *("text", "{", '{"city":"Oslo"}', "ß", "\n", "<|"),
)


def text_of(item: dict) -> str:
    match item["type"]:
        case "function_call":
            return item["arguments"]
        case "code_interpreter_call":
            return item["code"]
    return item["content"][0]["text"]


async def garble(seed: int, rounds: int) -> None:
    """Plays what no model should say, and checks every event, and that no text is lost."""
    random = Random(seed)
    scripts = ["".join(random.choices(PIECES, k=random.randint(1, 25))) for _ in range(rounds * 16)]
    tools = [WEATHER | {"strict": False}, {"type": "code_interpreter", "container": "auto"}, {"type": "web_search"}]
    async with scripted(*scripts, settings={"tools": [Python(), Browser()]}) as (client, _):
        for _ in range(rounds):
            events = await streamed(client, tools=tools, max_tool_calls=3)
            response = check_response(events[-1]["response"])
            assert response.status in ("completed", "incomplete")
            assert joined(events, "output_text") == response.output_text
            done = {e["output_index"]: e["item"] for e in events if e["type"] == "response.output_item.done"}
            assert [done[index] for index in range(len(done))] == events[-1]["response"]["output"]
            for item in done.values():
                deltas = [event["delta"] for event in events if event.get("item_id") == item["id"] and "delta" in event]
                assert item["type"] == "web_search_call" or "".join(deltas) == text_of(item)
            again = await client.responses.retrieve(response.id)
            assert again.to_dict(mode="json") == events[-1]["response"]


@in_loop
async def test_garbled_output():
    await garble(seed=0, rounds=30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@in_loop
async def test_much_garbled_output(seed):
    await garble(seed, rounds=100)
