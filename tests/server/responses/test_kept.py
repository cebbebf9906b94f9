"""Responses beyond their request: had again, continued, listed, deleted; in the background, cancelled, followed."""

import asyncio
import sqlite3

import openai
import pytest

from gptoss_jax.server.app import create_app
from gptoss_jax.server.responses.run import Desk
from gptoss_jax.server.responses.store import ResponseStore
from gptoss_jax.server.settings import ServerSettings
from tests.server.responses.fake import (
    GO,
    MODEL,
    Browser,
    Engine,
    asks,
    calls,
    check_items,
    check_response,
    client_of,
    events_of,
    idle,
    in_loop,
    says,
    scripted,
    serving,
    squeezed,
    thinks,
    tokenizer,
)

WEATHER = {"type": "function", "name": "weather"}
SLOW = {"seconds_per_token": 0.02}
LONG = says("x" * 2000)


async def created(client, **body):
    return await client.responses.create(**{"model": MODEL, "input": "Hi"} | body)


async def until(condition) -> None:
    while not await condition():
        await asyncio.sleep(0.01)


async def ended(client, response_id: str):
    """The response when it runs no more."""
    while (response := await client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        await asyncio.sleep(0.01)
    check_response(response.to_dict(mode="json"))
    return response


# Stored


@in_loop
async def test_a_response_can_be_had_again():
    async with scripted(thinks("Hm") + says("Hello")) as (client, _):
        response = await created(client)
        again = await client.responses.retrieve(response.id)
    assert again.to_dict(mode="json") == response.to_dict(mode="json")


@in_loop
async def test_what_cannot_be_told_of_it_is_refused():
    async with scripted(says("Hello")) as (client, _):
        response = await created(client)
        await client.responses.retrieve(response.id, include=["message.output_text.logprobs"])
        with pytest.raises(openai.BadRequestError, match=r"file_search_call\.results"):
            await client.responses.retrieve(response.id, include=["file_search_call.results"])
        with pytest.raises(openai.BadRequestError, match="include_obfuscation"):
            await client.responses.retrieve(response.id, stream=True, include_obfuscation=True)
        with pytest.raises(openai.BadRequestError, match="starting_after"):
            await client.responses.retrieve(response.id, extra_query={"starting_after": 1})


@in_loop
async def test_a_streamed_one_too():
    async with scripted(says("Hello")) as (client, _):
        events = await events_of(await created(client, stream=True))
        again = await client.responses.retrieve(events[-1]["response"]["id"])
    assert again.to_dict(mode="json") == events[-1]["response"]


@in_loop
async def test_store_false_stores_nothing():
    async with scripted(says("Hello")) as (client, _):
        response = await created(client, store=False)
        assert response.store is False
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.retrieve(response.id)
    assert missing.value.code == "response_not_found"


@in_loop
async def test_deletion_deletes():
    async with scripted(says("Hello"), says("again")) as (client, _):
        response = await created(client)
        await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError) as missing:
            await created(client, previous_response_id=response.id)
    assert missing.value.code == "previous_response_not_found"


@in_loop
async def test_a_conversation_goes_on():
    async with scripted(thinks("A.") + says("one"), says("two"), says("three")) as (client, engine):
        first = await created(client, input="1", instructions="Rhyme.")
        second = await created(client, input="2", previous_response_id=first.id, instructions="Shout.")
        await created(client, input="3", previous_response_id=second.id)
    assert second.previous_response_id == first.id
    # Reasoning before the last answer is not read again, nor are the instructions of earlier requests.
    talk = "<|start|>user<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>one<|end|>"
    assert engine.prompts[1].endswith(f"{talk}<|start|>user<|message|>2<|end|>{GO}")
    assert "Shout." in engine.prompts[1]
    assert "Rhyme." not in engine.prompts[1]
    assert "Shout." not in engine.prompts[2]
    assert engine.prompts[2].endswith(f"two<|end|><|start|>user<|message|>3<|end|>{GO}")


@in_loop
async def test_reasoning_is_kept_while_tools_run():
    first = thinks("Look.") + calls("weather", "{}")
    async with scripted(first, says("12"), says("bye")) as (client, engine):
        response = await created(client, tools=[WEATHER])
        output = {"type": "function_call_output", "call_id": response.output[1].call_id, "output": "12 degrees"}
        second = await created(client, tools=[WEATHER], previous_response_id=response.id, input=[output])
        await created(client, tools=[WEATHER], previous_response_id=second.id, input="Thanks")
    result = "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>12 degrees<|end|>"
    assert engine.prompts[1] == f"{engine.prompts[0]}{first}{result}{GO}"
    assert "Look." not in engine.prompts[2]


@in_loop
async def test_what_a_search_found_is_known_to_the_next_turn():
    tools = [{"type": "web_search"}]
    # In the commentary channel: what stands in analysis is dropped behind an answer.
    search = asks("browser.search", '{"query":"otters"}').replace("analysis", "commentary")
    scripts = search, says("Otters."), says("More."), says("Yet more.")
    async with scripted(*scripts, settings={"tools": [Browser()]}) as (client, engine):
        response = await created(client, tools=tools)
        await created(client, tools=tools, previous_response_id=response.id, input="More")
        sent = [{"role": "user", "content": "Hi"}, *(item.to_dict() for item in response.output)]
        await created(client, tools=tools, input=[*sent, {"role": "user", "content": "More"}])
    assert "found: an otter" in engine.prompts[2]
    assert engine.prompts[3] == engine.prompts[2]


@in_loop
async def test_item_references():
    async with scripted(thinks("A.") + says("one"), says("two")) as (client, engine):
        first = await created(client, input="1")
        sent = [{"type": "item_reference", "id": first.output[1].id}, {"role": "user", "content": "2"}]
        second = await created(client, input=sent)
        items = await client.responses.input_items.list(second.id, order="asc")
    assert engine.prompts[1].endswith(
        f"<|start|>assistant<|channel|>final<|message|>one<|end|><|start|>user<|message|>2<|end|>{GO}"
    )
    assert [item.type for item in items.data] == ["message", "message"]


@in_loop
async def test_input_items():
    async with scripted(thinks("A.") + says("one"), says("two")) as (client, _):
        first = await created(client, input="1", instructions="not an item")
        second = await created(
            client,
            previous_response_id=first.id,
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "2"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ],
        )
        pages = await client.responses.input_items.list(second.id, order="asc", limit=2)
        bodies = [item.to_dict(mode="json") async for item in pages]
        newest = await client.responses.input_items.list(second.id, limit=1)
        after = await client.responses.input_items.list(second.id, order="asc", after=bodies[0]["id"], limit=1)
        with pytest.raises(openai.BadRequestError):
            await client.responses.input_items.list(second.id, after="nothing")
        with pytest.raises(openai.NotFoundError):
            await client.responses.input_items.list("resp_9")
    check_items(bodies)
    kinds = ["message", "reasoning", "message", "message", "function_call", "function_call_output"]
    assert [body["type"] for body in bodies] == kinds
    assert bodies[0]["content"] == [{"type": "input_text", "text": "1"}]
    assert len({body["id"] for body in bodies}) == 6
    assert newest.data[0].id == bodies[-1]["id"]
    assert newest.has_more
    assert after.data[0].id == bodies[1]["id"]


@in_loop
async def test_a_file_is_there_after_a_restart(tmp_path):
    with Engine(says("one"), says("two")) as engine:
        async with serving(engine, store=tmp_path / "responses.db") as client:
            first = await created(client, input="1")
        async with serving(engine, store=tmp_path / "responses.db") as client:
            again = await client.responses.retrieve(first.id)
            await created(client, input="2", previous_response_id=first.id)
        assert again.to_dict() == first.to_dict()
        assert "one<|end|><|start|>user<|message|>2" in engine.prompts[1]


class FullDisk(ResponseStore):
    """A store whose disk is full."""

    async def put(self, response):
        raise sqlite3.OperationalError("database or disk is full")


@in_loop
async def test_an_answer_that_cannot_be_stored_is_an_answer_and_says_so(caplog):
    with Engine(says("Hello")) as engine:
        app = create_app(engine, tokenizer=tokenizer(), model_name=MODEL, settings=ServerSettings())
        app.state.responses = Desk(app.state.service, FullDisk.open(None))
        async with app.router.lifespan_context(app), client_of(app) as client:
            response = await created(client)
        app.state.responses.store.close()
    assert response.output_text == "Hello"
    assert response.store is False
    assert "disk is full" in caplog.text


# In the background


@in_loop
async def test_a_response_in_the_background():
    async with scripted(thinks("Hm") + says("Hello"), **SLOW) as (client, _):
        response = await created(client, background=True)
        check_response(response.to_dict(mode="json"))
        assert (response.status, response.background, response.output) == ("queued", True, [])
        done = await ended(client, response.id)
    assert done.status == "completed"
    assert done.output_text == "Hello"


@in_loop
async def test_a_response_in_the_background_waits_for_room():
    async with scripted(LONG, says("Hello"), max_open=1, settings={"retry_after_s": 1}, **SLOW) as (client, _):
        first = await created(client, background=True)
        await until(lambda: _is(client, first.id, "in_progress"))
        second = await created(client, background=True)
        await asyncio.sleep(0.1)
        assert (await client.responses.retrieve(second.id)).status == "queued"
        await client.responses.cancel(first.id)
        assert (await ended(client, second.id)).output_text == "Hello"


@in_loop
async def test_cancelling():
    async with scripted(thinks("Hm") + LONG, **SLOW) as (client, engine):
        response = await created(client, background=True)
        await until(lambda: _is(client, response.id, "in_progress"))
        cancelled = await client.responses.cancel(response.id)
        check_response(cancelled.to_dict(mode="json"))
        await idle(engine)
        again = await client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert [item.type for item in cancelled.output][:1] == ["reasoning"]
    assert again.to_dict() == cancelled.to_dict()


@in_loop
async def test_cancelling_one_that_has_ended_or_is_not_in_the_background():
    async with scripted(says("a"), says("b")) as (client, _):
        done = await ended(client, (await created(client, background=True)).id)
        assert (await client.responses.cancel(done.id)).status == "completed"
        other = await created(client)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.cancel(other.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel("resp_9")
    assert refused.value.code == "not_in_background"


@in_loop
async def test_deleting_one_that_runs_ends_it():
    async with scripted(LONG, **SLOW) as (client, engine):
        response = await created(client, background=True)
        await until(lambda: _is(client, response.id, "in_progress"))
        await client.responses.delete(response.id)
        await idle(engine)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)


@in_loop
async def test_following_one_in_the_background():
    async with scripted(thinks("Hm") + says("Hello")) as (client, _):
        events = await events_of(await created(client, background=True, stream=True))
        response_id = events[0]["response"]["id"]
        rest = [e async for e in await client.responses.retrieve(response_id, stream=True, starting_after=4)]
        every = await events_of(await client.responses.retrieve(response_id, stream=True))
    assert squeezed(events)[:3] == ["created", "queued", "in_progress"]
    assert squeezed(events)[-1] == "completed"
    assert every == events
    assert [event.sequence_number for event in rest] == [event["sequence_number"] for event in events[5:]]


@in_loop
async def test_events_of_one_that_was_not_in_the_background():
    async with scripted(says("a")) as (client, _):
        response = await created(client)
        with pytest.raises(openai.BadRequestError):
            await client.responses.retrieve(response.id, stream=True)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_9", stream=True)


@in_loop
async def test_one_in_the_background_can_be_continued_when_it_has_ended():
    async with scripted(says("one"), says("two"), **SLOW) as (client, engine):
        first = await created(client, input="1", background=True)
        await ended(client, first.id)
        await created(client, input="2", previous_response_id=first.id)
    assert "one<|end|><|start|>user<|message|>2" in engine.prompts[1]


@in_loop
async def test_one_that_runs_cannot_be_continued():
    async with scripted(LONG, **SLOW) as (client, _):
        first = await created(client, background=True)
        with pytest.raises(openai.NotFoundError, match="not finished"):
            await created(client, previous_response_id=first.id)
        await client.responses.cancel(first.id)


@in_loop
async def test_a_server_that_ends_fails_what_runs(tmp_path):
    with Engine(LONG, **SLOW) as engine:
        async with serving(engine, store=tmp_path / "responses.db", shutdown_s=0) as client:
            response = await created(client, background=True)
            await until(lambda: _is(client, response.id, "in_progress"))
        await idle(engine)
        async with serving(engine, store=tmp_path / "responses.db") as client:
            again = await client.responses.retrieve(response.id)
    assert again.status == "failed"


async def _is(client, response_id: str, status: str) -> bool:
    return (await client.responses.retrieve(response_id)).status == status
