"""Matrix products of token groups with one expert each. One door: `moe_matmul(x, weight, bias, group_sizes)`.

xla.py is the readable reference that every other implementation is judged by.
"""

from gptoss_jax.kernels.moe_matmul.xla import moe_matmul

__all__ = ["moe_matmul"]
