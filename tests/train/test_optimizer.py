"""Updates against the formulas of their papers in float64, which leaves decay, schedules, and where state lies."""

import dataclasses
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import abstract_model
from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.config import OptimizerSettings
from gptoss_jax.train.leaves import Method, Trained
from gptoss_jax.train.optimizer import is_for_muon, learning_rate, make_optimizer, state_shardings
from tests.train import cases

STEPS = 10
NAMES = get_args(get_type_hints(OptimizerSettings)["name"])
SHAPES = {"layers.0.attention.q.weight": (4, 3), "layers.0.attention.q.bias": (2, 3), "norm.scale": (3,)}


def settings(**changes: Any) -> OptimizerSettings:
    plain = OptimizerSettings(learning_rate=0.1, schedule="constant", clip=1e9)
    return dataclasses.replace(plain, **changes)


def random_tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def after(optimizer: optax.GradientTransformation, gradients: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The leaves of random_tree(0) after these."""
    leaves: Any = jax.tree.map(jnp.asarray, random_tree(0))
    state = optimizer.init(leaves)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, leaves)
        leaves = optax.apply_updates(leaves, updates)
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


GRADIENTS = [random_tree(seed) for seed in (1, 2, 3)]


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_adamw_is_that_of_its_paper():
    """arXiv:1711.05101, algorithm 2, with decay for the matrix only."""
    rate, beta1, beta2, epsilon, decay = 0.1, 0.8, 0.9, 1e-3, 0.3
    chosen = settings(beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
    expected: dict[str, np.ndarray] = {path: leaf.astype(np.float64) for path, leaf in random_tree(0).items()}
    mean, square = ({path: np.zeros(shape) for path, shape in SHAPES.items()} for _ in range(2))
    for t, gradient in enumerate(GRADIENTS, 1):
        for path, g in gradient.items():
            mean[path] = beta1 * mean[path] + (1 - beta1) * g
            square[path] = beta2 * square[path] + (1 - beta2) * g.astype(np.float64) ** 2
            direction = mean[path] / (1 - beta1**t) / (np.sqrt(square[path] / (1 - beta2**t)) + epsilon)
            own_decay = decay if path.endswith(".weight") else 0
            expected[path] -= rate * (direction + own_decay * expected[path])
    assert_same(after(make_optimizer(chosen, steps=STEPS), GRADIENTS), expected)


def test_sgd_adds_up_a_momentum():
    chosen = settings(name="sgd", beta1=0.5)
    expected = {}
    for path, leaf in random_tree(0).items():
        g1, g2, g3 = (gradient[path] for gradient in GRADIENTS)
        expected[path] = leaf - 0.1 * (g1 + (g2 + 0.5 * g1) + (g3 + 0.5 * g2 + 0.25 * g1))
    assert_same(after(make_optimizer(chosen, steps=STEPS), GRADIENTS), expected)


def test_lion_goes_by_the_sign():
    """arXiv:2302.06675: of its first step each entry moves by the rate."""
    moved = after(make_optimizer(settings(name="lion"), steps=STEPS), GRADIENTS[:1])
    assert_same(moved, {path: leaf - 0.1 * np.sign(GRADIENTS[0][path]) for path, leaf in random_tree(0).items()})


MATRICES = {  # inputs and outputs of each, its experts first
    "layers.0.attention.q.weight": ((4, 8, 16), (1, 32, 16)),
    "layers.0.attention.o.weight": ((16, 4, 8), (1, 16, 32)),
    "layers.0.moe.gate_up.weight": ((3, 10, 2, 16), (3, 20, 16)),
    "layers.0.moe.down.weight": ((3, 16, 10), (3, 16, 10)),
    "layers.0.attention.o.adapter.a": ((2, 4, 8), (1, 2, 32)),
    "layers.0.moe.gate_up.adapter.b": ((3, 10, 2, 4), (3, 20, 4)),
}


@pytest.mark.parametrize("path", MATRICES)
def test_muon_makes_singular_values_equal(path: str):
    """Its first step: those of the gradient's own directions, all near one, times sqrt(outputs / inputs) if more."""
    shape, stacked = MATRICES[path]
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    optimizer = make_optimizer(settings(name="muon", learning_rate=1.0), steps=STEPS)
    leaves = {path: jnp.zeros(shape)}
    updates: Any = optimizer.update({path: jnp.asarray(gradient)}, optimizer.init(leaves), leaves)[0]
    for found, own in zip(-np.asarray(updates[path]).reshape(stacked), gradient.reshape(stacked), strict=True):
        left, _, right = np.linalg.svd(own.astype(np.float64), full_matrices=False)
        values = left.T @ found @ right.T / max(1, stacked[1] / stacked[2]) ** 0.5
        assert np.all((np.diag(values) > 0.6) & (np.diag(values) < 1.3))
        np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-3)


def test_what_muon_is_not_for_has_a_rate_of_its_own():
    paths = ("embedding.weight", "layers.0.moe.router.weight", "layers.0.attention.q.bias", "layers.0.attention.sinks")
    leaves = {path: jnp.zeros((4, 3)) for path in paths}
    gradient = {path: jnp.ones((4, 3)) for path in paths}
    optimizer = make_optimizer(settings(name="muon", learning_rate=0.5, side_rate=0.25), steps=STEPS)
    updates: Any = optimizer.update(gradient, optimizer.init(leaves), leaves)[0]
    for path in paths:  # of Adam's first step each entry moves by the rate
        np.testing.assert_allclose(updates[path], -0.25, rtol=1e-5)


def test_a_long_gradient_is_cut_and_a_short_one_is_not():
    """All leaves together; sgd shows the length."""
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in GRADIENTS[0].values()))
    for clip, part in ((norm / 2, 0.5), (norm * 2, 1.0)):
        moved = after(make_optimizer(settings(name="sgd", clip=float(clip)), steps=STEPS), GRADIENTS[:1])
        assert_same(moved, {path: leaf - 0.1 * part * GRADIENTS[0][path] for path, leaf in random_tree(0).items()})


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_moves_a_b_that_is_zero(name: str):
    leaves = {"layers.0.attention.q.adapter.b": jnp.zeros((130, 140))}
    gradient = {path: jnp.ones_like(leaf) for path, leaf in leaves.items()}
    optimizer = make_optimizer(settings(name=name), steps=STEPS)
    updates: Any = optimizer.update(gradient, optimizer.init(leaves), leaves)[0]
    least = 0.0005 if name == "muon" else 0.05  # muon gives a matrix of rank one a length near one, however large it is
    assert all(bool(jnp.all(update < -least)) for update in updates.values())


# ---- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 1, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.2]),
    ],
)
def test_schedules(schedule: str, expected: list[float]):
    """Of 7 steps the first 2 warm up, and the last has the final part; a run that goes on stays there."""
    rate = learning_rate(settings(schedule=schedule, warmup=2, final=0.2), steps=7)
    np.testing.assert_allclose([rate(count) for count in range(7)], 0.1 * np.array(expected), rtol=1e-5)
    assert float(rate(100)) == float(rate(6))


def test_the_optimizer_follows_the_schedule():
    optimizer = make_optimizer(settings(name="sgd", beta1=0, schedule="linear"), steps=3)
    moved = after(optimizer, GRADIENTS)
    rates = (0.1, 0.05, 0)
    assert_same(
        moved,
        {
            path: leaf - sum(rate * gradient[path] for rate, gradient in zip(rates, GRADIENTS, strict=True))
            for path, leaf in random_tree(0).items()
        },
    )


def test_a_run_of_one_step():
    assert float(learning_rate(settings(schedule="cosine"), steps=1)(0)) == pytest.approx(0.1)


def test_a_warm_up_of_the_whole_run():
    with pytest.raises(UserError, match=r"optimizer\.warmup is 5 and the run has 5 steps; expected fewer"):
        make_optimizer(settings(warmup=5), steps=5)


# ---- where state lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fully", [False, True])
def test_state_lies_with_its_leaves(name: str, fully: bool):
    mesh = make_mesh(data=2, expert=2, tensor=2)
    model = abstract_model(cases.sizes(2), experts="bf16", mesh=mesh, impl="xla")
    trained = Trained(model, Method(fully_sharded=fully))
    optimizer = make_optimizer(settings(name=name, weight_decay=0.1), steps=STEPS)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in trained.shapes.items()}
    kept = jax.eval_shape(optimizer.init, leaves)
    shardings = state_shardings(optimizer, trained)
    assert jax.tree.structure(kept) == jax.tree.structure(shardings)
    cut = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        owner = next((str(getattr(key, "key", "")) for key in path if getattr(key, "key", None) in leaves), None)
        value = _at(kept, path)
        if owner is None or value.shape != leaves[owner].shape:
            assert sharding.is_fully_replicated
        else:
            assert sharding == trained.sharding(owner)
            cut += 1
    if name == "muon":
        assert cut == sum(1 if is_for else 2 for is_for in is_for_muon(leaves).values())
    elif name != "adafactor":  # keeps a row and a column of most leaves, which lie whole
        assert cut == {"adamw": 2, "lion": 1, "sgd": 1}[name] * len(leaves)


def test_without_a_mesh_state_lies_where_it_likes():
    trained = Trained(abstract_model(cases.sizes(1), experts="bf16", impl="xla"), Method())
    assert state_shardings(make_optimizer(settings(), steps=STEPS), trained) is None


def _at(tree: Any, path: Any) -> Any:
    return next(leaf for other, leaf in jax.tree_util.tree_leaves_with_path(tree) if other == path)
