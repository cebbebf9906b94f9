"""Asks a model to judge a text by a policy. Knows how to ask and what an answer means; knows no rule and no server.

policy ─► developer message ┐
content ─► user message     ├─► Chat ─► reasoning, then {"label": …, "rationale": …} ─► Judgement
                            ┘                         └─ held to by a grammar, if there is one
"""

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from reprlib import repr as shown
from typing import Any

from gptoss_jax.chat import Chat, TurnFinished, TurnSettings, Usage
from gptoss_jax.constrain import Grammar, Grammars
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Developer, Effort, System, User
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.moderation.policy import Policy, check_labels

_DEFAULT_SAMPLING = SamplingParams()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the model makes of a text.

    Attributes:
        label: one of the policy's.
        rationale: the reason that it gives; where the policy is a text of the caller's, its reasoning.
        reasoning: all that it thought before. It may repeat what is harmful in the content: not for users.
    """

    label: str
    rationale: str
    reasoning: str
    usage: Usage


class NoJudgement(Exception):
    """The model gave none. What follows is the caller's to say; that the content is harmless does not follow.

    Attributes:
        answer: what it said instead, as far as it came.
        reasoning: what it thought.
    """

    def __init__(self, why: str, *, answer: str, reasoning: str):
        super().__init__(why)
        self.answer = answer
        self.reasoning = reasoning


def moderate(
    policy: Policy | str,
    content: str,
    *,
    engine: AnyEngine,
    tokenizer: Tokenizer,
    labels: Sequence[str] = (),
    grammars: Grammars | None = None,
    effort: Effort = "medium",
    sampling: SamplingParams = _DEFAULT_SAMPLING,
    max_new_tokens: int | None = None,
) -> Judgement:
    """As `moderate_async`, where no event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise UserError("moderate was called where an event loop runs; await moderate_async there")
    return asyncio.run(
        moderate_async(
            policy,
            content,
            engine=engine,
            tokenizer=tokenizer,
            labels=labels,
            grammars=grammars,
            effort=effort,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
    )


async def moderate_async(
    policy: Policy | str,
    content: str,
    *,
    engine: AnyEngine,
    tokenizer: Tokenizer,
    labels: Sequence[str] = (),
    grammars: Grammars | None = None,
    effort: Effort = "medium",
    sampling: SamplingParams = _DEFAULT_SAMPLING,
    max_new_tokens: int | None = None,
) -> Judgement:
    """The label that a policy gives to a text, and why.

    Args:
        policy: a `Policy`, or a text of your own that says what to answer: one of `labels`, and nothing else.
        content: what is judged.
        labels: of a text of your own; a `Policy` has its own.
        grammars: of this tokenizer: the answer cannot be anything but a judgement. Without, it is what the model makes
            of the policy, and may be none.
        effort: how long the model reasons.
        sampling: its seed decides all chance: the same call gives the same judgement.
        max_new_tokens: for reasoning and answer; None for what the context leaves, as the models' guide advises.

    Raises:
        NoJudgement: the model was cut short, or answered something else.
        UserError: this cannot be asked for.
        QueueFull: the engine takes no more now.
    """
    form = _Form.of(policy, labels)
    conversation = (System(effort=effort), form.developer, User(text=content))
    settings = TurnSettings(
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        final=None if grammars is None else form.grammar(grammars),
        tool_choice="auto" if grammars is None else "none",
    )
    chat = Chat(engine, tokenizer, grammars=grammars)
    async with contextlib.aclosing(chat.stream(conversation, settings=settings)) as events:
        async for event in events:
            if isinstance(event, TurnFinished):
                return form.read(event)
    raise AssertionError("a turn ends with TurnFinished")


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a judgement is asked for and what it looks like: JSON, or for a text of the caller's a label alone."""

    developer: Developer
    labels: tuple[str, ...]
    schema: Mapping[str, Any] | None

    @classmethod
    def of(cls, policy: Policy | str, labels: Sequence[str]) -> "_Form":
        if isinstance(policy, str):
            check_labels("labels", labels)
            return cls(Developer(instructions=policy), tuple(labels), None)
        if labels:
            raise UserError(
                f"labels are {shown(list(labels))}; expected none beside policy {policy.name!r}, which has its own: "
                "leave them out"
            )
        developer = Developer(instructions=policy.text, formats=(policy.answer,))
        return cls(developer, tuple(label.name for label in policy.labels), policy.answer.schema)

    def grammar(self, grammars: Grammars) -> Grammar:
        if self.schema is not None:
            return grammars.json_schema(self.schema)
        return grammars.regex("|".join(f"(?:{re.escape(label)})" for label in self.labels))

    def read(self, turn: TurnFinished) -> Judgement:
        said = [message for message in turn.messages if isinstance(message, Assistant)]
        reasoning = "\n".join(message.text for message in said if message.channel == "analysis")
        answer = next((message.text for message in reversed(said) if message.channel == "final"), "")
        if turn.reason != "stop":
            why = f"the model gave no judgement: its turn ended by {turn.reason!r} {turn.message}".rstrip()
            raise NoJudgement(why, answer=answer, reasoning=reasoning)
        found = _json_judgement(answer) if self.schema is not None else (answer.strip(), reasoning)
        if found is None or found[0] not in self.labels:
            why = f"the model gave no judgement: expected one of {', '.join(self.labels)}, found {shown(answer)}"
            raise NoJudgement(why, answer=answer, reasoning=reasoning)
        return Judgement(label=found[0], rationale=found[1], reasoning=reasoning, usage=turn.usage)


def _json_judgement(answer: str) -> tuple[str, str] | None:
    """Label and rationale, if the answer has both."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"label": str(label), "rationale": str(rationale)}:
            return label, rationale
    return None
