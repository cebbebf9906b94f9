"""How well hidden states foretell the ids behind them, some at a time. Knows arrays and mesh axes, no model.

Scores of all tokens over the vocabulary never exist at once: of 2,048 tokens they are 1.6 GB in float32 in the release.
Tokens go in chunks, whose scores the way back computes again. On a mesh a device has its own rows and its own ids: the
devices of `expert`, which hold the same of both, share the tokens out, and sums over `tensor` bring the ids together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from gptoss_jax.kernels.linear import matmul
from gptoss_jax.sharding import AnyMesh, row_axis
from gptoss_jax.train.forward import RouterStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Of a batch, to be added up over batches; loss / weight is the mean.

    Attributes:
        loss: each target's -log of its probability, weighted.
        weight: of all targets.
        correct: the weight of those that no other id has a higher score than.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_size: int,
    chunk: int,
    mesh: AnyMesh | None = None,
) -> Sums:
    """The loss of the targets. Args as of `log_probabilities`, and how much each target counts."""
    return summed(*log_probabilities(hidden, weight, targets, vocab_size=vocab_size, chunk=chunk, mesh=mesh), weights)


def summed(log_probabilities: Float[Array, "B T"], is_best: Bool[Array, "B T"], weights: Float[Array, "B T"]) -> Sums:
    """A target of weight zero counts for nothing, whatever its probability."""
    loss = -jnp.sum(jnp.where(weights > 0, weights * log_probabilities, 0))
    return Sums(loss=loss, weight=jnp.sum(weights), correct=jnp.sum(weights * is_best))


def log_probabilities(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    vocab_size: int,
    chunk: int,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The log of each target's probability, and whether no other id has a higher score.

    Args:
        hidden: rows cut over `data` if it divides them.
        weight: of the unembedding, in hidden's dtype, cut over `tensor`. Its gradient is made only where it is asked
            for, and adds up in float32.
        targets: ids below vocab_size.
        vocab_size: further ids, which pad the weight, have no probability.
        chunk: how many tokens of a device have scores at once.
        mesh: None is one device.
    """
    rows = P() if mesh is None else P(row_axis(len(hidden), mesh))
    shared = () if mesh is None else ("expert",) if rows[0] else ("data", "expert")
    return _log_probabilities(hidden, weight, targets, _Cut(vocab_size, chunk, mesh, rows, shared))


def router_loss(stats: RouterStats) -> Float[Array, ""]:
    """How unevenly tokens spread over experts (arXiv:2101.03961, eq. 4): 1 where they are even, E where one has all.

    E · Σ load · probability, the mean over the layers. Only the probability has a gradient.
    """
    load = lax.stop_gradient(stats.load)
    return jnp.mean(load.shape[-1] * jnp.sum(load * stats.probability, axis=-1))


# ---- on each device --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Which tokens and ids a device has, and how many of the tokens at a time.

    Attributes:
        rows: where hidden states lie; ids lie over `tensor`.
        shared: the mesh axes whose devices hold the same tokens and ids, and share the tokens out.
    """

    vocab_size: int
    chunk: int
    mesh: AnyMesh | None
    rows: P
    shared: tuple[str, ...]

    def on_devices(self, local: Callable[..., Any], *operands: Any, out: tuple[P, ...]) -> Any:
        """local(hidden, weight, tokens, …), each device with its part."""
        if self.mesh is None:
            return local(*operands)
        specs = (self.rows, P("tensor"), *[self.rows] * (len(operands) - 2))
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*operands)

    def share(self, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "chunks C *rest"]:
        """This device's part of the tokens, in chunks; the last ones are padding."""
        flat = x.reshape(-1, *x.shape[2:])
        parts = math.prod(lax.axis_size(axis) for axis in self.shared)
        size = -(-len(flat) // parts)
        chunk = min(size, self.chunk)
        size = -(-size // chunk) * chunk
        flat = jnp.pad(flat, ((0, size * parts - len(flat)), *[(0, 0)] * (flat.ndim - 1)))
        if self.shared:
            flat = lax.dynamic_slice_in_dim(flat, lax.axis_index(self.shared) * size, size)
        return flat.reshape(-1, chunk, *flat.shape[1:])

    def unshare(self, x: Shaped[Array, "chunks C *rest"], rows: tuple[int, ...]) -> Shaped[Array, "B T *rest"]:
        """The parts of all devices, as they were before."""
        flat = x.reshape(-1, *x.shape[2:])
        if self.shared:
            flat = lax.all_gather(flat, self.shared, tiled=True)
        return flat[: math.prod(rows)].reshape(*rows, *flat.shape[1:])

    def over_ids(self, reduce: Callable[[Array, str], Array], x: Array) -> Array:
        """A reduction over the devices that have the other ids."""
        return x if self.mesh is None else reduce(x, "tensor")

    def scores(self, hidden: Float[Array, "C D"], weight: Float[Array, "V D"]) -> Float[Array, "C V"]:
        """Of this device's ids, float32."""
        scores = matmul(hidden, weight)
        ids = self.first_id(weight) + jnp.arange(len(weight))
        return jnp.where(ids < self.vocab_size, scores, -jnp.inf)

    def is_target(self, targets: Int[Array, " C"], weight: Float[Array, "V D"]) -> Bool[Array, "C V"]:
        return targets[:, None] == self.first_id(weight) + jnp.arange(len(weight))

    def first_id(self, weight: Float[Array, "V D"]) -> Int[Array, ""] | int:
        return 0 if self.mesh is None else lax.axis_index("tensor") * len(weight)


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probabilities(hidden: Array, weight: Array, targets: Array, cut: _Cut) -> tuple[Array, Array]:
    found, is_best, _ = _scored(hidden, weight, targets, cut)
    return found, is_best


def _scored(
    hidden: Float[Array, "B T D"], weight: Float[Array, "V D"], targets: Int[Array, "B T"], cut: _Cut
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Also the log of the sum of all exponentials, with which the way back needs no sum of its own."""

    def one_chunk(chunk: tuple[Array, Array], weight: Array) -> tuple[Array, Array, Array]:
        rows, targets = chunk
        scores = cut.scores(rows, weight)
        most = cut.over_ids(lax.pmax, jnp.max(scores, axis=-1))
        total = cut.over_ids(lax.psum, jnp.sum(jnp.exp(scores - most[:, None]), axis=-1))
        own = jnp.sum(jnp.where(cut.is_target(targets, weight), scores, 0), axis=-1)
        score, log_total = cut.over_ids(lax.psum, own), most + jnp.log(total)
        return score - log_total, score >= most, log_total

    def local(hidden: Array, weight: Array, targets: Array) -> tuple[Array, ...]:
        chunks = cut.share(hidden), cut.share(targets)
        return tuple(cut.unshare(x, targets.shape) for x in lax.map(lambda chunk: one_chunk(chunk, weight), chunks))

    return cut.on_devices(local, hidden, weight, targets, out=(cut.rows,) * 3)


def _forward(
    hidden: CustomVJPPrimal, weight: CustomVJPPrimal, targets: CustomVJPPrimal, cut: _Cut
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    found, is_best, log_total = _scored(hidden.value, weight.value, targets.value, cut)
    # What is saved are arrays; whether the weight trains is told by there being one more.
    trains = (jnp.zeros(()),) if weight.perturbed else ()
    return (found, is_best), (hidden.value, weight.value, targets.value, log_total, trains)


def _backward(cut: _Cut, saved: tuple[Any, ...], d_outputs: tuple[Array, Any]) -> tuple[Any, ...]:
    hidden, weight, targets, log_total, trains = saved

    def one_chunk(d_weight: Array | None, chunk: tuple[Array, ...], weight: Array) -> tuple[Array | None, Array]:
        rows, targets, log_total, d_found = chunk
        probabilities = jnp.exp(cut.scores(rows, weight) - log_total[:, None])
        d_scores = (d_found[:, None] * (cut.is_target(targets, weight) - probabilities)).astype(rows.dtype)
        if d_weight is not None:
            d_weight = d_weight + matmul(d_scores.T, rows.T)
        return d_weight, cut.over_ids(lax.psum, matmul(d_scores, weight.T)).astype(rows.dtype)

    def local(hidden: Array, weight: Array, *tokens: Array) -> tuple[Array, ...]:
        zeros = jnp.zeros(weight.shape, jnp.float32) if trains else None
        chunks = tuple(cut.share(x) for x in (hidden, *tokens))
        d_weight, d_hidden = lax.scan(lambda sums, chunk: one_chunk(sums, chunk, weight), zeros, chunks)
        d_hidden = cut.unshare(d_hidden, hidden.shape[:2])
        if d_weight is None:
            return (d_hidden,)
        d_weight = d_weight if cut.mesh is None else lax.psum(d_weight, ("data", "expert"))
        return d_hidden, d_weight.astype(weight.dtype)

    out = (cut.rows, P("tensor")) if trains else (cut.rows,)
    found = cut.on_devices(local, hidden, weight, targets, log_total, d_outputs[0], out=out)
    return found[0], found[1] if trains else None, None


_log_probabilities.defvjp(_forward, _backward, symbolic_zeros=True)
