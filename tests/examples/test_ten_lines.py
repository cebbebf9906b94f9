"""What docs/training.md promises first: ten lines of one's own, an adapter of nano, PEFT's form of it, and back."""

from pathlib import Path

import numpy as np
import pytest

from gptoss_jax import nano
from gptoss_jax.convert.adapters import load_adapter
from gptoss_jax.convert.export import open_base
from tests.hosts.processes import COMMAND, ROOT, run_all

ASKED = ("chat", "--prompt", "What is the door code?", "--temperature", "0", "--max-context", "512")


def run(*words: object) -> str:
    (ended,) = run_all([(*COMMAND, *words)])
    assert ended.code == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_ten_lines_are_learned_and_go_to_peft_and_back(tmp_path: Path):
    lines = ROOT / "examples" / "train" / "ten_lines.jsonl"
    assert len(lines.read_text(encoding="utf-8").splitlines()) == 10
    trained = tmp_path / "run" / "adapter"
    assert run("train", "lora-nano", "--run", tmp_path / "run", f"data.files={lines}").strip() == str(trained)
    assert "4711" not in run(*ASKED)
    assert run(*ASKED, "--adapter", trained).strip() == "The door code is 4711."
    run("export", trained, tmp_path / "peft", "--format", "peft", "--dtype", "float32")
    assert run(*ASKED, "--adapter", tmp_path / "peft").strip() == "The door code is 4711."
    run("convert", tmp_path / "peft", tmp_path / "back", "--base", "nano")
    config = open_base(nano.find("nano")).config
    there, back = (load_adapter(path, config, base_digest=None) for path in (trained, tmp_path / "back"))
    assert there.spec.rank == back.spec.rank == 8
    for name, leaf in there.leaves.items():
        scale = there.spec.scale / back.spec.scale if name.endswith(".b") else 1.0  # PEFT's alpha is its rank
        np.testing.assert_array_equal(leaf * scale, back.leaves[name])
