"""What one device can do at most, measured: bytes and multiplications per second. Knows arrays; knows no model."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from gptoss_jax.bench.timing import ROUNDS, seconds_inside
from gptoss_jax.kernels import linear, native


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Of one device.

    Attributes:
        copied: bytes per second, read and written together, of a copy.
        read: bytes per second of a sum.
        flops: multiplications and additions per second of a product of square matrices, sums in float32.
    """

    copied: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        """The better reader: one can be too slow, but none too fast."""
        return max(self.copied, self.read)

    def seconds(self, *, nbytes: float, flops: float) -> float:
        """The least time for so much work, if memory and arithmetic never wait for each other."""
        return max(nbytes / self.bandwidth, flops / self.flops)


def measure_ceilings(*, buffer_bytes: int, matrix_size: int, dtype: DTypeLike, budget: float) -> Ceilings:
    """`buffer_bytes` must be more than caches hold, `matrix_size` enough to fill the device.

    On a CPU XLA neither reads nor multiplies as fast as others, which are tried too: NumPy's bitwise or, in a thread
    for each core, and our own product.
    """
    is_cpu = jax.default_backend() == "cpu"
    buffer = jax.random.bits(jax.random.key(0, impl="rbg"), (buffer_bytes // 4,), jnp.uint32)
    copied = 2 * buffer.nbytes / seconds_inside(_copy, buffer, None, budget=budget)
    read = buffer.nbytes / seconds_inside(_sum, jnp.uint32(1), buffer, budget=budget)
    del buffer
    if is_cpu:
        read = max(read, _read_by_numpy(buffer_bytes))
    matrix = jax.random.normal(jax.random.key(1, impl="rbg"), (matrix_size, matrix_size), dtype)
    ways = [_multiply, _multiply_natively] if is_cpu and native.available() else [_multiply]
    multiplied = min(seconds_inside(way, matrix, matrix * matrix_size**-0.5, budget=budget) for way in ways)
    return Ceilings(copied=copied, read=read, flops=2 * matrix_size**3 / multiplied)


def _read_by_numpy(buffer_bytes: int) -> float:
    """Bytes per second. Large pages are part of it: NumPy asks for them, as our loading does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    buffer = np.ones(buffer_bytes // 8, np.uint64)  # not zeros: pages never written to would all be the same one
    parts = np.array_split(buffer, cores)
    with ThreadPoolExecutor(cores) as pool:
        return buffer.nbytes / statistics.median(
            _seconds(lambda: list(pool.map(np.bitwise_or.reduce, parts))) for _ in range(ROUNDS)
        )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _copy(buffer: UInt32[Array, " n"], _: None, i: Int[Array, ""]) -> UInt32[Array, " n"]:
    return buffer ^ i.astype(jnp.uint32)


def _sum(total: UInt32[Array, ""], buffer: UInt32[Array, " n"], i: Int[Array, ""]) -> UInt32[Array, ""]:
    """Each turn's terms depend on the sum before: the loop cannot make it once."""
    return jnp.sum(buffer ^ total, dtype=jnp.uint32)


def _multiply(x: Float[Array, "n n"], matrix: Float[Array, "n n"], i: Int[Array, ""]) -> Float[Array, "n n"]:
    """Random values of order one, turn after turn: a device is faster with zeros than with numbers."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def _multiply_natively(x: Float[Array, "n n"], matrix: Float[Array, "n n"], i: Int[Array, ""]) -> Float[Array, "n n"]:
    return linear.matmul(x, matrix, impl="cpu").astype(x.dtype)
