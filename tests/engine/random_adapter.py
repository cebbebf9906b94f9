"""An adapter that nobody trained, strong enough that no answer stays what it was."""

import math

import numpy as np

from gptoss_jax.model.adapter import Adapter, AdapterSpec, adapter_shapes
from gptoss_jax.model.config import ModelConfig

_INPUTS = ("width", "heads", "head_dim", "expert_width")  # of an a


def random_adapter(config: ModelConfig, spec: AdapterSpec, *, seed: int) -> Adapter:
    """What it adds to an output is about as large as the output."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, (shape, axes) in adapter_shapes(config, spec).items():
        is_input = _INPUTS.__contains__ if name.endswith(".a") else "rank".__eq__
        fan_in = math.prod(size for size, axis in zip(shape, axes, strict=True) if is_input(axis))
        leaves[name] = rng.normal(0, fan_in**-0.5, shape).astype(np.float32)
    return Adapter(spec=spec, leaves=leaves)
