"""How many multiplications and additions a step of training cannot do without. Knows sizes; measures nothing.

Forward, each token meets the matrices of attention, router, its own experts and the unembedding, and the keys of its
segment that it sees. Backward, the same again for what was read, and once more for each weight that is trained. What
is computed anew to save memory is no part of it: it is not what training asks for.
"""

from gptoss_jax.model.config import ModelConfig


def step_flops(config: ModelConfig, *, tokens: int, full_keys: int, sliding_keys: int, trains_all: bool) -> float:
    """Of all devices together.

    Args:
        config: the sizes.
        tokens: that are no padding.
        full_keys: that they see in a layer of full attention, of all tokens together.
        sliding_keys: in one with a window.
        trains_all: or only adapters, whose own products are left out: they are less than a hundredth.
    """
    keys = {"full": full_keys, "sliding": sliding_keys}
    seen = sum(keys[kind] for kind in config.layer_kinds)
    matrices = 2.0 * tokens * _weights_met(config)
    mixing = 4.0 * seen * config.num_heads * config.head_dim
    # Keys, values and queries all want a gradient: scores and values are two products, whose way back is four.
    return matrices * (3 if trains_all else 2) + 3 * mixing


def _weights_met(config: ModelConfig) -> int:
    """By one token, in all layers and the unembedding."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    experts = config.experts_per_token * 3 * config.expert_width + config.num_experts
    return config.num_layers * config.width * (heads + experts) + config.width * config.vocab_size
