"""Self-attention of one layer: projections, rotary embedding, cache, sinks. Knows no other layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels import attention as kernels
from gptoss_jax.model.cache import FullCache, RingCache
from gptoss_jax.model.config import LayerKind, ModelConfig
from gptoss_jax.model.implementations import device_kind_of
from gptoss_jax.model.layers import Dense, Linear, declare
from gptoss_jax.model.paged import LayerPages, Part, adapters_in_line, apart, in_line
from gptoss_jax.model.rope import rotate
from gptoss_jax.sharding import WHOLE, Placement, row_axis


class Attention(nnx.Module):
    """Grouped-query attention with one learned sink per query head; a sliding layer sees `window` positions."""

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
        impl: str = "xla",
        linear_impl: str = "xla",
        dense: Dense = "bf16",
    ):
        width = (config.width,)
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        query_axes, key_axes = ("heads", "head_dim", "width"), ("kv_heads", "head_dim", "width")
        settings: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement}
        linear = functools.partial(Linear, dense=dense, impl=linear_impl, **settings)
        self.q = linear(heads, width, axes=query_axes)
        self.k = linear(kv_heads, width, axes=key_axes)
        self.v = linear(kv_heads, width, axes=key_axes)
        self.o = linear(width, heads, axes=("width", "heads", "head_dim"))
        normal = nnx.initializers.normal(1.0)
        self.sinks = declare(rngs, (config.num_heads,), ("heads",), dtype=jnp.float32, init=normal, placement=placement)
        self.rope = config.rope
        self.window = config.sliding_window if kind == "sliding" else None
        self.mesh = placement.mesh
        self.impl = impl
        self.device_kind = device_kind_of(placement.mesh)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: FullCache | RingCache,
        *,
        length: Int[Array, " B"],
        count: Int[Array, " B"],
        adapter: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], FullCache | RingCache]:
        """The T tokens of row b stand at positions length[b], length[b] + 1, …; the first count[b] of them are kept.

        `adapter`: see Linear.
        """
        q, k, v = self._project(x, length[:, None] + jnp.arange(x.shape[1]), adapter)
        mixed, grown = self._local(x.shape[0])(q, k, v, cache, self.sinks[...], length, count)
        return self.o(mixed, adapter=adapter), grown

    def whole(self, x: Float[Array, "B T D"], *, starts: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of whole texts, several in each, as training packs them: see train/batch.py. Needs no cache.

        A token's text begins at `starts` of it: positions count from there, and nothing before is seen.
        """
        q, k, v = self._project(x, jnp.arange(x.shape[1]) - starts, None)
        if self.mesh is None:
            return self.o(self._attend_whole(q, k, v, self.sinks[...], starts))
        rows = row_axis(x.shape[0], self.mesh)
        heads = P(rows, None, "tensor")
        in_specs = (heads, heads, heads, P("tensor"), P(rows))
        local = jax.shard_map(self._attend_whole, mesh=self.mesh, in_specs=in_specs, out_specs=heads, check_vma=False)
        return self.o(local(q, k, v, self.sinks[...], starts))

    def paged(
        self, x: Float[Array, "1 M D"], pages: LayerPages, *, parts: Sequence[Part]
    ) -> tuple[Float[Array, "1 M D"], LayerPages]:
        """The tokens of all parts in one line; each attends to its own sequence, in pages."""
        adapter = adapters_in_line(parts)
        q, k, v = self._project(x, in_line([part.positions() for part in parts])[None], adapter)
        mixed, grown = self._local_paged()(q[0], k[0], v[0], pages, self.sinks[...], tuple(parts))
        return self.o(mixed[None], adapter=adapter), grown

    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], adapter: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values; the first two know their positions."""
        q, k, v = (linear(x, adapter=adapter) for linear in (self.q, self.k, self.v))
        return rotate(q, positions, self.rope), rotate(k, positions, self.rope), v

    def _local(self, num_rows: int) -> Callable[..., tuple[Float[Array, "B T N H"], FullCache | RingCache]]:
        """From queries to mixed values. On a mesh each device has its own rows and heads, and needs no other's."""
        if self.mesh is None:
            return self._attend
        rows = row_axis(num_rows, self.mesh)
        heads = P(rows, None, "tensor")
        in_specs = (heads, heads, heads, heads, P("tensor"), P(rows), P(rows))
        return jax.shard_map(self._attend, mesh=self.mesh, in_specs=in_specs, out_specs=(heads, heads), check_vma=False)

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        cache: FullCache | RingCache,
        sinks: Float[Array, " N"],
        length: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], FullCache | RingCache]:
        keys, values, grown = cache.extend(k, v, length=length, count=count)
        attend = kernels.full if self.window is None else functools.partial(kernels.sliding, window=self.window)
        settings = {"impl": self.impl, "device_kind": self.device_kind}
        return attend(q, keys, values, sinks, first_query=length, **settings), grown

    def _attend_whole(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        sinks: Float[Array, " N"],
        starts: Int[Array, "B T"],
    ) -> Float[Array, "B T N H"]:
        settings: dict[str, Any] = {
            "first_query": jnp.zeros(len(q), jnp.int32),
            "first_key": starts,
            "impl": self.impl,
            "device_kind": self.device_kind,
        }
        if self.window is None:
            return kernels.full(q, k, v, sinks, **settings)
        k, v = (jnp.pad(x, ((0, 0), (self.window, 0), (0, 0), (0, 0))) for x in (k, v))
        return kernels.sliding(q, k, v, sinks, window=self.window, **settings)

    def _local_paged(self) -> Callable[..., tuple[Float[Array, "M N H"], LayerPages]]:
        """On a mesh each device has its own heads of every page; which tokens there are, all know."""
        if self.mesh is None:
            return self._attend_paged
        heads, pages = P(None, "tensor"), P(None, None, "tensor")
        in_specs = (heads, heads, heads, pages, P("tensor"), P())
        return jax.shard_map(
            self._attend_paged, mesh=self.mesh, in_specs=in_specs, out_specs=(heads, pages), check_vma=False
        )

    def _attend_paged(
        self,
        q: Float[Array, "M N H"],
        k: Float[Array, "M K H"],
        v: Float[Array, "M K H"],
        pages: LayerPages,
        sinks: Float[Array, " N"],
        parts: Sequence[Part],
    ) -> tuple[Float[Array, "M N H"], LayerPages]:
        # All is written before any is read: a write between two reads would copy the pages.
        grown = pages.write(k, v, parts, window=self.window)
        settings = {"window": self.window, "impl": self.impl, "device_kind": self.device_kind}
        mixed = [
            kernels.paged(
                queries,
                grown.k,
                grown.v,
                part.table(self.window),
                sinks,
                first_query=part.first,
                count=part.count,
                **settings,
            )
            for part, queries in zip(parts, apart(q, parts), strict=True)
        ]
        return in_line(mixed), grown
