"""A whole tiny model on a GPU: its kernels give the logits of the reference, in one pass and token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from tests.tiny import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),  # jax 0.12
]

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
NUM_TOKENS, PROMPT = 15, 11  # beyond the window of 9


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, NUM_TOKENS)), jnp.int32)


def make(impl: str, dtype, experts: str) -> GptOss:
    return GptOss(CONFIG, dtype=dtype, experts=experts, impl=impl, rngs=nnx.Rngs(0))


def token_by_token(model: GptOss) -> np.ndarray:
    """Logits of the prompt's pass and of each single step behind it."""

    @nnx.jit
    def extend(model: GptOss, tokens: jax.Array, cache, count: jax.Array):
        hidden, cache = model.extend(tokens, cache, count=count)
        return model.logits(hidden), cache

    ids, cache = tokens(), model.empty_cache(rows=2, capacity=NUM_TOKENS)
    found = []
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, NUM_TOKENS))]:
        logits, cache = extend(model, ids[:, start:end], cache, jnp.full(2, end - start, jnp.int32))
        found.append(logits)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_float32_logits_are_the_references(impl: str, experts: str):
    expected = np.asarray(make("xla", jnp.float32, experts)(tokens()))
    model = make(impl, jnp.float32, experts)
    tolerance = 1e-4 * expected.std()  # sums of float32 in another order, through two layers
    np.testing.assert_allclose(model(tokens()), expected, atol=tolerance)
    np.testing.assert_allclose(token_by_token(model), expected, atol=tolerance)


def test_bfloat16_logits_are_near_the_references(impl: str):
    """Each layer rounds to 8 bits; a token whose experts nearly tie may go elsewhere, so that a few may differ more."""
    expected = np.asarray(make("xla", jnp.bfloat16, "mxfp4")(tokens()))
    found = token_by_token(make(impl, jnp.bfloat16, "mxfp4"))
    off = np.abs(found - expected).max(axis=-1) / expected.std()
    assert np.median(off) < 0.1
    assert (off < 0.5).mean() > 0.9
