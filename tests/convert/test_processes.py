"""Several processes on one conversion or checkpoint: the same bytes, each reading its own part, none hanging."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.checkpoint import load
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.names import file_tensors
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import parameters
from gptoss_jax.sharding import MeshShape, make_mesh
from tests.convert.worker import shard_digests
from tests.tiny import TINY

WORKER = Path(__file__).with_name("worker.py")
# 32 experts, so that most bytes are those that the mesh divides.
CONFIG = dataclasses.replace(TINY, expert_width=192, num_experts=32, layer_kinds=alternating_layers(2))
MESH = "expert=2,tensor=2"
TIMEOUT = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "source"
    write_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """Made by one process with four devices."""
    convert(source, source.parent / "checkpoint", mesh=MeshShape.parse(MESH))
    return source.parent / "checkpoint"


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that no one else is given meanwhile: it stays bound, for a server that shares it, as gRPC's do."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def run_two(*arguments: object, mesh: str = MESH) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two workers with two devices each, which see each other."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with free_port() as port:
        shared = [
            *arguments,
            "--mesh",
            mesh,
            "--devices",
            2,
            "--processes",
            2,
            "--port",
            port,
            "--batch-bytes",
            300_000,
        ]
        workers = [
            subprocess.Popen(
                [sys.executable, WORKER, *map(str, shared), "--process", str(process)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]
        try:
            printed = [process.communicate(timeout=TIMEOUT) for process in workers]
        finally:
            for process in workers:
                process.kill()
    return [(process.returncode, *texts) for process, texts in zip(workers, printed, strict=True)]


def results(ended: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    assert [code for code, _, _ in ended] == [0, 0], [error for _, _, error in ended]
    return [json.loads(text.splitlines()[-1]) for _, text, _ in ended]  # gloo prints too


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_make_the_same_checkpoint_as_one(source: Path, checkpoint: Path, tmp_path: Path):
    results(run_two("convert", source, tmp_path / "checkpoint"))
    assert tree(tmp_path / "checkpoint") == tree(checkpoint)
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("kind", ["checkpoint", "source"])
def test_each_process_loads_its_own_shards_and_reads_little_else(kind, source: Path, checkpoint: Path):
    """Onto another mesh than it was made for: four ways by expert, two of them here and two there."""
    expected = shard_digests(parameters(load(checkpoint, mesh=make_mesh(expert=4))))
    found = results(run_two("load", {"checkpoint": checkpoint, "source": source}[kind], mesh="expert=4"))
    for name, shards in expected.items():
        first, second = (process["shards"][name] for process in found)
        assert {**first, **second} == shards
        divided = any(word in name for word in ("gate_up", "down"))
        assert first.keys().isdisjoint(second.keys()) == divided
    tensors = file_tensors(CONFIG, layout="hf", experts="mxfp4")
    experts, others = (sum(x.nbytes for x in tensors if (".experts." in x.name) == of) for of in (True, False))
    for process in found:
        # Half of the experts, all of the rest, and a tenth for headers, manifest and Orbax's notes on every parameter.
        assert process["bytes_read"] < 1.1 * (experts / 2 + others) < 0.7 * (experts + others)


def test_a_bad_scale_stops_both_processes(source: Path, tmp_path: Path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = TensorFolder.open(folder).tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with info.file.open("r+b") as file:
        file.seek(info.offset + (20 * 160 + 17) * 6 + 2)
        file.write(b"\xff")
    (first, _, first_error), (second, _, second_error) = run_two("convert", folder, tmp_path / "checkpoint")
    assert (first, second) == (1, 1)
    assert "process 1 failed at reading the source; its own message says why" in first_error
    assert "down_proj_scales holds scale byte 255 (NaN) at (20, 17, 2)" in second_error
    assert os.listdir(tmp_path) == ["source"]
