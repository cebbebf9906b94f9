"""Several processes as one: they wait for each other and fail together. Knows no files and no parameters."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax.errors import UserError


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together(step: str) -> Iterator[None]:
    """A step that all processes leave at once: by a UserError if one of them raised one, so that none waits for it."""
    failed: UserError | None = None
    try:
        yield
    except UserError as error:
        failed = error
    if jax.process_count() > 1:
        flags = np.ravel(multihost_utils.process_allgather(np.array(failed is not None)))
        if failed is None and flags.any():
            raise UserError(f"process {int(flags.argmax())} failed at {step}; its own message says why: run it again")
    if failed is not None:
        raise failed
