"""Self-attention of one layer: projections, rotary embedding, cache, sinks. Knows no other layer."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels import attention as kernels
from gptoss_jax.model.cache import FullCache, RingCache
from gptoss_jax.model.config import LayerKind, ModelConfig
from gptoss_jax.model.layers import Linear, declare
from gptoss_jax.model.rope import rotate


class Attention(nnx.Module):
    """Grouped-query attention with one learned sink per query head; a sliding layer sees `window` positions."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = (config.width,)
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        query_axes, key_axes = ("heads", "head_dim", "width"), ("kv_heads", "head_dim", "width")
        self.q = Linear(heads, width, axes=query_axes, dtype=dtype, rngs=rngs)
        self.k = Linear(kv_heads, width, axes=key_axes, dtype=dtype, rngs=rngs)
        self.v = Linear(kv_heads, width, axes=key_axes, dtype=dtype, rngs=rngs)
        self.o = Linear(width, heads, axes=("width", "heads", "head_dim"), dtype=dtype, rngs=rngs)
        sinks = nnx.initializers.normal(1.0)
        self.sinks = declare(rngs, (config.num_heads,), ("heads",), dtype=jnp.float32, init=sinks)
        self.rope = config.rope
        self.window = config.sliding_window if kind == "sliding" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: FullCache | RingCache,
        *,
        length: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], FullCache | RingCache]:
        """The T tokens of row b stand at positions length[b], length[b] + 1, …; the first count[b] of them are kept."""
        positions = length[:, None] + jnp.arange(x.shape[1])
        q = rotate(self.q(x), positions, self.rope)
        k = rotate(self.k(x), positions, self.rope)
        keys, values, grown = cache.extend(k, self.v(x), length=length, count=count)
        sinks = self.sinks[...]
        if self.window is None:
            mixed = kernels.full(q, keys, values, sinks, first_query=length)
        else:
            mixed = kernels.sliding(q, keys, values, sinks, first_query=length, window=self.window)
        return self.o(mixed), grown
