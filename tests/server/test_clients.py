"""OpenAI's client and its agents against a server's process over a real socket: each answer as their own types read it.

What the answers are in detail is tested without a socket; here is what programs do that know nothing of us.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import agents
import httpx
import openai
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.responses import ResponseFunctionToolCall, ResponseReasoningItem
from pydantic import BaseModel

from tests.server.responses.fake import GO, MODEL, calls, in_loop, says, thinks
from tests.server.scripted_server import scripted_server

agents.set_tracing_disabled(True)

SCRIPTS = {
    "Hi": [thinks("They greet.") + says("Hello!")],
    "Who am I?": [says("You greeted me.")],
    "Talk": [says("la " * 30_000)],  # for half a minute and more: somebody ends it
    "The capital of Norway": [thinks("Oslo.") + says('{"city":"Oslo","degrees":12}')],
    "Weather?": [
        thinks("Look.") + calls("weather", '{"city":"Oslo"}'),
        thinks("Now Rome.") + calls("weather", '{"city":"Rome"}'),
        says("Rome is warmer."),
    ],
    "Both at once": [
        calls("weather", '{"city":"Oslo"}').replace("<|call|>", f"<|end|>{GO}") + calls("weather", '{"city":"Rome"}'),
        "",
        says("Rome."),
    ],
    "Weather, in a form": [calls("weather", '{"city":"Oslo"}'), says('{"city":"Oslo","degrees":12}')],
    "Once upon": [" a time"],
    "What is here?": [
        thinks("Look.")
        + f"<|channel|>commentary<|message|>Let me look.<|end|>{GO}"
        + calls("exec_command", '{"cmd":"ls"}'),
        thinks("Try.") + calls("no_such_tool", "{}"),
        says("A file."),
    ],
} | {f"Number {number}": [says(f"{number} it is.")] for number in range(20)}


class Place(BaseModel):
    """The form of an answer."""

    city: str
    degrees: int


class Weather(BaseModel):
    """Tells the weather."""

    city: str


OSLO = Place(city="Oslo", degrees=12)
HI = [{"role": "user", "content": "Hi"}]
DEGREES = {"Oslo": "12 degrees", "Rome": "20 degrees"}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": Weather.model_json_schema()}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with scripted_server(SCRIPTS) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def talking(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)


def running(address: str) -> float:
    """Sequences that the engine works on."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("gptoss_engine_running "))


async def idle(address: str) -> None:
    async with asyncio.timeout(5):
        while running(address):
            await asyncio.sleep(0.02)


# Responses


def test_a_response_is_kept_continued_and_forgotten(client):
    first = client.responses.create(model=MODEL, input="Hi", instructions="Be kind.", metadata={"a": "b"})
    assert first.output_text == "Hello!"
    assert [item.type for item in first.output] == ["reasoning", "message"]
    kept = client.responses.retrieve(first.id)
    assert kept.to_dict() == first.to_dict()
    second = client.responses.create(model=MODEL, input="Who am I?", previous_response_id=first.id)
    assert second.output_text == "You greeted me."
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))  # three pages
    assert [(item.type, item.role) for item in items if item.type == "message"] == [
        ("message", "user"),
        ("message", "assistant"),
        ("message", "user"),
    ]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=first.id):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError, match="was deleted"):
        client.responses.create(model=MODEL, input="Who am I?", previous_response_id=second.id)


def test_a_streamed_response(client):
    with client.responses.stream(model=MODEL, input="Hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == "Hello!"
    assert len(deltas) > 1
    assert client.responses.retrieve(final.id).output_text == "Hello!"


def test_a_response_is_parsed(client):
    parsed = client.responses.parse(model=MODEL, input="The capital of Norway", text_format=Place)
    assert parsed.output_parsed == OSLO
    with client.responses.stream(model=MODEL, input="The capital of Norway", text_format=Place) as stream:
        assert stream.until_done().get_final_response().output_parsed == OSLO


def test_functions_are_called_and_answered(client):
    tools = [openai.pydantic_function_tool(Weather, name="weather")["function"] | {"type": "function"}]
    said: list = [{"role": "user", "content": "Weather?"}]
    for _ in range(3):
        response = client.responses.parse(model=MODEL, input=said, tools=tools, store=False)
        said += response.output
        for call in response.output:
            if isinstance(call, ResponseFunctionToolCall):
                output = DEGREES[json.loads(call.arguments)["city"]]
                said.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    assert response.output_text == "Rome is warmer."
    assert sum(isinstance(item, ResponseReasoningItem) for item in said) == 2


def test_one_in_the_background_is_read_and_cancelled(client, address):
    response = client.responses.create(model=MODEL, input="Talk", background=True)
    assert response.status in ("queued", "in_progress")
    with client.responses.retrieve(response.id, stream=True) as stream:
        deltas = (event for event in stream if event.type == "response.output_text.delta")
        read = [next(deltas) for _ in range(6)][-1]
    with client.responses.retrieve(response.id, stream=True, starting_after=read.sequence_number) as stream:
        assert next(iter(stream)).sequence_number == read.sequence_number + 1
    assert client.responses.retrieve(response.id).status == "in_progress"
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output_text.startswith("la la")
    assert client.responses.retrieve(response.id).to_dict() == cancelled.to_dict()
    asyncio.run(idle(address))


def test_a_count(client):
    counted = client.responses.input_tokens.count(model=MODEL, input="Hi")
    usage = client.responses.create(model=MODEL, input="Hi").usage
    assert counted.input_tokens == usage.input_tokens


# Chat completions and completions


def test_a_completed_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Hello!", "stop")
    assert "".join(token.token for token in choice.logprobs.content) == "Hello!"
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
    assert choice.message.reasoning == "They greet."


def test_a_streamed_chat(client):
    options = {"include_usage": True}
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options=options) as stream:
        *chunks, last = stream
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Hello!"
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    with client.chat.completions.stream(model=MODEL, messages=HI, n=3) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello!"] * 3


def test_a_chat_is_parsed(client):
    question = [{"role": "user", "content": "The capital of Norway"}]
    answer = client.chat.completions.parse(model=MODEL, messages=question, response_format=Place)
    assert answer.choices[0].message.parsed == OSLO
    with client.chat.completions.stream(model=MODEL, messages=question, response_format=Place) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == OSLO


@pytest.mark.parametrize("streamed", [False, True])
def test_arguments_are_parsed(client, streamed):
    """A function of pydantic's is strict."""
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    asked = {"model": MODEL, "tools": tools, "messages": [{"role": "user", "content": "Weather?"}]}
    if streamed:
        with client.chat.completions.stream(**asked) as stream:
            answer = stream.get_final_completion()
    else:
        answer = client.chat.completions.parse(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Oslo")
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_side_by_side(client, streamed):
    said: list = [{"role": "user", "content": "Both at once"}]
    asked = {"model": MODEL, "tools": [{"type": "function", "function": FUNCTION}], "messages": said}
    if streamed:
        state = ChatCompletionStreamState()
        with client.chat.completions.create(**asked, stream=True) as stream:
            for chunk in stream:
                state.handle_chunk(chunk)
        message = state.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**asked).choices[0].message
    cities = [json.loads(call.function.arguments)["city"] for call in message.tool_calls]
    assert cities == ["Oslo", "Rome"]
    said.append(message)
    for call, city in zip(message.tool_calls, cities, strict=True):
        said.append({"role": "tool", "tool_call_id": call.id, "content": DEGREES[city]})
    assert client.chat.completions.create(**asked).choices[0].message.content == "Rome."


def test_a_chat_calls_by_force_and_answers(client):
    said: list = [{"role": "user", "content": "Weather?"}]
    tools = [{"type": "function", "function": FUNCTION}]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}, "auto"):
        answer = client.chat.completions.create(model=MODEL, messages=said, tools=tools, tool_choice=choice)
        message = answer.choices[0].message
        said.append(message)  # as the client gives it, with its nulls
        for call in message.tool_calls or ():
            output = DEGREES[json.loads(call.function.arguments)["city"]]
            said.append({"role": "tool", "tool_call_id": call.id, "content": output})
    assert message.content == "Rome is warmer."


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=4, echo=True, logprobs=1)
    assert answer.choices[0].text == "Once upon a t"
    assert answer.choices[0].finish_reason == "length"
    with client.completions.create(model=MODEL, prompt=["Once upon"] * 2, n=2, stream=True) as stream:
        texts = ["", "", "", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [" a time"] * 4


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.models.retrieve("gpt-5")


# What goes wrong


def test_refusals_are_the_client_s_own_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="Hi", prompt={"id": "pmpt_1"})
    assert refused.value.param == "prompt"
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=HI, temperature="hot")


@pytest.mark.parametrize("leave", ["responses", "chat", "completions"])
def test_whoever_leaves_a_stream_ends_it(client, address, leave):
    streams = {
        "responses": lambda: client.responses.create(model=MODEL, input="Talk", stream=True),
        "chat": lambda: client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Talk"}], stream=True
        ),
        "completions": lambda: client.completions.create(model=MODEL, prompt="Talk", max_tokens=80_000, stream=True),
    }
    with streams[leave]() as stream:
        for _ in range(5):
            next(stream)
        assert running(address) == 1
    asyncio.run(idle(address))


# At the same time


@in_loop
async def test_many_at_once(address):
    async def respond(number):
        response = await client.responses.create(model=MODEL, input=f"Number {number}")
        return response.output_text

    async def stream(number):
        said = [{"role": "user", "content": f"Number {number}"}]
        chunks = await client.chat.completions.create(model=MODEL, messages=said, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async with talking(address) as client:
        ways = (respond, stream)
        texts = await asyncio.gather(*[ways[number % 2](number) for number in range(20)])
    assert texts == [f"{number} it is." for number in range(20)]


@in_loop
async def test_the_async_client(address):
    async with talking(address) as client:
        async with client.responses.stream(model=MODEL, input="The capital of Norway", text_format=Place) as stream:
            assert (await stream.get_final_response()).output_parsed == OSLO
        question = [{"role": "user", "content": "The capital of Norway"}]
        async with client.chat.completions.stream(model=MODEL, messages=question, response_format=Place) as chat:
            assert (await chat.get_final_completion()).choices[0].message.parsed == OSLO
        response = await client.responses.create(model=MODEL, input="Talk", background=True)
        assert (await client.responses.cancel(response.id)).status == "cancelled"
        items = client.responses.input_items.list(response.id)
        assert [item.content[0].text async for item in items] == ["Talk"]
        await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.completions.create(model=MODEL, prompt="Once upon")).choices[0].text == " a time"


@in_loop
async def test_a_request_that_is_cancelled_ends(address):
    async with talking(address) as client:
        waiting = asyncio.create_task(client.responses.create(model=MODEL, input="Talk"))
        async with asyncio.timeout(5):
            while not await asyncio.to_thread(running, address):
                await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await idle(address)


# Agents


@function_tool
def weather(city: str) -> str:
    """Tells the weather."""
    return DEGREES[city]


def forecaster(client, kind, *, output_type=None, **settings) -> Agent:
    return Agent(
        name="Forecaster",
        instructions="Tell the weather.",
        model=kind(model=MODEL, openai_client=client),
        tools=[weather],
        output_type=output_type,
        model_settings=ModelSettings(**settings),
    )


KINDS = pytest.mark.parametrize("kind", [OpenAIResponsesModel, OpenAIChatCompletionsModel])


@pytest.mark.parametrize("settings", [{}, {"tool_choice": "required"}, {"tool_choice": "weather"}])
@KINDS
@in_loop
async def test_agents_run_their_tools(address, kind, settings):
    async with talking(address) as client:
        result = await Runner.run(forecaster(client, kind, **settings), "Weather?")
    assert result.final_output == "Rome is warmer."
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == list(DEGREES.values())


@KINDS
@in_loop
async def test_agents_stream(address, kind):
    async with talking(address) as client:
        result = Runner.run_streamed(forecaster(client, kind, tool_choice="required"), "Weather?")
        events = [event async for event in result.stream_events()]
    assert result.final_output == "Rome is warmer."
    named = [event.name for event in events if event.type == "run_item_stream_event"]
    assert [name for name in named if name != "reasoning_item_created"] == [
        *["tool_called", "tool_output"] * 2,
        "message_output_created",
    ]
    raw = [event.data for event in events if event.type == "raw_response_event"]
    assert "".join(each.delta for each in raw if each.type == "response.output_text.delta") == "Rome is warmer."


@KINDS
@in_loop
async def test_agents_answer_in_a_form(address, kind):
    async with talking(address) as client:
        result = await Runner.run(forecaster(client, kind, output_type=Place), "Weather, in a form")
    assert result.final_output == OSLO


@in_loop
async def test_agents_go_on_from_a_stored_response(address):
    async with talking(address) as client:
        agent = forecaster(client, OpenAIResponsesModel)
        first = await Runner.run(agent, "Weather?", auto_previous_response_id=True)
        again = await Runner.run(agent, "Hi", previous_response_id=first.last_response_id)
    assert again.final_output == "Hello!"


# Codex


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("codex") is None, reason="needs Codex: npm i -g @openai/codex")
def test_codex_set_up_as_the_documentation_says(address, tmp_path):
    documentation = Path(__file__).parents[2] / "docs" / "responses.md"
    block = re.search(r"```toml\n(.*?)```", documentation.read_text(encoding="utf-8"), flags=re.DOTALL)
    config = block[1].replace("http://127.0.0.1:8000", address).replace('"gpt-oss-20b"', f'"{MODEL}"')
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    (home / "config.toml").write_text(config)
    (folder / "a.py").write_text("x")
    command = ["codex", "exec", "--strict-config", "--skip-git-repo-check", "--json", "What is here?"]
    environment = {**os.environ, "CODEX_HOME": str(home)}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    told = [item["text"] for item in items if item["type"] == "agent_message"]
    assert told == ["Let me look.", "A file."]
    (listing,) = [item for item in items if item["type"] == "command_execution"]
    assert "a.py" in listing["aggregated_output"]
    (turn,) = [event for event in events if event["type"] == "turn.completed"]
    assert turn["usage"]["output_tokens"] > 0
