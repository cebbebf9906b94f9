"""Writes a made-up gpt-oss checkpoint in the exact released layout. Knows the statistics of weights; runs no model.

Every parameter draws from a random stream of its own, seeded by its name. So the weights depend neither on the layout
nor on what else is written: both layouts of one (config, seed) hold the very same model, and its first layers are
those of a deeper one. Only raw 64-bit streams of PCG64 are drawn, the one thing NumPy promises never to change.

The spreads make a random model behave like a trained one where tests and benchmarks look: the residual stream stays of
order one, attention is neither flat nor one-hot, forgotten sinks and biases show, every expert is visited, some
activations reach the clamp, and logits differ by several units.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from gptoss_jax.convert.companions import ORIGINAL_SHARD_NAME, companions
from gptoss_jax.convert.names import FileTensor, Layout, file_tensors
from gptoss_jax.convert.writer import SHARD_NAME, write_folder
from gptoss_jax.harmony.tokenizer import write_byte_tokenizer
from gptoss_jax.kernels.mxfp4 import BLOCK, CODE_VALUES
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import Experts

SHARD_BYTES = 5_000_000_000  # the release's 20b has three shards of at most this

_PIECE = 1 << 20  # bytes drawn at a time
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Standard deviation of each layer's output for an input of order one.
# Attention and experts add about 0.3 each to a residual stream that begins at 2 and ends near 3. If they added more,
# what all tokens share (biases, means over random keys) would grow until some of 128 experts are never visited.
_GAINS = {
    "embedding": 2.0,
    "q": 1.2,
    "k": 1.2,
    "v": 1.0,
    "o": 0.4,
    "router": 1.5,
    "gate_up": 2.0,  # one value in 2,000 reaches the clamp at 7
    "down": 0.15,  # its input has a root mean square of about 3
    "unembedding": 3.0,
}
_BIAS_STD = 0.1
_NORM_STD = 0.2  # around 1
_SINK_MEAN, _SINK_STD = 2.0, 1.0  # a sink weighs as much as a few keys


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    layout: Layout = "hf",
    experts: Experts = "mxfp4",
    max_shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes weights, config and a tokenizer into a new or empty folder, in memory that no size of the model changes.

    `experts="bf16"` stores the values of the MXFP4 model of the same seed, as `transformers` saves it.
    `on_bytes` is called with the number of bytes of weights just made.

    Raises:
        UserError: the folder is not empty, the disk has no room, or the vocabulary is too small for a tokenizer.
        Unsupported: OpenAI's layout with bf16 experts.
    """
    tensors = {tensor.name: tensor for tensor in file_tensors(config, layout=layout, experts=experts)}

    def chunks(name: str) -> Iterator[np.ndarray]:
        for chunk in _tensor_bytes(config, seed, tensors[name]):
            yield chunk
            if on_bytes is not None:
                on_bytes(chunk.nbytes)

    tokenizer = _byte_tokenizer(config.vocab_size)
    write_folder(
        folder,
        tuple(tensors.values()),
        chunks,
        max_shard_bytes=max_shard_bytes,
        shard_name=ORIGINAL_SHARD_NAME if layout == "original" else SHARD_NAME,
        beside=companions(config, tuple(tensors.values()), layout=layout, experts=experts, tokenizer=tokenizer),
    )


# --- weights ------------------------------------------------------------------------------------------------------


def _tensor_bytes(config: ModelConfig, seed: int, tensor: FileTensor) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """The file's bytes of a tensor, parameter by parameter, experts one at a time."""
    for part in tensor.parts:
        shape = part.view.file_shape
        layer, _, leaf = part.parameter.rpartition(".")
        if leaf in ("blocks", "scales"):
            for expert in range(shape[0]):
                draw = _expert_blocks if leaf == "blocks" else _expert_scales
                yield from draw(config, seed, layer, expert, count=math.prod(shape[1:]))
        elif layer.endswith((".gate_up", ".down")) and leaf == "weight":
            for expert in range(shape[0]):
                yield _expert_values(config, seed, layer, expert, shape=(shape[2], shape[1]))
        else:
            yield from _dense(config, seed, part.parameter, count=math.prod(shape))


def _dense(config: ModelConfig, seed: int, parameter: str, *, count: int) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """bf16 values, uniform around the mean: sums over a fan-in are normal all the same."""
    mean, std = _spread(config, parameter)
    steps = (np.arange(1 << 16) - (2**15 - 0.5)) / 2**16  # symmetric around 0, of variance 1/12
    table = (mean + std * math.sqrt(12) * steps).astype(_BFLOAT16).view(np.uint16)
    for piece in _random_bytes(seed, parameter, count=2 * count):
        yield np.take(table, piece.view("<u2"), mode="clip").astype("<u2", copy=False).view(np.uint8)


def _spread(config: ModelConfig, parameter: str) -> tuple[float, float]:
    """Mean and standard deviation of a parameter that is not packed."""
    layer, leaf = parameter.split(".")[-2:]
    match leaf:
        case "bias":
            return 0.0, _BIAS_STD
        case "scale":
            return 1.0, _NORM_STD
        case "sinks":
            return _SINK_MEAN, _SINK_STD
    return 0.0, _weight_std(config, layer)


def _weight_std(config: ModelConfig, layer: str) -> float:
    fan_in = {"embedding": 1, "o": config.num_heads * config.head_dim, "down": config.expert_width}
    return _GAINS[layer] / math.sqrt(fan_in.get(layer, config.width))


def _expert_blocks(
    config: ModelConfig, seed: int, layer: str, expert: int, *, count: int
) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """Uniform bytes: all 16 codes are equally likely."""
    return _random_bytes(seed, f"{layer}.blocks/{expert}", count=count)


def _expert_scales(
    config: ModelConfig, seed: int, layer: str, expert: int, *, count: int
) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    table = scale_table(_weight_std(config, layer.rpartition(".")[2]))
    for piece in _random_bytes(seed, f"{layer}.scales/{expert}", count=count):
        yield np.take(table, piece)


def scale_table(std: float) -> UInt8[np.ndarray, "256"]:
    """A scale byte for each random byte, three or four neighbours, such that uniform codes decode to `std`.

    A scale is 127 + base + floor(3r + f) with r uniform in [0, 1). The mean of its square is
    4^base ((1 - f) + 4 + 16 + 64 f) / 3 = 4^base (7 + 21 f), which takes every value once as f runs from 0 to 1.
    """
    code_square = sum(code * code for code in CODE_VALUES) / len(CODE_VALUES)
    goal = std * std / code_square / 7
    base = (math.frexp(goal)[1] - 1) // 2  # floor(log4(goal)), without a logarithm's last digit
    fraction = (goal / 4.0**base - 1) / 3
    steps = (3 * np.arange(256) + round(256 * fraction)) >> 8
    return (127 + base + steps).astype(np.uint8)


def _expert_values(
    config: ModelConfig, seed: int, layer: str, expert: int, *, shape: tuple[int, int]
) -> UInt8[np.ndarray, " bytes"]:
    """One expert's matrix decoded, [in, out] in bf16; `shape` is [out, in], which MXFP4 packs along in."""
    rows, num_blocks = shape[0], shape[1] // BLOCK
    blocks = np.concatenate([*_expert_blocks(config, seed, layer, expert, count=rows * num_blocks * BLOCK // 2)])
    scales = np.concatenate([*_expert_scales(config, seed, layer, expert, count=rows * num_blocks)])
    codes = np.array(CODE_VALUES, np.float32)
    pairs = np.stack([codes[np.arange(256) & 0xF], codes[np.arange(256) >> 4]], axis=-1)  # low nibble first
    values = pairs[blocks].reshape(rows, num_blocks, BLOCK)
    values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127).reshape(rows, num_blocks, 1)
    decoded = values.reshape(shape).astype(_BFLOAT16)  # exact: two significant bits
    return np.ascontiguousarray(decoded.T).reshape(-1).view(np.uint8)


def _random_bytes(seed: int, name: str, *, count: int) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """The first `count` bytes of the stream that belongs to `name`, in pieces; the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.PCG64(int.from_bytes(digest, "little"))
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        words = np.asarray(generator.random_raw(-(-size // 8)), np.dtype("<u8"))
        yield words.view(np.uint8)[:size]


# --- what lies beside them ----------------------------------------------------------------------------------------


def _byte_tokenizer(vocab_size: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        write_byte_tokenizer(path, vocab_size)
        return path.read_bytes()
