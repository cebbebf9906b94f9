"""`demo`: the main job from end to end on the small model. Knows the order of steps; every step is a command's."""

import argparse
import contextlib
import dataclasses
import datetime
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax import checkpoint, nano
from gptoss_jax.cli import devices
from gptoss_jax.cli.terminal import progress, size, table
from gptoss_jax.cli.text import Timing, timed
from gptoss_jax.configs import model_config
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.harmony.messages import Assistant, Conversation, Developer, Function, System, User
from gptoss_jax.harmony.parse import parse
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import MeshShape, make_mesh

_MEANINGLESS = "The weights are random, so what follows means nothing:"
_KINDS = {"moe": "experts", "attention": "attention", "embedding": "vocabulary", "unembedding": "vocabulary"}

_WEATHER = Function(
    name="get_weather",
    description="Gets the weather of a city.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
_ASKED: Sequence[tuple[str, Developer | None]] = (
    ("What is 347 + 285?", None),
    ("Lena Kim is 36 years old and lives in Paris. Give name, age and city as JSON.", None),
    ("What is the weather in Lima?", Developer(functions=(_WEATHER,))),
)


def run(options: argparse.Namespace) -> int:
    mesh_shape = MeshShape.parse(options.mesh)
    devices.simulate_mesh(mesh_shape, num_processes=1)
    with _folder(options.keep) as folder:
        release, converted = _release(options.model, folder), folder / "converted"
        print(f"2. Converted for the mesh {mesh_shape}: {converted}")
        with progress("converting") as show:
            convert(release, converted, mesh=mesh_shape, on_progress=show)
        print("3. Loaded, each parameter straight to its devices")
        model = checkpoint.load(converted, mesh=make_mesh(**dataclasses.asdict(mesh_shape)))
        table("What lies where", *_placement(model))
        talk = _ask if options.model == nano.NAME else _go_on
        timing = talk(model, load_tokenizer(converted), options.max_new_tokens)
        print(f"   {timing.describe()} ({mesh_shape.num_devices} simulated devices of one CPU)")
        tries = ["gptoss-jax chat"] if options.model == nano.NAME else []
        if options.keep:
            tries += [f"gptoss-jax inspect {converted}", f"gptoss-jax verify {converted} --against {release}"]
        if tries:
            print("\nTry: " + "\n     ".join(tries))
    return 0


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is not None:
        folder = Path(keep)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gptoss-jax-demo-") as temporary:
        yield Path(temporary)


def _release(model: str, folder: Path) -> Path:
    """nano as it is, or random weights in the sizes of another model."""
    if model == nano.NAME:
        release = nano.find(nano.NAME)
        print(f"1. gpt-oss-nano, a small real model in the released layout: {release}")
        return release
    release = folder / "release"
    print(f"1. A checkpoint of the released layout with random weights: {release}")
    write_checkpoint(release, model_config(model))
    return release


def _ask(model: GptOss, tokenizer: Tokenizer, max_new_tokens: int) -> Timing:
    """Each question once, and all that the model says to it; the times are those of the last."""
    print("4. Asked")
    timing = Timing()
    for question, developer in _ASKED:
        conversation: Conversation = [System(effort="medium", date=datetime.date.today())]
        conversation += [User(text=question)] if developer is None else [developer, User(text=question)]
        settings = {"sampling": SamplingParams(temperature=0), "stop_ids": tokenizer.end_ids}
        ids = generate(model, render_prompt(conversation, tokenizer), max_new_tokens=max_new_tokens, **settings)
        timing = Timing()
        print(f"   > {question}")
        for message in parse(timed(ids, timing), tokenizer):
            print(f"     {_name(message)}: {message.text.replace(chr(10), ' · ')}")
    return timing


def _name(message: Assistant) -> str:
    return f"{message.channel} to {message.recipient}" if message.recipient else str(message.channel)


def _go_on(model: GptOss, tokenizer: Tokenizer, max_new_tokens: int) -> Timing:
    """Of random weights a text is all that can be asked for."""
    print("4. Generated")
    timing = Timing()
    ids = generate(model, tokenizer.encode(_MEANINGLESS), max_new_tokens=max_new_tokens, stop_ids=())
    print(f"   {_MEANINGLESS} {tokenizer.decode(timed(ids, timing))!r}")
    return timing


def _placement(model: GptOss) -> tuple[list[str], list[list[str]]]:
    """Bytes that each device really holds, by kind of parameter, read off the arrays."""
    held: Counter[tuple[Any, str]] = Counter()  # by (device, kind)
    for name, parameter in parameters(model).items():
        kind = next((label for word, label in _KINDS.items() if word in name.split(".")), "norms")
        for shard in parameter[...].addressable_shards:
            held[shard.device, kind] += shard.data.nbytes
    kinds = ["experts", "attention", "vocabulary", "norms"]
    rows = []
    assert model.mesh is not None
    for place, device in np.ndenumerate(model.mesh.devices):
        parts = [held[device, kind] for kind in kinds]
        rows.append([str(device), ", ".join(map(str, place)), *map(size, parts), size(sum(parts))])
    return ["device", ", ".join(model.mesh.axis_names), *kinds, "in all"], rows
