"""The routes of /v1/responses. Knows HTTP and the desk; knows no harmony and no model.

POST   /v1/responses                    a response: at once, streamed, or in the background
POST   /v1/responses/input_tokens       how many tokens a body has
GET    /v1/responses/{id}               one that is stored, or that runs in the background; its events too
DELETE /v1/responses/{id}
POST   /v1/responses/{id}/cancel        one that runs in the background
GET    /v1/responses/{id}/input_items   what it was made of
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from gptoss_jax.server.errors import ApiError, unavailable, unsupported
from gptoss_jax.server.responses.ask import ask, count, read_prompt
from gptoss_jax.server.responses.events import Event
from gptoss_jax.server.responses.refusals import refuse_include
from gptoss_jax.server.responses.run import PATIENCE_S, Answer, Desk, open_desk
from gptoss_jax.server.responses.schemas import CountTokens, CreateResponse
from gptoss_jax.server.responses.store import NotStored, StoreClosed
from gptoss_jax.server.service import TheService
from gptoss_jax.server.sse import stream_events, while_connected


@contextlib.asynccontextmanager
async def _opened(app: FastAPI) -> AsyncIterator[None]:
    """A store that cannot be opened ends the start of the server, not the first request."""
    prepare(app)
    yield


router = APIRouter(prefix="/v1/responses", tags=["responses"], lifespan=_opened)


def desk_of(request: Request) -> Desk:
    """The application's desk, for a route's `Depends`."""
    return prepare(request.app)


def prepare(app: FastAPI) -> Desk:
    """Opens the application's store, unless it is open. Raises UserError for a file that cannot be used."""
    if not hasattr(app.state, "responses"):
        app.state.responses = open_desk(app.state.service)
    return app.state.responses


TheDesk = Annotated[Desk, Depends(desk_of)]


@router.post("", summary="Create a response")
async def create(body: CreateResponse, request: Request, service: TheService, desk: TheDesk) -> Response:
    """Answers; or, with `stream`, sends events; or, with `background`, begins and says so."""
    asked = await ask(body, service=service, store=desk.store)
    if body.background:
        job = await desk.start(asked)
        return _streamed(request, job.read()) if body.stream else JSONResponse(job.response)
    answer = desk.answer(asked)
    if body.stream:
        return _streamed(request, answer.events(patience_s=PATIENCE_S))
    return JSONResponse(await while_connected(request, _finished(answer)))


@router.post("/input_tokens", summary="Count the tokens of a body")
async def input_tokens(body: CountTokens, service: TheService, desk: TheDesk) -> dict[str, Any]:
    """How many tokens the model would read."""
    prompt = await read_prompt(body, service=service, store=desk.store)
    return {"object": "response.input_tokens", "input_tokens": await count(prompt.conversation, service.tokenizer)}


@router.get("/{response_id}", summary="Look a response up")
async def retrieve(
    response_id: str,
    request: Request,
    desk: TheDesk,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    include_obfuscation: bool = False,
) -> Response:
    """The response as it is now; with `stream`, the events of one in the background, all or those behind one."""
    refuse_include(request.query_params.getlist("include[]"))
    if include_obfuscation:
        raise unsupported("include_obfuscation", "not supported; expected false")
    if not stream:
        if starting_after is not None:
            raise ApiError(400, "starting_after: expected with stream=true alone", param="starting_after")
        return JSONResponse(await _found(desk, response_id))
    job = desk.job(response_id)
    if job is None:
        await _found(desk, response_id)
        message = (
            f"stream: the events of {response_id!r} are not kept: expected a response in the background that runs or "
            "has ended lately; ask for it without stream"
        )
        raise ApiError(400, message, code="no_events", param="stream")
    return _streamed(request, job.read(after=-1 if starting_after is None else starting_after))


@router.delete("/{response_id}", summary="Delete a response")
async def delete(response_id: str, desk: TheDesk) -> dict[str, Any]:
    """Forgets it and its items; responses that continue it can then not be continued any further."""
    with _missing():
        await desk.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/{response_id}/cancel", summary="Cancel a response in the background")
async def cancel(response_id: str, desk: TheDesk) -> Response:
    """Ends it. One that has ended stays as it is."""
    body = await _found(desk, response_id)
    if not body["background"]:
        message = f"response {response_id!r} was not made in the background; it is ended by closing its connection"
        raise ApiError(400, message, code="not_in_background", param="response_id")
    job = desk.job(response_id)
    if job is not None:
        await job.cancel()
    return JSONResponse(await _found(desk, response_id))


@router.get("/{response_id}/input_items", summary="List what a response was made of")
async def input_items(
    response_id: str,
    desk: TheDesk,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    before: str | None = None,
) -> dict[str, Any]:
    """The items of its input, those of the responses that it continues included, a page at a time."""
    if before is not None:
        raise unsupported("before", "not supported; go on by after, or turn the order round")
    with _missing():
        if desk.store is None:
            raise NotStored(response_id)
        items = await desk.store.input_items(response_id)
    if order == "desc":
        items.reverse()
    page, more = _page(items, after=after, limit=limit)
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": more,
    }


def _page(items: list[dict[str, Any]], *, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
    start = 0
    if after is not None:
        start = next((index for index, item in enumerate(items, start=1) if item["id"] == after), 0)
        if not start:
            raise ApiError(400, f"after: there is no item {after[:100]!r} among them", param="after")
    return items[start : start + limit], len(items) > start + limit


async def _finished(answer: Answer) -> dict[str, Any]:
    async with contextlib.aclosing(answer.events()) as events:
        async for _ in events:
            pass
    return answer.response


def _streamed(request: Request, events: AsyncGenerator[Event, None]) -> Response:
    return stream_events(request, _named(events), done=False)


async def _named(events: AsyncGenerator[Event, None]) -> AsyncGenerator[tuple[str | None, Mapping[str, Any]], None]:
    async with contextlib.aclosing(events):
        async for event in events:
            yield event["type"], event


async def _found(desk: Desk, response_id: str) -> dict[str, Any]:
    with _missing():
        return await desk.body(response_id)


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """Says by a 404 that there is no such response, by a 503 that the server ends."""
    try:
        yield
    except StoreClosed as error:
        raise unavailable("the server is shutting down", code="shutting_down", retry_after_s=1) from error
    except NotStored as error:
        message = f"there is no response {error.args[0][:100]!r}: it was not stored, is not finished, or was deleted"
        raise ApiError(404, message, code="response_not_found", param="response_id") from error
