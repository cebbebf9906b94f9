"""The benchmarks run from end to end on a tiny model and say what they should; no time is judged."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def result_of(name: str, tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    """What the benchmark wrote, after looking at what every result holds and that nothing was left behind."""
    work, out = tmp_path / "work", tmp_path / "new" / "result.json"
    work.mkdir()
    where = [] if name == "startup" else ["--dir", work]
    done = run(name, *arguments, *where, "--out", out)
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir())
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert result["command"].startswith(f"python -m benchmarks.{name} ")
    assert str(tmp_path) not in json.dumps(result)  # results are committed: they name nobody's folders
    assert set(result["commit"]) == {"id", "dirty"}
    assert {"cpu", "cores", "memory_bytes", "kernel", "load_before"} <= result["machine"].keys()
    assert {"python", "gptoss-jax", "jax", "orbax-checkpoint"} <= result["versions"].keys()
    return result


@pytest.mark.slow
def test_conversion(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--layers", "1", "--rounds", "1", "--cache", "cold", "--mesh", "expert=4"]
    result = result_of("conversion", tmp_path, *arguments)
    assert (result["model"], result["cache"], result["mesh"]) == ("tiny", "cold", "expert=4")
    (measured,) = result["runs"]
    assert measured["layers"] == 1
    steps = measured["steps"]
    assert [step["step"] for step in steps] == ["init", "cp", "cp", "convert", "cat", "verify", "export"]
    for step in steps:
        assert step["bytes"] > 0
        assert step["seconds"] >= step["sync_seconds"] >= 0
        assert step["bytes_per_second"] == pytest.approx(step["bytes"] / step["seconds"])
    ceilings = {step["step"]: step["ceiling"] for step in steps if "ceiling" in step}
    assert ceilings == {"convert": "cp", "verify": "cat", "export": "cp"}
    fastest = max(step["bytes_per_second"] for step in steps if step["step"] == "cp")
    (convert,) = (step for step in steps if step["step"] == "convert")
    assert convert["share_of_ceiling"] == pytest.approx(convert["bytes_per_second"] / fastest)


@pytest.mark.slow
def test_cpu_generate(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--layers", "2", "--tokens", "5", "--buffer-bytes", "8000000"]
    result = result_of("cpu_generate", tmp_path, *arguments)
    decoding = result["decoding"]
    assert (decoding["tokens"], len(decoding["token_seconds"]), decoding["dtype"]) == (5, 4, "bfloat16")
    assert result["peak_rss_bytes"] >= decoding["load_peak_rss_bytes"] > result["disk"]["bytes"] > 0
    # Counted by hand for TINY's two layers, in bytes: 2 of 8 experts, packed in blocks of 17 bytes for 32 weights.
    per_expert = 2 * 224 * 160 // 32 * 17 + 2 * 224 * 2 + 160 * 224 // 32 * 17 + 160 * 2
    attention_weights = 160 * 16 * (12 + 4 + 4) + 16 * (12 + 4 + 4) + 12 * 16 * 160 + 160
    assert result["token_bytes"] == {
        "experts": 2 * 2 * per_expert,
        "attention": 2 * (2 * attention_weights + 4 * 12),  # sinks are float32
        "unembedding": 352 * 160 * 2,
        "norms, routers, one embedding": 2 * (2 * 160 * 4 + 8 * 160 * 2 + 8 * 2) + 160 * 4 + 160 * 2,
    }
    roof = result["memory"]["bytes_per_second"] / sum(result["token_bytes"].values())
    assert result["share_of_roof"] == pytest.approx(result["tokens_per_second"] / roof)


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    result = result_of("startup", tmp_path, "--runs", "1")
    beside = {entry["command"]: entry["beside"] for entry in result["commands"]}
    assert beside == {
        "python -c pass": None,
        "import gptoss_jax": "python -c pass",
        "gptoss-jax --help": "python -c pass",
        "import jax": "python -c pass",
        "gptoss_jax.load": "import jax",
    }
    for entry in result["commands"]:
        assert 0 < entry["fastest_seconds"] <= entry["median_seconds"] <= entry["slowest_seconds"]


def test_a_command_that_fails_is_shown_and_leaves_nothing(tmp_path: Path) -> None:
    done = run("conversion", "--model", "tiny", "--mesh", "expert=3", "--dir", tmp_path, "--out", tmp_path / "out.json")
    assert done.returncode == 1
    assert "gptoss-jax convert: " in done.stderr
    assert "mesh axis expert=3 does not divide" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["conversion", "cpu_generate"])
def test_a_folder_that_is_not_there_is_said(name: str, tmp_path: Path) -> None:
    done = run(name, "--model", "tiny", "--dir", tmp_path / "none", "--out", tmp_path / "out.json")
    assert done.returncode == 2
    assert "is no folder; expected one on the disk to be measured" in done.stderr


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = run("conversion", "--model", "tinny", "--dir", tmp_path, "--out", tmp_path / "out.json")
    assert "no model is named 'tinny': did you mean tiny?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.conversion", "--model", "tiny", "--dir", str(tmp_path)]
    running = subprocess.Popen([*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/release")):  # it is writing its input
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.terminate()
    assert running.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["conversion", "cpu_generate", "startup", "sizes", "bandwidth", "decoding"])
def test_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
