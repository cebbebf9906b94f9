"""Clients of an application without a socket between them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI


@contextlib.asynccontextmanager
async def client_of(app: FastAPI, **kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application; a mistake of the application becomes the answer that a client would get."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", **kwargs) as client:
        yield client


def ask(app: FastAPI, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request and its answer."""

    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, "[DONE]" as it is."""
    frames = [frame for frame in response.text.split("\n\n") if frame and not frame.startswith(":")]
    data = [line.removeprefix("data: ") for frame in frames for line in frame.split("\n") if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


class Wire:
    """One request over raw ASGI, whose client may go away at any time: what httpx cannot do without a socket."""

    def __init__(self, app: FastAPI, path: str, body: Any):
        self.sent: list[Any] = []
        self._to_app: asyncio.Queue[Any] = asyncio.Queue()
        self._to_app.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }
        self.task = asyncio.create_task(app(scope, self._to_app.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def go_away(self) -> None:
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def wait_for(self, num_messages: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < num_messages:
                await asyncio.sleep(0.001)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)
