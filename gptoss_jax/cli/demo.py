"""`demo`: the main job from end to end on a made-up model. Knows the order of steps; every step is a command's."""

import argparse
import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax import checkpoint
from gptoss_jax.cli import devices
from gptoss_jax.cli.terminal import progress, size, table
from gptoss_jax.cli.text import Timing, timed
from gptoss_jax.configs import model_config
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.engine.generate import generate
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import MeshShape, make_mesh

_PROMPT = "The weights are random, so what follows means nothing:"
_KINDS = {"moe": "experts", "attention": "attention", "embedding": "vocabulary", "unembedding": "vocabulary"}


def run(options: argparse.Namespace) -> int:
    mesh_shape = MeshShape.parse(options.mesh)
    devices.simulate_mesh(mesh_shape, num_processes=1)
    with _folder(options.keep) as folder:
        release, converted = folder / "release", folder / "converted"
        print(f"1. A checkpoint of the released layout with random weights: {release}")
        write_checkpoint(release, model_config(options.model))
        print(f"2. Converted for the mesh {mesh_shape}: {converted}")
        with progress("converting") as show:
            convert(release, converted, mesh=mesh_shape, on_progress=show)
        print("3. Loaded, each parameter straight to its devices")
        model = checkpoint.load(converted, mesh=make_mesh(**dataclasses.asdict(mesh_shape)))
        table("What lies where", *_placement(model))
        print("4. Generated")
        tokenizer, timing = load_tokenizer(converted), Timing()
        ids = generate(model, tokenizer.encode(_PROMPT), max_new_tokens=options.max_new_tokens, stop_ids=())
        text = tokenizer.decode(timed(ids, timing))
        print(f"   {_PROMPT} {text!r}")
        print(f"   {timing.describe()} ({mesh_shape.num_devices} simulated devices of one CPU)")
        if options.keep:
            print(f"\nTry: gptoss-jax inspect {converted}\n     gptoss-jax verify {converted} --against {release}")
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
