"""Parameters of OpenAI's that are known and not served: asked for, they are refused by name. Knows bodies alone.

What asks for nothing beyond what is done anyway passes: null, a default, `reasoning.summary: auto`, which leaves it to
the server whether there is a summary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from gptoss_jax.harmony.messages import Effort
from gptoss_jax.server.errors import ApiError, unsupported
from gptoss_jax.server.responses.schemas import CountTokens, CreateResponse

_NEVER = {
    "access_programs": "not supported",
    "background_options": "not supported; background: true starts as soon as there is room",
    "context_management": "not supported; truncation: auto leaves the oldest turns out",
    "conversation": "conversations are not kept; go on from a response by previous_response_id",
    "image": "not supported; gpt-oss reads text alone",
    "moderation": "not supported",
    "personality": "not supported; say it in instructions",
    "prompt": "templates are not kept; send their text as instructions and input",
    "prompt_cache_options": "not supported; beginnings that prompts have in common are cached anyway",
}
_ONLY = {
    "prompt_cache_retention": ("in_memory",),
    "text.verbosity": ("medium",),
    "reasoning.summary": ("auto",),
    "reasoning.generate_summary": ("auto",),
    "reasoning.mode": ("standard",),
    "reasoning.context": ("auto", "current_turn"),
    "stream_options.include_obfuscation": (False,),
}
_WHY = {
    "text.verbosity": "the model has no such setting; say in instructions how long the answer should be",
    "reasoning.summary": "there are no summaries; the reasoning itself is in the item's content",
    "reasoning.context": "the model was trained without the reasoning of earlier turns",
}
# Whatever of these there is, is told in any case; the reasoning stands in the item in plain text, not enciphered.
_INCLUDED = ("code_interpreter_call.outputs", "message.output_text.logprobs", "reasoning.encrypted_content")
_NOT_INCLUDED = (
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
# What OpenAI's other models know, in words of this one's.
_EFFORTS: dict[str, Effort] = {"none": "low", "minimal": "low", "xhigh": "high"}


def refuse(body: CountTokens) -> None:
    """Raises ApiError for the first parameter that is asked for and cannot be had."""
    for name, why in _NEVER.items():
        if getattr(body, name, None) is not None:
            raise unsupported(name, why)
    for name, allowed in _ONLY.items():
        value = _at(body, name)
        if value is not None and value not in allowed:
            expected = " or ".join(repr(each) for each in allowed)
            raise unsupported(name, f"expected {expected}, found {value!r}" + "".join(_because(name)))
    if isinstance(body, CreateResponse):
        refuse_include(body.include or [])


def effort_of(body: CountTokens, *, default: Effort) -> Effort:
    """The effort that is asked for, in the model's words."""
    asked = body.reasoning.effort if body.reasoning is not None else None
    if asked is None:
        return default
    known: dict[str, Effort] = {effort: effort for effort in get_args(Effort)} | _EFFORTS
    if asked not in known:
        message = f"reasoning.effort: expected one of {', '.join(known)}, found {asked!r}"
        raise ApiError(400, message, code="invalid_value", param="reasoning.effort")
    return known[asked]


def refuse_include(include: Sequence[str]) -> None:
    """Raises ApiError for what is not told of an item. A name that nobody knows is skipped."""
    for name in include:
        if name in _NOT_INCLUDED:
            raise unsupported("include", f"{name!r} is not supported; expected {', '.join(_INCLUDED)}")


def _at(body: Any, path: str) -> Any:
    for name in path.split("."):
        body = getattr(body, name, None)
    return body


def _because(name: str) -> Iterator[str]:
    if name in _WHY:
        yield f"; {_WHY[name]}"
