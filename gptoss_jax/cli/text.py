"""`generate`: a prompt in, streamed text or JSON out, timings beside it. Knows text and ids; samples nothing itself."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from gptoss_jax import checkpoint
from gptoss_jax.cli import adapters, devices, programs
from gptoss_jax.cli.agreement import agree_on_command
from gptoss_jax.engine.generate import generate as generate_ids
from gptoss_jax.engine.request import STOP_IDS, SamplingParams
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import check_way
from gptoss_jax.model.transformer import GptOss, abstract_model
from gptoss_jax.sharding import MeshShape, make_mesh


@dataclasses.dataclass
class Timing:
    """When the ids of one generation came, in seconds. The first two waited for their steps to be compiled."""

    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Tokens per second from the third on."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1]) if len(self.times) > 2 else None

    def describe(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:.2f} tokens/s from the third on"
        return f"{len(self.times)} tokens, the first after {self.times[0]:.2f} s (with compiling){rate}"


def generate(options: argparse.Namespace) -> int:
    shape = None if options.mesh in (None, "auto") else MeshShape.parse(options.mesh)
    if options.host_devices is not None:
        devices.simulate(options.host_devices)
    programs.keep()
    with devices.joined(options) as hosts:
        first, path = hosts.process_id == 0, Path(options.checkpoint)
        config, experts = checkpoint.sizes(path)
        tokenizer, prompt = _prompt(path, options)
        if options.mesh == "auto":
            context = len(prompt) + options.max_new_tokens
            shape = devices.choose(options, config, experts, batch=1, context=context, first=first)
        mesh = None if shape is None else make_mesh(**dataclasses.asdict(shape))
        devices.check_all_take_part(mesh, hosts)
        settings = {"mesh": mesh, "dtype": jnp.dtype(options.dtype), "impl": options.impl, "dispatch": options.dispatch}
        settings |= {"dense": options.dense, "embedding": options.embedding}
        _rehearse(config, prompt, options, experts=experts, **settings)
        agree_on_command(options, checkpoint=path, prompt=prompt)
        trained = adapters.read(adapters.only(options.adapter), checkpoint=path, config=config)
        with devices.enough_memory():
            model = adapters.attached(checkpoint.load(path, **settings), trained)
            _print(model, tokenizer, prompt, options, first=first)
    return 0


def _rehearse(
    config: ModelConfig, prompt: Sequence[int], options: argparse.Namespace, *, mesh: Mesh | None, **settings: Any
) -> None:
    """Raises whatever loading and generating would refuse, before weights are read: one layer speaks for all, and
    shapes for its weights."""
    check_way(options.dispatch, mesh=mesh)
    one_layer = dataclasses.replace(config, layer_kinds=config.layer_kinds[:1])
    _ids(abstract_model(one_layer, mesh=mesh, **settings), prompt, options, stop_ids=STOP_IDS)


def _print(
    model: GptOss, tokenizer: Tokenizer | None, prompt: Sequence[int], options: argparse.Namespace, *, first: bool
) -> None:
    """As the ids come, or as one JSON object at the end."""
    timing, ids, stop_ids = Timing(), [], STOP_IDS if tokenizer is None else tokenizer.end_ids
    stream = tokenizer.stream() if tokenizer and not options.json else None
    for token_id in timed(_ids(model, prompt, options, stop_ids=stop_ids), timing):
        ids.append(token_id)
        if stream:
            print(stream.push(token_id), end="", flush=True)
        elif not options.json:
            print(token_id, end=" ", flush=True)
    if options.json:
        stopped_by = ids[-1] if ids and ids[-1] in stop_ids else None
        print(json.dumps(_document(model, tokenizer, prompt, ids, timing) | {"stopped_by": stopped_by}))
    else:
        print(stream.finish() if stream else "")
        if first:
            print(timing.describe(), file=sys.stderr)


def timed(ids: Iterator[int], timing: Timing) -> Iterator[int]:
    """The ids, with `timing` filled in as they come."""
    start = time.perf_counter()
    for token_id in ids:
        timing.times.append(time.perf_counter() - start)
        yield token_id


def _prompt(path: Path, options: argparse.Namespace) -> tuple[Tokenizer | None, list[int]]:
    """With ids a tokenizer is a comfort, with text a need."""
    if (options.text is None) == (options.tokens is None):
        raise UserError("expected a TEXT or --tokens, one of the two")
    if options.tokens is not None:
        tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
        return tokenizer, _parse_ids(options.tokens)
    tokenizer = load_tokenizer(path)
    return tokenizer, tokenizer.encode(sys.stdin.read() if options.text == "-" else options.text)


def _parse_ids(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise UserError(f"--tokens holds {word!r}; expected ids separated by commas, as in 1,2,3")
    return [int(word) for word in words]


def _ids(
    model: GptOss, prompt: Sequence[int], options: argparse.Namespace, *, stop_ids: Collection[int]
) -> Iterator[int]:
    settings = {"max_new_tokens": options.max_new_tokens, "sampling": _sampling(options), "stop_ids": stop_ids}
    return generate_ids(model, prompt, **settings)


def _sampling(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(map(_parse_bias, options.logit_bias)),
        seed=options.seed,
    )


def _parse_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias is {text!r}; expected ID=VALUE, as in 1234=-5") from None


def _document(
    model: GptOss, tokenizer: Tokenizer | None, prompt: Sequence[int], ids: Sequence[int], timing: Timing
) -> dict[str, object]:
    return {
        "prompt_ids": list(prompt),
        "ids": list(ids),
        "text": tokenizer.decode(ids) if tokenizer else None,
        "seconds_to_first_token": timing.times[0],
        "tokens_per_second": timing.rate,
        "mesh": None if model.mesh is None else dict(model.mesh.shape),
        "dtype": str(model.dtype),
    }
