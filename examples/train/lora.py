"""LoRA on attention and experts, the experts packed as released: train, chat with the adapter, hand it to PEFT.

python examples/train/lora.py                         a tiny random model, ten lines of data
python examples/train/lora.py CKPT train.jsonl        yours; further words are settings: optimizer.learning_rate=1e-4
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import gptoss_jax
from gptoss_jax import checkpoint
from gptoss_jax.configs import model_config, train_config_file
from gptoss_jax.convert.adapters import load_adapter
from gptoss_jax.convert.peft import write_peft
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.harmony.messages import System, User
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.model.adapter import with_adapters
from gptoss_jax.train.config import read_config
from gptoss_jax.train.run import train

TINY_SETTINGS = ("data.row_length=256", "loop.accumulate=1", "loop.rows=2", "loop.epochs=2", "optimizer.warmup=1")


def main(folder: Path, arguments: list[str]) -> None:
    path, data, *settings = arguments or [*make_tiny(folder), *TINY_SETTINGS]
    config = read_config(
        train_config_file("lora-20b"), [f"model.checkpoint={path}", f'data.files=["{data}"]', *settings]
    )
    finished = train(folder / "run", config, on_entry=lambda entry: print(entry["kind"], entry["step"], entry["loss"]))
    assert finished.outcome is not None
    sizes, _ = checkpoint.sizes(path)
    adapter = load_adapter(finished.outcome, sizes)

    model = with_adapters(gptoss_jax.load(path), [adapter])
    tokenizer = gptoss_jax.load_tokenizer(Path(path))
    prompt = render_prompt([System(), User(text="Name a colour.")], tokenizer)
    print(repr(tokenizer.decode(list(gptoss_jax.generate(model, prompt, max_new_tokens=16)))))
    write_peft(folder / "peft", adapter, config=sizes)
    print("for PEFT, transformers and vLLM:", sorted(file.name for file in (folder / "peft").iterdir()))


def make_tiny(folder: Path) -> tuple[str, str]:
    """A stand-in with two layers and random weights, and ten conversations."""
    config = model_config("tiny")
    write_checkpoint(folder / "tiny", dataclasses.replace(config, layer_kinds=config.layer_kinds[:2]))
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Green."}]
    (folder / "train.jsonl").write_text(10 * (json.dumps({"messages": turns}) + "\n"))
    return str(folder / "tiny"), str(folder / "train.jsonl")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:])
