"""A server in this process for tests of /v1/responses: a tokenizer of bytes, an engine of texts, OpenAI's client."""

import asyncio
import contextlib
import functools
import re
import tempfile
from pathlib import Path

import httpx
import openai
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from gptoss_jax.harmony.messages import Function, Namespace
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine
from gptoss_jax.tools.base import ToolError

VOCAB = 300
MODEL = "gpt-oss-tiny"
GO = "<|start|>assistant"


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder) / "tokenizer.json", VOCAB)
        return load_tokenizer(Path(folder))


def ids(text: str) -> list[int]:
    """Text with marks, as "<|channel|>final<|message|>Hi<|return|>", to ids."""
    found = []
    for index, piece in enumerate(re.split(r"(<\|[a-z]+\|>)", text)):
        found += [tokenizer().special(piece)] if index % 2 else tokenizer().encode(piece)
    return found


def thinks(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|>{GO}"


def says(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def calls(name: str, arguments: str) -> str:
    return f" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>{arguments}<|call|>"


def asks(recipient: str, text: str) -> str:
    """A call to a tool of the server's."""
    return f"<|channel|>analysis to={recipient} code<|message|>{text}<|call|>"


class Engine(ScriptedEngine):
    """Plays texts in turn; `prompts` is what it was asked, as text."""

    def __init__(self, *scripts: str, **options):
        super().__init__([ids(script) for script in scripts], **{"vocab_size": VOCAB} | options)

    @property
    def prompts(self) -> list[str]:
        return [tokenizer().decode(request.prompt) for request in self.requests]


class Python:
    """A tool that has one answer to everything but "bad"."""

    namespace = Namespace(name="python", description="Runs Python.")

    def handles(self, recipient: str) -> bool:
        return recipient == "python"

    def session(self) -> "Python":
        return self

    async def call(self, recipient: str, text: str) -> str:
        if text == "bad":
            raise ToolError("NameError: bad")
        return "42\n"


class Browser:
    """A browser that finds one thing."""

    namespace = Namespace(name="browser", functions=(Function(name="search"), Function(name="open")))

    def handles(self, recipient: str) -> bool:
        return recipient.startswith("browser.")

    def session(self) -> "Browser":
        return self

    async def call(self, recipient: str, text: str) -> str:
        return "found: an otter"


@contextlib.asynccontextmanager
async def client_of(app):
    """OpenAI's client of an application."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)


@contextlib.asynccontextmanager
async def serving(engine, **settings):
    """OpenAI's client of a server on this engine, ended with it."""
    app = create_app(engine, tokenizer=tokenizer(), model_name=MODEL, settings=ServerSettings(**settings))
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


@contextlib.asynccontextmanager
async def scripted(*scripts: str, settings=None, **options):
    """(client, engine): a server that plays these texts."""
    with Engine(*scripts, **options) as engine:
        async with serving(engine, **(settings or {})) as client:
            yield client, engine
        await idle(engine)


async def idle(engine: ScriptedEngine) -> None:
    """Raises unless the engine has nothing to do in a moment: it hears of an end between two steps."""
    async with asyncio.timeout(1):
        while engine.num_open:
            await asyncio.sleep(0.005)


def in_loop(test):
    """Runs a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), timeout=30))

    return run


# Fields that OpenAI's server sends and that its client's types do not have.
_EXTRA = {"store", "bytes", "name", "action.queries"}
_EVENTS = TypeAdapter(ResponseStreamEvent)


def check_response(body: dict) -> Response:
    """Raises unless it has all that OpenAI's types ask for, of the right types, at every depth, and nothing else."""
    response = Response.model_validate(body, strict=True)
    assert _extras(response) <= _EXTRA, _extras(response)
    return response


def check_event(body: dict) -> None:
    """The same for an event."""
    event = _EVENTS.validate_python(body, strict=True)
    assert event.type == body["type"]
    assert _extras(event) <= _EXTRA, _extras(event)


def check_items(bodies: list[dict]) -> None:
    """The same for items of a list."""
    for body in bodies:
        item = TypeAdapter(ResponseItem).validate_python(body, strict=True)
        assert item.type == body["type"]
        assert _extras(item) <= _EXTRA, _extras(item)


def _extras(value: object) -> set[str]:
    if isinstance(value, BaseModel):
        fields = [getattr(value, name) for name in type(value).model_fields]
        return set(value.model_extra or {}).union(*map(_extras, fields))
    if isinstance(value, list):
        return set().union(*map(_extras, value))
    return set()


async def events_of(stream) -> list[dict]:
    """All events of a stream as they were sent: each checked, numbered without a gap, items in their order."""
    events = [event.to_dict(mode="json") async for event in stream]
    for number, event in enumerate(events):
        check_event(event)
        assert event["sequence_number"] == number
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert added == sorted(done) == list(range(len(added)))
    return events


def squeezed(events: list[dict]) -> list[str]:
    """The names of events without "response.", one for any number of the same in a row."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if not i or name != names[i - 1]]
