"""How much XLA is told of where an operation comes from. Knows jax's settings only."""

import contextlib
from collections.abc import Iterator

import jax

_NAME = "jax_include_full_tracebacks_in_locations"


@contextlib.contextmanager
def own_lines_only() -> Iterator[None]:
    """What is lowered meanwhile names the line of each operation, and not the calls that led there.

    XLA for GPUs makes one text of all calls of a program and copies it for each kernel. Of the 20b's training step it
    has 1 GB: compiling took more than half an hour with it, and two and a half minutes without.
    """
    before = getattr(jax.config, _NAME)
    jax.config.update(_NAME, False)
    try:
        yield
    finally:
        jax.config.update(_NAME, before)
