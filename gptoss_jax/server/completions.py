"""`/v1/completions`: ids in, ids out, and how likely they are. Knows no harmony: the prompt is continued as it stands.

Evaluation harnesses live on it: prompts as ids, `echo` with `logprobs` for how likely a text is. Its logprobs have the
legacy form, four lists of the same length. Special tokens that the model writes are shown by their names; an id that
ends the answer is in `logprobs`, not in `text`.
"""

import asyncio
import codecs
import contextlib
import dataclasses
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)
from starlette.concurrency import run_in_threadpool

from gptoss_jax.engine import request as engine
from gptoss_jax.engine.request import MAX_LOGPROBS, Event, Finished, PromptScores, SamplingParams, Token
from gptoss_jax.engine.stream import Stream
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.errors import ApiError, of_end, unsupported
from gptoss_jax.server.sampling import sampling_of
from gptoss_jax.server.service import Service, TheService
from gptoss_jax.server.sse import stream_events, while_connected

router = APIRouter(tags=["completions"])

_MAX_CHOICES = 256  # prompts times n
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_LONG_TEXT = 20_000  # characters; encoding more would keep other requests waiting


def _check_characters(text: str) -> str:
    if _HALF_A_PAIR.search(text):  # JSON's \u can say it, UTF-8 cannot
        raise ValueError("expected text, found half of a surrogate pair")
    return text


Text: TypeAlias = Annotated[StrictStr, AfterValidator(_check_characters)]
Ids: TypeAlias = Annotated[list[StrictInt], Field(min_length=1)]
Prompt: TypeAlias = Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]


class StreamOptions(BaseModel):
    """How a stream is told."""

    include_usage: bool = False


class CompletionBody(BaseModel):
    """What is asked for; fields that are not known here are skipped."""

    model_config = ConfigDict(extra="ignore")

    prompt: Prompt = Field(description="a text (ordinary, whatever it looks like), ids, or a list of either")
    model: str | None = None
    max_tokens: int | None = Field(default=16, ge=0, description="0 only with echo")
    n: int | None = Field(default=1, ge=1, le=_MAX_CHOICES, description="continuations of each prompt")
    best_of: int | None = Field(default=None, description="refused unless it is n")
    echo: bool | None = Field(default=False, description="the prompt stands before the answer")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="this many of the best ids, too")
    stop: Text | list[Text] | None = Field(default=None, description="texts that end the answer")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(default=None, description="refused")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, description="the same seed, the same answer; any otherwise")
    user: str | None = Field(default=None, description="not used")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _say_what_a_prompt_is(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError as error:  # says for each of four kinds why it is not that one
            raise ValueError("expected a text, a list of ids, or a list of several of either, none empty") from error


@router.post("/v1/completions", summary="Continue a text or ids")
async def complete(body: CompletionBody, request: Request, service: TheService) -> Response:
    """Continues each prompt `n` times."""
    model = service.model_named(body.model)
    _check(body)
    prompts = await _encoded(body.prompt, service.tokenizer)
    if len(prompts) * (body.n or 1) > _MAX_CHOICES:
        message = f"{len(prompts)} prompts, each {body.n} times; expected at most {_MAX_CHOICES} choices"
        raise ApiError(400, message, param="n")
    completion = _Completion(body, prompts, service, model=model)
    if body.stream:
        return stream_events(request, completion.chunks(), done=True)
    return JSONResponse(await while_connected(request, completion.whole()))


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise unsupported("suffix", "the model was not trained to fill in; leave it out")
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", f"it is {body.best_of} and n is {body.n or 1}; expected the same, or none")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; expected at least 1, or echo", param="max_tokens")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given and stream is not; set stream too", param="stream_options")


async def _encoded(prompt: Prompt, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each prompt. Those that the caller gave are taken as they are, special ones too."""

    def encode() -> list[list[int]]:
        return [tokenizer.encode(each) if isinstance(each, str) else each for each in several]

    several: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if sum(len(each) for each in several if isinstance(each, str)) > _LONG_TEXT:
        return await run_in_threadpool(encode)
    return encode()


class _Completion:
    """One request on its way: a stream of the engine for each prompt, `n` choices from each stream."""

    def __init__(self, body: CompletionBody, prompts: Sequence[list[int]], service: Service, *, model: str):
        self._body = body
        self._prompts = prompts
        self._service = service
        self._model = model
        self._n = body.n or 1
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [
            _Choice(prompt, service, echo=bool(body.echo), logprobs=body.logprobs)
            for prompt in prompts
            for _ in range(self._n)
        ]
        self._cached_tokens = 0

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts: list[list[str]] = [[] for _ in self._choices]
        logprobs = [_Logprobs() for _ in self._choices]
        reasons: list[str | None] = [None] * len(self._choices)
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for number, piece in pieces:
                texts[number].append(piece.text)
                logprobs[number].extend(piece.logprobs)
                reasons[number] = piece.finish_reason
        shown = [each.as_json() if self._body.logprobs is not None else None for each in logprobs]
        choices = [
            {"index": number, "text": "".join(text), "logprobs": shown[number], "finish_reason": reasons[number]}
            for number, text in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[tuple[None, Mapping[str, Any]], None]:
        """The answer as it comes."""
        wants_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        head = {**self._head, "usage": None} if wants_usage else self._head
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for number, piece in pieces:
                shown = piece.logprobs.as_json() if self._body.logprobs is not None else None
                if not (piece.text or shown or piece.finish_reason):  # an id inside a character
                    continue
                choice = {"index": number, "text": piece.text, "logprobs": shown, "finish_reason": piece.finish_reason}
                yield None, {**head, "choices": [choice]}
        if wants_usage:
            yield None, {**head, "choices": [], "usage": self._usage()}

    async def _pieces(self) -> AsyncGenerator[tuple[int, "_Piece"], None]:
        """What there is more of a choice, whenever there is; leaving it frees all that the engine holds for it."""
        submit = self._service.engine_of(self._model).submit
        with contextlib.ExitStack() as held:
            streams = [held.enter_context(submit(each)) for each in self._requests()]
            async with contextlib.aclosing(_merged(streams)) as events:
                async for number, event in events:
                    for piece in self._of_event(number * self._n, event):
                        yield piece

    def _of_event(self, first: int, event: Event) -> Iterator[tuple[int, "_Piece"]]:
        match event:
            case PromptScores():
                for number in range(first, first + self._n):
                    self._choices[number].prompt_scores = event.tokens
            case Token():
                yield first + event.index, self._choices[first + event.index].token(event)
            case Finished():
                if event.reason not in ("stop", "length"):
                    raise of_end(event.reason, event.message)
                if not event.index:
                    self._cached_tokens += event.cached_tokens
                yield first + event.index, self._choices[first + event.index].end(event)

    def _requests(self) -> list[engine.Request]:
        body = self._body
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        scores_prompt = body.echo and (body.logprobs is not None or body.max_tokens == 0)
        return [
            engine.Request(
                prompt=prompt,
                max_new_tokens=self._service.new_tokens(body.max_tokens, num_prompt=len(prompt)),
                sampling=_sampling(body),
                stop_ids=self._service.stop_ids,
                stop=stop,
                n=self._n,
                prompt_logprobs=(body.logprobs or 0) if scores_prompt else None,
            )
            for prompt in self._prompts
        ]

    def _usage(self) -> dict[str, Any]:
        prompt, completion = sum(map(len, self._prompts)), sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


@dataclasses.dataclass
class _Logprobs:
    """The legacy form: as many entries in each list as there are ids."""

    tokens: list[str] = dataclasses.field(default_factory=list)
    token_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = dataclasses.field(default_factory=list)
    text_offset: list[int] = dataclasses.field(default_factory=list)

    def extend(self, other: "_Logprobs") -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset

    def as_json(self) -> dict[str, Any]:
        return self.__dict__  # asdict would copy each id's entries, for each id of a stream


@dataclasses.dataclass
class _Piece:
    text: str
    logprobs: _Logprobs
    finish_reason: str | None = None


class _Choice:
    """The text of one continuation so far, behind its prompt where that is echoed."""

    def __init__(self, prompt: Sequence[int], service: Service, *, echo: bool, logprobs: int | None):
        self.prompt_scores: Sequence[Token] = ()  # of the second id on
        self.num_tokens = 0
        self._unechoed = prompt if echo else ()
        self._tokenizer = service.tokenizer
        self._stop_ids = service.stop_ids
        self._num_top = logprobs
        self._num_characters = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def token(self, token: Token) -> _Piece:
        """What an id adds. One that ends the answer is no text."""
        piece = self._echoed()
        self.num_tokens += 1
        data = b"" if token.id in self._stop_ids else self._tokenizer.decode_bytes([token.id])
        self._add(piece, token.id, data, token)
        return piece

    def end(self, finished: Finished) -> _Piece:
        """What is left: the bytes before a stop string, a character that was cut."""
        piece = self._echoed()
        piece.text += self._utf8.decode(finished.tail, final=True)
        piece.finish_reason = finished.reason
        return piece

    def _echoed(self) -> _Piece:
        """The prompt, the first time; then nothing."""
        piece = _Piece("", _Logprobs())
        scores = [None, *self.prompt_scores]
        for number, token_id in enumerate(self._unechoed):
            score = scores[number] if number < len(scores) else None
            self._add(piece, token_id, self._tokenizer.decode_bytes([token_id]), score)
        if self._unechoed:
            piece.text += self._tell(self._utf8.decode(b"", final=True))
        self._unechoed = ()
        return piece

    def _add(self, piece: _Piece, token_id: int, data: bytes, score: Token | None) -> None:
        if self._num_top is not None:
            name = self._name(token_id)
            piece.logprobs.tokens.append(name)
            piece.logprobs.text_offset.append(self._num_characters)
            piece.logprobs.token_logprobs.append(None if score is None else _shown(score.logprob))
            piece.logprobs.top_logprobs.append(None if score is None else self._top(score, name))
        piece.text += self._tell(self._utf8.decode(data))

    def _tell(self, text: str) -> str:
        self._num_characters += len(text)
        return text

    def _top(self, token: Token, name: str) -> dict[str, float]:
        """The best ids and, as OpenAI's API has it, the one that was chosen, whose name this is."""
        best = {self._name(token_id): _shown(logprob) for token_id, logprob in token.top[: self._num_top]}
        return best | {name: _shown(token.logprob)}

    def _name(self, token_id: int) -> str:
        """A text that is this id's alone: of bytes that are no text their numbers, of an unused id its own."""
        data = self._tokenizer.decode_bytes([token_id])
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        if text == "\ufffd" and self._tokenizer.encode(text) != [token_id]:
            return f"token_id:{token_id}"
        return text


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def read(number: int, stream: Stream) -> None:
        async for event in stream:
            events.put_nowait((number, event))
        events.put_nowait(None)

    readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    num_open = len(readers)
    try:
        while num_open:
            found = await events.get()
            if found is None:
                num_open -= 1
            else:
                yield found
    finally:
        for reader in readers:
            reader.cancel()


def _sampling(body: CompletionBody) -> SamplingParams:
    return sampling_of(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=body.seed,
        logprobs=body.logprobs,
    )


def _shown(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
