"""The model of the tests: every size and product of sizes is different, so that no mixed-up axis goes unnoticed."""

from gptoss_jax.model.config import ModelConfig, RopeConfig, alternating_layers

TINY = ModelConfig(
    vocab_size=352,
    width=160,
    num_heads=12,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    experts_per_token=2,
    expert_width=224,
    sliding_window=9,
    layer_kinds=alternating_layers(6),
    rope=RopeConfig(theta=150000.0, factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0),
    max_context=131072,
)
