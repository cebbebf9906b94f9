"""Full training from random weights, experts as the MXFP4 that is exported: as gpt-oss-nano is made.

python examples/train/full.py                      ten steps on twenty sums
python examples/train/full.py FOLDER [settings]    its first part, on what examples/nano/make has put in FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path

import gptoss_jax
from gptoss_jax.configs import model_config, train_config_file
from gptoss_jax.harmony.tokenizer import write_byte_tokenizer
from gptoss_jax.train.config import read_config
from gptoss_jax.train.run import train

TINY_SETTINGS = (
    "data.evaluation=[]",
    "data.row_length=384",
    "loop.rows=2",
    "loop.steps=4",
    "loop.sample_every=0",
    "optimizer.warmup=1",
)


def main(folder: Path, arguments: list[str]) -> None:
    made = Path(arguments[0]) if arguments else make_sums(folder)
    files = [
        f"model.tokenizer={made}",
        f'data.files=["{made}/first.jsonl"]',
        f'data.evaluation=["{made}/evaluation.jsonl"]',
        "method.quantise=true",
    ]
    config = read_config(train_config_file("nano-first"), [*files, *(arguments[1:] or TINY_SETTINGS)])
    finished = train(folder / "run", config, on_entry=lambda entry: print(entry["kind"], entry["step"], entry["loss"]))
    assert finished.outcome is not None
    model = gptoss_jax.load(finished.outcome)  # a folder of the released layout, experts packed
    print(f"{finished.outcome.name}: {model.experts} experts, {model.config.num_layers} layers")


def make_sums(folder: Path) -> Path:
    write_byte_tokenizer(folder / "tokenizer.json", vocab_size=model_config("nano").vocab_size)
    lines = [
        {"messages": [{"role": "user", "content": f"{a} + 4"}, {"role": "assistant", "content": str(a + 4)}]}
        for a in range(20)
    ]
    (folder / "first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:])
