"""The benchmarks that scripts/gpu runs, on the CPU and a tiny model: they run and say what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["gpu_steps", "gpu_peers"])
def test_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.slow
def test_peers_are_measured_or_say_what_they_miss(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small = ["--model", "tiny", "--layers", "1", "--rows", "1,3", "--context", "20", "--prompt", "12", "--tokens", "2"]
    out = tmp_path / "peers.json"
    done = run("gpu_peers", *small, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    transformers, openai = result["peers"]
    assert [step["rows"] for step in transformers["decode"]] == [1, 3]
    assert min(step["tokens_per_second"] for step in [*transformers["decode"], transformers["prefill"]]) > 0
    assert openai.get("skipped") or openai["decode"]  # it runs on CUDA alone


def test_gpu_script_says_what_is_wrong() -> None:
    done = subprocess.run([ROOT / "scripts" / "gpu", "--wat"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--wat is unknown; there are --quick, --dry-run, --tune and --no-tests" in done.stderr
