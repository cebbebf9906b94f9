"""The store of responses: whole or not at all, in one process, over restarts, and gone when deleted."""

import asyncio
import sqlite3
import subprocess
import sys

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Developer, ToolResult, User
from gptoss_jax.server.responses.store import NotStored, ResponseStore, StoreClosed, StoredItem, StoredResponse

SAID = (
    Developer(instructions="Rhyme."),
    User(text="Grüße 🦦"),
    User(text="x", name="ann"),
    Assistant(text="think", channel="analysis"),
    Assistant(text="{}", channel="commentary", recipient="functions.f", content_type="json"),
    ToolResult(name="functions.f", text="12"),
    ToolResult(name="python", text="", channel="analysis"),
    Assistant(text="answer"),
    Assistant(text="no channel", channel=None),
)


def item(name: str, *messages) -> StoredItem:
    return StoredItem(body={"id": name, "type": "message"}, messages=messages)


def response(name: str, *, previous: str | None = None, status: str = "completed", size: int = 0) -> StoredResponse:
    body = {"id": name, "previous_response_id": previous, "status": status, "padding": "x" * size}
    return StoredResponse(
        body=body,
        input=(item(f"{name}_in", User(text=f"to {name}")),),
        output=(item(f"{name}_out", Assistant(text=f"of {name}")),),
    )


def run(store: ResponseStore, work):
    return asyncio.run(work(store))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.db"


@pytest.fixture
def store():
    store = ResponseStore.open(None)
    yield store
    store.close()


def test_messages_come_back_as_they_were(store):
    async def work(store):
        body = {"id": "a", "previous_response_id": None, "status": "completed"}
        await store.put(StoredResponse(body=body, input=(item("i", *SAID),)))
        return await store.history("a")

    (found,) = run(store, work)
    assert found.messages == SAID


def test_a_chain_is_read_from_its_beginning(store):
    async def work(store):
        for name, previous in (("a", None), ("b", "a"), ("other", "a"), ("c", "b")):
            await store.put(response(name, previous=previous))
        return await store.history("c"), await store.input_items("c"), await store.items(["b_out", "none"])

    history, inputs, items = run(store, work)
    assert [each.body["id"] for each in history] == ["a_in", "a_out", "b_in", "b_out", "c_in", "c_out"]
    assert [each["id"] for each in inputs] == ["a_in", "a_out", "b_in", "b_out", "c_in"]
    assert {name: each.messages for name, each in items.items()} == {"b_out": (Assistant(text="of b"),)}


def test_what_continues_a_deleted_response_cannot_be_continued(store):
    async def work(store):
        for name, previous in (("a", None), ("b", "a"), ("c", "b")):
            await store.put(response(name, previous=previous))
        await store.delete("a")
        assert await store.items(["a_in", "a_out"]) == {}
        assert (await store.body("b"))["id"] == "b"
        for name in ("a", "b", "c"):
            with pytest.raises(NotStored) as missing:
                await store.history(name)
            assert missing.value.args == ("a",)
        with pytest.raises(NotStored):
            await store.delete("a")

    run(store, work)


def test_one_that_is_not_finished_cannot_be_continued(store):
    async def work(store):
        await store.put(response("a", status="in_progress"))
        with pytest.raises(NotStored):
            await store.history("a")

    run(store, work)


def test_one_of_the_same_id_takes_its_place(store):
    async def work(store):
        await store.put(response("a", status="queued"))
        await store.put(response("a", status="completed"))
        return await store.body("a"), await store.history("a")

    body, history = run(store, work)
    assert body["status"] == "completed"
    assert [each.body["id"] for each in history] == ["a_in", "a_out"]


def test_a_response_that_cannot_be_written_whole_is_not_there(store):
    good = response("a")
    bad = StoredResponse(body=good.body, input=good.input, output=(item("b", User(text="\ud800")), *good.output))
    object.__setattr__(bad.output[0], "body", {"id": object()})

    async def work(store):
        with pytest.raises((TypeError, sqlite3.Error)):
            await store.put(bad)
        with pytest.raises(NotStored):
            await store.body("a")
        assert await store.items(["a_in"]) == {}
        await store.put(good)
        return await store.history("a")

    assert len(run(store, work)) == 2


def test_the_oldest_are_forgotten_where_there_is_no_room():
    store = ResponseStore.open(None, max_bytes=200_000)

    async def work(store):
        there = []
        for number in range(20):
            await store.put(response(str(number), size=30_000))
        for number in range(20):
            try:
                await store.body(str(number))
                there.append(number)
            except NotStored:
                pass
        return there

    there = run(store, work)
    store.close()
    assert there == list(range(20 - len(there), 20))
    assert 3 <= len(there) <= 6


def test_it_is_there_after_a_restart(path):
    first = ResponseStore.open(path)
    run(first, lambda store: store.put(response("a")))
    first.close()
    first.close()  # does no harm
    with pytest.raises(StoreClosed):
        run(first, lambda store: store.body("a"))
    second = ResponseStore.open(path)
    history = run(second, lambda store: store.history("a"))
    second.close()
    assert [message for each in history for message in each.messages] == [
        User(text="to a"),
        Assistant(text="of a"),
    ]
    assert path.stat().st_mode & 0o077 == 0


def test_what_ran_when_the_process_ended_has_failed(path):
    first = ResponseStore.open(path)
    for name, status in (("a", "queued"), ("b", "in_progress"), ("c", "completed")):
        run(first, lambda store, name=name, status=status: store.put(response(name, status=status)))
    first.close()
    second = ResponseStore.open(path)
    bodies = [run(second, lambda store, name=name: store.body(name)) for name in "abc"]
    second.close()
    assert [body["status"] for body in bodies] == ["failed", "failed", "completed"]
    assert bodies[0]["error"]["code"] == "server_error"


KILLED = """
import asyncio, os, sys
from pathlib import Path
from tests.server.responses.test_store import ResponseStore, response

async def main():
    store = ResponseStore.open(Path(sys.argv[1]))
    for number in range(1_000_000):
        await store.put(response(str(number), size=20_000))
        if number == 20:
            print("ready", flush=True)

asyncio.run(main())
"""


def test_a_process_that_is_killed_leaves_whole_responses(path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    store = ResponseStore.open(path)

    async def work(store):
        number = 0
        while True:
            try:
                body = await store.body(str(number))
            except NotStored:
                return number
            assert len(body["padding"]) == 20_000
            assert len(await store.history(str(number))) == 2
            number += 1

    assert run(store, work) > 20
    store.close()


def test_deleted_text_is_not_in_the_file(path):
    store = ResponseStore.open(path)
    secret = StoredResponse(
        body={"id": "a", "previous_response_id": None, "status": "completed"},
        input=(item("i", User(text="swordfish " * 2000)),),
    )
    run(store, lambda store: store.put(secret))
    files = list(path.parent.iterdir())
    assert any(b"swordfish" in file.read_bytes() for file in files)
    run(store, lambda store: store.delete("a"))
    assert not any(b"swordfish" in file.read_bytes() for file in files if file.exists())
    store.close()


# Files that cannot be used


def test_another_process_has_it(path):
    store = ResponseStore.open(path)
    with pytest.raises(UserError, match="in use by another process"):
        ResponseStore.open(path)
    store.close()


def test_another_version(path):
    ResponseStore.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(UserError, match="expected version 1 of the store, found version 7"):
        ResponseStore.open(path)


def test_another_programs_file(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE birds (name)")
    db.close()
    with pytest.raises(UserError, match="something else"):
        ResponseStore.open(path)


def test_no_sqlite(path):
    path.write_text("a shopping list, rather longer than a header of SQLite's " * 20)
    with pytest.raises(UserError, match="not a database"):
        ResponseStore.open(path)
    assert path.read_text().startswith("a shopping list")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        ResponseStore.open(tmp_path / "nowhere" / "responses.db")
