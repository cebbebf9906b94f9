"""The mixture of experts of one layer: router and expert MLP. Knows its parameters; dispatch.py moves the tokens."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.kernels.choose import layout
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import Way, mix
from gptoss_jax.model.experts import ExpertLinear
from gptoss_jax.model.layers import Linear
from gptoss_jax.sharding import WHOLE, Placement


class MoE(nnx.Module):
    """Every token visits its `experts_per_token` best experts; none is dropped."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        packed: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        placement: Placement = WHOLE,
        impl: str = "xla",
        linear_impl: str = "xla",
        dispatch: Way | None = None,
    ):
        experts, width, expert_width = config.num_experts, config.width, config.expert_width
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "placement": placement}
        self.router = Linear((experts,), (width,), axes=("router_experts", "width"), impl=linear_impl, **kwargs)
        make = functools.partial(ExpertLinear, experts, packed=packed, layout=layout(impl), **kwargs)
        self.gate_up = make((expert_width, 2), width, axes=(("expert_width", "gate_up"), "width"))
        self.down = make((width,), expert_width, axes=(("width",), "expert_width"))
        self.experts_per_token = config.experts_per_token
        self.limit = config.swiglu_limit
        self.mesh = placement.mesh
        self.impl = impl
        self.dispatch: Way | None = dispatch

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        is_real: Bool[Array, "B T"] | None = None,
        adapter: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Tokens that are not real visit no expert, and come out as zeros. `adapter`: see Linear."""
        return self.mix(x, self.scores(x, adapter=adapter), is_real=is_real, adapter=adapter)

    def scores(self, x: Float[Array, "B T D"], *, adapter: Int[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        """The router's, in float32: rounding them to bfloat16 would send tokens to other experts at near-ties."""
        return self.router(x, out_dtype=jnp.float32, adapter=adapter)

    def mix(
        self,
        x: Float[Array, "B T D"],
        scores: Float[Array, "B T E"],
        *,
        is_real: Bool[Array, "B T"] | None = None,
        adapter: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the experts that the scores choose make of each token."""
        return mix(
            x,
            scores,
            (*self.gate_up.arrays(), *self.down.arrays()),
            experts_per_token=self.experts_per_token,
            limit=self.limit,
            impl=self.impl,
            is_real=is_real,
            adapter=adapter,
            mesh=self.mesh,
            way=self.dispatch,
            expert_specs=(*self.gate_up.specs(), *self.down.specs()),
        )
