"""The model and the requests of the engine on two processes, the same for them and for their judge."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.engine.request import Request, SamplingParams
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.model.adapter import AdapterSpec, with_adapters
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from tests.engine.random_adapter import random_adapter
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), max_context=200)
SETTINGS = EngineSettings(max_rows=2, page_size=8, cache_tokens=200, prefill_tokens=16, batch_invariant=True)
ADAPTERS = {
    "attention": random_adapter(CONFIG, AdapterSpec(rank=3, alpha=3, targets=("q", "k", "v", "o")), seed=1),
    "experts": random_adapter(CONFIG, AdapterSpec(rank=5, alpha=5, targets=("router", "gate_up", "down")), seed=2),
}
SETTINGS_OF_REQUESTS = (
    SamplingParams(temperature=0),
    SamplingParams(seed=3, logit_bias={7: 3.0}),
    SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(seed=5, top_k=9, top_p=0.9),
)


class OddIds:
    """A constraint."""

    def mask(self) -> np.ndarray:
        return np.full(CONFIG.vocab_size // 32, 0xAAAAAAAA, np.uint32)

    def accept(self, token_id: int) -> None:
        assert token_id % 2


REQUESTS = tuple(
    Request(
        prompt=range(10 + 7 * i),
        max_new_tokens=12,
        sampling=sampling,
        stop_ids=(),
        n=1 + i % 2,
        constraint=OddIds if i == 2 else None,
        adapter=(None, "attention", "experts", "attention")[i],
    )
    for i, sampling in enumerate(SETTINGS_OF_REQUESTS)
)


def make_model(*adapters: str, mesh=None) -> GptOss:
    """With these adapters."""
    base = GptOss(CONFIG, dtype=jnp.float32, mesh=mesh, impl="xla", rngs=nnx.Rngs(0))
    return with_adapters(base, [ADAPTERS[name] for name in adapters])
