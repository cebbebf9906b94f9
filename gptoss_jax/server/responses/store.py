"""Responses that can be had again, in an SQLite file or in memory. Knows JSON and messages; knows no HTTP, no turn.

    responses   number · id · previous ──► the response that it continues · status · body (JSON)
    items       response · side (input|output) · position · id · body (JSON) · messages (JSON): what the model reads

One thread holds the connection and does all the work, so nothing here makes an event loop wait. A response is written
in one transaction: it is there with all of its items, or it is not there. Whoever deletes one deletes its text: pages
that held it are overwritten.
"""

import asyncio
import dataclasses
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Developer, Message, ToolResult, User

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x67_6F_6A_72  # "gojr", in the file's header: tells ours from other SQLite files
SCHEMA_VERSION = 1
MAX_BYTES_IN_MEMORY = 256 << 20  # older responses are forgotten beyond it; a file grows as far as its disk

_TABLES = f"""
BEGIN;
CREATE TABLE responses (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    previous TEXT,
    status TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE items (
    response INTEGER NOT NULL REFERENCES responses (number) ON DELETE CASCADE,
    side TEXT NOT NULL CHECK (side IN ('input', 'output')),
    position INTEGER NOT NULL,
    id TEXT NOT NULL,
    body TEXT NOT NULL,
    messages TEXT NOT NULL,
    PRIMARY KEY (response, side, position)
) WITHOUT ROWID;
CREATE INDEX items_by_id ON items (id);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_CHAIN = """
WITH RECURSIVE chain (number, id, previous, depth) AS (
    SELECT number, id, previous, 0 FROM responses WHERE id = ?
    UNION ALL
    SELECT r.number, r.id, r.previous, depth + 1 FROM responses r JOIN chain ON r.id = chain.previous
)
"""

_UNFINISHED = ("queued", "in_progress")
_KINDS: dict[str, type[Message]] = {
    "developer": Developer,
    "user": User,
    "assistant": Assistant,
    "tool": ToolResult,
}
_KIND_OF = {kind: name for name, kind in _KINDS.items()}
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredItem:
    """An item as a client sees it, with its id, and as the model reads it."""

    body: Mapping[str, Any]
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """A response as a client sees it, the items that were sent for it, and those that it made."""

    body: Mapping[str, Any]
    input: tuple[StoredItem, ...]
    output: tuple[StoredItem, ...] = ()


class NotStored(LookupError):
    """There is no response with the id that `args[0]` gives: it never was, or it was deleted."""


class StoreClosed(RuntimeError):
    """The store is asked for something after `close`."""


class ResponseStore:
    """Keeps responses by their ids. `open` makes one; `close` ends it."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, *, max_bytes: int | None):
        self._db = connection  # used in `thread` alone
        self._thread = thread
        self._max_bytes = max_bytes
        self._closed = False

    @classmethod
    def open(cls, path: Path | None, *, max_bytes: int | None = None) -> "ResponseStore":
        """The store in this file, which is made where there is none; None is memory.

        Args:
            max_bytes: the oldest responses are forgotten beyond it. None: `MAX_BYTES_IN_MEMORY` in memory, and no end
                in a file.

        Raises:
            UserError: the file cannot be used, is of another version, or is in use by another process.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
        try:
            connection = thread.submit(_connect, path).result()
        except BaseException:
            thread.shutdown()
            raise
        return cls(
            connection, thread, max_bytes=MAX_BYTES_IN_MEMORY if path is None and max_bytes is None else max_bytes
        )

    async def put(self, response: StoredResponse) -> None:
        """Stores it, in place of one with the same id."""
        await self._run(lambda: self._put(response))

    async def body(self, response_id: str) -> dict[str, Any]:
        """The response. Raises NotStored."""
        return await self._run(lambda: self._body(response_id))

    async def input_items(self, response_id: str) -> list[dict[str, Any]]:
        """All that the model was given for it, those of the responses that it continues included, oldest first.

        Raises NotStored.
        """
        return await self._run(lambda: self._input_items(response_id))

    async def history(self, response_id: str) -> list[StoredItem]:
        """Input and output of it and of all that it continues, oldest first.

        Raises NotStored, of any of them; one that is not finished has no output yet, and counts as not stored.
        """
        return await self._run(lambda: self._history(response_id))

    async def items(self, ids: Iterable[str]) -> dict[str, StoredItem]:
        """The items with these ids; those that there are not are left out."""
        wanted = list(ids)
        return await self._run(lambda: self._items(wanted))

    async def delete(self, response_id: str) -> None:
        """Forgets a response and its items. Raises NotStored."""
        await self._run(lambda: self._delete(response_id))

    def close(self) -> None:
        """Waits for what is being written, and closes the file."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._db.close).result()
            self._thread.shutdown()

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._closed:
            raise StoreClosed("the store of responses is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # What follows runs in the thread.

    def _put(self, response: StoredResponse) -> None:
        body = response.body
        with self._db:
            self._db.execute("DELETE FROM responses WHERE id = ?", (body["id"],))
            number = self._db.execute(
                "INSERT INTO responses (id, previous, status, body) VALUES (?, ?, ?, ?)",
                (body["id"], body["previous_response_id"], body["status"], json.dumps(body)),
            ).lastrowid
            for side, items in (("input", response.input), ("output", response.output)):
                self._db.executemany(
                    "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        (number, side, position, item.body["id"], json.dumps(item.body), _dump(item.messages))
                        for position, item in enumerate(items)
                    ),
                )
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while self._max_bytes is not None and self._bytes() > self._max_bytes:
            with self._db:
                self._db.execute(
                    "DELETE FROM responses WHERE number = (SELECT min(number) FROM responses) "
                    "AND number < (SELECT max(number) FROM responses)"
                )
                if self._db.execute("SELECT changes()").fetchone() == (0,):
                    return  # the newest one alone is too large; it stays

    def _bytes(self) -> int:
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def _body(self, response_id: str) -> dict[str, Any]:
        row = self._db.execute("SELECT body FROM responses WHERE id = ?", (response_id,)).fetchone()
        if row is None:
            raise NotStored(response_id)
        return json.loads(row[0])

    def _input_items(self, response_id: str) -> list[dict[str, Any]]:
        rows = self._db.execute(
            f"{_CHAIN} SELECT items.body FROM chain JOIN items ON items.response = chain.number "
            "WHERE depth > 0 OR side = 'input' ORDER BY depth DESC, side, position",
            (response_id,),
        ).fetchall()
        if not rows:
            self._body(response_id)  # raises where there is none
        return [json.loads(body) for (body,) in rows]

    def _history(self, response_id: str) -> list[StoredItem]:
        oldest = self._db.execute(
            f"{_CHAIN} SELECT id, previous FROM chain ORDER BY depth DESC LIMIT 1", (response_id,)
        ).fetchone()
        if oldest is not None and self._body(response_id)["status"] in _UNFINISHED:
            raise NotStored(response_id)
        if oldest is None or oldest[1] is not None:
            raise NotStored(response_id if oldest is None else oldest[1])
        rows = self._db.execute(
            f"{_CHAIN} SELECT body, messages FROM chain JOIN items ON items.response = chain.number "
            "ORDER BY depth DESC, side, position",
            (response_id,),
        )
        return [StoredItem(body=json.loads(body), messages=_load(messages)) for body, messages in rows]

    def _items(self, ids: list[str]) -> dict[str, StoredItem]:
        found = {}
        for item_id in ids:
            row = self._db.execute("SELECT body, messages FROM items WHERE id = ? LIMIT 1", (item_id,)).fetchone()
            if row is not None:
                found[item_id] = StoredItem(body=json.loads(row[0]), messages=_load(row[1]))
        return found

    def _delete(self, response_id: str) -> None:
        with self._db:
            if not self._db.execute("DELETE FROM responses WHERE id = ?", (response_id,)).rowcount:
                raise NotStored(response_id)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # the log holds the text too


# --- opening ----------------------------------------------------------------------------------------------------------


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is None:
        connection = sqlite3.connect(":memory:")
        _prepare(connection, "memory")
        return connection
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what people wrote is nobody else's to read
        connection = sqlite3.connect(path, timeout=0)
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, f"expected a file that can be written, found: {error}") from error
    try:
        _prepare(connection, path)
    except sqlite3.Error as error:
        connection.close()
        if "locked" in str(error):
            raise _unusable(path, "expected a file of this server alone, found it in use by another process") from error
        raise _unusable(path, f"expected an SQLite file of responses, found: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(db: sqlite3.Connection, path: Path | str) -> None:
    for pragma in ("locking_mode = EXCLUSIVE", "foreign_keys = ON", "secure_delete = ON", "synchronous = NORMAL"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    application, version, tables = (
        db.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if (application, version, tables) == (0, 0, 0):  # new, or empty because a first start was cut off
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.executescript(_TABLES)
    elif application != APPLICATION_ID:
        raise _unusable(
            path, f"expected a store of responses, found an SQLite file of something else ({tables} tables)"
        )
    elif version != SCHEMA_VERSION:
        raise _unusable(path, f"expected version {SCHEMA_VERSION} of the store, found version {version}")
    _fail_unfinished(db)


def _fail_unfinished(db: sqlite3.Connection) -> None:
    """Whoever ran these is gone. Also takes the lock on the file, by writing."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        rows = db.execute("SELECT number, body FROM responses WHERE status IN ('queued', 'in_progress')").fetchall()
        for number, text in rows:
            error = {"code": "server_error", "message": "the server ended before this response was finished"}
            body = json.loads(text) | {"status": "failed", "error": error}
            db.execute("UPDATE responses SET status = 'failed', body = ? WHERE number = ?", (json.dumps(body), number))
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _unusable(path: Path | str, what: str) -> UserError:
    return UserError(f"the store of responses {path}: {what}; name another file, or keep none with --store none")


# --- messages ---------------------------------------------------------------------------------------------------------


def _dump(messages: Iterable[Message]) -> str:
    """Each message as {"kind": …} and what of it is not by default."""
    return json.dumps(
        [
            {"kind": _KIND_OF[type(message)]}
            | {
                field.name: getattr(message, field.name)
                for field in dataclasses.fields(message)
                if getattr(message, field.name) != field.default
            }
            for message in messages
        ]
    )


def _load(text: str) -> tuple[Message, ...]:
    return tuple(
        _KINDS[entry["kind"]](**{name: value for name, value in entry.items() if name != "kind"})
        for entry in json.loads(text)
    )
