"""The small files beside the weights in each released layout: config, generation defaults, dtypes. Knows no weights."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_jax.convert.json_file import parse_object
from gptoss_jax.convert.names import BFLOAT16, FileTensor, Layout
from gptoss_jax.harmony.tokenizer import O200K_VOCAB_SIZE, o200k_specials
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import Experts

TOKENIZER_NAME = "tokenizer.json"
DTYPES_NAME = "dtypes.json"
ORIGINAL_SHARD_NAME = "model--{number:05d}-of-{count:05d}.safetensors"

_FLOAT_NAMES = {BFLOAT16: "BF16", np.dtype(np.float32): "FP32"}
_START, _RETURN, _CALL, _END = "<|startoftext|>", "<|return|>", "<|call|>", "<|endoftext|>"


def companions(
    config: ModelConfig,
    tensors: Sequence[FileTensor],
    *,
    layout: Layout,
    experts: Experts,
    tokenizer: bytes | None,
) -> dict[str, bytes]:
    """What the release keeps beside `tensors`, by file name; the tokenizer, a tokenizer.json, goes with either layout.

    Raises:
        UserError: OpenAI's config.json cannot say what `config` says, or the tokenizer is no JSON object.
    """
    found = {} if tokenizer is None else {TOKENIZER_NAME: tokenizer}
    if layout == "original":
        dtypes = {tensor.name: _openai_dtype(tensor) for tensor in tensors}
        return found | {"config.json": as_json(config.to_openai()), DTYPES_NAME: as_json(dtypes)}
    ids = _special_ids(tokenizer, config.vocab_size)
    special: dict[str, Any] = {}
    if ids.keys() >= {_START, _RETURN, _CALL, _END}:
        # A small vocabulary has its special tokens elsewhere; transformers refuses ids that lie outside.
        special = {"eos_token_id": ids[_RETURN], "pad_token_id": ids[_END]}
        generation = {
            "bos_token_id": ids[_START],
            "do_sample": True,
            "eos_token_id": [ids[_RETURN], ids[_END], ids[_CALL]],
            "pad_token_id": ids[_END],
        }
        found["generation_config.json"] = as_json(generation)
    return found | {"config.json": as_json(config.to_hf(mxfp4=experts == "mxfp4") | special)}


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _openai_dtype(tensor: FileTensor) -> str:
    packed = {"blocks": "FP4", "scales": "UE8"}
    return packed.get(tensor.name.rpartition(".")[2]) or _FLOAT_NAMES[tensor.dtype]


def _special_ids(tokenizer: bytes | None, vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens by name: the tokenizer's own, or the release's if the vocabulary has them."""
    if tokenizer is None:
        return o200k_specials() if vocab_size >= O200K_VOCAB_SIZE else {}
    added = parse_object(tokenizer, name=TOKENIZER_NAME).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = {token.get("content"): token.get("id") for token in tokens}
    return {name: id_ for name, id_ in ids.items() if isinstance(name, str) and type(id_) is int and id_ < vocab_size}
