"""Whole steps of a model with random weights made on the device: tokens per second of decoding and of a prompt.

Knows models and caches; knows no kernel. No checkpoint is read: no time depends on the values of weights but for the
experts that are chosen, which random weights spread evenly.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from gptoss_jax.bench.timing import seconds_outside
from gptoss_jax.engine.generate import step
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.footprint import footprint, reads
from gptoss_jax.model.formats import in_memory
from gptoss_jax.model.layers import Dense
from gptoss_jax.model.transformer import Experts, GptOss, parameters, split
from gptoss_jax.sharding import AnyMesh, MeshShape

_MOST_STEPS = 64  # in a row, for which the cache has room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step: `tokens` of each of `rows` rows, behind `context` cached ones.

    Attributes:
        seconds: measured.
        nbytes: that the busiest device must read, on average over routings.
        flops: multiplications and additions, of all devices together.
    """

    rows: int
    tokens: int
    context: int
    seconds: float
    nbytes: float
    flops: float

    @property
    def tokens_per_second(self) -> float:
        return self.rows * self.tokens / self.seconds


def random_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    experts: Experts,
    dense: Dense = "bf16",
    mesh: AnyMesh | None,
    impl: str | None,
) -> GptOss:
    """A model on its devices, in the layout that `load` gives it.

    The generator is the hardware's own: the usual one needs memory four times the codes'.
    """
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    model = GptOss(config, dtype=dtype, experts=experts, dense=dense, mesh=mesh, impl=impl, rngs=rngs)
    for path, value in parameters(model).items():
        array = value[...]
        kept = in_memory(path, rank=array.ndim, sharding=array.sharding, impl=model.impl.moe_matmul)
        if kept is not array.sharding:
            value[...] = jax.device_put(array, kept)
    return model


def decode(model: GptOss, *, rows: int, context: int, budget: float) -> Step:
    """Each row's next token, again and again, behind `context` tokens of random keys and values.

    The tokens fed are random too: greedy text of random weights may repeat itself, and would read few experts.
    """
    cache = _random_cache(model.empty_cache(rows=rows, capacity=context + _MOST_STEPS), length=context)
    return _measure(model, cache, rows=rows, tokens=1, context=context, budget=budget)


def prefill(model: GptOss, *, tokens: int, budget: float) -> Step:
    """A prompt in one step, into an empty cache."""
    cache = model.empty_cache(rows=1, capacity=tokens)
    return _measure(model, cache, rows=1, tokens=tokens, context=0, budget=budget)


def _measure(model: GptOss, cache: Cache, *, rows: int, tokens: int, context: int, budget: float) -> Step:
    """Cached tokens are forgotten after each step: all steps are alike, and the cache never overflows."""
    graph, parameters = split(model)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(_MOST_STEPS, rows, tokens), dtype=np.int32)
    feeds = itertools.cycle([jnp.asarray(each) for each in ids])
    count, length = jnp.full(rows, tokens, jnp.int32), jnp.full(rows, context, jnp.int32)
    greedy, index = RowSettings.of([SamplingParams(temperature=0)] * rows), jnp.zeros(rows, jnp.int32)

    def run(cache: Cache) -> Cache:
        _, cache = step(graph, parameters, next(feeds), count, cache, greedy, index)
        return dataclasses.replace(cache, length=_copy(length))

    seconds, _ = seconds_outside(run, cache, budget=budget, most=_MOST_STEPS)
    shape = MeshShape(**model.mesh.shape) if model.mesh is not None else MeshShape()
    settings = {"rows": rows, "capacity": context + tokens, "dtype": model.dtype, "experts": model.experts}
    held = footprint(model.config, shape, dense=model.dense, **settings)
    return Step(
        rows=rows,
        tokens=tokens,
        context=context,
        seconds=seconds,
        nbytes=reads(model.config, shape, held, rows=rows, tokens=tokens).total,
        flops=step_flops(model.config, rows=rows, tokens=tokens, context=context),
    )


def step_flops(config: ModelConfig, *, rows: int, tokens: int, context: int) -> float:
    """Twice the multiplications: of every matrix that a token meets, of scores and values of the keys it sees, and of
    the unembedding for the last token of each row."""
    heads = config.num_heads * config.head_dim
    projections = config.width * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    experts = config.experts_per_token * 3 * config.width * config.expert_width + config.num_experts * config.width
    seen = context + np.arange(1, tokens + 1)
    keys = {"full": seen.sum(), "sliding": np.minimum(seen, config.sliding_window).sum()}
    mixing = sum(2 * heads * int(keys[kind]) for kind in config.layer_kinds)
    layers = config.num_layers * tokens * (projections + experts)
    return 2.0 * rows * (layers + mixing + config.width * config.vocab_size)


def _random_cache(cache: Cache, *, length: int) -> Cache:
    """Full of numbers: a device is faster with zeros. Each zero makes room for its number."""
    leaves, tree = jax.tree.flatten(cache.layers)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), len(leaves))
    for i, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        shape, dtype, sharding = leaf.shape, leaf.dtype, leaf.sharding
        leaf.delete()
        leaves[i] = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharding)(key, shape, dtype)
    return Cache(jax.tree.unflatten(tree, leaves), jnp.full_like(cache.length, length))


@jax.jit
def _copy(length: Int[Array, " B"]) -> Int[Array, " B"]:
    """The step consumes its cache, lengths included."""
    return length + 0
