"""All that routes need, in one object: `request.app.state.service`. Knows engine, chat and settings; knows no JSON."""

import contextlib
import dataclasses
import time
from typing import Annotated

from fastapi import Depends, Request

from gptoss_jax.chat.turn import Chat
from gptoss_jax.constrain.grammars import Grammars
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.errors import ApiError, unavailable
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.running import Running, WatchedEngine
from gptoss_jax.server.settings import ServerSettings


@dataclasses.dataclass(frozen=True)
class _Open:
    engine: WatchedEngine
    chat: Chat
    grammars: Grammars


class Service:
    """What a server serves with. The engine may come later: until then, and when the server ends, it is a 503.

    Attributes:
        model_name: what clients call the model.
        created: when the server began, in seconds of Unix time.
        stop_ids: ids that end an answer.
        metrics: what is counted.
        running: what has not ended.
        resources: closed when the server ends, the last one first.
    """

    def __init__(self, *, tokenizer: Tokenizer, model_name: str, settings: ServerSettings):
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.settings = settings
        self.created = int(time.time())
        self.stop_ids = _stop_ids(tokenizer)
        self.metrics = Metrics()
        self.running = Running()
        self.resources = contextlib.ExitStack()
        self._open: _Open | None = None
        self._stops_at: float | None = None  # on the monotonic clock, what still runs is ended

    @property
    def engine(self) -> AnyEngine:
        """The engine, for ids; its streams are watched."""
        return self._opened().engine

    @property
    def chat(self) -> Chat:
        """The chat, for conversations."""
        return self._opened().chat

    @property
    def grammars(self) -> Grammars:
        """For answers that must have a form."""
        return self._opened().grammars

    @property
    def max_context(self) -> int | None:
        """The most ids of a request and its answer; None while the model loads."""
        return None if self._open is None else self._open.engine.max_context

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for another model than this server's; no name means this one."""
        if name is not None and name != self.model_name:
            message = f"there is no model {name[:100]!r}; this server has {self.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def new_tokens(self, wanted: int | None, *, num_prompt: int) -> int:
        """How many ids an answer may have: what is wanted, or else what the context leaves, and the settings allow.

        Raises:
            ApiError: the prompt leaves no room in the context, or not as much as is wanted.
        """
        most = self.engine.max_context - num_prompt
        if most < (1 if wanted is None else wanted):
            new = "" if wanted is None else f" and {wanted} new ones"
            message = (
                f"{num_prompt} prompt ids{new} are too many for the context of {self.engine.max_context}: "
                "shorten the prompt or ask for fewer"
            )
            raise ApiError(400, message, code="context_length_exceeded")
        limit = self.settings.max_new_tokens
        new = most if wanted is None else wanted
        return new if limit is None else min(new, limit)

    def open(self, engine: AnyEngine) -> None:
        """The engine is there: requests are taken from now on. Any thread may say so, once; it takes a second."""
        watched = WatchedEngine(engine, metrics=self.metrics, running=self.running)
        grammars = Grammars.of(self.tokenizer, vocab_size=engine.vocab_size)
        self.metrics.watch(engine.stats)
        self._open = _Open(watched, Chat(watched, self.tokenizer, grammars=grammars), grammars)

    def stop(self, *, within_s: float | None = None) -> None:
        """No request is taken any more; what runs may go on for `settings.shutdown_s`, or shorter."""
        stops_at = time.monotonic() + (self.settings.shutdown_s if within_s is None else within_s)
        self._stops_at = stops_at if self._stops_at is None else min(stops_at, self._stops_at)

    async def close(self) -> None:
        """Waits for what runs, until its time is over, then ends it. The engine stays its owner's."""
        self.stop()
        await self.running.drain(lambda: self._stops_at or 0.0)
        self.resources.close()

    def _opened(self) -> _Open:
        if self._stops_at is not None:
            raise self._unavailable("the server is shutting down", code="shutting_down")
        if self._open is None:
            raise self._unavailable("the model is still loading", code="model_loading")
        return self._open

    def _unavailable(self, message: str, *, code: str) -> ApiError:
        return unavailable(f"{message}; try again later", code=code, retry_after_s=self.settings.retry_after_s)


async def service_of(request: Request) -> Service:
    """What the application serves with. Waits for nothing; FastAPI would call a plain function in a thread."""
    return request.app.state.service


TheService = Annotated[Service, Depends(service_of)]  # of a route's parameter


def _stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    with contextlib.suppress(UserError):  # a small tokenizer may not have it
        return tokenizer.stop_ids | {tokenizer.special("<|endoftext|>")}
    return tokenizer.stop_ids
