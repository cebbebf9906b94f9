"""The bytes that are counted are those of the real model's arrays on a real mesh, and of the release."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.configs import model_config
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.footprint import busiest_experts, footprint, reads
from gptoss_jax.model.transformer import abstract_model, parameters
from gptoss_jax.sharding import MeshShape, make_mesh, place
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(3))
# tensor=8 repeats the 4 key heads and pads the 7 blocks of expert width.
SHAPES = [
    MeshShape(),
    MeshShape(2, 1, 3),
    MeshShape(1, 3, 2),
    MeshShape(1, 1, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("experts", "dtype"), [("mxfp4", jnp.bfloat16), ("bf16", jnp.float32)])
def test_weights_are_the_shards_of_every_parameter(shape: MeshShape, experts: str, dtype) -> None:
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
    model = abstract_model(CONFIG, dtype=dtype, experts=experts, mesh=mesh)
    shards = [
        (place(path, value.shape, value.axes, mesh).shard_shape(value.shape), value.dtype)
        for path, value in parameters(model).items()
    ]
    expected = sum(int(np.prod(size)) * dtype.itemsize for size, dtype in shards)
    held = footprint(CONFIG, shape, rows=2, capacity=40, dtype=dtype, experts=experts)
    assert sum(held.weights.values()) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_the_cache_is_what_the_model_makes(shape: MeshShape, rows: int) -> None:
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
    model = abstract_model(CONFIG, mesh=mesh)
    cache = jax.jit(lambda: model.empty_cache(rows=rows, capacity=40))()
    on_first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache.layers)]
    assert footprint(CONFIG, shape, rows=rows, capacity=40).cache == sum(on_first)


# Experts, attention and unembedding by hand: 4 experts of 13.2 MB in each layer, 53 MB of attention, 1.16 GB.
@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-20b", 3.70), ("gpt-oss-120b", 4.97)])
def test_a_token_of_the_release_reads_its_active_weights(name: str, gigabytes: float) -> None:
    config = model_config(name)
    held = footprint(config, MeshShape(), rows=1, capacity=1)
    read = reads(config, MeshShape(), held, rows=1)
    small = held.weights["router"] + held.weights["norms"]
    assert (read.dense + read.experts - small) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(("expert", "tokens"), [(1, 1), (1, 9), (4, 1), (4, 9), (8, 64), (3, 2)])
def test_the_busiest_device_is_that_of_random_routings(expert: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    config = dataclasses.replace(TINY, num_experts=24, experts_per_token=4)
    busiest = []
    for _ in range(500):
        chosen = {int(e) for _ in range(tokens) for e in rng.permutation(24)[:4]}
        busiest.append(max(sum(e * expert // 24 == shard for e in chosen) for shard in range(expert)))
    # A token's experts differ and do not depend on one device alone, which the binomial leaves out: it errs upwards.
    found = busiest_experts(config, MeshShape(expert=expert), tokens=tokens)
    assert np.mean(busiest) * 0.97 < found < np.mean(busiest) * 1.15
