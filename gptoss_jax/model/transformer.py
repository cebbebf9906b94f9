"""The gpt-oss model, top to bottom: embedding, layers of attention and experts, logits. Knows no tokenizer, no files.

ids ─► embedding ─► 24|36 × ( + attention(norm(x)) ; + experts(norm(x)) ) ─► norm ─► unembedding ─► logits
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.model.attention import Attention
from gptoss_jax.model.cache import Cache, FullCache, RingCache
from gptoss_jax.model.config import LayerKind, ModelConfig
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.implementations import Implementations, platform_of
from gptoss_jax.model.layers import Dense, Embedding, Linear, Memory, RMSNorm, check_dense
from gptoss_jax.model.moe import MoE
from gptoss_jax.model.paged import LayerPages, PagedCache, Part, adapters_in_line, apart, in_line, spread
from gptoss_jax.model.placement import place_model
from gptoss_jax.sharding import AnyMesh, Axes, Placement, constrain, partition

Experts = Literal["mxfp4", "bf16"]
Past = TypeVar("Past")  # what a layer remembers


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
        dense: Dense = "bf16",
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement, "linear_impl": impl.linear}
        norm = functools.partial(RMSNorm, config.width, eps=config.norm_eps, rngs=rngs, placement=placement)
        self.attention_norm = norm()
        self.attention = Attention(config, kind, impl=impl.attention, dense=dense, **kwargs)
        self.moe_norm = norm()
        self.moe = MoE(config, packed=packed, impl=impl.moe_matmul, dispatch=dispatch, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: FullCache | RingCache,
        *,
        length: Int[Array, " B"],
        count: Int[Array, " B"],
        adapter: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], FullCache | RingCache]:
        settings: dict[str, Any] = {"cache": cache, "length": length, "count": count, "adapter": adapter}
        return self._around(x, functools.partial(self.attention, **settings), adapter=adapter)

    def whole(
        self, x: Float[Array, "B T D"], *, starts: Int[Array, "B T"], is_real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        """Rows of whole texts, several in each (see train/batch.py); the router's scores beside the output."""
        x = x + self.attention.whole(self.attention_norm(x), starts=starts)
        normed = self.moe_norm(x)
        scores = self.moe.scores(normed)
        return x + self.moe.mix(normed, scores, is_real=is_real), scores

    def paged(
        self, x: Float[Array, "1 M D"], pages: LayerPages, *, parts: Sequence[Part]
    ) -> tuple[Float[Array, "1 M D"], LayerPages]:
        is_real = in_line([part.is_real() for part in parts])[None]
        attend = functools.partial(self.attention.paged, pages=pages, parts=parts)
        return self._around(x, attend, is_real=is_real, adapter=adapters_in_line(parts))

    def _around(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[Array], tuple[Array, Past]],
        *,
        is_real: Bool[Array, "B T"] | None = None,
        adapter: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Past]:
        mixed, grown = attend(self.attention_norm(x))
        x = x + mixed
        return x + self.moe(self.moe_norm(x), is_real=is_real, adapter=adapter), grown


class GptOss(nnx.Module):
    """A gpt-oss model. `model(tokens)` gives logits; `extend` goes on from a cache.

    Args:
        config: the sizes.
        dtype: of computation and of every parameter but norms and sinks (float32) and packed experts (uint8).
            float16 is refused: the residual stream reaches 9e4.
        experts: how the expert weights lie in memory, MXFP4 as released or in `dtype`.
        dense: how the weights of attention and unembedding do, in `dtype` or rounded to 8 bits with one scale for each
            32 inputs ("int8"), on one device only.
        mesh: where the parameters are sharded; None is one device.
        impl: which implementation of the kernels runs, "xla" for all or "moe_matmul=gpu,attention=xla"; by default the
            best that the devices have (see implementations.py).
        embedding: in which memory its table lies; on the host it leaves the device 1.16 GB more in the release.
        dispatch: how tokens reach their experts on a mesh (see dispatch.py); by default chosen by their number.

    Raises:
        UserError: a mesh that the model does not fit, or an unknown implementation.
        Unsupported: a named implementation that does not run on these devices, or 8-bit weights on several.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        experts: Experts = "mxfp4",
        dense: Dense = "bf16",
        mesh: AnyMesh | None = None,
        impl: str | None = None,
        dispatch: Way | None = None,
        embedding: Memory = "device",
        rngs: nnx.Rngs,
    ):
        if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
            raise ValueError(f"dtype is {jnp.dtype(dtype)}; expected bfloat16 or float32: float16 overflows at 65504")
        placement = place_model(config, mesh)
        num_devices = 1 if mesh is None else mesh.size
        check_dense(dense, num_devices=num_devices)
        self.impl = Implementations.parse(impl, platform=platform_of(mesh), num_devices=num_devices)
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement}
        block = functools.partial(
            Block, packed=experts == "mxfp4", dense=dense, impl=self.impl, dispatch=dispatch, **kwargs
        )
        self.embedding = Embedding(config.vocab_size, config.width, memory=embedding, **kwargs)
        self.layers = nnx.List([block(config, kind) for kind in config.layer_kinds])
        self.norm = RMSNorm(config.width, eps=config.norm_eps, rngs=rngs, placement=placement)
        kwargs |= {"use_bias": False, "dense": dense, "impl": self.impl.linear}
        self.unembedding = Linear((config.vocab_size,), (config.width,), axes=("vocab", "width"), **kwargs)
        self.config = config
        self.mesh = mesh
        self.kv_heads = placement.fitted("kv_heads", config.num_kv_heads)  # on a mesh some are repeated or padded
        self.num_scores = placement.fitted("vocab", config.vocab_size)  # on a mesh some are padding
        self.dtype = jnp.dtype(dtype)
        self.experts: Experts = experts
        self.dense: Dense = dense

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits after each token, rows beginning at position 0. Ids must be within the vocabulary."""
        rows, num_tokens = tokens.shape
        cache = self.empty_cache(rows=rows, capacity=num_tokens)
        hidden, _ = self.extend(tokens, cache, count=jnp.full(rows, num_tokens, jnp.int32))
        return self.logits(hidden)[..., : self.config.vocab_size]

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        count: Int[Array, " B"],
        adapter: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Feeds the next tokens of each row: a whole prompt, a chunk of one, or the one token just sampled.

        Of row b the first count[b] tokens are real; the rest is padding, whose outputs mean nothing and which is not
        cached, so rows of different length share a call. Returns the last layer's output, normalised, and the cache.
        Of several attached adapters each row takes `adapter`, -1 none; None is all of them.
        """
        settings = {"length": cache.length, "count": count, "adapter": None}
        if adapter is not None:
            settings["adapter"] = spread(adapter, tokens.shape[1])
        hidden, grown = self._through(tokens, cache.layers, lambda layer, x, past: layer(x, past, **settings))
        return hidden, self._placed(Cache(grown, cache.length + count))

    def extend_paged(self, parts: Sequence[Part], cache: PagedCache) -> tuple[list[Float[Array, "_ _ D"]], PagedCache]:
        """Feeds the next tokens of many sequences, whose pages the parts name: see paged.py.

        Returns the last layer's output for each part, normalised, and the pages. Rows of a mesh's `data` shards would
        need pages of their own, so that axis must be 1.
        """
        assert self.mesh is None or self.mesh.shape["data"] == 1, self.mesh
        tokens = in_line([part.tokens for part in parts])[None]
        hidden, grown = self._through(tokens, cache.layers, functools.partial(_paged_layer, parts=tuple(parts)))
        return apart(hidden[0], parts), self._placed_pages(PagedCache(grown))

    def _through(
        self,
        tokens: Int[Array, "B T"],
        pasts: Sequence[Past],
        go: Callable[[Block, Array, Past], tuple[Array, Past]],
    ) -> tuple[Float[Array, "B T D"], tuple[Past, ...]]:
        """From ids to normalised outputs, each layer with what it remembers."""
        x = constrain(self.embedding(tokens), ("rows", None, "width"), self.mesh)
        grown = []
        for layer, past in zip(self.layers, pasts, strict=True):
            x, past = go(layer, x, past)
            grown.append(past)
        return self.norm(x), tuple(grown)

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

    def empty_pages(
        self, *, num_full_pages: int, num_sliding_pages: int, page_size: int, dtype: DTypeLike | None = None
    ) -> PagedCache:
        """Pages for `extend_paged`, in the model's dtype or as int8 codes with scales."""
        return self._placed_pages(
            PagedCache.empty(
                self.config,
                num_full_pages=num_full_pages,
                num_sliding_pages=num_sliding_pages,
                page_size=page_size,
                dtype=self.dtype if dtype is None else dtype,
                kv_heads=self.kv_heads,
            )
        )

    def _placed_pages(self, cache: PagedCache) -> PagedCache:
        """Each device has its heads of every page."""
        if self.mesh is None:
            return cache
        return jax.lax.with_sharding_constraint(cache, NamedSharding(self.mesh, partition((None, None, "kv_heads"))))

    def _placed(self, cache: Cache) -> Cache:
        """Keys and values lie with their rows and heads, lengths with their rows."""
        axes = ("rows", None, "kv_heads", "head_dim")
        layers = jax.tree.map(lambda x: constrain(x, axes, self.mesh), cache.layers)
        return Cache(layers, constrain(cache.length, ("rows",), self.mesh))


class Graph:
    """All of a model but its arrays, as jit wants its static arguments.

    nnx takes a model apart and hashes its definition anew at each call, which costs 7 ms for 24 layers; this is done
    once.
    """

    def __init__(self, definition: nnx.GraphDef[GptOss], tree: Any):
        self._definition, self._tree = definition, tree
        self._hash = hash((definition, tree))

    def merge(self, arrays: Sequence[Array]) -> GptOss:
        return nnx.merge(self._definition, jax.tree.unflatten(self._tree, arrays))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Graph):
            return self is other
        return (self._hash, self._tree, self._definition) == (other._hash, other._tree, other._definition)


def split(model: GptOss) -> tuple[Graph, list[Any]]:
    """What a jitted step takes, apart: the first as a static argument, then arrays (of an abstract model, shapes)."""
    definition, parameters = nnx.split(model)
    arrays, tree = jax.tree.flatten(parameters)
    return Graph(definition, tree), arrays


def _paged_layer(layer: Block, x: Array, pages: LayerPages, *, parts: tuple[Part, ...]) -> tuple[Array, LayerPages]:
    return _traced_once(*nnx.split(layer), x, pages, parts)


@functools.partial(jax.jit, static_argnames="graph")
def _traced_once(
    graph: nnx.GraphDef[Block], parameters: nnx.State, x: Array, pages: LayerPages, parts: tuple[Part, ...]
) -> tuple[Array, LayerPages]:
    """A layer within a step. jit remembers its trace, which all layers of a kind share: an engine compiles many steps,
    and tracing each of their layers would take five times as long."""
    return nnx.merge(graph, parameters).paged(x, pages, parts=parts)


def abstract_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    experts: Experts = "mxfp4",
    dense: Dense = "bf16",
    mesh: AnyMesh | None = None,
    impl: str | None = None,
    dispatch: Way | None = None,
    embedding: Memory = "device",
) -> GptOss:
    """The model with shapes for parameters: what is loaded and planned before anything is allocated."""
    settings: dict[str, Any] = {"dtype": dtype, "experts": experts, "dense": dense, "mesh": mesh, "impl": impl}
    settings |= {"dispatch": dispatch, "embedding": embedding}
    return nnx.eval_shape(lambda: GptOss(config, **settings, rngs=nnx.Rngs(0)))


def parameters(model: GptOss) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as "layers.3.moe.gate_up.blocks". Metadata `axes` names its dimensions."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


def parameter_shapes(config: ModelConfig, experts: Experts) -> Mapping[str, tuple[int, ...]]:
    """The released shape of every parameter by its path."""
    return MappingProxyType({path: shape for path, (shape, _) in released(config, experts).items()})


@functools.cache
def released(
    config: ModelConfig, experts: Experts, dense: Dense = "bf16"
) -> Mapping[str, tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of every parameter by its path, as released, or as 8-bit weights would be.

    One layer is traced and stands for all, whose parameters are alike: tracing 36 takes seconds.
    """
    one_layer = dataclasses.replace(config, layer_kinds=config.layer_kinds[:1])
    traced = parameters(abstract_model(one_layer, experts=experts, dense=dense, impl="xla"))
    found = {path: (value.shape, value.get_metadata()["axes"]) for path, value in traced.items()}
    layers = [
        {path.replace(".0.", f".{layer}.", 1): said for path, said in found.items() if path.startswith("layers.0.")}
        for layer in range(config.num_layers)
    ]
    ends = {path: said for path, said in found.items() if not path.startswith("layers.0.")}
    return MappingProxyType(functools.reduce(operator.or_, layers, ends))


def with_parameters(model: GptOss, values: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> GptOss:
    """The (abstract) model with `values`, arrays or shapes, as its parameters, by path."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(path, value.replace(values[".".join(map(str, path))])) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
