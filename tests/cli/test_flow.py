"""The commands as a user types them, one after the other, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.tiny import TINY


def run(*arguments: object, code: int = 0, **settings) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from gptoss_jax.cli import main; sys.exit(main())",
        *map(str, arguments),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, **settings)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def release(folder: Path) -> Path:
    run("init", folder / "release", "--model", "tiny", "--layers", 2, "--seed", 3)
    return folder / "release"


@pytest.fixture(scope="module")
def checkpoint(folder: Path, release: Path) -> Path:
    run("convert", release, folder / "checkpoint", "--mesh", "data=1,expert=4")
    return folder / "checkpoint"


def test_a_checkpoint_equals_its_release_and_comes_back_from_it(folder: Path, release: Path, checkpoint: Path):
    assert "whole, and equal to" in run("verify", checkpoint, "--against", release).stdout
    run("export", checkpoint, folder / "back", "--format", "hf")
    there, back = (load_file(path / "model.safetensors") for path in (release, folder / "back"))
    assert {name: array.tobytes() for name, array in there.items()} == {
        name: array.tobytes() for name, array in back.items()
    }


def test_one_flipped_bit_is_found(folder: Path, checkpoint: Path):
    copy = folder / "flipped"
    subprocess.run(["cp", "-r", checkpoint, copy], check=True)
    path = next((copy / "params/state/layers.1.moe.down.blocks").rglob("c/*/*/*/*"))
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    assert "layers.1.moe.down.blocks" in run("verify", copy, code=1).stdout


def test_inspect_speaks_to_people_and_to_machines(release: Path, checkpoint: Path):
    for path, mesh in ((release, []), (checkpoint, ["--mesh", "expert=4"])):
        text = run("inspect", path, *mesh).stdout
        assert "2 of 8 experts of 224" in text
        document = json.loads(run("inspect", path, "--json").stdout)
        assert document["config"]["width"] == TINY.width
        assert document["total"]["nbytes"] == sum(tensor["nbytes"] for tensor in document["tensors"])


def test_the_same_text_from_release_and_checkpoint_on_one_device_and_on_a_mesh(release: Path, checkpoint: Path):
    settings = ("--tokens", "5,6,7,8,9,10,11,12,13,14,15", "--max-new-tokens", 6, "--temperature", 0, "--json")
    plain = json.loads(run("generate", release, *settings, "--dtype", "float32").stdout)
    mesh = ("--mesh", "data=2,expert=4", "--host-devices", 8)
    sharded = json.loads(run("generate", checkpoint, *settings, "--dtype", "float32", *mesh).stdout)
    assert len(plain["ids"]) == 6
    assert sharded["ids"] == plain["ids"]
    assert sharded["mesh"] == {"data": 2, "expert": 4, "tensor": 1}


def test_text_streams_to_stdout_and_timings_to_stderr(checkpoint: Path):
    done = run("generate", checkpoint, "-", "--max-new-tokens", 4, "--seed", 1, input="some text")
    assert done.stdout.endswith("\n")
    assert "tokens, the first after" in done.stderr


def test_a_reader_that_stops_is_no_error(checkpoint: Path):
    program = "import sys; from gptoss_jax.cli import main; sys.exit(main())"
    shell = f'"{sys.executable}" -c "{program}" inspect "{checkpoint}" --json | head -1'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("{")
    assert done.stderr == ""
