"""What a model holds and reads on one device of a mesh, to the byte. Knows sizes and cuts; makes no array.

held    every weight as it is fitted to the mesh (padding and repeated heads included), and the whole KV cache
read    by one decode step on the busiest device: its weights that are not experts (of the embedding only the rows
        that are looked up), its experts that have tokens, and its part of the cache
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Dense, Memory, check_dense
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, released
from gptoss_jax.sharding import Axes, MeshShape, Placement, abstract_mesh, partition

GROUPS: tuple[str, ...] = ("embedding", "attention", "router", "experts", "norms", "unembedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one device.

    Attributes:
        weights: by the names of GROUPS.
        full_cache: keys and values of the layers that see everything.
        sliding_cache: of the layers that see a window.
    """

    weights: Mapping[str, int]
    full_cache: int
    sliding_cache: int

    @property
    def cache(self) -> int:
        return self.full_cache + self.sliding_cache

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """Bytes that the busiest device reads in one step, on average over routings."""

    dense: int
    experts: int
    cache: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.cache


def bytes_on_host(config: ModelConfig, *, dtype: DTypeLike, embedding: Memory) -> int:
    """Of the weights that lie in the host's memory: the embedding's table or nothing."""
    return config.vocab_size * config.width * jnp.dtype(dtype).itemsize if embedding == "host" else 0


def footprint(
    config: ModelConfig,
    shape: MeshShape,
    *,
    rows: int,
    capacity: int,
    dtype: DTypeLike = jnp.bfloat16,
    experts: Experts = "mxfp4",
    dense: Dense = "bf16",
    embedding: Memory = "device",
) -> Footprint:
    """Of a model with a cache for `rows` rows of `capacity` tokens.

    An embedding in the host's memory counts nothing.

    Raises:
        UserError: the model does not fit the mesh's axes.
        Unsupported: 8-bit dense weights on several devices.
    """
    check_dense(dense, num_devices=shape.num_devices)
    itemsize = jnp.dtype(dtype).itemsize
    full, sliding = (config.layer_kinds.count(kind) for kind in ("full", "sliding"))
    slot = rows_here(rows, shape) * 2 * kv_heads_here(config, shape) * config.head_dim * itemsize
    weights = _weights(config, shape, itemsize=itemsize, experts=experts, dense=dense)
    return Footprint(
        weights=weights | ({"embedding": 0} if embedding == "host" else {}),
        full_cache=full * slot * capacity,
        sliding_cache=sliding * slot * config.sliding_window,
    )


def reads(config: ModelConfig, shape: MeshShape, held: Footprint, *, rows: int, tokens: int = 1) -> Reads:
    """Of one step that feeds `tokens` tokens to each of `rows` rows whose cache is full."""
    tokens_here = rows_here(rows, shape) * tokens
    looked_up = tokens_here * held.weights["embedding"] * shape.tensor // config.vocab_size
    dense = sum(size for group, size in held.weights.items() if group not in ("experts", "embedding"))
    num_experts = -(-config.num_experts // shape.expert)
    busy = busiest_experts(config, shape, tokens=tokens_here)
    return Reads(dense=dense + looked_up, experts=round(held.weights["experts"] * busy / num_experts), cache=held.cache)


def busiest_experts(config: ModelConfig, shape: MeshShape, *, tokens: int) -> float:
    """How many experts with tokens the device with the most of them has, on average.

    Tokens choose their experts uniformly here, and experts are taken for independent of each other: the number on one
    device is then binomial, and the mean of the largest is the sum over k of the chance that some device exceeds k.
    """
    chance = 1 - (1 - config.experts_per_token / config.num_experts) ** tokens
    num_experts = -(-config.num_experts // shape.expert)
    at_most = 0.0
    mean = 0.0
    for k in range(num_experts):
        at_most += math.comb(num_experts, k) * chance**k * (1 - chance) ** (num_experts - k)
        mean += 1 - min(at_most, 1.0) ** shape.expert
    return mean


def rows_here(rows: int, shape: MeshShape) -> int:
    """Rows that `data` does not divide run whole on every data shard: see sharding.row_axis."""
    return rows if rows % shape.data else rows // shape.data


def shard_size(axis: str, size: int, config: ModelConfig, shape: MeshShape) -> int:
    """Entries of a logical axis on one device, padding included."""
    return _shard((size,), (axis,), config, shape)[0]


def kv_heads_here(config: ModelConfig, shape: MeshShape) -> int:
    """Copies and padding included."""
    return shard_size("kv_heads", config.num_kv_heads, config, shape)


def _weights(config: ModelConfig, shape: MeshShape, *, itemsize: int, experts: Experts, dense: Dense) -> dict[str, int]:
    """Layers differ in what they see and not in their parameters: one stands for all."""
    found: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for path, (size, axes) in released(_one_layer(config), experts, dense).items():
        times = config.num_layers if path.startswith("layers.") else 1
        values = math.prod(_shard(size, axes, config, shape))
        found[group(path)] += times * values * entry_bytes(path, itemsize)
    return found


@functools.cache
def _one_layer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[:1])


def _shard(size: tuple[int, ...], axes: Axes, config: ModelConfig, shape: MeshShape) -> tuple[int, ...]:
    fits = _placement(config, shape).axis_fits(size, axes)
    parts = [getattr(shape, axis) if axis else 1 for axis in partition(axes)]
    return tuple(fit.fitted // part for fit, part in zip(fits, parts, strict=True))


@functools.cache
def _placement(config: ModelConfig, shape: MeshShape) -> Placement:
    return place_model(config, abstract_mesh(shape))


def group(path: str) -> str:
    """Which of GROUPS a parameter belongs to."""
    parts = path.split(".")
    if parts[-1] == "scale":
        return "norms"
    for group in ("embedding", "unembedding", "attention", "router"):
        if group in parts:
            return group
    return "experts"


def entry_bytes(path: str, itemsize: int) -> int:
    """Of one entry of a parameter, in a model whose dtype has `itemsize`.

    Codes are bytes and so are the experts' scales; those of 8-bit weights, norms and sinks are float32, and everything
    else is of the model's dtype.
    """
    last = path.rsplit(".", 1)[-1]
    scales = 1 if group(path) == "experts" else 4
    return {"blocks": 1, "codes": 1, "scales": scales, "scale": 4, "sinks": 4}.get(last, itemsize)
