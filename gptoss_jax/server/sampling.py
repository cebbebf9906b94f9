"""How ids are chosen and how likely they were, between JSON and the engine. Knows numbers; knows no conversation."""

import secrets
from collections.abc import Mapping
from typing import Any

from gptoss_jax.engine.request import SamplingParams, Token
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.errors import ApiError

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


def sampling_of(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[str, float] | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
) -> SamplingParams:
    """The settings of one request; what is None has the engine's default, and no seed means any.

    Args:
        top_k: 0 and -1 are off: other servers have the one or the other.
        logit_bias: ids as JSON's keys, which are texts.
        seed: of any size; the engine's has 32 bits.
        logprobs: how many of the best ids are told.

    Raises:
        ApiError: a key of `logit_bias` is no id. Ranges are the engine's to check.
    """
    asked = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0 if top_k == -1 else top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": None if logit_bias is None else {_id_of(key): bias for key, bias in logit_bias.items()},
        "seed": secrets.randbits(32) if seed is None else seed % 2**32,
        "logprobs": logprobs,
    }
    return SamplingParams(**{name: value for name, value in asked.items() if value is not None})


def logprob_body(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token with how likely it was, and the likeliest in its place."""
    top = [_told(token_id, logprob, tokenizer) for token_id, logprob in token.top]
    return _told(token.id, token.logprob, tokenizer) | {"top_logprobs": top}


def _told(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token_id])
    text = data.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}


def _id_of(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise ApiError(400, f"logit_bias: expected ids as keys, found {key[:40]!r}", param="logit_bias")
    return int(key)
