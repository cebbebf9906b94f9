"""gpt-oss written plainly in jnp, to be differentiated: the judge of gradients. Imports nothing of gptoss_jax.

Knows parameters by their paths, in released shapes and decoded; one text a row, from its first position. Knows no
packing, no kernels, no mesh: each expert is computed for each token, an adapter is added to its matrix, scores of the
whole vocabulary exist.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tests.oracle import mxfp4_decode

Weights: TypeAlias = Mapping[str, Float[Array, "..."]]
Ids: TypeAlias = Int[np.ndarray | Array, "B T"]
Counts: TypeAlias = Float[np.ndarray | Array, "B T"]

SWIGLU_ALPHA = 1.702

# How b · a of each target makes a matrix of its weight's shape.
_PRODUCTS = {
    "q": "nhr,rd->nhd",
    "k": "nhr,rd->nhd",
    "v": "nhr,rd->nhd",
    "o": "dr,rnh->dnh",
    "router": "er,rd->ed",
    "gate_up": "efgr,erd->efgd",
    "down": "edr,erf->edf",
}


def decoded(parameters: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, "..."]]:
    """All in float64; blocks and scales of an expert matrix become its weight."""
    found = {}
    for path, value in parameters.items():
        if path.endswith(".blocks"):
            stem = path.removesuffix(".blocks")
            found[f"{stem}.weight"] = mxfp4_decode(np.asarray(value), np.asarray(parameters[f"{stem}.scales"]))
        elif not path.endswith(".scales"):
            found[path] = np.asarray(value, np.float64)
    return found


def merged(weights: Weights, adapter: Weights, *, scale: float) -> dict[str, Float[Array, "..."]]:
    """Each weight with scale · b · a added to it."""
    found = dict(weights)
    for path in (path.removesuffix(".adapter.a") for path in adapter if path.endswith(".adapter.a")):
        a, b = adapter[f"{path}.adapter.a"], adapter[f"{path}.adapter.b"]
        added = jnp.einsum(_PRODUCTS[path.rpartition(".")[2]], b, a)
        found[f"{path}.weight"] = found[f"{path}.weight"] + scale * added
    return found


def mean_loss(
    weights: Weights,
    config: Any,
    tokens: Ids,
    targets: Ids,
    counts: Counts,
) -> Float[Array, ""]:
    """-log of the targets' probabilities, weighted by counts, over the sum of all counts."""
    found = log_probabilities(weights, config, tokens, targets)
    return -jnp.sum(found * counts) / jnp.sum(counts)


def log_probabilities(
    weights: Weights,
    config: Any,
    tokens: Ids,
    targets: Ids,
) -> Float[Array, "B T"]:
    scores = logits(weights, config, tokens)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]


def logits(weights: Weights, config: Any, tokens: Ids) -> Float[Array, "B T V"]:
    x = weights["embedding.weight"][tokens]
    for layer, kind in enumerate(config.layer_kinds):
        at = f"layers.{layer}."
        window = config.sliding_window if kind == "sliding" else tokens.shape[1]
        normed = _norm(x, weights[f"{at}attention_norm.scale"], config)
        x = x + _attention(weights, f"{at}attention.", normed, config, window=window)
        x = x + _experts(weights, f"{at}moe.", _norm(x, weights[f"{at}moe_norm.scale"], config), config)
    return _norm(x, weights["norm.scale"], config) @ weights["unembedding.weight"].T


def _norm(x: Float[Array, "B T D"], scale: Float[Array, " D"], config: Any) -> Float[Array, "B T D"]:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale


def _attention(
    weights: Weights, at: str, x: Float[Array, "B T D"], config: Any, *, window: int
) -> Float[Array, "B T D"]:
    q, k, v = (
        jnp.einsum("btd,nhd->btnh", x, weights[f"{at}{name}.weight"]) + weights[f"{at}{name}.bias"] for name in "qkv"
    )
    angles = np.arange(x.shape[1])[:, None] * _frequencies(config)
    q, k = (_rotated(heads, angles, config) for heads in (q, k))
    k, v = (jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=2) for heads in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(config.head_dim)
    age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    scores = jnp.where((age >= 0) & (age < window), scores, -jnp.inf)
    sinks = jnp.broadcast_to(weights[f"{at}sinks"][None, :, None, None], (*scores.shape[:3], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
    mixed = jnp.einsum("bnts,bsnh->btnh", shares, v)
    return jnp.einsum("btnh,dnh->btd", mixed, weights[f"{at}o.weight"]) + weights[f"{at}o.bias"]


def _frequencies(config: Any) -> Float[np.ndarray, " half"]:
    """YaRN's (arXiv:2309.00071): pairs that turn often keep theirs, those that turn seldom are slowed by the factor."""
    rope, half = config.rope, config.head_dim // 2
    plain = rope.theta ** (-np.arange(half) / half)

    def pair_that_turns(times: float) -> float:
        return half * np.log(rope.original_context / (times * 2 * np.pi)) / np.log(rope.theta)

    low, high = max(pair_that_turns(rope.beta_fast), 0), min(pair_that_turns(rope.beta_slow), 2 * half - 1)
    slowed = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    return plain * (1 - slowed) + plain / rope.factor * slowed


def _rotated(x: Float[Array, "B T N H"], angles: Float[np.ndarray, "T half"], config: Any) -> Float[Array, "B T N H"]:
    concentration = 0.1 * np.log(config.rope.factor) + 1
    cos, sin = (concentration * turned(angles)[:, None] for turned in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _experts(weights: Weights, at: str, x: Float[Array, "B T D"], config: Any) -> Float[Array, "B T D"]:
    scores = jnp.einsum("btd,ed->bte", x, weights[f"{at}router.weight"]) + weights[f"{at}router.bias"]
    least = jnp.sort(scores, axis=-1)[..., -config.experts_per_token, None]
    shares = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf))
    both = jnp.einsum("btd,efgd->btefg", x, weights[f"{at}gate_up.weight"]) + weights[f"{at}gate_up.bias"]
    limit = config.swiglu_limit
    gate = jnp.where(both[..., 0] >= limit, limit, both[..., 0])
    up = jnp.where(both[..., 1] >= limit, limit, jnp.where(both[..., 1] <= -limit, -limit, both[..., 1]))
    inner = gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    out = jnp.einsum("btef,edf->bted", inner, weights[f"{at}down.weight"]) + weights[f"{at}down.bias"]
    return jnp.einsum("bte,bted->btd", shares, out)
