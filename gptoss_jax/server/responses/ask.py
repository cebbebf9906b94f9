"""What a body asks for, as a turn of a chat. Knows bodies, the store and the model's sizes; runs nothing.

body ─► refused? ─► history (store) + input ─► messages ─┐
     ─► tools, choice, format ─► functions, grammars ────┴─► conversation, settings ─► fits the context? ─► Asked
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptoss_jax.chat import TurnSettings
from gptoss_jax.engine.request import SamplingParams, Token
from gptoss_jax.harmony.messages import Assistant, Message, ToolResult, User
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.responses.convert import (
    conversation_of,
    input_items,
    new_id,
    references,
    stored_items,
    without_oldest,
)
from gptoss_jax.server.responses.offer import Form, Offer, form_of, limited, offer_of
from gptoss_jax.server.responses.refusals import effort_of, refuse
from gptoss_jax.server.responses.schemas import CountTokens, CreateResponse
from gptoss_jax.server.responses.store import NotStored, ResponseStore, StoredItem
from gptoss_jax.server.sampling import logprob_body, sampling_of
from gptoss_jax.server.service import Service
from gptoss_jax.tools.base import Tool

_ROUNDS = 16
_MOST_OF_A_HEADER = 300  # ids: marks, a role, a name, a recipient, a channel, a content type


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is to read, and what it is offered.

    Attributes:
        model: the name of the one that is asked.
    """

    model: str
    conversation: Sequence[Message]
    input: tuple[StoredItem, ...]
    offer: Offer
    form: Form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A turn, ready to run.

    Attributes:
        model: the name of the one that answers.
        response: the body of the response as it begins, without output.
        input: the request's own items, for the store.
        logprobs: what the client is told of a token; None where it did not ask.
    """

    model: str
    conversation: Sequence[Message]
    settings: TurnSettings
    tools: tuple[Tool, ...]
    response: Mapping[str, Any]
    input: tuple[StoredItem, ...]
    logprobs: Callable[[Token], Mapping[str, Any]] | None


async def ask(body: CreateResponse, *, service: Service, store: ResponseStore | None) -> Asked:
    """Reads a body. Raises ApiError for what cannot be had, and UserError for what makes no sense."""
    stored = _stored(body, store)
    prompt = await read_prompt(body, service=service, store=store)
    conversation = await _fitted(body, prompt, service)
    wants_logprobs = "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs)
    sampling = sampling_of(
        temperature=body.temperature, top_p=body.top_p, logprobs=body.top_logprobs if wants_logprobs else None
    )
    settings = TurnSettings(
        sampling=sampling,
        max_new_tokens=_least(body.max_output_tokens, service.settings.max_new_tokens),
        tool_choice=prompt.offer.choice,
        parallel_calls=body.parallel_tool_calls is not False,
        final=prompt.form.grammar,
        strict=prompt.offer.strict,
        max_rounds=max(_ROUNDS, (body.max_tool_calls or 0) + 1),
    )
    return Asked(
        model=prompt.model,
        conversation=conversation,
        settings=settings,
        tools=limited(prompt.offer.tools, body.max_tool_calls),
        response=_response(body, prompt, sampling=sampling, stored=stored, service=service),
        input=prompt.input,
        logprobs=(lambda token: logprob_body(token, service.tokenizer)) if wants_logprobs else None,
    )


async def read_prompt(body: CountTokens, *, service: Service, store: ResponseStore | None) -> Prompt:
    """The part of a body that goes into a prompt."""
    _ = service.engine  # 503 while there is none, before anything is looked up
    refuse(body)
    model = service.model_named(body.model)
    items = input_items(body.input)
    earlier = await _earlier(body.previous_response_id, store)
    if not items and not earlier:
        raise ApiError(400, "input: expected a text or at least one item", param="input")
    wanted = references(items)
    known = await store.items(wanted) if store is not None and wanted else {}
    new = stored_items(items, earlier=earlier, known=known)
    # A schema takes a millisecond to compile, and a hundred of them must not make others wait.
    offer, form = await asyncio.to_thread(_offered, body, service)
    conversation = conversation_of(
        [message for item in (*earlier, *new) for message in item.messages],
        instructions=body.instructions,
        functions=offer.functions,
        formats=form.formats,
        tools=[tool.namespace for tool in offer.tools],
        effort=effort_of(body, default=service.settings.default_effort),
        today=service.settings.today,
    )
    return Prompt(model=model, conversation=conversation, input=tuple(new), offer=offer, form=form)


def _offered(body: CountTokens, service: Service) -> tuple[Offer, Form]:
    lenient = service.settings.lenient_schemas
    offer = offer_of(
        body.tools or (),
        body.tool_choice,
        grammars=service.grammars,
        server_tools=service.settings.tools,
        lenient=lenient,
    )
    form = form_of(body.text.format if body.text else None, grammars=service.grammars, lenient=lenient)
    return offer, form


async def _earlier(previous: str | None, store: ResponseStore | None) -> list[StoredItem]:
    if previous is None:
        return []
    try:
        if store is not None:
            return await store.history(previous)
        missing, why = previous, "this server stores none (--store none)"
    except NotStored as error:
        missing, why = error.args[0], "it was not stored, is not finished, or was deleted"
    of = "" if missing == previous else f", which {previous!r} continues"
    message = f"there is no response {missing[:100]!r}{of}: {why}"
    raise ApiError(404, message, code="previous_response_not_found", param="previous_response_id")


def _stored(body: CreateResponse, store: ResponseStore | None) -> bool:
    if store is None and body.store:
        raise ApiError(400, "store: this server stores no responses (--store none); send false", param="store")
    stored = store is not None and body.store is not False
    if body.background and not stored:
        raise ApiError(400, "background: expected a stored response, found store: false", param="background")
    return stored


# --- the context ------------------------------------------------------------------------------------------------------


async def _fitted(body: CreateResponse, prompt: Prompt, service: Service) -> Sequence[Message]:
    """The conversation, without its oldest turns where there is no room for them and `truncation` is "auto"."""
    cuts = body.truncation == "auto"
    most = service.engine.max_context - (body.max_output_tokens or 1 if cuts else 1)
    conversation = prompt.conversation
    if await _at_most(conversation, service.tokenizer) <= most:
        return conversation
    first = num_ids = await count(conversation, service.tokenizer)
    while num_ids > most:
        shorter = without_oldest(conversation) if cuts else None
        if shorter is None:
            raise _too_long(first, service.engine.max_context)
        conversation = shorter
        num_ids = await count(conversation, service.tokenizer)
    return conversation


async def _at_most(conversation: Sequence[Message], tokenizer: Tokenizer) -> int:
    """No fewer ids than the prompt has, had in a moment: no id is less than a byte."""
    said = [message for message in conversation if isinstance(message, User | Assistant | ToolResult)]
    head = [message for message in conversation if not isinstance(message, User | Assistant | ToolResult)]
    return await count(head, tokenizer) + sum(len(message.text.encode()) + _MOST_OF_A_HEADER for message in said)


async def count(conversation: Sequence[Message], tokenizer: Tokenizer) -> int:
    """The number of ids of the prompt."""
    return len(await asyncio.to_thread(render_prompt, conversation, tokenizer))


def _too_long(num_ids: int, max_context: int) -> ApiError:
    message = (
        f"the prompt has {num_ids} tokens; the model's context is {max_context}: send less, or truncation: auto, "
        "which leaves the oldest turns out"
    )
    return ApiError(400, message, code="context_length_exceeded", param="input")


# --- the response -----------------------------------------------------------------------------------------------------


def _response(
    body: CreateResponse, prompt: Prompt, *, sampling: SamplingParams, stored: bool, service: Service
) -> dict[str, Any]:
    """The response before it begins: what was asked for, as it is understood here."""
    choice = body.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": prompt.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": effort_of(body, default=service.settings.default_effort), "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": stored,
        "temperature": sampling.temperature,
        "text": {"format": dict(prompt.form.echo), "verbosity": "medium"},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(mode="json", exclude_none=True),
        "tools": [dict(tool) for tool in prompt.offer.echo],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
