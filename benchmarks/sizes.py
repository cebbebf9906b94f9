"""How many bytes a model's release has and one decoded token touches, read off the table of parameters. Runs nothing.

A command of its own, which prints JSON: counting needs jax, and the scripts that measure peak memory must stay small.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks import report
from gptoss_jax.configs import model_config
from gptoss_jax.convert.names import file_tensors
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import abstract_model, parameters

_EXPERTS, _ATTENTION, _UNEMBEDDING, _REST = "experts", "attention", "unembedding", "norms, routers, one embedding"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, help="keep only the first ones")
    return report.main(_count, parser.parse_args())


def _count(options: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")
    config = model_config(options.model)
    config = dataclasses.replace(config, layer_kinds=config.layer_kinds[: options.layers])
    print(json.dumps({"layers": config.num_layers, "release": release_bytes(config), "token": token_bytes(config)}))


def release_bytes(config: ModelConfig) -> int:
    """Of the weights as released: experts in MXFP4, the rest in bfloat16."""
    return sum(tensor.nbytes for tensor in file_tensors(config, layout="hf", experts="mxfp4"))


def token_bytes(config: ModelConfig) -> dict[str, int]:
    """Of the weights that a token decoded alone must read, by kind: its own experts, one row of the embedding, the
    others whole. Keys and values are left out: 49 kB a token in the 20b, little beside the weights in a short text."""
    found: Counter[str] = Counter()
    for name, parameter in parameters(abstract_model(config, dtype=jnp.bfloat16)).items():
        words = name.split(".")
        nbytes = math.prod(parameter.shape) * parameter.dtype.itemsize
        if "gate_up" in words or "down" in words:
            found[_EXPERTS] += nbytes * config.experts_per_token // config.num_experts
        elif words[0] == "embedding":
            found[_REST] += nbytes // config.vocab_size
        else:
            kind = _ATTENTION if "attention" in words else _UNEMBEDDING if words[0] == "unembedding" else _REST
            found[kind] += nbytes
    return {kind: found[kind] for kind in (_EXPERTS, _ATTENTION, _UNEMBEDDING, _REST)}


if __name__ == "__main__":
    sys.exit(main())
