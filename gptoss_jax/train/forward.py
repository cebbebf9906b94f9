"""From masters and packed rows to hidden states, one layer at a time. Knows the order of modules; knows no loss.

A layer makes its parameters of its masters inside of what is computed again on the way back: in between only its input
is kept, and neither a gathered master nor a dequantised weight is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.model.dispatch import route
from gptoss_jax.sharding import constrain
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.leaves import Leaves, Piece, Trained

Remat = Literal["layer", "dots", "none"]

_POLICIES: Mapping[str, Any] = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """How the tokens of a batch spread over the experts, padding left out.

    Attributes:
        visits: how many of the tokens' visits each expert has.
        probability: the mean of the softmax over all experts.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    visits: Float[Array, "L E"]
    probability: Float[Array, "L E"]

    @property
    def load(self) -> Float[Array, "L E"]:
        """The share of all visits."""
        return self.visits / jnp.maximum(self.visits.sum(axis=-1, keepdims=True), 1)


def forward(
    trained: Leaves, frozen: Leaves, batch: Batch, *, plan: Trained, remat: Remat = "layer"
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """The last layer's output, normalised, of every token.

    Args:
        trained: the masters.
        frozen: the plan's, which are arguments of a jitted step and no constants of it.
        batch: rows cut over the mesh's `data`.
        plan: what belongs where.
        remat: what is computed again on the way back: all of a "layer", all but the products of whole rows ("dots",
            faster and larger), or "none" of it.
    """
    modules = _Modules(plan, trained, frozen)
    ids = batch.tokens
    x = modules.run("embedding", lambda embedding, ids: embedding(ids), ids)
    x = constrain(x, ("rows", None, "width"), plan.model.mesh)
    stats = []
    for i in range(plan.model.config.num_layers):
        layer = functools.partial(_layer, experts_per_token=plan.model.config.experts_per_token)
        x, found = modules.run(f"layers.{i}", layer, x, batch.starts, batch.is_real, remat=remat)
        stats.append(found)
    return modules.run("norm", lambda norm, x: norm(x), x), jax.tree.map(lambda *of: jnp.stack(of), *stats)


def unembedding(trained: Leaves, frozen: Leaves, *, plan: Trained) -> Any:
    """The module that gives logits, for a loss that takes some tokens at a time."""
    return _merged(plan, plan.pieces["unembedding"], *_Modules(plan, trained, frozen).own("unembedding"))


@dataclasses.dataclass(frozen=True)
class _Modules:
    plan: Trained
    trained: Leaves
    frozen: Leaves

    def own(self, name: str) -> tuple[Leaves, Leaves]:
        """What the module has of either kind."""
        names = self.plan.pieces[name].parameters
        return {n: self.trained[n] for n in names if n in self.trained}, {
            n: self.frozen[n] for n in names if n not in self.trained
        }

    def run(self, name: str, call: Callable[..., Any], *inputs: Any, remat: Remat = "none") -> Any:
        """call(module, *inputs), of which nothing but the policy's is kept for the way back."""
        piece = self.plan.pieces[name]

        def go(trained: Leaves, frozen: Leaves, *inputs: Any) -> Any:
            return call(_merged(self.plan, piece, trained, frozen), *inputs)

        if remat != "none":
            go = jax.checkpoint(go, policy=_POLICIES[remat])
        return go(*self.own(name), *inputs)


def _merged(plan: Trained, piece: Piece, trained: Leaves, frozen: Leaves) -> Any:
    return piece.merge(frozen | {name: plan.laid(name, master) for name, master in trained.items()})


def _layer(
    layer: Any,
    x: Float[Array, "B T D"],
    starts: Int[Array, "B T"],
    is_real: Bool[Array, "B T"],
    *,
    experts_per_token: int,
) -> tuple[Float[Array, "B T D"], RouterStats]:
    x, scores = layer.whole(x, starts=starts, is_real=is_real)
    return x, _router_stats(scores, is_real, experts_per_token)


def _router_stats(scores: Float[Array, "B T E"], is_real: Bool[Array, "B T"], experts_per_token: int) -> RouterStats:
    """Of one layer, [E] each."""
    chosen, _ = route(scores, experts_per_token)
    real = is_real[..., None].astype(jnp.float32)
    visits = jnp.sum(jax.nn.one_hot(chosen, scores.shape[-1]).sum(axis=-2) * real, axis=(0, 1))
    probability = jnp.sum(jax.nn.softmax(scores) * real, axis=(0, 1)) / jnp.maximum(real.sum(), 1)
    return RouterStats(visits, probability)
