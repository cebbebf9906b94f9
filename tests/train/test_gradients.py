"""The gradient of every trained leaf against a plain dense model's in float64, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.moe_matmul.swiglu import swiglu
from gptoss_jax.model.adapter import adapter_shapes
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.transformer import Experts
from tests.train import cases, dense_twin

TEXTS = cases.texts()
CLOSE = 0.9999  # cosine of float32 gradients with those in float64
SAME_SIZE = 2e-3  # of norms, relative

Gradients = dict[str, np.ndarray]


@functools.cache
def judged(num_layers: int, experts: Experts, adapted: bool) -> tuple[float, Gradients]:
    """The twin's loss and gradients, of an adapter or of all weights."""
    config = cases.sizes(num_layers)
    weights, alone = dense_twin.decoded(cases.make_values(config, experts=experts)), cases.one_by_one(TEXTS)
    adapter = cases.random_leaves(adapter_shapes(config, cases.ADAPTER)) if adapted else {}
    with jax.enable_x64(True):
        frozen = {path: jnp.asarray(value) for path, value in weights.items()}
        trained = {path: jnp.asarray(value, jnp.float64) for path, value in adapter.items()} if adapted else frozen

        def loss(trained: dict[str, jax.Array]) -> jax.Array:
            merged = dense_twin.merged(frozen, trained, scale=cases.ADAPTER.scale) if adapted else trained
            return dense_twin.mean_loss(merged, config, alone.tokens, alone.targets, alone.weights)

        found, gradients = jax.jit(jax.value_and_grad(loss))(trained)
        return float(found), {path: np.asarray(value) for path, value in gradients.items()}


@functools.cache
def ours(
    num_layers: int,
    experts: Experts,
    adapted: bool,
    *,
    shape: tuple[int, int, int] | None = None,
    way: Way | None = None,
    fully: bool = False,
) -> tuple[float, Gradients]:
    mesh, config = cases.mesh_of(shape), cases.sizes(num_layers)
    values = cases.make_values(config, experts=experts)
    model = cases.make_model(config, values, mesh=mesh, way=way)
    trainer = cases.make_trainer(model, adapter=cases.ADAPTER if adapted else None, fully=fully)
    state = cases.state_with(trainer, cases.random_leaves(trainer.trained.shapes) if adapted else values)
    state, metrics = trainer.step(state, cases.on_devices(cases.stacked(cases.packed(TEXTS)), mesh))
    return float(metrics.loss), cases.gradients(state)


def assert_same(found: tuple[float, Gradients], judged: tuple[float, Gradients]) -> None:
    (found_loss, gradients), (loss, expected) = found, judged
    assert abs(found_loss - loss) < 1e-5 * loss
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        assert cases.cosine(gradient, expected[path]) > CLOSE, path
        ratio = np.linalg.norm(gradient) / np.linalg.norm(expected[path])
        assert abs(ratio - 1) < SAME_SIZE, (path, ratio)


SPREAD, CUT_HEADS = (2, 2, 2), (1, 1, 8)  # over 8 devices the 12 heads are 16, and the 4 key heads 8, each twice


def test_all_weights_have_the_gradients_of_a_dense_model():
    """Packed rows, sliding and full layers, YaRN, sinks, clamps, all at once."""
    assert_same(ours(2, "bf16", False), judged(2, "bf16", False))


def test_an_adapter_of_packed_experts_on_a_mesh_has_the_gradients_of_a_dense_model():
    assert_same(ours(2, "mxfp4", True, shape=SPREAD), judged(2, "mxfp4", True))


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "adapted"), [("mxfp4", True), ("bf16", True), ("bf16", False)])
def test_gradients_of_six_layers(experts: Experts, adapted: bool):
    """An error in one layer is carried to all before it."""
    assert_same(ours(6, experts, adapted), judged(6, experts, adapted))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reduce", "exchange"])
@pytest.mark.parametrize("shape", [SPREAD, CUT_HEADS], ids=str)
@pytest.mark.parametrize(("experts", "adapted"), [("mxfp4", True), ("bf16", False)], ids=["adapter", "full"])
def test_gradients_of_six_layers_on_a_mesh(shape: tuple[int, int, int], way: Way, experts: Experts, adapted: bool):
    assert_same(ours(6, experts, adapted, shape=shape, way=way, fully=not adapted), judged(6, experts, adapted))


# ---- sinks, numerically ----------------------------------------------------------------------------------------------


def test_sinks_have_the_gradient_of_finite_differences():
    """Of the loss in float64, with a sliding window, several texts in a row, and YaRN; no derivative is taken of it."""
    config = cases.sizes(2)
    _, gradients = ours(2, "bf16", False)
    alone = cases.one_by_one(TEXTS)
    weights = dense_twin.decoded(cases.make_values(config, experts="bf16"))
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        loss = jax.jit(
            lambda weights: dense_twin.mean_loss(weights, config, alone.tokens, alone.targets, alone.weights)
        )
        for layer in range(2):
            path = f"layers.{layer}.attention.sinks"
            for head in rng.choice(config.num_heads, 4, replace=False):
                step = np.zeros(config.num_heads)
                step[head] = 1e-4
                up, down = (float(loss(weights | {path: weights[path] + sign * step})) for sign in (1, -1))
                slope = (up - down) / 2e-4
                assert abs(gradients[path][head] - slope) < 1e-3 * np.abs(gradients[path]).max(), (path, head)


# ---- the clamp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "up", "moves"),
    [
        (6.99, 6.99, (True, True)),
        (7.0, 1.0, (False, True)),
        (7.01, 1.0, (False, True)),
        (-9.0, 1.0, (True, True)),  # the gate is cut from above only
        (1.0, 7.0, (True, False)),
        (1.0, -7.0, (True, False)),
        (1.0, -7.01, (True, False)),
    ],
)
def test_at_the_clamp_there_is_no_gradient(gate: float, up: float, moves: tuple[bool, bool]):
    """0 at the limit itself, where jnp.clip would give a half."""
    found = jax.grad(lambda gate, up: swiglu(gate, up, 7.0).sum(), (0, 1))(jnp.float32([gate]), jnp.float32([up]))
    assert tuple(bool(gradient[0] != 0) for gradient in found) == moves
