"""Routes about the server itself: models, ids of texts, health, metrics, documentation. Knows no conversation."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, Field

from gptoss_jax.server.completions import Text
from gptoss_jax.server.documentation import page_of
from gptoss_jax.server.service import Service, TheService

router = APIRouter(tags=["server"])


class TokenizeBody(BaseModel):
    """A text."""

    prompt: Text


class DetokenizeBody(BaseModel):
    """Ids."""

    tokens: list[int] = Field(description="special ones come back by their names")


@router.get("/v1/models", summary="List the models")
async def models(service: TheService) -> dict[str, Any]:
    """The model that is served, and the model with each of its adapters."""
    return {"object": "list", "data": [_model(service, name) for name in service.models]}


@router.get("/v1/models/{model:path}", summary="Look a model up")
async def model(model: str, service: TheService) -> dict[str, Any]:
    """The model, if it is served."""
    return _model(service, service.model_named(model))


@router.post("/tokenize", summary="Text to ids")
def tokenize(body: TokenizeBody, service: TheService) -> dict[str, Any]:
    """The ids of a text as ordinary text: nothing in it becomes a special token."""
    ids = service.tokenizer.encode(body.prompt)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.max_context}


@router.post("/detokenize", summary="Ids to text")
def detokenize(body: DetokenizeBody, service: TheService) -> dict[str, Any]:
    """The text of ids; bytes that are no UTF-8 become U+FFFD."""
    return {"prompt": service.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info", summary="What a harness asks about the tokenizer")
async def tokenizer_info(service: TheService) -> dict[str, Any]:
    """Sizes. No token stands for the beginning or the end of any text: `/tokenize` gives ordinary ids alone."""
    return {
        "vocab_size": service.tokenizer.vocab_size,
        "model_max_length": service.max_context,
        "bos_token": None,
        "eos_token": None,
    }


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is there a server?")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Are requests taken?")
async def ready(service: TheService) -> dict[str, str]:
    """200 when requests are taken; 503 while the model loads and when the server ends."""
    _ = service.engine
    return {"status": "ready", "model": service.model_name}


@router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
def metrics(service: TheService) -> Response:
    """Counts, times and what the engine does; nothing of any text."""
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """What there is, for people."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
    return HTMLResponse(page_of(request.app.openapi()), headers={"Content-Security-Policy": policy})


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "gptoss-jax",
        "root": service.model_name,
        "parent": None if name == service.model_name else service.model_name,
        "max_model_len": service.max_context,
    }
