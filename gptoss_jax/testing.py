"""An engine that plays given ids, for tests of whatever talks to an engine. Knows no model and no text.

    with ScriptedEngine([[5, 6, 7], [8, 9]]) as engine:
        engine.submit(Request(prompt=[1], max_new_tokens=10)).result()   # one answer: 5, 6, 7

It is public: use it to test programs of your own without a checkpoint or an accelerator. It needs no jax.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from gptoss_jax.engine.continuation import Continuation, TokenBytes
from gptoss_jax.engine.request import Request, SamplingParams, Token
from gptoss_jax.engine.scheduler import Counts, QueueFull
from gptoss_jax.engine.stats import Stats
from gptoss_jax.engine.stops import StopStrings
from gptoss_jax.engine.stream import Stream, deliver
from gptoss_jax.errors import UserError

Script: TypeAlias = Sequence[int]
_SHORTEST_STEP = 1e-4  # seconds between steps: whoever submits or aborts has to come to the lock


class ScriptedEngine:
    """Plays scripts to requests, an id a step to each; an `AnyEngine`.

    A request ends as on `Engine`: by a stop id, a stop string, `max_new_tokens` or `abort`; by "error" where the script
    says an id that the constraint forbids; and by "length" where the script is over before all that.

    Logprobs are made up, so that a test can tell them: see `logprob` and `top_logprobs`. Of a prompt is said to have
    been cached what it begins with in common with an earlier one, all but its last id at most.

    Args:
        scripts: one for each request, in their order, which all continuations of the request play; or a function that
            is asked for each continuation, with a request that has that continuation's seed.
        vocab_size: ids are smaller than this.
        max_context: the most ids of a request and its continuation together.
        seconds_per_token: how long a step takes.
        max_rows: continuations that play at a time; the others wait for one of them to end. None for no limit.
        max_open: requests that may be open at a time; another one is refused with QueueFull. None for no limit.
        token_bytes: what an id stands for; only stop strings ask for it.

    Attributes:
        requests: all that were submitted, in order.
    """

    def __init__(
        self,
        scripts: Sequence[Script] | Callable[[Request], Script],
        *,
        vocab_size: int = 201_088,
        max_context: int = 131_072,
        seconds_per_token: float = 0.0,
        max_rows: int | None = None,
        max_open: int | None = None,
        token_bytes: TokenBytes | None = None,
    ):
        self.requests: list[Request] = []
        self._scripts = scripts
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._seconds = seconds_per_token
        self._max_rows = max_rows
        self._max_open = max_open
        self._token_bytes = token_bytes
        self._players: list[_Player] = []
        self._aborted: list[Stream] = []
        self._num_steps = self._num_generated = self._num_prefilled = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="scripted engine", daemon=True)
        self._thread.start()

    @staticmethod
    def logprob(token_id: int) -> float:
        """What every answer says of this id: -1/8 to -1."""
        return -(token_id % 8 + 1) / 8

    def top_logprobs(self, token_id: int, number: int) -> tuple[tuple[int, float], ...]:
        """The best ids where `token_id` was chosen: itself, then those behind it, each a half less likely."""
        ids = [(token_id + i) % self._vocab_size for i in range(min(number, self._vocab_size))]
        return tuple((each, self.logprob(token_id) - i / 2) for i, each in enumerate(ids))

    @property
    def vocab_size(self) -> int:
        """Ids are smaller than this."""
        return self._vocab_size

    @property
    def max_context(self) -> int:
        """The most ids of one request, prompt and continuation."""
        return self._max_context

    @property
    def num_open(self) -> int:
        """Streams that are not finished: 0 when nothing runs and whoever left was noticed."""
        with self._changed:
            return self._num_open()

    def submit(self, request: Request) -> Stream:
        """Begins to play.

        Raises:
            QueueFull: `max_open` requests are open.
            UserError: the request is wrong, there is no script left for it, or the engine is closed.
        """
        request.check(vocab_size=self._vocab_size, max_context=self._max_context)
        stream = Stream(request.n, abort=self._abort)
        with self._changed:
            if self._closed:
                raise UserError("the engine is closed; requests go to an engine that is open")
            if self._max_open is not None and self._num_open() >= self._max_open:
                raise QueueFull(f"{self._max_open} requests are open, as many as may; try again when one has ended")
            self._players += [self._player(request, index, stream) for index in range(request.n)]
            self._num_prefilled += len(request.prompt)
            self.requests.append(request)
            self._changed.notify()
        return stream

    def stats(self) -> Stats:
        """What it does and has done; it has no pages."""
        with self._changed:
            queue = Counts(
                running=len(self._players[: self._max_rows]),
                waiting=len(self._players) - len(self._players[: self._max_rows]),
                queued_tokens=0,
                held_full_pages=0,
                held_sliding_pages=0,
                cached_full_pages=0,
                cached_sliding_pages=0,
                prefilled_tokens=self._num_prefilled,
                cached_tokens=0,
                preemptions=0,
            )
            return Stats(
                queue=queue,
                steps=self._num_steps,
                failed_steps=0,
                generated_tokens=self._num_generated,
                proposed_tokens=0,
                accepted_tokens=0,
                host_seconds=0.0,
                programs=0,
            )

    def close(self) -> None:
        """Ends what plays, by Finished("abort"). More than once does no harm."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "ScriptedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _num_open(self) -> int:
        return len({player.stream for player in self._players})

    def _player(self, request: Request, index: int, stream: Stream) -> "_Player":
        stops = None
        if request.stop:
            if self._token_bytes is None:
                raise UserError("stop strings need the bytes of ids; give the engine token_bytes")
            stops = StopStrings([text.encode() if isinstance(text, str) else text for text in request.stop])
        continuation = Continuation(
            request, index, vocab_size=self._vocab_size, stops=stops, token_bytes=self._token_bytes
        )
        if request.prompt_logprobs is not None:
            continuation.score_prompt(1, [self._token(0, i, request.prompt_logprobs) for i in request.prompt[1:]])
        else:
            continuation.cached_tokens = max((_num_shared(request, earlier) for earlier in self.requests), default=0)
        return _Player(continuation, self._script(request, continuation.sampling), stream)

    def _token(self, index: int, token_id: int, num_top: int | None) -> Token:
        return Token(index, token_id, self.logprob(token_id), self.top_logprobs(token_id, num_top or 0))

    def _script(self, request: Request, sampling: SamplingParams) -> Script:
        if callable(self._scripts):
            return self._scripts(dataclasses.replace(request, sampling=sampling))
        if len(self.requests) >= len(self._scripts):
            raise UserError(f"request {len(self.requests) + 1} of an engine with {len(self._scripts)} scripts; add one")
        return self._scripts[len(self.requests)]

    def _abort(self, stream: Stream) -> None:
        with self._changed:
            self._aborted.append(stream)
            self._changed.notify()

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        with self._changed:
            try:
                self._play()
            finally:  # also where it makes a mistake: nobody is to wait for ever
                self._closed = True
                self._end(self._players)

    def _play(self) -> None:
        next_step = 0.0
        while not self._closed:
            self._end([player for player in self._players if player.stream in self._aborted])
            self._aborted.clear()
            seconds = next_step - time.perf_counter()
            if not self._players:
                self._changed.wait()
            elif seconds > 0:
                self._changed.wait(seconds)
            else:
                next_step = time.perf_counter() + max(self._seconds, _SHORTEST_STEP)
                self._step()

    def _step(self) -> None:
        for player in self._players[: self._max_rows]:
            token_id = player.next_id()
            if token_id is not None:
                continuation = player.continuation
                token = self._token(continuation.index, token_id, continuation.sampling.logprobs)
                self._num_generated += len(continuation.advance([token]))
        self._num_steps += 1
        self._tell(self._players)

    def _end(self, players: Sequence["_Player"]) -> None:
        for player in players:
            player.continuation.finish("abort")
        self._tell(players)

    def _tell(self, players: Sequence["_Player"]) -> None:
        told = [(player.stream, player.continuation) for player in players]
        deliver([(stream, continuation.take_unread()) for stream, continuation in told if continuation.unread])
        self._players = [player for player in self._players if not player.continuation.finished]


@dataclasses.dataclass
class _Player:
    """A script on its way."""

    continuation: Continuation
    script: Script
    stream: Stream
    num_played: int = 0

    def next_id(self) -> int | None:
        """What the script says next; ends the continuation where it says nothing, or what is not allowed."""
        if self.num_played == len(self.script):
            self.continuation.finish("length")
            return None
        token_id = self.script[self.num_played]
        self.num_played += 1
        if self.continuation.is_constrained and not self._allows(token_id):
            self.continuation.finish("error", message=f"the script says id {token_id}, which the constraint forbids")
            return None
        return token_id

    def _allows(self, token_id: int) -> bool:
        mask = self.continuation.mask()
        return mask is not None and bool(mask[token_id // 32] >> np.uint32(token_id % 32) & 1)


def _num_shared(request: Request, earlier: Request) -> int:
    """Ids that two prompts begin with in common; the last of the first one is computed in any case."""
    most = min(len(request.prompt) - 1, len(earlier.prompt))
    return next((i for i in range(most) if request.prompt[i] != earlier.prompt[i]), most)
