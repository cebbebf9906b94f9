"""Steps of LoRA on the CPU, by one trainer, timed: ours, or peft on transformers. Knows a release; compares nothing.

A command of its own, `python -m benchmarks.train_steps ENGINE JOB`, which prints JSON. The work is the same for all:
adapters of attention and of every expert in float32, AdamW, one batch of whole rows of random ids again and again,
every layer computed anew on the way back.
"""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gptoss_jax import checkpoint
from gptoss_jax.model.adapter import AdapterSpec
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import OptimizerSettings
from gptoss_jax.train.leaves import Method, Trained
from gptoss_jax.train.optimizer import make_optimizer
from gptoss_jax.train.step import StepSettings, Trainer

_RATE = 1e-4
_CHUNK = 512
_PRODUCTS = 12  # of which the fastest is the ceiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every engine is given."""

    model: str
    dtype: Literal["bfloat16", "float32"]
    rows: int
    length: int
    steps: int  # that are timed, after one that is not
    rank: int

    def tokens(self, vocab_size: int) -> np.ndarray:
        return np.random.default_rng(0).integers(vocab_size, size=(self.rows, self.length)).astype(np.int32)


def main() -> None:
    engine, path = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps({"ours": _ours, "peft": _peft, "products": _products}[engine](job)))


def _ours(job: Job) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    model = checkpoint.load(job.model, dtype=jnp.dtype(job.dtype), impl="attention=xla")
    adapter = AdapterSpec(rank=job.rank, alpha=job.rank, targets=("q", "k", "v", "o", "gate_up", "down"))
    settings = OptimizerSettings(learning_rate=_RATE, schedule="constant")
    optimizer = make_optimizer(settings, steps=job.steps + 1)
    trainer = Trainer(Trained(model, Method(adapter=adapter)), optimizer, StepSettings(chunk=_CHUNK))
    state, batch = trainer.start(0), _batch(job.tokens(model.config.vocab_size))

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return float(metrics.loss)

    return _timed(step, job) | {"versions": _versions("jax", "flax")}


def _batch(tokens: np.ndarray) -> Batch:
    """One text in each row, whose every token but the last foretells the next."""
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    arrays: dict[str, Any] = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}
    arrays |= {"starts": np.zeros_like(tokens), "is_real": np.ones(tokens.shape, bool)}
    return jax.tree.map(lambda x: jnp.asarray(x)[None], Batch(**arrays))


def _peft(job: Job) -> dict[str, Any]:
    import peft
    import transformers

    model = transformers.GptOssForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=job.rank,
            lora_alpha=job.rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    ids = torch.from_numpy(job.tokens(model.config.vocab_size)).long()

    def step() -> float:
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    parameters = sum(parameter.numel() for parameter in trained)
    return _timed(step, job) | {"parameters": parameters, "versions": _versions("torch", "transformers", "peft")}


def _timed(step: Callable[[], float], job: Job) -> dict[str, Any]:
    """The first step compiles, or allocates: its loss is that of the base alone."""
    losses, seconds = [], []
    for _ in range(job.steps + 1):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "first_seconds": seconds[0], "seconds": seconds[1:]}


def _products(job: Job) -> dict[str, Any]:
    """A product of all tokens with a square matrix of 2048, in the job's dtype, by oneDNN: the ceiling of a step."""
    x, weight = (torch.randn(n, 2048, dtype=getattr(torch, job.dtype)) for n in (job.rows * job.length, 2048))
    seconds = []
    with torch.inference_mode():
        for _ in range(_PRODUCTS):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - start)
    return {"flops_per_second": 2 * x.numel() * len(weight) / min(seconds), "versions": _versions("torch")}


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


if __name__ == "__main__":
    main()
