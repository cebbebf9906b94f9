"""One answer of the model, from ids to parts and messages. Knows tokens and events; knows no engine and no tool."""

from collections.abc import Sequence

from gptoss_jax.chat.events import Part
from gptoss_jax.chat.stops import AnswerStops
from gptoss_jax.engine.request import Token
from gptoss_jax.harmony.events import End, HarmonyEvent
from gptoss_jax.harmony.messages import Assistant
from gptoss_jax.harmony.parse import Parser
from gptoss_jax.harmony.tokenizer import Tokenizer


class Round:
    """Reads what one request to the engine gives.

    Args:
        tokenizer: the model's.
        index: of the first message.
        stop: texts that end it where the user is spoken to.
        parallel_calls: whether it goes on behind a call.

    Attributes:
        messages: those that have ended.
        calls: of these the ones that call somebody, and are whole.
        is_over: by a stop string or a call, though the model would go on; nothing may be pushed then.
        num_tokens: that were pushed.
        num_reasoning_tokens: of these the ones of analysis messages.
    """

    def __init__(self, tokenizer: Tokenizer, *, index: int, stop: Sequence[str], parallel_calls: bool):
        self.messages: list[Assistant] = []
        self.calls: list[Assistant] = []
        self.is_over = False
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self._parser = Parser(tokenizer, index=index)
        self._stops = AnswerStops(stop)
        self._parallel_calls = parallel_calls
        self._untold: list[Token] = []  # they have made no event yet
        self._in_message = 0  # tokens since the last message ended

    def push(self, token: Token) -> list[Part]:
        """What this token tells."""
        self.num_tokens += 1
        self._in_message += 1
        return self._take(self._parser.push(token.id), token)

    def finish(self) -> list[Part]:
        """What is left when there are no more tokens."""
        return [] if self.is_over else self._take(self._parser.finish(), None)

    def _take(self, events: Sequence[HarmonyEvent], token: Token | None) -> list[Part]:
        """The events with their tokens: of several, the last has this token and the first those that waited."""
        told: list[Part] = []
        if token is not None and len(events) < 2:
            self._untold.append(token)
        for number, event in enumerate(events):
            tokens: list[Token] = []
            if number == 0:
                tokens, self._untold = self._untold, []
            elif token is not None and number == len(events) - 1:
                tokens = [token]
            told += self._stops.feed(Part(event, tuple(tokens)))
            if self._stops.found:
                break
        for part in told:
            if isinstance(part.event, End):
                self._end(part.event)
        if self._stops.found:
            self.is_over = True
            self.calls.clear()  # nothing is to follow
        return told

    def _end(self, end: End) -> None:
        message = end.message
        self.messages.append(message)
        if message.channel == "analysis":
            self.num_reasoning_tokens += self._in_message
        self._in_message = 0
        if message.recipient is not None and end.by != "cut":
            self.calls.append(message)
            self.is_over = self.is_over or not self._parallel_calls
