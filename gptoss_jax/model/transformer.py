"""The gpt-oss model, top to bottom: embedding, layers of attention and experts, logits. Knows no tokenizer, no files.

ids ─► embedding ─► 24|36 × ( + attention(norm(x)) ; + experts(norm(x)) ) ─► norm ─► unembedding ─► logits
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.model.attention import Attention
from gptoss_jax.model.cache import Cache, FullCache, RingCache
from gptoss_jax.model.config import LayerKind, ModelConfig
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.implementations import Implementations, platform_of
from gptoss_jax.model.layers import Embedding, Linear, Memory, RMSNorm
from gptoss_jax.model.moe import MoE
from gptoss_jax.model.placement import place_model
from gptoss_jax.sharding import AnyMesh, Axes, Placement, constrain

Experts = Literal["mxfp4", "bf16"]


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        *,
        packed: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement,
        impl: Implementations,
        dispatch: Way | None = None,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement}
        norm = functools.partial(RMSNorm, config.width, eps=config.norm_eps, rngs=rngs, placement=placement)
        self.attention_norm = norm()
        self.attention = Attention(config, kind, impl=impl.attention, **kwargs)
        self.moe_norm = norm()
        self.moe = MoE(config, packed=packed, impl=impl.moe_matmul, dispatch=dispatch, **kwargs)

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
        mesh: where the parameters are sharded; None is one device.
        impl: which implementation of the kernels runs, "xla" for all or "moe_matmul=gpu,attention=xla"; by default the
            best that the devices have.
        embedding: in which memory its table lies; on the host it leaves the device 1.16 GB more in the release.
        dispatch: how tokens reach their experts on a mesh (see dispatch.py); by default chosen by their number.

    Raises:
        UserError: a mesh that the model does not fit, or an unknown implementation.
        Unsupported: a named implementation that does not run on these devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        experts: Experts = "mxfp4",
        mesh: AnyMesh | None = None,
        impl: str | None = None,
        dispatch: Way | None = None,
        embedding: Memory = "device",
        rngs: nnx.Rngs,
    ):
        if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
            raise ValueError(f"dtype is {jnp.dtype(dtype)}; expected bfloat16 or float32: float16 overflows at 65504")
        placement = place_model(config, mesh)
        self.impl = Implementations.parse(impl, platform=platform_of(mesh))
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement}
        block = functools.partial(Block, packed=experts == "mxfp4", impl=self.impl, dispatch=dispatch, **kwargs)
        self.embedding = Embedding(config.vocab_size, config.width, memory=embedding, **kwargs)
        self.layers = nnx.List([block(config, kind) for kind in config.layer_kinds])
        self.norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs, placement=placement)
        self.unembedding = Linear(
            (config.vocab_size,), (config.width,), axes=("vocab", "width"), use_bias=False, **kwargs
        )
        self.config = config
        self.mesh = mesh
        self.kv_heads = placement.fitted("kv_heads", config.num_kv_heads)  # on a mesh some are repeated or padded
        self.dtype = jnp.dtype(dtype)
        self.experts: Experts = experts

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits after each token, rows beginning at position 0. Ids must be within the vocabulary."""
        rows, num_tokens = tokens.shape
        cache = self.empty_cache(rows=rows, capacity=num_tokens)
        hidden, _ = self.extend(tokens, cache, count=jnp.full(rows, num_tokens, jnp.int32))
        return self.logits(hidden)[..., : self.config.vocab_size]

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
        """Scores of every id, float32; where `tensor` does not divide the vocabulary, -inf for some ids past it."""
        scores = self.unembedding(hidden, out_dtype=jnp.float32)
        if scores.shape[-1] == self.config.vocab_size:
            return scores
        return jnp.where(jnp.arange(scores.shape[-1]) < self.config.vocab_size, scores, -jnp.inf)

    def empty_cache(self, *, rows: int, capacity: int) -> Cache:
        """A cache for `rows` rows of at most `capacity` tokens, in the model's dtype."""
        return self._placed(
            Cache.empty(self.config, rows=rows, capacity=capacity, dtype=self.dtype, kv_heads=self.kv_heads)
        )

    def _placed(self, cache: Cache) -> Cache:
        """Keys and values lie with their rows and heads, lengths with their rows."""
        axes = ("rows", None, "kv_heads", "head_dim")
        layers = jax.tree.map(lambda x: constrain(x, axes, self.mesh), cache.layers)
        return Cache(layers, constrain(cache.length, ("rows",), self.mesh))


def abstract_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    experts: Experts = "mxfp4",
    mesh: AnyMesh | None = None,
    impl: str | None = None,
    dispatch: Way | None = None,
    embedding: Memory = "device",
) -> GptOss:
    """The model with shapes for parameters: what is loaded and planned before anything is allocated."""
    settings: dict[str, Any] = {"dtype": dtype, "experts": experts, "mesh": mesh, "impl": impl}
    settings |= {"dispatch": dispatch, "embedding": embedding}
    return nnx.eval_shape(lambda: GptOss(config, **settings, rngs=nnx.Rngs(0)))


def parameters(model: GptOss) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as "layers.3.moe.gate_up.blocks". Metadata `axes` names its dimensions."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


def parameter_shapes(config: ModelConfig, experts: Experts) -> Mapping[str, tuple[int, ...]]:
    """The released shape of every parameter by its path."""
    return MappingProxyType({path: shape for path, (shape, _) in released(config, experts).items()})


@functools.cache  # tracing 36 layers takes seconds
def released(config: ModelConfig, experts: Experts) -> Mapping[str, tuple[tuple[int, ...], Axes]]:
    """Released shape and logical axes of every parameter by its path."""
    found = parameters(abstract_model(config, experts=experts, impl="xla"))
    return MappingProxyType({path: (value.shape, value.get_metadata()["axes"]) for path, value in found.items()})


def with_parameters(model: GptOss, values: Mapping[str, jax.Array]) -> GptOss:
    """The (abstract) model with `values` as its parameters, by path."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(path, value.replace(values[".".join(map(str, path))])) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
