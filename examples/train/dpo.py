"""Preferences: an adapter learns to prefer one answer to another (DPO, arXiv:2305.18290).

python examples/train/dpo.py                         a tiny random model, eight pairs
python examples/train/dpo.py CKPT pairs.jsonl        yours: lines of prompt, chosen, rejected
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.configs import train_config_file
from gptoss_jax.train.config import read_config
from gptoss_jax.train.run import train

sys.path.append(str(Path(__file__).parent))
from lora import make_tiny

TINY_SETTINGS = (
    *("data.row_length=256", "loop.rows=4", "loop.accumulate=1", "loop.epochs=4"),
    *("optimizer.learning_rate=1e-3", "optimizer.warmup=0"),
)


def show(entry: Mapping[str, Any]) -> None:
    """The loss begins at ln 2: the adapter has no preference yet. Accuracy is of pairs with the chosen one ahead."""
    if entry["kind"] == "step":
        print(f"step {entry['step']}: loss {entry['loss']:.4f}, accuracy {entry['accuracy']:.2f}")


def main(folder: Path, arguments: list[str]) -> None:
    path, data, *settings = arguments or [make_tiny(folder)[0], make_pairs(folder), *TINY_SETTINGS]
    config = read_config(train_config_file("dpo"), [f"model.checkpoint={path}", f'data.files=["{data}"]', *settings])
    train(folder / "run", config, on_entry=show)


def make_pairs(folder: Path) -> str:
    pair = {"prompt": "Name a colour.", "chosen": "Green, say.", "rejected": "No."}
    (folder / "pairs.jsonl").write_text(8 * (json.dumps(pair) + "\n"))
    return str(folder / "pairs.jsonl")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:])
