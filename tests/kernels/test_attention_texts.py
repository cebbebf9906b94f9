"""Rows that hold several texts: each is attended to as if it stood alone, forward and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels import attention
from gptoss_jax.kernels.attention import xla
from tests import oracle

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 6, 2, 8, 5
LENGTHS = ((7, 1, 13), (3, 18))  # of the texts in each row, 21 tokens in all
TOLERANCE = 1e-5  # as test_attention.py


@pytest.fixture(params=["one block", "blocks of 4"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks of 4":
        monkeypatch.setattr(xla, "_MOST_QUERIES", 4)


def texts() -> list[tuple[int, slice]]:
    """(row, where in it) of every text."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        found += [(row, slice(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return found


def starts() -> np.ndarray:
    first = np.zeros((len(LENGTHS), sum(LENGTHS[0])), np.int32)
    for row, where in texts():
        first[row, where] = where.start
    return first


def operands() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    rows, size = starts().shape
    q = rng.standard_normal((rows, size, HEADS, HEAD_DIM), np.float32)
    k, v = (rng.standard_normal((rows, size, KV_HEADS, HEAD_DIM), np.float32) for _ in range(2))
    return q, k, v, rng.standard_normal(HEADS, np.float32)


def attend(q, k, v, sinks, first_key=None, *, window: int | None, impl: str = "xla") -> jax.Array:
    first_query = jnp.zeros(len(q), jnp.int32)
    if window is None:
        return attention.full(q, k, v, sinks, first_query=first_query, first_key=first_key, impl=impl)
    k, v = (jnp.pad(x, ((0, 0), (window, 0), (0, 0), (0, 0))) for x in (k, v))
    settings = {"first_query": first_query, "first_key": first_key, "window": window, "impl": impl}
    return attention.sliding(q, k, v, sinks, **settings)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [None, WINDOW])
def test_every_text_is_what_the_oracle_makes_of_it_alone(window: int | None):
    q, k, v, sinks = operands()
    found = np.asarray(attend(*map(jnp.asarray, (q, k, v, sinks)), jnp.asarray(starts()), window=window))
    for row, where in texts():
        alone = (x[row, where].astype(np.float64)[None] for x in (q, k, v))
        expected = oracle.attention(*alone, sinks.astype(np.float64), window=window)[0]
        np.testing.assert_allclose(found[row, where], expected, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_gradients_are_those_of_the_texts_one_by_one(window: int | None):
    arrays = tuple(map(jnp.asarray, operands()))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape, np.float32))

    def packed(*arrays):
        return jnp.sum(weights * attend(*arrays, jnp.asarray(starts()), window=window))

    def one_by_one(q, k, v, sinks):
        total = jnp.zeros(())
        for row, where in texts():
            alone = (x[row, where][None] for x in (q, k, v))
            total += jnp.sum(weights[row, where] * attend(*alone, sinks, window=window)[0])
        return total

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*arrays) for f in (packed, one_by_one))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_another_implementation_is_refused(window: int | None):
    arrays = tuple(map(jnp.asarray, operands()))
    run = functools.partial(attend, *arrays, jnp.asarray(starts()), window=window, impl="gpu-interpret")
    with pytest.raises(Unsupported, match=r"'gpu-interpret' takes rows of one text each.*attention=xla"):
        run()
