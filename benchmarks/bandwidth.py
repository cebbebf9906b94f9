"""How fast this machine's memory can be read by all its cores together. Knows no model.

A command of its own, which prints JSON: its buffer must be gone before anything else is measured. Two readers that have
nothing in common are tried, and the faster one is the ceiling: a reader can be too slow, but never too fast.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2 << 30, help="more than caches hold; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="the best one counts; default: %(default)s")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    buffer = np.ones(options.bytes // 8, np.uint64)  # not zeros: pages never written to would all be the same one
    readers = {"numpy": _numpy_reader(buffer), "jax": _jax_reader(buffer)}
    found = {name: buffer.nbytes / _best_seconds(read, options.rounds) for name, read in readers.items()}
    print(json.dumps({"bytes_per_second": max(found.values()), "readers": found, "buffer_bytes": buffer.nbytes}))


def _numpy_reader(buffer: np.ndarray) -> Callable[[], object]:
    """One thread for each core. The bitwise or of integers is the cheapest reduction: nothing but memory limits it."""
    cores = len(os.sched_getaffinity(0))
    pool, parts = ThreadPoolExecutor(cores), np.array_split(buffer, cores)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def _jax_reader(buffer: np.ndarray) -> Callable[[], object]:
    total = jax.jit(jnp.sum)
    array = jnp.asarray(buffer.view(np.float32))
    total(array).block_until_ready()  # compiled before it is timed
    return lambda: total(array).block_until_ready()


def _best_seconds(read: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
