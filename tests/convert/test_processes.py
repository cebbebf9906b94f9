"""Several processes on one conversion or checkpoint: the same bytes, each reading its own part, none hanging."""

import dataclasses
import functools
import json
import operator
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.checkpoint import load
from gptoss_jax.convert import store
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.names import file_tensors
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import parameters
from gptoss_jax.sharding import MeshShape, make_mesh
from tests.convert.worker import shard_digests
from tests.hosts.processes import Ended, free_port, run_all
from tests.tiny import TINY

WORKER = Path(__file__).with_name("worker.py")
# 32 experts, so that most bytes are those that the mesh divides.
CONFIG = dataclasses.replace(TINY, expert_width=192, num_experts=32, layer_kinds=alternating_layers(2))
MESH = "expert=2,tensor=2"
CHUNK_BYTES = 20_000  # less than two experts, so that each has files of its own, as in a real checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "source"
    write_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """Made by four processes with a device each."""
    results(run("convert", source, source.parent / "checkpoint", num_processes=4, devices=1))
    return source.parent / "checkpoint"


def run(*arguments: object, num_processes: int, devices: int, mesh: str = MESH) -> list[Ended]:
    """Workers that see each other, with `devices` each."""
    shared = (*arguments, "--mesh", mesh, "--devices", devices, "--processes", num_processes, "--port", free_port())
    command = (sys.executable, WORKER, *shared, "--batch-bytes", 300_000, "--chunk-bytes", CHUNK_BYTES)
    return run_all([(*command, "--process", process) for process in range(num_processes)])


def results(ended: list[Ended]) -> list[dict[str, Any]]:
    assert [process.code for process in ended] == [0] * len(ended), [process.stderr for process in ended]
    return [json.loads(process.stdout.splitlines()[-1]) for process in ended]  # gloo prints too


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_four_processes_make_the_same_checkpoint_as_one(monkeypatch, source: Path, checkpoint: Path, tmp_path: Path):
    monkeypatch.setattr(store, "_CHUNK_BYTES", CHUNK_BYTES)
    convert(source, tmp_path / "checkpoint", mesh=MeshShape.parse(MESH))
    assert tree(tmp_path / "checkpoint") == tree(checkpoint)
    assert sorted(os.listdir(checkpoint.parent)) == ["checkpoint", "source"]


@pytest.mark.parametrize("kind", ["checkpoint", "source"])
def test_each_process_loads_its_own_shards_and_reads_little_else(kind, source: Path, checkpoint: Path):
    """Onto another mesh than it was made for: four ways by expert, each in a process of its own."""
    expected = shard_digests(parameters(load(checkpoint, mesh=make_mesh(expert=4))))
    folder = {"checkpoint": checkpoint, "source": source}[kind]
    found = results(run("load", folder, num_processes=4, devices=1, mesh="expert=4"))
    for name, shards in expected.items():
        held = [process["shards"][name] for process in found]
        assert functools.reduce(operator.or_, held) == shards
        divided = any(word in name for word in ("gate_up", "down"))
        assert sum(map(len, held)) == (len(shards) if divided else 4 * len(shards))
    tensors = file_tensors(CONFIG, layout="hf", experts="mxfp4")
    experts, others = (sum(x.nbytes for x in tensors if (".experts." in x.name) == of) for of in (True, False))
    for process in found:
        # A quarter of the experts, all of the rest, and a tenth for headers, manifest and notes on every parameter.
        assert process["bytes_read"] < 1.1 * (experts / 4 + others) < 0.6 * (experts + others)


def test_a_bad_scale_stops_both_processes(source: Path, tmp_path: Path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = TensorFolder.open(folder).tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with info.file.open("r+b") as file:
        file.seek(info.offset + (20 * 160 + 17) * 6 + 2)
        file.write(b"\xff")
    first, second = run("convert", folder, tmp_path / "checkpoint", num_processes=2, devices=2)
    assert (first.code, second.code) == (1, 1)
    assert "process 1 failed at reading the source; its own message says why" in first.stderr
    assert "down_proj_scales holds scale byte 255 (NaN) at (20, 17, 2)" in second.stderr
    assert os.listdir(tmp_path) == ["source"]
