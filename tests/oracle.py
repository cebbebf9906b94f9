"""The gpt-oss model in NumPy float64, plainly: the judge of every other form. Imports nothing of gptoss_jax.

Knows Hugging Face's config.json and tensor names, one whole prompt at a time. Knows no cache, no sharding and no speed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

# E2M1: the low three bits choose the size, the high bit the sign, so code 8 is -0.
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)

SWIGLU_ALPHA = 1.702  # in no released config.json

QUERIES_AT_ONCE = 128  # bounds the scores to [B, N, 128, S]; the result does not depend on it


def forward(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: Int[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T V"]:
    """Logits after each token of whole prompts, from a Hugging Face checkpoint with MXFP4 or bf16 experts."""
    x = _float64(tensors, "model.embed_tokens.weight")[tokens]
    cos, sin = rope_tables(config, np.arange(tokens.shape[1]))
    for layer, kind in enumerate(config["layer_types"]):
        at = f"model.layers.{layer}."
        window = {"sliding_attention": config["sliding_window"], "full_attention": None}[kind]
        normed = rms_norm(x, _float64(tensors, at + "input_layernorm.weight"), eps=config["rms_norm_eps"])
        x = x + attention_layer(config, tensors, at + "self_attn.", normed, cos, sin, window=window)
        normed = rms_norm(x, _float64(tensors, at + "post_attention_layernorm.weight"), eps=config["rms_norm_eps"])
        x = x + moe_layer(config, tensors, at + "mlp.", normed)
    x = rms_norm(x, _float64(tensors, "model.norm.weight"), eps=config["rms_norm_eps"])
    return x @ _float64(tensors, "lm_head.weight").T


def rms_norm(
    x: Float[np.ndarray, "*rows D"], scale: Float[np.ndarray, " D"], *, eps: float
) -> Float[np.ndarray, "*rows D"]:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope_tables(
    config: Mapping[str, Any], positions: Int[np.ndarray, " T"]
) -> tuple[Float[np.ndarray, "T half"], Float[np.ndarray, "T half"]]:
    """Cosines and sines of the angles by which each position turns each pair, times YaRN's concentration.

    YaRN (arXiv:2309.00071) leaves the pairs that turn more than beta_fast times within the original context as they
    are, slows those that turn less than beta_slow times by the factor, and blends linearly in between.
    """
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    half = config["head_dim"] // 2
    pairs = np.arange(half)
    frequency = rope["rope_theta"] ** (-pairs / half)
    concentration = 1.0
    if rope["rope_type"] == "yarn":

        def pair_that_turns(times: float) -> float:
            context = rope["original_max_position_embeddings"]
            return half * np.log(context / (times * 2 * np.pi)) / np.log(rope["rope_theta"])

        # Not rounded to whole pairs (`truncate: false`); kept within the head, as transformers does.
        low = max(pair_that_turns(rope["beta_fast"]), 0)
        high = min(pair_that_turns(rope["beta_slow"]), 2 * half - 1)
        slowed = np.clip((pairs - low) / (high - low), 0, 1)
        frequency = frequency * (1 - slowed) + frequency / rope["factor"] * slowed
        concentration = 0.1 * np.log(rope["factor"]) + 1
    angle = positions[:, None] * frequency
    return np.cos(angle) * concentration, np.sin(angle) * concentration


def rotate(
    x: Float[np.ndarray, "B T heads H"], cos: Float[np.ndarray, "T half"], sin: Float[np.ndarray, "T half"]
) -> Float[np.ndarray, "B T heads H"]:
    """Turns each pair (i, i + H/2): the halves of a head are the two coordinates, not its even and odd elements."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_layer(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    at: str,
    x: Float[np.ndarray, "B T D"],
    cos: Float[np.ndarray, "T half"],
    sin: Float[np.ndarray, "T half"],
    *,
    window: int | None,
) -> Float[np.ndarray, "B T D"]:
    """Projections, rotary embedding and attention of the layer whose tensors' names begin with `at`."""

    def heads(name: str) -> Float[np.ndarray, "B T heads H"]:
        return _linear(tensors, at + name, x).reshape(*x.shape[:2], -1, config["head_dim"])

    q, k, v = rotate(heads("q_proj"), cos, sin), rotate(heads("k_proj"), cos, sin), heads("v_proj")
    mixed = attention(q, k, v, _float64(tensors, at + "sinks"), window=window)
    return _linear(tensors, at + "o_proj", mixed.reshape(*x.shape[:2], -1))


def attention(
    q: Float[np.ndarray, "B T N H"],
    k: Float[np.ndarray, "B S K H"],
    v: Float[np.ndarray, "B S K H"],
    sinks: Float[np.ndarray, " N"],
    *,
    window: int | None,
) -> Float[np.ndarray, "B T N H"]:
    """Causal attention of the last T of S tokens; `window` counts the keys in sight, the query's own among them.

    A head's sink is one more logit in its softmax that carries no value.
    """
    num_tokens, num_heads = q.shape[1:3]
    num_keys, num_kv_heads = k.shape[1:3]
    # Query head n reads key/value head n // (N / K). Heads before tokens: [B, N, S, H].
    k = np.repeat(k, num_heads // num_kv_heads, axis=2).swapaxes(1, 2)
    v = np.repeat(v, num_heads // num_kv_heads, axis=2).swapaxes(1, 2)
    q = q.swapaxes(1, 2)
    first_query = num_keys - num_tokens
    mixed = np.empty(q.shape)
    for start in range(0, num_tokens, QUERIES_AT_ONCE):
        queries = slice(start, min(start + QUERIES_AT_ONCE, num_tokens))
        position = first_query + np.arange(queries.start, queries.stop)[:, None]
        first_key = 0 if window is None else max(0, position[0, 0] - window + 1)
        key_position = np.arange(first_key, position[-1, 0] + 1)  # other keys are in no query's sight
        age = position - key_position
        seen = age >= 0 if window is None else (age >= 0) & (age < window)
        scores = q[:, :, queries] @ k[:, :, key_position].swapaxes(2, 3) / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        sink = sinks[:, None, None]
        peak = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        shares = np.exp(scores - peak)
        shares /= shares.sum(axis=-1, keepdims=True) + np.exp(sink - peak)
        mixed[:, :, queries] = shares @ v[:, :, key_position]
    return mixed.swapaxes(1, 2)


def softmax(x: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows n"]:
    grown = np.exp(x - x.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def moe_layer(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], at: str, x: Float[np.ndarray, "*rows D"]
) -> Float[np.ndarray, "*rows D"]:
    """The mixture of experts whose tensors' names begin with `at`."""
    experts, weights = route(_linear(tensors, at + "router", x), config["num_experts_per_tok"])
    return moe(
        x,
        experts,
        weights,
        gate_up=expert_weights(tensors, at + "experts.gate_up_proj"),
        gate_up_bias=_float64(tensors, at + "experts.gate_up_proj_bias"),
        down=expert_weights(tensors, at + "experts.down_proj"),
        down_bias=_float64(tensors, at + "experts.down_proj_bias"),
        limit=config["swiglu_limit"],
    )


def route(
    logits: Float[np.ndarray, "*rows E"], num_active: int
) -> tuple[Int[np.ndarray, "*rows X"], Float[np.ndarray, "*rows X"]]:
    """The experts of each token, best first, and their weights: a softmax over the chosen logits alone."""
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :num_active]  # of equal logits the first expert wins
    return experts, softmax(np.take_along_axis(logits, experts, axis=-1))


def moe(
    x: Float[np.ndarray, "*rows D"],
    experts: Int[np.ndarray, "*rows X"],
    weights: Float[np.ndarray, "*rows X"],
    *,
    gate_up: Float[np.ndarray, "E twoF D"],
    gate_up_bias: Float[np.ndarray, "E twoF"],
    down: Float[np.ndarray, "E D F"],
    down_bias: Float[np.ndarray, "E D"],
    limit: float,
) -> Float[np.ndarray, "*rows D"]:
    """Sum over each token's experts of weight * expert(token)."""
    mixed = np.zeros(x.shape)
    for expert in range(len(gate_up)):
        *row, place = np.nonzero(experts == expert)
        at = tuple(row)
        inner = swiglu(x[at] @ gate_up[expert].T + gate_up_bias[expert], limit=limit)
        # A token names an expert at most once, so no row stands twice in `at` and += loses nothing.
        mixed[at] += weights[*at, place, None] * (inner @ down[expert].T + down_bias[expert])
    return mixed


def swiglu(gate_up: Float[np.ndarray, "*rows twoF"], *, limit: float) -> Float[np.ndarray, "*rows F"]:
    """Even elements gate, odd ones are gated; the gate is cut from above only."""
    gate = np.minimum(gate_up[..., 0::2], limit)
    up = np.clip(gate_up[..., 1::2], -limit, limit)
    return gate / (1 + np.exp(-SWIGLU_ALPHA * gate)) * (up + 1)


def expert_weights(tensors: Mapping[str, np.ndarray], name: str) -> Float[np.ndarray, "E out inner"]:
    """One layer's expert matrices, input axis last, whether the checkpoint holds them in MXFP4 or in bf16."""
    if name + "_blocks" in tensors:
        return mxfp4_decode(tensors[name + "_blocks"], tensors[name + "_scales"])
    return _float64(tensors, name).swapaxes(1, 2)  # transformers saves dequantised experts with the input axis first


def mxfp4_decode(
    blocks: UInt8[np.ndarray, "*rows n 16"], scales: UInt8[np.ndarray, "*rows n"]
) -> Float[np.ndarray, "*rows columns"]:
    """Blocks of 32 four-bit codes, the low nibble first, times 2^(scale - 127)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(FP4_VALUES[codes], scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*blocks.shape[:-2], -1)


def _linear(
    tensors: Mapping[str, np.ndarray], name: str, x: Float[np.ndarray, "*rows i"]
) -> Float[np.ndarray, "*rows o"]:
    return x @ _float64(tensors, name + ".weight").T + _float64(tensors, name + ".bias")


def _float64(tensors: Mapping[str, np.ndarray], name: str) -> Float[np.ndarray, "..."]:
    return tensors[name].astype(np.float64)
