"""The gpt-oss model, top to bottom: embedding, layers of attention and experts, logits. Knows no tokenizer, no files.

ids ─► embedding ─► 24|36 × ( + attention(norm(x)) ; + experts(norm(x)) ) ─► norm ─► unembedding ─► logits
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.model.attention import Attention
from gptoss_jax.model.cache import Cache, FullCache, RingCache
from gptoss_jax.model.config import LayerKind, ModelConfig
from gptoss_jax.model.layers import Embedding, Linear, RMSNorm
from gptoss_jax.model.moe import MoE
from gptoss_jax.sharding import constrain

Experts = Literal["mxfp4", "bf16"]


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, *, packed: bool, mesh: Mesh | None, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, kind, dtype=dtype, rngs=rngs)
        self.moe_norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.moe = MoE(config, packed=packed, mesh=mesh, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: FullCache | RingCache,
        *,
        length: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], FullCache | RingCache]:
        mixed, grown = self.attention(self.attention_norm(x), cache, length=length, count=count)
        x = x + mixed
        return x + self.moe(self.moe_norm(x)), grown


class GptOss(nnx.Module):
    """A gpt-oss model. `model(tokens)` gives logits; `extend` goes on from a cache.

    Args:
        config: the sizes.
        dtype: of computation and of every parameter but norms and sinks (float32) and packed experts (uint8).
            float16 is refused: the residual stream reaches 9e4.
        experts: how the expert weights lie in memory, MXFP4 as released or in `dtype`.
        mesh: where experts are sharded; None is one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        experts: Experts = "mxfp4",
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
            raise ValueError(f"dtype is {jnp.dtype(dtype)}; expected bfloat16 or float32: float16 overflows at 65504")
        self.embedding = Embedding(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
        block = functools.partial(Block, packed=experts == "mxfp4", mesh=mesh, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([block(config, kind) for kind in config.layer_kinds])
        self.norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        axes = ("vocab", "width")
        self.unembedding = Linear(
            (config.vocab_size,), (config.width,), axes=axes, dtype=dtype, rngs=rngs, use_bias=False
        )
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.experts: Experts = experts

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits after each token, rows beginning at position 0. Ids must be within the vocabulary."""
        rows, num_tokens = tokens.shape
        cache = self.empty_cache(rows=rows, capacity=num_tokens)
        hidden, _ = self.extend(tokens, cache, count=jnp.full(rows, num_tokens, jnp.int32))
        return self.logits(hidden)

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, *, count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Feeds the next tokens of each row: a whole prompt, a chunk of one, or the one token just sampled.

        Of row b the first count[b] tokens are real; the rest is padding, whose outputs mean nothing and which is not
        cached, so rows of different length share a call. Returns the last layer's output, normalised, and the cache.
        """
        x = constrain(self.embedding(tokens), ("rows", None, "width"), self.mesh)
        grown = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = layer(x, layer_cache, length=cache.length, count=count)
            grown.append(layer_cache)
        return self.norm(x), self._placed(Cache(tuple(grown), cache.length + count))

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Scores of every id, float32."""
        return self.unembedding(hidden, out_dtype=jnp.float32)

    def empty_cache(self, *, rows: int, capacity: int) -> Cache:
        """A cache for `rows` rows of at most `capacity` tokens, in the model's dtype."""
        return self._placed(Cache.empty(self.config, rows=rows, capacity=capacity, dtype=self.dtype))

    def _placed(self, cache: Cache) -> Cache:
        """Keys and values lie with their rows and heads, lengths with their rows."""
        axes = ("rows", None, "kv_heads", "head_dim")
        layers = jax.tree.map(lambda x: constrain(x, axes, self.mesh), cache.layers)
        return Cache(layers, constrain(cache.length, ("rows",), self.mesh))


def abstract_model(
    config: ModelConfig, *, dtype: DTypeLike = jnp.bfloat16, experts: Experts = "mxfp4", mesh: Mesh | None = None
) -> GptOss:
    """The model with shapes for parameters: what is loaded and planned before anything is allocated."""
    return nnx.eval_shape(lambda: GptOss(config, dtype=dtype, experts=experts, mesh=mesh, rngs=nnx.Rngs(0)))


def parameters(model: GptOss) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as "layers.3.moe.gate_up.blocks". Metadata `axes` names its dimensions."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


@functools.cache  # tracing 36 layers takes seconds
def parameter_shapes(config: ModelConfig, experts: Experts) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    found = parameters(abstract_model(config, experts=experts))
    return MappingProxyType({path: value.shape for path, value in found.items()})


def with_parameters(model: GptOss, values: Mapping[str, jax.Array]) -> GptOss:
    """The (abstract) model with `values` as its parameters, by path."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(path, value.replace(values[".".join(map(str, path))])) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
