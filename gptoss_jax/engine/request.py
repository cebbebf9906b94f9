"""What is asked of the engine, and what it answers. Knows ids and settings; knows no text, model or other request.

A life of a request: `Request` in, then for each of its `n` continuations some `Token`s and one `Finished`. Before them
comes `PromptScores`, where it was asked for.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import UInt32

from gptoss_jax.errors import UserError

STOP_IDS = (199999, 200002, 200012)  # <|endoftext|>, <|return|>, <|call|>: the release's generation_config.json
MAX_BIASES = 256  # ids of one logit_bias
MAX_LOGPROBS = 20  # best ids told beside the one that was chosen; OpenAI's API has the same limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request chooses its ids. engine/sampling.py says in which order, and computes them.

    Attributes:
        temperature: divides the scores; 0 takes the best id, a tie goes to the lower one.
        top_k: only the k best ids, 0 for all.
        top_p: only the best ids whose probabilities add up to it, the one that crosses it included; 1 for all.
        min_p: only ids at least this many times as likely as the best; 0 for all.
        repetition_penalty: scores of ids in the prompt or generated are divided by it, if negative multiplied; 1 is
            none.
        presence_penalty: is taken from the scores of generated ids, once for each id.
        frequency_penalty: is taken from the scores of generated ids, as often as each was generated.
        logit_bias: is added to the scores of its ids.
        seed: decides the noise of every generated id together with its index, and nothing else does.
        logprobs: how many of the best ids are told with their logprobs; None for none, and 0 is that too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    seed: int = 0
    logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether the ids so far matter to the next one's scores."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def of_continuation(self, index: int) -> "SamplingParams":
        """The settings of continuation `index` of a request with n > 1: a seed of its own."""
        return dataclasses.replace(self, seed=(self.seed + index) % 2**32)

    def check(self, vocab_size: int) -> None:
        """Raises UserError for a setting outside its range."""
        ranges = (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0; 1 is off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2; 0 is off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is off"),
            ("seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or None"),
        )
        for name, good, expected in ranges:
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")
        self._check_bias(vocab_size)

    def _check_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise UserError(f"logit_bias has {len(self.logit_bias)} ids; expected at most {MAX_BIASES}")
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size:
                raise UserError(
                    f"logit_bias holds id {token_id}; expected 0 to {vocab_size - 1}, the model's vocabulary"
                )
            if not -100 <= bias <= 100:
                raise UserError(f"logit_bias of id {token_id} is {bias}; expected -100 to 100")


@runtime_checkable
class Constraint(Protocol):
    """Which ids may come next, as a grammar or a schema knows. Each continuation has its own."""

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """ceil(vocabulary / 32) words: bit i % 32 of word i // 32 says whether id i is allowed. No bit: refused."""
        ...

    def accept(self, token_id: int, /) -> None:
        """Goes on by an id that the last mask allowed."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what is wanted after it.

    Attributes:
        stop_ids: an id of these is the last, and is told.
        stop: texts that end the continuation wherever they lie over the ids; no id from their first byte on is told.
        n: continuations of this prompt; each has its seed, see `SamplingParams.of_continuation`.
        priority: a greater one is served before a lesser one.
        constraint: makes the constraint of one continuation.
        prompt_logprobs: tells how likely each id of the prompt is, with as many of the best in its place; nothing of
            the prompt is taken from the prefix cache then. With it max_new_tokens may be 0.
        adapter: the name of the engine's adapter that answers; None is the model without any.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: Collection[int] = STOP_IDS
    stop: Sequence[bytes | str] = ()
    n: int = 1
    priority: int = 0
    constraint: Callable[[], Constraint] | None = None
    prompt_logprobs: int | None = None
    adapter: str | None = None

    def check(self, *, vocab_size: int, max_context: int) -> None:
        """Raises UserError for what no model of these sizes could do."""
        self.sampling.check(vocab_size)
        if not len(self.prompt):
            raise UserError("the prompt has 0 ids; expected at least 1")
        least = 1 if self.prompt_logprobs is None else 0
        for name, number, expected in (("max_new_tokens", self.max_new_tokens, least), ("n", self.n, 1)):
            if number < expected:
                raise UserError(f"{name} is {number}; expected at least {expected}")
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_LOGPROBS:
            raise UserError(f"prompt_logprobs is {self.prompt_logprobs}; expected 0 to {MAX_LOGPROBS}, or None")
        outside = next((i for i in self.prompt if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise UserError(f"the prompt holds id {outside}; expected 0 to {vocab_size - 1}, the model's vocabulary")
        new = max(self.max_new_tokens, 1)  # one is drawn, if only to be dropped
        if len(self.prompt) + new > max_context:
            raise UserError(
                f"{len(self.prompt)} prompt ids and {new} new ones are {len(self.prompt) + new}; the model's context "
                f"is {max_context}: shorten the prompt or ask for fewer"
            )
        if any(not text for text in self.stop):
            raise UserError("stop holds an empty text; expected texts of at least one character")


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One generated id of continuation `index`; logprobs are of the model, see engine/sampling.py."""

    index: int
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """Continuation `index` has no more ids.

    Attributes:
        message: says more of an error or a refusal.
        stop: the stop string that ended it. It may begin within an id: no `Token` tells of that id or one behind it.
        tail: what this id's bytes hold before the stop string; they are the last of the answer.
        cached_tokens: ids of the prompt that were found in the prefix cache.
    """

    index: int
    reason: Literal["stop", "length", "abort", "error", "refused"]
    message: str = ""
    stop: bytes | None = None
    tail: bytes = b""
    cached_tokens: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class PromptScores:
    """How likely each id of the prompt is behind those before it, from the second id on; comes before any `Token`."""

    index: int
    tokens: tuple[Token, ...]


Event: TypeAlias = Token | Finished | PromptScores
