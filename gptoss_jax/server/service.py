"""All that routes need, in one object: `request.app.state.service`. Knows engine, chat and settings; knows no JSON."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
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

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


@dataclasses.dataclass(frozen=True)
class _Open:
    engines: Mapping[str, WatchedEngine]  # by model
    chats: Mapping[str, Chat]
    grammars: Grammars


class Service:
    """What a server serves with. The engine may come later: until then, and when the server ends, it is a 503.

    Attributes:
        model_name: what clients call the model.
        models: what they may ask for: the model, then the model with each of its adapters, by the adapter's name.
        created: when the server began, in seconds of Unix time.
        stop_ids: ids that end an answer.
        metrics: what is counted.
        running: what has not ended.
        resources: closed when the server ends, the last one first.
    """

    def __init__(
        self, *, tokenizer: Tokenizer, model_name: str, settings: ServerSettings, adapters: Sequence[str] = ()
    ):
        check_names(adapters, model_name=model_name)
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.models = (model_name, *adapters)
        self.settings = settings
        self.created = int(time.time())
        self.stop_ids = tokenizer.end_ids
        self.metrics = Metrics()
        self.running = Running()
        self.resources = contextlib.ExitStack()
        self._open: _Open | None = None
        self._stops_at: float | None = None  # on the monotonic clock, what still runs is ended

    @property
    def engine(self) -> AnyEngine:
        """The engine, with the model as it is."""
        return self.engine_of(self.model_name)

    def engine_of(self, model: str) -> AnyEngine:
        """The engine, for ids, with one of `models`; its streams are watched."""
        return self._opened().engines[model]

    def chat_of(self, model: str) -> Chat:
        """The chat, for conversations, with one of `models`."""
        return self._opened().chats[model]

    @property
    def grammars(self) -> Grammars:
        """For answers that must have a form."""
        return self._opened().grammars

    @property
    def max_context(self) -> int | None:
        """The most ids of a request and its answer; None while the model loads."""
        return None if self._open is None else self._open.engines[self.model_name].max_context

    def model_named(self, name: str | None) -> str:
        """One of `models`; no name means the model as it is. Raises ApiError 404 for a name that none of them has."""
        if name is None:
            return self.model_name
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            message = f"there is no model {name[:100]!r}; this server has {known}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return name

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
        engines = {name: self._watched(engine, name) for name in self.models}
        grammars = Grammars.of(self.tokenizer, vocab_size=engine.vocab_size)
        self.metrics.watch(engine.stats)
        chats = {name: Chat(watched, self.tokenizer, grammars=grammars) for name, watched in engines.items()}
        self._open = _Open(engines, chats, grammars)

    def stop(self, *, within_s: float | None = None) -> None:
        """No request is taken any more; what runs may go on for `settings.shutdown_s`, or shorter."""
        stops_at = time.monotonic() + (self.settings.shutdown_s if within_s is None else within_s)
        self._stops_at = stops_at if self._stops_at is None else min(stops_at, self._stops_at)

    async def close(self) -> None:
        """Waits for what runs, until its time is over, then ends it. The engine stays its owner's."""
        self.stop()
        await self.running.drain(lambda: self._stops_at or 0.0)
        self.resources.close()

    def _watched(self, engine: AnyEngine, model: str) -> WatchedEngine:
        adapter = None if model == self.model_name else model
        return WatchedEngine(engine, model=model, adapter=adapter, metrics=self.metrics, running=self.running)

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


def check_names(adapters: Sequence[str], *, model_name: str) -> None:
    """Raises UserError for adapters that clients could not tell from each other or from the model, or not write."""
    for place, name in enumerate(adapters):
        if _NAME.fullmatch(name) is None:
            raise UserError(
                f"an adapter is named {name[:100]!r}; expected a letter or digit, then letters, digits and . _ : / -, "
                "at most 200 characters in all: clients give it as their model"
            )
        if name in (model_name, *adapters[:place]):
            other = "the model" if name == model_name else "another one"
            raise UserError(f"an adapter is named {name!r} as {other} is; expected a name of its own: give it NAME=DIR")
