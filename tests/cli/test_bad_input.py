"""What a user gets wrong: one sentence on stderr that names it and the way out, exit code 2, and nothing in the way."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from gptoss_jax.cli import main
from gptoss_jax.cli.devices import enough_memory
from gptoss_jax.convert import conversion
from gptoss_jax.errors import UserError
from tests.convert.hollow import write_hollow
from tests.hosts.processes import COMMAND, free_port, run_all
from tests.tiny import TINY


@pytest.fixture(autouse=True)
def _jax_has_started():
    """So that no command here changes how many devices the other tests have."""
    assert len(jax.devices()) == 8


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail, and gives its one line of complaint."""

    def run(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 2
        found = capsys.readouterr()
        lines = [line for line in found.err.splitlines() if line.startswith("gptoss-jax ")]
        assert len(lines) == 1, found.err
        return lines[0]

    return run


def test_destination_exists(say, tiny_hf: Path, tmp_path: Path):
    assert f"{tmp_path} exists; expected a destination that does not" in say("convert", tiny_hf, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_source_is_destination(say, tiny_hf: Path):
    assert "is the source itself" in say("convert", tiny_hf, tiny_hf)


def test_no_such_source(say, tmp_path: Path):
    assert f"{tmp_path / 'nothing'} is no folder; expected a released folder" in say(
        "convert", tmp_path / "nothing", tmp_path / "out"
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_no_such_folder(say, tmp_path: Path, command: str):
    more = ["text"] if command == "generate" else []
    assert str(tmp_path / "nothing") in say(command, tmp_path / "nothing", *more)


def test_truncated_shard(say, tiny_hf: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny_hf, source)
    weights = source / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    complaint = say("convert", source, tmp_path / "out")
    assert "model.safetensors" in complaint
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_config_that_is_not_implemented(say, tiny_hf: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny_hf, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert "hidden_act is 'gelu'; implemented is 'silu'" in say("convert", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        (
            "expert=3",
            "experts=8, which mesh axis expert=3 does not divide: choose expert among 1, 2; only the files are",
        ),
        (
            "tensor=2",
            "tensor=2 does not divide: choose tensor among 1; only the files are cut for this mesh, and a check",
        ),
        ("experts=2", "names axis 'experts'; expected data, expert, tensor"),
        ("expert=two", "gives expert the size 'two'; expected a positive integer"),
        ("expert=0", "gives expert the size '0'; expected a positive integer"),
        ("expert=-2", "gives expert the size '-2'; expected a positive integer"),
        ("expert", "gives expert the size ''; expected a positive integer"),
        ("expert=2,expert=4", "names axis 'expert' twice; name it once"),
        ("", "names axis ''; expected data, expert, tensor, as in expert=4,tensor=2"),
        ("data=16", "16 CPU devices are wanted and jax has started with 8: run the command in a process of its own"),
    ],
)
def test_a_mesh_that_does_not_fit(say, tiny_hf: Path, tmp_path: Path, mesh: str, complaint: str):
    assert complaint in say("convert", tiny_hf, tmp_path / "out", "--mesh", mesh)
    assert not [*tmp_path.iterdir()]


def test_a_mesh_with_more_devices_than_heads(say, tiny_hf: Path):
    complaint = "mesh axis tensor=13 exceeds the model's 12 query heads: choose tensor up to 12"
    assert complaint in say("inspect", tiny_hf, "--mesh", "tensor=13")


def test_an_interrupted_conversion(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """No mistake, but a command that is stopped owes a sentence too; and the next counts only what it does itself."""
    words = ("convert", str(tiny_hf), str(tmp_path / "out"))
    monkeypatch.setattr(conversion, "BATCH_BYTES", 1_000_000)
    save, batches = conversion.store.save, iter(range(100))

    def save_one(*arguments: Any) -> None:
        if next(batches) == 1:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(conversion.store, "save", save_one)
    assert main(words) == 130
    assert "gptoss-jax convert: interrupted; the same command goes on from here" in capsys.readouterr().err
    assert main(words) == 0
    assert re.search(r"/out: 4\.03 MB, the last 3\.\d\d MB in \d+\.\d s, ", capsys.readouterr().err)


def test_a_model_without_a_name(say, tmp_path: Path):
    assert "did you mean gpt-oss-20b?" in say("init", tmp_path / "out", "--model", "gpt-oss-20")


def test_more_layers_than_there_are(say, tmp_path: Path):
    assert "--layers is 9; the model has 1 to 6" in say("init", tmp_path / "out", "--model", "tiny", "--layers", 9)


def test_bf16_experts_in_openais_layout(say, tmp_path: Path):
    complaint = say("init", tmp_path / "out", "--model", "tiny", "--layout", "original", "--expert-format", "bf16")
    assert "OpenAI's layout holds MXFP4 experts only" in complaint
    assert not [*tmp_path.iterdir()]


def test_export_of_what_is_no_checkpoint(say, tiny_hf: Path, tmp_path: Path):
    complaint = say("export", tiny_hf, tmp_path / "out", "--format", "original")
    assert str(tiny_hf) in complaint
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vocabulary of 640 GB, none of which is there: a command that loads it ends in no sentence."""
    folder = tmp_path_factory.mktemp("hollow")
    write_hollow(folder, dataclasses.replace(TINY, vocab_size=10**9))
    return folder


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "expected a TEXT or --tokens"),
        (["text", "--tokens", "1"], "expected a TEXT or --tokens"),
        (["text"], "tokenizer.json"),
        (["--tokens", "1,b"], "--tokens holds 'b'; expected ids separated by commas"),
        (["--tokens", "1,1000000000"], "holds id 1000000000; expected 0 to 999999999"),
        (["--tokens", "1", "--top-p", "0"], "top_p is 0.0; expected more than 0"),
        (["--tokens", "1", "--temperature", "-1"], "temperature is -1.0; expected 0 (greedy) or more"),
        (["--tokens", "1", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--tokens", "1", "--max-new-tokens", "131072"], "are 131073; the model's context is 131072: shorten"),
        (["--tokens", "1", "--mesh", "expert=16"], "needs 16 devices, there are 8 (cpu): make an axis smaller, or sim"),
        (["--tokens", "1", "--mesh", "expert=two"], "gives expert the size 'two'; expected a positive integer"),
        (["--tokens", "1", "--host-devices", "0"], "--host-devices is 0; expected at least 1"),
        (["--tokens", "1", "--impl", "tpu"], "'tpu' runs on tpu, the devices here are cpu: choose one of xla"),
        (
            ["--tokens", "1", "--impl", "attention=gpu"],
            "'gpu' runs on gpu, the devices here are cpu: choose one of xla",
        ),
        (["--tokens", "1", "--impl", "xls"], "no implementation 'xls': did you mean xla? expected one of xla"),
        (
            ["--tokens", "1", "--impl", "moe_mat=xla"],
            "names op 'moe_mat'; expected one of attention, linear, moe_matmul",
        ),
        (["--tokens", "1", "--dispatch", "redu"], "dispatch 'redu' is unknown; expected one of reduce, exchange, rag"),
        (
            ["--tokens", "1", "--mesh", "expert=2", "--dispatch", "ragged"],
            "the mesh's devices are cpu: choose 'exchange'",
        ),
    ],
)
def test_generate_before_it_loads(say, hollow: Path, arguments: list[str], complaint: str):
    assert complaint in say("generate", hollow, *arguments)


def test_a_device_that_is_full():
    """2**50 bytes are more than the addresses of a process, whatever the machine has."""
    with (
        pytest.raises(
            UserError, match=r"too little memory \(Out of memory allocating 1125899906842624 bytes\): spread the model"
        ),
        enough_memory(),
    ):
        jax.numpy.zeros(1 << 50, jax.numpy.uint8).block_until_ready()


def test_processes_that_count_differently_or_are_given_no_mesh(hollow: Path):
    """Nobody waits, and nothing is loaded."""
    word = (*COMMAND, "generate", hollow, "--tokens", 1, "--host-devices", 1, "--join-timeout", 100, "--coordinator")
    for counts, complaint in (
        ((2, 3), "do not agree on the number of processes: give all the same --num-processes"),
        (
            (2, 2),
            "--mesh is missing: it lays the model over the devices of the 2 processes; choose sizes whose product",
        ),
    ):
        where = f"127.0.0.1:{free_port()}"
        for process in run_all(
            [(*word, where, "--num-processes", count, "--process-id", i) for i, count in enumerate(counts)]
        ):
            assert process.code == 2, process.stderr
            assert complaint in process.stderr
            assert "Traceback" not in process.stderr
            assert process.stdout == ""


def test_half_of_the_process_flags(say, tiny_hf: Path, tmp_path: Path):
    complaint = say("convert", tiny_hf, tmp_path / "out", "--coordinator", "localhost:1")
    assert "belong together: give all three, or none" in complaint


def test_unknown_options_and_help_leave_by_argparse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "folder", "--beams", "4"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "convert" in capsys.readouterr().out


def test_help_imports_no_jax():
    program = (
        "import sys, gptoss_jax.cli as cli\ntry: cli.main(['convert', '-h'])\nfinally: assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_an_extra_that_is_not_installed():
    """In a process of its own, where none has been imported. What belongs to no extra keeps its traceback."""
    program = """
import sys
from gptoss_jax.cli import main

for name in sys.argv[1:]:
    sys.modules[name] = None  # as if it were not installed
    assert main(["serve", "folder"]) == 2
    del sys.modules[name]
sys.modules["gptoss_jax.server.app"] = None
main(["serve", "folder"])
"""
    names = ["uvicorn", "fastapi", "llguidance", "prometheus_client"]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if line.startswith("gptoss-jax serve: ")]
    assert complaints == [
        f'gptoss-jax serve: {name} is not installed; pip install "gptoss-jax[serve]" brings it' for name in names
    ]
    assert "ModuleNotFoundError: import of gptoss_jax.server.app halted" in done.stderr
    assert done.returncode == 1
