"""Other people's programs on /v1/responses: OpenAI's agents, and a client that goes away."""

import asyncio
import json

import agents
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool

from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from tests.server.responses.fake import (
    MODEL,
    Engine,
    calls,
    events_of,
    idle,
    in_loop,
    says,
    scripted,
    thinks,
    tokenizer,
)

agents.set_tracing_disabled(True)
SCRIPTS = (
    thinks("Look.") + calls("weather", '{"city":"Oslo"}'),
    thinks("Now Rome.") + calls("weather", '{"city":"Rome"}'),
    thinks("Compare.") + says("Rome is warmer."),
)


@function_tool
def weather(city: str) -> str:
    """Tells the weather."""
    return {"Oslo": "12 degrees", "Rome": "20 degrees"}[city]


def forecaster(client, **settings) -> Agent:
    return Agent(
        name="Forecaster",
        instructions="Tell the weather.",
        model=OpenAIResponsesModel(model=MODEL, openai_client=client),
        tools=[weather],
        model_settings=ModelSettings(**settings),
    )


@pytest.mark.parametrize("settings", [{}, {"tool_choice": "required"}, {"store": False, "parallel_tool_calls": False}])
@in_loop
async def test_agents_run_their_tools(settings):
    async with scripted(*SCRIPTS) as (client, engine):
        result = await Runner.run(forecaster(client, **settings), "Where is it warmer?")
    assert result.final_output == "Rome is warmer."
    assert "12 degrees" in engine.prompts[1]
    assert "Look." in engine.prompts[2]  # reasoning goes back while tools run
    assert "20 degrees" in engine.prompts[2]


@in_loop
async def test_agents_stream():
    async with scripted(*SCRIPTS) as (client, _):
        result = Runner.run_streamed(forecaster(client, tool_choice="required"), "Where is it warmer?")
        kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
    assert result.final_output == "Rome is warmer."
    once = ["reasoning_item_created", "tool_called", "tool_output"]
    assert kinds == [*once, *once, "reasoning_item_created", "message_output_created"]


@in_loop
async def test_agents_with_previous_response_id():
    async with scripted(*SCRIPTS, says("You are welcome.")) as (client, engine):
        first = await Runner.run(forecaster(client), "Where is it warmer?", auto_previous_response_id=True)
        again = await Runner.run(forecaster(client), "Thanks", previous_response_id=first.last_response_id)
    assert again.final_output == "You are welcome."
    assert "Where is it warmer?" in engine.prompts[3]


def as_codex_sends_it(items: list[dict]) -> dict:
    """The body of a request as Codex makes it for a model that it does not know."""
    shell = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}
    tools = [
        {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": shell},
        {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": {"type": "grammar"}},
        {"type": "namespace", "name": "mcp", "description": "More.", "tools": [{"type": "function", "name": "js"}]},
        {"type": "tool_search", "execution": "client"},
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
    ]
    return {
        "model": MODEL,
        "instructions": "You are a coding agent.",
        "input": items,
        "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a",
    }


@in_loop
async def test_two_requests_of_codex():
    items: list[dict] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
    ]
    first = thinks("Use ls.") + calls("shell", '{"command": ["ls"]}')
    async with scripted(first, says("a.py")) as (client, engine):
        for _ in range(2):
            body, metadata = as_codex_sends_it(items), {"client_metadata": {"x-codex-installation-id": "019b"}}
            stream = await client.responses.create(**body, extra_body=metadata)
            events = await events_of(stream)
            assert events[-1]["type"] == "response.completed"
            for item in events[-1]["response"]["output"]:
                kept = {key: value for key, value in item.items() if key not in ("id", "status")}
                items.append(kept | ({"encrypted_content": None} if item["type"] == "reasoning" else {}))
                if item["type"] == "function_call":
                    items.append({"type": "function_call_output", "call_id": item["call_id"], "output": "a.py"})
    result = "<|start|>functions.shell to=assistant<|channel|>commentary<|message|>a.py<|end|>"
    assert engine.prompts[1] == f"{engine.prompts[0]}{first}{result}<|start|>assistant"
    assert "apply_patch" not in engine.prompts[0]


class Connection:
    """One request over bare ASGI, whose client goes away when it is told to."""

    def __init__(self, **body):
        self.gone = asyncio.Event()
        self.sent: list[dict] = []
        self._body = json.dumps(body).encode()
        self._read = False

    async def receive(self) -> dict:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    async def run(self, app) -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/responses",
            "headers": headers,
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        await app(scope, self.receive, self.send)


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_client_that_goes_away_ends_its_turn(stream):
    with Engine(says("x" * 5000), seconds_per_token=0.01) as engine:
        app = create_app(engine, tokenizer=tokenizer(), model_name=MODEL, settings=ServerSettings())
        async with app.router.lifespan_context(app):
            connection = Connection(model=MODEL, input="Hi", stream=stream)
            served = asyncio.create_task(connection.run(app))
            while engine.stats().generated_tokens < 30:
                await asyncio.sleep(0.01)
            assert any(b"output_text.delta" in sent.get("body", b"") for sent in connection.sent) == stream
            connection.gone.set()
            await served
            await idle(engine)


@in_loop
async def test_a_client_that_goes_away_from_one_in_the_background_does_not_end_it():
    with Engine(says("x" * 60), seconds_per_token=0.01) as engine:
        app = create_app(engine, tokenizer=tokenizer(), model_name=MODEL, settings=ServerSettings())
        async with app.router.lifespan_context(app):
            connection = Connection(model=MODEL, input="Hi", stream=True, background=True)
            served = asyncio.create_task(connection.run(app))
            while engine.stats().generated_tokens < 10:
                await asyncio.sleep(0.01)
            connection.gone.set()
            await served
            assert engine.num_open == 1
            while engine.num_open:
                await asyncio.sleep(0.01)
    assert engine.stats().generated_tokens > 60
