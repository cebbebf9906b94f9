"""What a turn tells while it runs. Knows harmony's events and the engine's tokens; knows no engine and no tool.

Part … Part ─► ToolStarted ─► ToolFinished ─► Part … Part ─► TurnFinished
one round       its calls are answered        the next round
"""

import dataclasses
from typing import Literal, TypeAlias

from gptoss_jax.engine.request import Token
from gptoss_jax.harmony.events import HarmonyEvent
from gptoss_jax.harmony.messages import Assistant, Message, ToolResult

TurnReason: TypeAlias = Literal["stop", "length", "tool_calls", "abort", "error", "refused"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """How many ids a turn took.

    Attributes:
        prompt_tokens: of the prompts of all rounds: each holds what was said before it, tools' results too.
        cached_tokens: of these what the engine found in its prefix cache.
        completion_tokens: that the model generated, in all rounds, headers and the ids that end messages among them.
        reasoning_tokens: of these the ones of analysis messages.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Something the model said, and the ids that it was said with; the indices of messages go on over rounds.

    Ids of a header are with the Start, the one that ends a message is with its End. Every id of a turn is in one Part,
    except those that a stop string swallowed and those of a header that was cut.
    """

    event: HarmonyEvent
    tokens: tuple[Token, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolStarted:
    """A tool runs; those that the model called side by side run so."""

    call: Assistant


@dataclasses.dataclass(frozen=True, slots=True)
class ToolFinished:
    """A tool has answered; `failed` says that the result is the text of an error."""

    call: Assistant
    result: ToolResult
    seconds: float
    failed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class TurnFinished:
    """The turn is over.

    Attributes:
        reason: "stop" the answer is whole, "length" a limit was met (of tokens, context or rounds), "tool_calls" the
            caller is to answer calls, "abort" the engine was told to end it, "error" something broke, "refused" the
            engine would not.
        messages: all that this turn added to the conversation, in order; the last one may be cut.
        usage: over all rounds.
        message: says more of a reason that is not "stop" or "tool_calls".
    """

    reason: TurnReason
    messages: tuple[Message, ...]
    usage: Usage
    message: str = ""


ChatEvent: TypeAlias = Part | ToolStarted | ToolFinished | TurnFinished
