"""The application: routes, and what every request goes through before and after them. Knows them; answers none.

request ─► counted ─► CORS ─► who may ask ─► how long may it be ─► route ─► Service
"""

import contextlib
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import gptoss_jax
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server import chat_completions, completions, errors, system
from gptoss_jax.server.auth import Guard
from gptoss_jax.server.limits import BodyLimit
from gptoss_jax.server.metrics import CountRequests
from gptoss_jax.server.page import page_router
from gptoss_jax.server.responses import routes as responses
from gptoss_jax.server.service import Service
from gptoss_jax.server.settings import ServerSettings


def create_app(
    engine: AnyEngine | None,
    *,
    tokenizer: Tokenizer,
    model_name: str,
    settings: ServerSettings,
    adapters: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application that serves an engine.

    Args:
        engine: stays the caller's, who closes it when the application has ended. None where it comes later, by
            `app.state.service.open(engine)`; until then requests for the model are answered by 503.
        tokenizer: of the engine's model.
        model_name: what clients call the model.
        settings: see ServerSettings.
        adapters: names of the engine's, by each of which clients call the model with that adapter.

    Raises:
        UserError: names that clients could not write, or could mistake for each other.
    """
    app = FastAPI(
        title="gptoss-jax",
        version=gptoss_jax.__version__,
        description=f"An OpenAI-compatible API to {model_name}.",
        docs_url=None,  # FastAPI's page loads its script from another server; system.py has one of our own
        redoc_url=None,
        lifespan=_lifespan,
    )
    service = Service(tokenizer=tokenizer, model_name=model_name, settings=settings, adapters=adapters)
    app.state.service = service
    errors.install(app)
    for router in (responses.router, chat_completions.router, completions.router, system.router):
        app.include_router(router)
    if settings.page:
        app.include_router(page_router())
    _add_middleware(app, service)
    if engine is not None:
        service.open(engine)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The last one added is the first that sees a request."""
    settings = service.settings
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    app.add_middleware(CountRequests, metrics=service.metrics)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.service.close()
