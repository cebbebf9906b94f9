"""What a user gets wrong: one sentence on stderr that names it and the way out, exit code 2, and nothing in the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gptoss_jax.cli import main


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
        ("expert=3", "experts=8, which mesh axis expert=3 does not divide: choose expert among 1, 2"),
        ("tensor=2", "expert_width_blocks=7, which mesh axis tensor=2 does not divide"),
        ("experts=2", "names axis 'experts'; expected data, expert, tensor"),
        ("expert=two", "gives expert the size 'two'; expected a positive integer"),
        ("data=16", "16"),
    ],
)
def test_a_mesh_that_does_not_fit(say, tiny_hf: Path, tmp_path: Path, mesh: str, complaint: str):
    assert complaint in say("convert", tiny_hf, tmp_path / "out", "--mesh", mesh)
    assert not [*tmp_path.iterdir()]


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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "expected a TEXT or --tokens"),
        (["text", "--tokens", "1"], "expected a TEXT or --tokens"),
        (["--tokens", "1,b"], "--tokens holds 'b'; expected ids separated by commas"),
        (["--tokens", "1,352"], "holds id 352; expected 0 to 351"),
        (["text", "--top-p", "0"], "top_p is 0.0; expected more than 0"),
        (["text", "--temperature", "-1"], "temperature is -1.0; expected 0 (greedy) or more"),
        (["text", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["text", "--mesh", "expert=16"], "needs 16 devices, there are 8"),
        (["text", "--host-devices", "0"], "--host-devices is 0; expected at least 1"),
    ],
)
def test_generate(say, tiny_hf: Path, arguments: list[str], complaint: str):
    assert complaint in say("generate", tiny_hf, *arguments)


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
