"""One continuation of a request, from sampled ids to events: where it ends and what may be told. Knows no pages.

A token is told when no stop string can swallow any of its bytes any more:

    stop "END"     ids      │ the │  EN │ D.  │          told: " the", then Finished(stop=b"END", tail=b" ")
                   bytes    │ the │ ␣EN │ D.  │          " EN" was held back; its space stands before the stop string
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from gptoss_jax.engine.drafts import PromptLookup
from gptoss_jax.engine.request import Constraint, Event, Finished, PromptScores, Request, SamplingParams, Token
from gptoss_jax.engine.stops import StopSearch, StopStrings
from gptoss_jax.errors import UserError

TokenBytes = Callable[[int], bytes]


@dataclasses.dataclass(slots=True)
class _Held:
    """A token that may yet be swallowed, and the bytes of all tokens up to its beginning and its end."""

    token: Token
    data: bytes
    begin: int

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


class Continuation:
    """What the engine remembers of one continuation beside its ids and pages.

    Attributes:
        sampling: its settings, with its own seed.
        unread: the events that were not delivered yet.
        finished: whether the last of them is the last of all.
        cached_tokens: ids of the prompt that were found in the prefix cache.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        vocab_size: int,
        draft_tokens: int = 0,
        stops: StopStrings | None = None,
        token_bytes: TokenBytes | None = None,
    ):
        self.index = index
        self.sampling: SamplingParams = request.sampling.of_continuation(index)
        self.unread: list[Event] = []
        self.finished = False
        self.cached_tokens = 0
        self._left = request.max_new_tokens
        # Scores of the prompt's ids, from the second on, as far as they were computed; None when nothing waits for any.
        self._scores: list[Token] | None = None if request.prompt_logprobs is None or index else []
        self._num_prompt = len(request.prompt)
        self._stop_ids = frozenset(request.stop_ids)
        self._token_bytes = token_bytes
        self._search = StopSearch(stops) if stops is not None else None
        self._held: deque[_Held] = deque()
        self._vocab_size = vocab_size
        self._constraint: Constraint | None = request.constraint() if request.constraint is not None else None
        self._mask: np.ndarray | None = None if self._constraint is None else self._ask(self._constraint)
        # What a penalty or a constraint makes of a score depends on the ids before, which a guess might be one of.
        guesses = draft_tokens and self._constraint is None and not self.sampling.penalises
        self._lookup = PromptLookup(request.prompt) if guesses else None
        self._draft_tokens = draft_tokens

    def draft(self) -> Sequence[int]:
        """Ids that may come next."""
        return self._lookup.propose(min(self._draft_tokens, self._left - 1)) if self._lookup is not None else ()

    @property
    def is_constrained(self) -> bool:
        """Whether `mask` is to be asked before an id is drawn."""
        return self._constraint is not None

    def mask(self) -> np.ndarray | None:
        """The ids that may come next, as bits. A mistake in the caller's constraint ends this continuation: None."""
        assert self._constraint is not None
        if self._mask is None:
            try:
                self._mask = self._ask(self._constraint)
            except Exception as error:
                self.finish("error", message=describe(error))
        return self._mask

    def take_unread(self) -> list[Event]:
        """The events that were not delivered yet."""
        unread, self.unread = self.unread, []
        return unread

    def advance(self, tokens: Iterable[Token]) -> list[int]:
        """Takes what was sampled, up to where this ends, and says which ids were taken.

        A mistake in the caller's constraint or `token_bytes` ends this continuation, no other.
        """
        taken = []
        for token in tokens:
            taken.append(token.id)
            if not self._left:  # only the prompt's scores were wanted
                self.finish("length")
                break
            self._left -= 1
            try:
                self._take(token)
            except Exception as error:
                self.finish("error", message=describe(error))
            if self.finished:
                break
        if self._lookup is not None and not self.finished:
            self._lookup.extend(taken)
        return taken

    def score_prompt(self, first: int, scores: Iterable[Token]) -> None:
        """Takes scores of the prompt from its id `first` on; after a preemption some come again."""
        if self._scores is None or self.finished:
            return
        self._scores += list(scores)[1 + len(self._scores) - first :]
        if len(self._scores) == self._num_prompt - 1:
            self.unread.append(PromptScores(self.index, tuple(self._scores)))
            self._scores = None

    def finish(self, reason: Literal["stop", "length", "abort", "error", "refused"], *, message: str = "") -> None:
        """Ends it here; what was held back is told first."""
        if not self.finished:
            self._tell(Finished(self.index, reason, message, cached_tokens=self.cached_tokens))

    def _take(self, token: Token) -> None:
        if token.id in self._stop_ids:
            self._held.append(_Held(token, b"", 0))
            self.finish("stop")
        elif self._search is None:
            self.unread.append(token)
        else:
            self._look_for_stops(token, self._search)
        if not self._left:
            self.finish("length")
        if self._constraint is not None and not self.finished:
            self._constraint.accept(token.id)
            self._mask = None

    def _look_for_stops(self, token: Token, search: StopSearch) -> None:
        """Holds the token back, and tells those that are out of every stop string's reach."""
        assert self._token_bytes is not None
        data = self._token_bytes(token.id)
        begin, found = search.num_bytes, search.feed(data)
        self._held.append(_Held(token, data, begin))
        while self._held and self._held[0].end <= search.num_clear:
            self.unread.append(self._held.popleft().token)
        if found is not None:
            first = self._held[0]
            self._held.clear()
            tail = first.data[: found.begin - first.begin]
            self._tell(Finished(self.index, "stop", stop=found.stop, tail=tail, cached_tokens=self.cached_tokens))

    def _tell(self, end: Finished) -> None:
        self.unread += [held.token for held in self._held]
        self._held.clear()
        self.unread.append(end)
        self.finished = True

    def _ask(self, constraint: Constraint) -> np.ndarray:
        allowed = np.asarray(constraint.mask())
        words = -(-self._vocab_size // 32)
        if allowed.shape != (words,) or allowed.dtype != np.uint32:
            raise UserError(
                f"the constraint's mask is {allowed.dtype}{list(allowed.shape)}; expected uint32[{words}], "
                f"a bit for each of {self._vocab_size} ids"
            )
        if not allowed.any():
            raise UserError("the constraint allows no id at all; expected at least a stop id where nothing may follow")
        return allowed


def describe(error: BaseException) -> str:
    """The message of an event: a user's mistake speaks for itself, of another error its kind is said too."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")
