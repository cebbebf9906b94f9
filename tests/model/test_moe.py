"""Router, swiglu and the layer of experts against the oracle, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import route
from gptoss_jax.model.experts import ExpertLinear
from gptoss_jax.model.moe import MoE
from tests import oracle
from tests.tiny import TINY

ROWS, TOKENS = 3, 7
E, D, F, X = TINY.num_experts, TINY.width, TINY.expert_width, TINY.experts_per_token
TOLERANCE = 2e-5  # outputs are of order one; a float32 sum over 224 products of order 0.1 to 1 errs by 1e-6 to 1e-5


# ---- router ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts_per_token", [1, 2, 5, 8])
def test_route_agrees_with_the_oracle(experts_per_token: int):
    logits = np.random.default_rng(0).standard_normal((ROWS, TOKENS, E)).astype(np.float32)
    chosen, weights = route(jnp.asarray(logits), experts_per_token)
    expected_chosen, expected_weights = oracle.route(logits.astype(np.float64), experts_per_token)
    np.testing.assert_array_equal(chosen, expected_chosen)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)


def test_of_equal_logits_the_lower_expert_wins():
    logits = jnp.asarray([[[1.0, 3, 3, 2, 3, 0, 3, 2], [4.0] * 8]])
    chosen, weights = route(logits, 3)
    assert chosen.tolist() == [[[1, 2, 4], [0, 1, 2]]]
    np.testing.assert_array_equal(chosen, lax.top_k(logits, 3)[1])
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_the_weights_are_a_softmax_over_the_chosen_only():
    """Experts left out change nothing, however close they come."""
    weights = [route(jnp.asarray([[[2.0, 1.0, *[others] * 6]]]), 2)[1] for others in (-30.0, 0.999)]
    np.testing.assert_array_equal(*weights)
    np.testing.assert_allclose(weights[0][0, 0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-6)


# ---- swiglu ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (0.0, 3.0, 0.0),
        (1.0, 0.0, 1 / (1 + np.exp(-1.702))),
        (9.0, 9.0, 7 * 8 / (1 + np.exp(-1.702 * 7))),  # both cut at 7
        (-9.0, -9.0, -9 * -6 / (1 + np.exp(1.702 * 9))),  # the gate is not cut from below
    ],
)
def test_swiglu_by_hand(gate: float, up: float, expected: float):
    out = swiglu(jnp.full(1, gate), jnp.full(1, up), 7.0)
    assert float(out[0]) == pytest.approx(expected, rel=1e-6)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
def test_the_layer_agrees_with_the_oracle(packed: bool):
    layer = MoE(TINY, packed=packed, dtype=jnp.float32, rngs=nnx.Rngs(3))
    rng = np.random.default_rng(4)
    for part in (layer.router, layer.gate_up, layer.down):
        part.bias[...] = jnp.asarray(rng.standard_normal(part.bias.shape), jnp.float32)
    x = rng.standard_normal((ROWS, TOKENS, D)).astype(np.float32)
    out = jax.jit(lambda x: layer(x))(jnp.asarray(x))

    router, gate_up, down = (part.bias[...] for part in (layer.router, layer.gate_up, layer.down))
    logits = x.astype(np.float64) @ np.asarray(layer.router.weight[...], np.float64).T + np.asarray(router, np.float64)

    def float64(part: ExpertLinear) -> np.ndarray:
        if packed:
            return oracle.mxfp4_decode(np.asarray(part.blocks[...]), np.asarray(part.scales[...]))
        return np.asarray(part.weight[...], np.float64)

    expected = oracle.moe(
        x.astype(np.float64),
        *oracle.route(logits, X),
        gate_up=float64(layer.gate_up).reshape(E, 2 * F, D),
        gate_up_bias=np.asarray(gate_up, np.float64).reshape(E, 2 * F),
        down=float64(layer.down),
        down_bias=np.asarray(down, np.float64),
        limit=7.0,
    )
    np.testing.assert_allclose(out, expected, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


def test_a_width_that_is_not_whole_blocks_cannot_be_packed():
    config = ModelConfig(**{**TINY.__dict__, "expert_width": 200})
    with pytest.raises(UserError, match=r"expert_width=200 is no multiple of 32.*bf16"):
        MoE(config, packed=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
