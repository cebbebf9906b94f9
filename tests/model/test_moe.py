"""Router and experts against the oracle, whole and as a sum over shards of experts and of the expert width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.mxfp4 import MXFP4
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.moe import ExpertLinear, MoE, mix_experts, route, swiglu
from tests import oracle
from tests.tiny import TINY

ROWS, TOKENS = 3, 7
E, D, F, X = TINY.num_experts, TINY.width, TINY.expert_width, TINY.experts_per_token
TOLERANCE = 2e-5  # outputs are of order one; a float32 sum over 224 products of order 0.1 to 1 errs by 1e-6 to 1e-5


class Experts:
    """Random experts in MXFP4, and the same in float64 as the oracle wants them."""

    def __init__(self, *, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.gate_up, self.down = self._packed(rng, (E, F, 2), D), self._packed(rng, (E, D), F)
        self.gate_up_bias = rng.standard_normal((E, F, 2)).astype(np.float32)
        self.down_bias = rng.standard_normal((E, D)).astype(np.float32)
        self.x = rng.standard_normal((ROWS, TOKENS, D)).astype(np.float32)

    def _packed(self, rng: np.random.Generator, outputs: tuple[int, ...], inputs: int) -> MXFP4:
        blocks = rng.integers(256, size=(*outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(119, 123, size=(*outputs, inputs // 32), dtype=np.uint8)
        return MXFP4(blocks, scales)

    def mixed_by_the_oracle(self, chosen: np.ndarray, weights: np.ndarray, *, limit: float = 7.0) -> np.ndarray:
        return oracle.moe(
            self.x.astype(np.float64),
            chosen,
            weights.astype(np.float64),
            gate_up=oracle.mxfp4_decode(self.gate_up.blocks, self.gate_up.scales).reshape(E, 2 * F, D),
            gate_up_bias=self.gate_up_bias.reshape(E, 2 * F).astype(np.float64),
            down=oracle.mxfp4_decode(self.down.blocks, self.down.scales),
            down_bias=self.down_bias.astype(np.float64),
            limit=limit,
        )

    def mixed(
        self,
        chosen: np.ndarray,
        weights: np.ndarray,
        *,
        packed: bool = True,
        limit: float = 7.0,
        experts: slice = slice(None),
        width_blocks: slice | None = None,
        adds_down_bias: bool = True,
    ) -> np.ndarray:
        """By mix_experts: all experts, or the shard that holds some of them and some blocks of the expert width."""
        gate_up, gate_up_bias = self.gate_up[experts], self.gate_up_bias[experts]
        down, down_bias = self.down[experts], self.down_bias[experts]
        if width_blocks is not None:
            width = slice(32 * width_blocks.start, 32 * width_blocks.stop)
            gate_up, gate_up_bias = gate_up[:, width], gate_up_bias[:, width]
            down = MXFP4(down.blocks[:, :, width_blocks], down.scales[:, :, width_blocks])
        matrices = [jax.tree.map(jnp.asarray, matrix) for matrix in (gate_up, down)]
        if not packed:
            matrices = [matrix.decode(jnp.float32) for matrix in matrices]
        out = mix_experts(
            *map(jnp.asarray, (self.x, chosen, weights)),
            matrices[0],
            jnp.asarray(gate_up_bias),
            matrices[1],
            jnp.asarray(down_bias),
            limit=limit,
            first_expert=experts.start or 0,
            adds_down_bias=adds_down_bias,
        )
        return np.asarray(out)


@pytest.fixture(scope="module")
def experts() -> Experts:
    return Experts()


@pytest.fixture(scope="module")
def visits() -> tuple[np.ndarray, np.ndarray]:
    """Random visits, the first row's all to the same two experts."""
    logits = np.random.default_rng(8).standard_normal((ROWS, TOKENS, E))
    logits[0, :, 5], logits[0, :, 2] = 9, 8
    chosen, weights = oracle.route(logits, X)
    return chosen.astype(np.int32), weights.astype(np.float32)


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


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
@pytest.mark.parametrize("limit", [7.0, 0.4])
def test_mix_experts_agrees_with_the_oracle(experts: Experts, visits, packed: bool, limit: float):
    expected = experts.mixed_by_the_oracle(*visits, limit=limit)
    np.testing.assert_allclose(experts.mixed(*visits, packed=packed, limit=limit), expected, atol=TOLERANCE)


def test_all_tokens_may_visit_the_same_experts(experts: Experts):
    chosen = np.broadcast_to(np.array([6, 1], np.int32), (ROWS, TOKENS, X))
    weights = np.broadcast_to(np.array([0.7, 0.3], np.float32), (ROWS, TOKENS, X))
    expected = experts.mixed_by_the_oracle(chosen, weights)
    np.testing.assert_allclose(experts.mixed(chosen, weights), expected, atol=TOLERANCE)


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_of_experts_sum_to_the_whole(experts: Experts, visits, num_shards: int):
    size = E // num_shards
    shards = [experts.mixed(*visits, experts=slice(i * size, (i + 1) * size)) for i in range(num_shards)]
    np.testing.assert_allclose(np.sum(shards, axis=0), experts.mixed_by_the_oracle(*visits), atol=TOLERANCE)


def test_shards_of_the_expert_width_sum_to_the_whole_with_one_bias(experts: Experts, visits):
    """224 is 7 blocks: here 3 and 4 of them."""
    first = experts.mixed(*visits, width_blocks=slice(0, 3), adds_down_bias=True)
    second = experts.mixed(*visits, width_blocks=slice(3, 7), adds_down_bias=False)
    np.testing.assert_allclose(first + second, experts.mixed_by_the_oracle(*visits), atol=TOLERANCE)


def test_a_shard_that_nobody_visits_gives_zero(experts: Experts):
    chosen = np.zeros((ROWS, TOKENS, X), np.int32) + np.array([1, 0], np.int32)
    weights = np.full((ROWS, TOKENS, X), 0.5, np.float32)
    assert not experts.mixed(chosen, weights, experts=slice(2, 8)).any()


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
    out = swiglu(jnp.full((1, 1, 2), jnp.array([gate, up])), 7.0)
    assert float(out[0, 0]) == pytest.approx(expected, rel=1e-6)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
def test_the_layer_agrees_with_the_oracle(packed: bool):
    layer = MoE(TINY, packed=packed, mesh=None, dtype=jnp.float32, rngs=nnx.Rngs(3))
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
        MoE(config, packed=True, mesh=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
