"""Attention with sinks over cached keys: `full` sees every earlier position, `sliding` the last `window`.

One door; xla.py is the readable reference that every other implementation is judged by.
"""

from gptoss_jax.kernels.attention.xla import full, sliding

__all__ = ["full", "sliding"]
