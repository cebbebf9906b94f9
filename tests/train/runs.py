"""A model of two layers, data for it and configurations: what whole runs are tried with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.harmony.tokenizer import write_byte_tokenizer
from gptoss_jax.train import toml
from gptoss_jax.train.config import TrainConfig
from tests.tiny import TINY

TWO_LAYERS = dataclasses.replace(TINY, layer_kinds=TINY.layer_kinds[:2])
STEPS = 6


def write_inputs(folder: Path) -> Path:
    """`base` with packed experts and `plain` with bf16 ones, texts to train and to hold out, preferences."""
    for name, experts in (("base", "mxfp4"), ("plain", "bf16")):
        write_checkpoint(folder / name, TWO_LAYERS, seed=0, layout="hf", experts=experts)
        write_byte_tokenizer(folder / name / "tokenizer.json", TINY.vocab_size)
    sums = [{"prompt": f"{i}+{i + 1}=", "completion": str(2 * i + 1)} for i in range(60)]
    write_lines(folder / "train.jsonl", sums)
    write_lines(folder / "held_out.jsonl", sums[::9])
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(12)]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    """Six steps of two rows each; `changes` are by section: loop={"steps": 9}."""
    table: dict[str, Any] = {
        "model": {"checkpoint": str(folder / "base"), "dtype": "float32"},
        "method": {"rank": 2, "targets": ["q", "down"]},
        "data": {
            "files": [str(folder / "train.jsonl")],
            "evaluation": [str(folder / "held_out.jsonl")],
            "row_length": 24,
            "window": 16,
        },
        "optimizer": {"learning_rate": 0.01},
        "loop": {"steps": STEPS, "rows": 2, "evaluate_every": 3, "save_every": 2, "seed": 1},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    return toml.build(TrainConfig, table)
