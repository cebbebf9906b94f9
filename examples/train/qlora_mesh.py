"""QLoRA over a mesh: packed experts spread over devices, their adapter with them. What each device holds, then steps.

python examples/train/qlora_mesh.py                        a tiny random model on eight simulated devices
python examples/train/qlora_mesh.py CKPT train.jsonl       gpt-oss-120b on the eight devices of this machine
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax

from gptoss_jax.configs import train_config_file
from gptoss_jax.model.transformer import parameters
from gptoss_jax.train.config import read_config
from gptoss_jax.train.run import Opened, train

sys.path.append(str(Path(__file__).parent))
from lora import make_tiny

TINY_SETTINGS = (
    *("data.row_length=256", "loop.rows=2", "loop.accumulate=1", "loop.epochs=2"),
    *("optimizer.warmup=1", "mesh.data=2", "mesh.expert=2", "mesh.tensor=2"),
)


def show(opened: Opened) -> None:
    """Before the first step: the bytes of the model, read off the arrays."""
    held: Counter[str] = Counter()
    for parameter in parameters(opened.trainer.trained.model).values():
        for shard in parameter[...].addressable_shards:
            held[str(shard.device)] += shard.data.nbytes
    for device, nbytes in sorted(held.items()):
        print(f"{device} holds {nbytes:,} bytes")


def main(folder: Path, arguments: list[str]) -> None:
    if not arguments:  # before jax looks for devices: the CPU is to look like eight
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    path, data, *settings = arguments or [*make_tiny(folder), *TINY_SETTINGS]
    config = read_config(
        train_config_file("qlora-120b"), [f"model.checkpoint={path}", f'data.files=["{data}"]', *settings]
    )
    finished = train(folder / "run", config, on_opened=show, on_entry=lambda e: print(e["kind"], e["step"], e["loss"]))
    print(f"{finished.result.step} steps")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:])
