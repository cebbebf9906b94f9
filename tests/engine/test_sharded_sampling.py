"""Sampling from scores whose vocabulary lies over devices: the ids of one device, and next to no communication."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.engine.sampling import sample
from gptoss_jax.sharding import make_mesh

ROWS, VOCAB = 4, 352
RELEASED_VOCAB = 201_088
SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 20, 1.0), (1.3, 0, 0.9), (1.0, 300, 0.6), (1.1, 353, 0.9)]
MESHES = [(1, 4), (1, 8), (2, 4), (2, 3)]  # data, tensor; 3 pads the vocabulary to 354 ids
draw = jax.jit(sample)


def settings(temperature: float, top_k: int, top_p: float) -> dict[str, jax.Array]:
    return {"temperature": jnp.float32(temperature), "top_k": jnp.int32(top_k), "top_p": jnp.float32(top_p)}


@pytest.mark.parametrize(("data", "tensor"), MESHES)
def test_ids_are_those_of_one_device(data: int, tensor: int):
    # Halves make ties, also across the border of two shards.
    logits = (np.random.default_rng(1).standard_normal((ROWS, VOCAB)) * 4).round().astype(np.float32) / 2
    padded = np.pad(logits, ((0, 0), (0, -VOCAB % tensor)), constant_values=-np.inf)
    sharded = jax.device_put(padded, NamedSharding(make_mesh(data=data, tensor=tensor), P("data", "tensor")))
    for setting in SETTINGS:
        for seed in range(2):
            expected = draw(jnp.asarray(logits), jax.random.key(seed), **settings(*setting))
            np.testing.assert_array_equal(draw(sharded, jax.random.key(seed), **settings(*setting)), expected)


@pytest.mark.parametrize(("data", "tensor"), [(1, 4), (1, 8), (2, 4)])
def test_only_sums_travel(data: int, tensor: int):
    """Of a row at most 8 bytes for each device in one collective, or the 15 sums of a pass; never its scores."""
    sharding = NamedSharding(make_mesh(data=data, tensor=tensor), P("data", "tensor"))
    logits = jax.ShapeDtypeStruct((ROWS, RELEASED_VOCAB), jnp.float32, sharding=sharding)
    compiled = draw.lower(logits, jax.random.key(0), **settings(1.0, 50, 0.9)).compile()
    collective = r" = (.*?) (all-[\w-]+|collective-[\w-]+|reduce-scatter[\w-]*|ragged-[\w-]+)\("
    found = re.findall(collective, compiled.as_text())
    assert {kind for _, kind in found} == {"all-reduce", "all-gather"}
    for shapes, kind in found:
        sizes = [math.prod(map(int, filter(None, size.split(",")))) for size in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        assert sum(sizes) <= ROWS // data * (tensor if kind == "all-gather" else 15), (shapes, kind)
    # The noise takes most: threefry's counters and rounds are some twenty words of each id on a CPU.
    share = 4 * ROWS // data * RELEASED_VOCAB // tensor
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * share
