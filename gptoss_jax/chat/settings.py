"""How one turn is to go. Knows limits and choices; runs nothing, and makes no grammar."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from gptoss_jax.engine.request import Constraint, SamplingParams
from gptoss_jax.errors import UserError

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | str
Grammar: TypeAlias = Any  # made by the Grammars that turn it into a constraint; nobody else looks into it


@runtime_checkable
class AnyGrammars(Protocol):
    """What a turn asks of grammars; constrain.grammars.Grammars are some, from a library that not everybody needs."""

    def turn(
        self,
        *,
        final: Grammar | None,
        calls: Mapping[str, Grammar],
        choice: ToolChoice,
        recipients: Collection[str],
        parallel: bool,
    ) -> Callable[[], Constraint]:
        """Makes the constraints of a round."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnSettings:
    """How one turn is to go.

    Attributes:
        sampling: of every round; later rounds have seeds that follow from this one.
        max_new_tokens: over all rounds at most; None for what the context leaves. More than that is not refused.
        stop: texts that end the turn where the user is spoken to; in reasoning and in calls they mean nothing.
        tool_choice: "required" or a recipient, as "functions.f", forces a call; once it was answered the model is free.
        parallel_calls: whether several calls may stand side by side; if not, a round is over with its first.
        final: what the answer must be; where reasoning ends and the answer begins, so does the grammar.
        strict: what the arguments of calls must be, by recipient.
        max_rounds: requests to the engine; the tools called in the last one are not run.
        tool_timeout_s: after which a tool has failed.
        priority: see Request.
        adapter: see Request.
    """

    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    tool_choice: ToolChoice = "auto"
    parallel_calls: bool = True
    final: Grammar | None = None
    strict: Mapping[str, Grammar] = dataclasses.field(default_factory=dict, hash=False)
    max_rounds: int = 16
    tool_timeout_s: float = 300.0
    priority: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("max_rounds", self.max_rounds)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if not self.tool_timeout_s > 0:
            raise UserError(f"tool_timeout_s is {self.tool_timeout_s}; expected more than 0 seconds")
        if isinstance(self.stop, str):  # a sequence of texts too, of one character each
            raise UserError(f"stop is {self.stop!r}; expected a list of texts")
        if any(not text for text in self.stop):
            raise UserError("stop holds an empty text; expected texts of at least one character")
        for text in self.stop:
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise UserError(f"stop holds {text!r}; expected whole characters, found half of a surrogate pair")
