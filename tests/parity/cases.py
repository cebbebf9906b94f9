"""The models and prompts that the parity tests compare. Knows sizes and seeds; knows no reference and no torch."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.model.config import ModelConfig, RopeConfig
from tests.tiny import TINY

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
NUM_GREEDY = 64
# Below this lead of the last chosen expert over the first one left out, float32 rounding may route a token elsewhere.
SAFE_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A synthetic model, prompts of one length, and the positions of the first one whose logits a golden keeps.

    The other prompts are there for the bf16 comparison. A token that bf16 sends to another expert weighs more than a
    hundred others: our KL over transformers' ran from 0.12 to 4.96 on 96 single prompts of 200 tokens, and from 0.62 to
    1.13 on eight prompts together.
    """

    name: str
    config: ModelConfig
    prompt_length: int
    positions: tuple[int, ...]
    num_prompts: int = 8
    seed: int = 0
    experts: Literal["mxfp4", "bf16"] = "mxfp4"

    @property
    def prompts(self) -> np.ndarray:
        """int32[num_prompts, prompt_length]"""
        # Raw Philox output is the same in every NumPy; `integers` is not promised to be.
        raw = np.random.Philox(self.seed).random_raw(self.num_prompts * self.prompt_length)
        ids = (raw % np.uint64(self.config.vocab_size)).astype(np.int32)
        return ids.reshape(self.num_prompts, self.prompt_length)

    @property
    def golden(self) -> Path:
        return GOLDENS / f"{self.name}.npz"

    @property
    def openai_can_say_it(self) -> bool:
        """OpenAI's config.json has no list of layer kinds, and its loader reads MXFP4 experts only."""
        kinds = self.config.layer_kinds
        return self.experts == "mxfp4" and all(kind == ("full" if i % 2 else "sliding") for i, kind in enumerate(kinds))

    def write(self, folder: Path, *, layout: Literal["hf", "original"] = "hf") -> None:
        write_checkpoint(folder, self.config, seed=self.seed, layout=layout, experts=self.experts)


def _rope(*, factor: float = 32.0, original_context: int = 4096, theta: float = 150000.0) -> RopeConfig:
    return RopeConfig(theta=theta, factor=factor, original_context=original_context, beta_fast=32.0, beta_slow=1.0)


CASES = (
    # 3 query heads per key/value head, hidden 160 and intermediate 224, window 9.
    Case(name="tiny", config=TINY, prompt_length=200, positions=tuple(range(200)), seed=1),
    # 5 query heads per key/value head, intermediate far wider than hidden, 13 experts of which 3 run, stored in bf16.
    Case(
        name="wide_bf16",
        config=ModelConfig(
            vocab_size=270,
            width=96,
            num_heads=10,
            num_kv_heads=2,
            head_dim=22,
            num_experts=13,
            experts_per_token=3,
            expert_width=288,
            sliding_window=9,
            layer_kinds=("sliding", "full", "sliding", "full", "sliding"),
            rope=_rope(),
            max_context=131072,
        ),
        prompt_length=200,
        positions=tuple(range(200)),
        experts="bf16",
    ),
    # One key/value head, layers in no alternating order, another clamp and epsilon: only Hugging Face's form says so.
    Case(
        name="odd_layers",
        config=ModelConfig(
            vocab_size=283,
            width=128,
            num_heads=7,
            num_kv_heads=1,
            head_dim=26,
            num_experts=6,
            experts_per_token=1,
            expert_width=96,
            sliding_window=5,
            layer_kinds=("full", "sliding", "sliding", "full"),
            rope=_rope(),
            max_context=131072,
            norm_eps=1e-3,
            swiglu_limit=1.5,
        ),
        prompt_length=200,
        positions=tuple(range(200)),
        seed=1,
    ),
    # The release's window and its 32 experts with 4 active; the prompt runs past the window and far past YaRN's
    # original context, which is 256 here.
    Case(
        name="short_context",
        config=ModelConfig(
            vocab_size=266,
            width=192,
            num_heads=8,
            num_kv_heads=4,
            head_dim=28,
            num_experts=32,
            experts_per_token=4,
            expert_width=160,
            sliding_window=128,
            layer_kinds=("sliding", "full", "sliding", "full"),
            rope=_rope(factor=8.0, original_context=256, theta=10000.0),
            max_context=2048,
        ),
        prompt_length=700,
        positions=tuple(range(500, 700)),
        num_prompts=3,
    ),
    # The release's rotary embedding and window, with a prompt past the 4,096 tokens from which YaRN extends.
    Case(
        name="long",
        config=ModelConfig(
            vocab_size=267,
            width=64,
            num_heads=6,
            num_kv_heads=2,
            head_dim=24,
            num_experts=9,
            experts_per_token=2,
            expert_width=96,
            sliding_window=128,
            layer_kinds=("sliding", "full", "sliding", "full"),
            rope=_rope(),
            max_context=131072,
        ),
        prompt_length=5000,
        positions=(*range(97, 4097, 97), *range(4096, 4999, 10), *range(4950, 5000)),
        num_prompts=1,
        seed=1,
    ),
)


def weights_sha256(folder: Path) -> str:
    """One digest over every tensor's name, dtype, shape and bytes, however the files are cut."""
    digest = hashlib.sha256()
    tensors = read_tensors(folder)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
