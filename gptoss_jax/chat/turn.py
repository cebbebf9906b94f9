"""One turn: conversation + tools + engine -> typed events. The only loop that runs tools. Knows no server, no terminal.

    conversation ─► render_prompt ─► engine.submit ─► Round: ids to parts ──┬─► no call: the turn is over
         ▲                                                                  ├─► the caller's to answer: it is over too
         └── the round's messages, the tools' results ◄── Calls: run tools ─┘

What a tool does wrong, and what the model calls wrongly, becomes a result that the model reads. The history rule is
the renderer's: reasoning since the last final answer is kept while tools are called.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from gptoss_jax.chat.calls import Calls
from gptoss_jax.chat.events import ChatEvent, Part, ToolFinished, ToolStarted, TurnFinished, TurnReason, Usage
from gptoss_jax.chat.round import Round
from gptoss_jax.chat.settings import AnyGrammars, TurnSettings
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.request import Constraint, Finished, Request, SamplingParams, Token
from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.engine.stream import Stream
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Conversation, Developer, Message, System
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.tools.base import FUNCTIONS, Tool

_PATIENCE_S = 30.0  # for a place in the queue, of a turn that has begun
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
_SEED_STRIDE = 2_654_435_761  # far from the small steps by which requests differ


class Chat:
    """Runs turns on an engine, any number at a time.

        async with contextlib.aclosing(chat.stream(conversation, settings=TurnSettings())) as events:
            async for event in events:
                ...

    Args:
        engine: stays the caller's, who closes it.
        tokenizer: the model's.
        grammars: `Grammars.of(tokenizer)`; only settings that constrain ask for them.
    """

    def __init__(self, engine: AnyEngine, tokenizer: Tokenizer, *, grammars: AnyGrammars | None = None):
        self._engine = engine
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._stop_ids = tokenizer.end_ids

    async def stream(
        self, conversation: Conversation, *, settings: TurnSettings, tools: Sequence[Tool] = ()
    ) -> AsyncGenerator[ChatEvent, None]:
        """The model's turn in a conversation, which the caller has told of functions and formats.

        The last event is TurnFinished. `tools` are run here; a call to anybody else ends the turn, for the caller to
        answer. Leaving it, by `aclose` or by cancelling who reads it, ends the engine's work and the tools'.

        Raises:
            QueueFull: the engine takes no more now; before the first event.
            UserError: this cannot be asked for; before the first event.
        """
        turn = _Turn(conversation, settings, Calls(tools, timeout_s=settings.tool_timeout_s))
        while turn.ending is None:
            async with contextlib.aclosing(self._round(turn)) as parts:
                async for part in parts:
                    yield part
            async with contextlib.aclosing(turn.answer_calls()) as answers:
                async for event in answers:
                    yield event
        yield turn.ending

    async def _round(self, turn: "_Turn") -> AsyncGenerator[Part, None]:
        """The model speaks once."""
        said = turn.new_round(self._tokenizer)  # nothing may fail between the stream and who sees to its end
        try:
            request = await asyncio.to_thread(self._request, turn)  # of a long text it takes long
            stream = None if request is None else await self._submit(request, first=not turn.num_rounds)
        except UserError as error:
            if not turn.num_rounds:
                raise
            turn.end("error", str(error))
            return
        if request is None or stream is None:
            return
        finished = Finished(0, "error", "the engine's stream broke off")
        async with stream:
            async for event in stream:
                if isinstance(event, Finished):
                    finished = event
                elif isinstance(event, Token) and not said.is_over:
                    for part in said.push(event):
                        yield part
                    if said.is_over:
                        stream.abort()  # and Finished follows
        for part in said.finish():
            yield part
        turn.add(request, said, finished)

    def _request(self, turn: "_Turn") -> Request | None:
        """The next round's; None where the turn has met a limit."""
        prompt = render_prompt([*turn.conversation, *turn.messages], self._tokenizer)
        room = self._engine.max_context - len(prompt)
        left = room if turn.tokens_left is None else min(room, turn.tokens_left)
        if left < 1 and turn.num_rounds:
            what = "the context has no room" if room < 1 else "max_new_tokens leaves nothing"
            turn.end("length", f"{what} for an answer behind the tools' results")
            return None
        return Request(
            prompt=prompt,
            max_new_tokens=max(left, 1),  # the engine says it better where a prompt leaves none
            sampling=turn.sampling,
            stop_ids=self._stop_ids,
            priority=turn.settings.priority,
            adapter=turn.settings.adapter,
            constraint=self._constraint(turn),
        )

    def _constraint(self, turn: "_Turn") -> Callable[[], Constraint] | None:
        settings, choice = turn.settings, turn.tool_choice
        if settings.final is None and not settings.strict and choice == "auto":
            return None
        if self._grammars is None:
            raise UserError(
                f"tool_choice is {choice!r} and {len(settings.strict) + (settings.final is not None)} grammars are to "
                "be kept to, which this Chat cannot see to: give it the tokenizer's Grammars"
            )
        known = _recipients(turn.conversation)
        if choice not in ("auto", "none", "required", *known):
            raise UserError(
                f"tool_choice is {choice!r}; expected auto, none, required or what the conversation tells of: "
                f"{', '.join(known) or 'no tool'}"
            )
        return self._grammars.turn(
            final=settings.final,
            calls=settings.strict,
            choice=choice,
            recipients=known,
            parallel=settings.parallel_calls,
        )

    async def _submit(self, request: Request, *, first: bool) -> Stream:
        """A new turn is told at once that the queue is full; one that has begun waits for a place."""
        pause, until = _SHORTEST_PAUSE_S, time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._engine.submit(request)
            except QueueFull:
                if first or time.monotonic() > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


@dataclasses.dataclass
class _Turn:
    """How far a turn has come."""

    conversation: Conversation
    settings: TurnSettings
    tools: Calls
    messages: list[Message] = dataclasses.field(default_factory=list)
    calls: list[Assistant] = dataclasses.field(default_factory=list)  # of the newest round
    usage: Usage = dataclasses.field(default_factory=Usage)
    num_rounds: int = 0
    num_said: int = 0  # messages of the model's
    ending: TurnFinished | None = None

    @property
    def tokens_left(self) -> int | None:
        most = self.settings.max_new_tokens
        return None if most is None else most - self.usage.completion_tokens

    @property
    def sampling(self) -> SamplingParams:
        """With a seed of the round's own: the same noise again would make the same mistake again."""
        sampling = self.settings.sampling
        return dataclasses.replace(sampling, seed=(sampling.seed + self.num_rounds * _SEED_STRIDE) % 2**32)

    @property
    def tool_choice(self) -> str:
        """What holds for the next round: who had to call has called, and may answer."""
        choice = self.settings.tool_choice
        return "auto" if self.num_rounds and choice != "none" else choice

    def new_round(self, tokenizer: Tokenizer) -> Round:
        settings = self.settings
        return Round(tokenizer, index=self.num_said, stop=settings.stop, parallel_calls=settings.parallel_calls)

    def add(self, request: Request, said: Round, finished: Finished) -> None:
        """Goes on by a round, or ends with it."""
        self.num_rounds += 1
        self.num_said += len(said.messages)
        self.messages += said.messages
        self.calls = said.calls
        self.usage = Usage(
            prompt_tokens=self.usage.prompt_tokens + len(request.prompt),
            cached_tokens=self.usage.cached_tokens + finished.cached_tokens,
            completion_tokens=self.usage.completion_tokens + said.num_tokens,
            reasoning_tokens=self.usage.reasoning_tokens + said.num_reasoning_tokens,
        )
        if finished.reason != "stop" and not said.is_over:
            self.end(finished.reason, finished.message)
        elif not said.calls:
            self.end("stop")

    async def answer_calls(self) -> AsyncGenerator[ToolStarted | ToolFinished, None]:
        """Runs the tools that the newest round called, and ends the turn where that is not all there is to do."""
        if self.ending is not None:
            return
        calls = [call for call in self.calls if self.tools.handles(call)]
        if calls and self.num_rounds == self.settings.max_rounds:
            self.end("length", f"max_rounds is {self.num_rounds}, and the model called a tool again")
            return
        finished: list[ToolFinished] = []
        async with contextlib.aclosing(self.tools.answer(calls)) as events:
            async for event in events:
                yield event
                if isinstance(event, ToolFinished):
                    finished.append(event)
        results = {id(event.call): event.result for event in finished}
        self.messages += [results[id(call)] for call in calls]  # in the order of the calls
        if len(calls) < len(self.calls):
            self.end("tool_calls")

    def end(self, reason: TurnReason, message: str = "") -> None:
        self.ending = TurnFinished(reason, tuple(self.messages), self.usage, message)


def _recipients(conversation: Conversation) -> tuple[str, ...]:
    """Whom the model was told that it may call."""
    found: list[str] = []
    for message in conversation:
        if isinstance(message, Developer):
            found += [f"{FUNCTIONS}.{function.name}" for function in message.functions]
        if isinstance(message, System):
            for space in message.tools:
                found += [f"{space.name}.{function.name}" for function in space.functions] or [space.name]
    return tuple(dict.fromkeys(found))
