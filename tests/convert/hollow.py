"""A release of any size whose file is a header and a hole: it takes no room, and reading it would be noticed."""

import json
import struct
from pathlib import Path

from gptoss_jax.convert.names import file_tensors
from gptoss_jax.model.config import ModelConfig


def write_hollow(folder: Path, config: ModelConfig) -> None:
    header, end = {}, 0
    for tensor in file_tensors(config, layout="hf", experts="mxfp4"):
        code = "U8" if str(tensor.dtype) == "uint8" else "BF16"
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config.to_hf(mxfp4=True)))
