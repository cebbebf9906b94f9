"""The chunked loss against float64 NumPy, on one device and on meshes; what it keeps in memory; the router's loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.forward import RouterStats
from gptoss_jax.train.loss import Sums, cross_entropy, log_probabilities, router_loss

B, T, D, V = 4, 13, 24, 37
PADDED = 40  # ids, on a mesh whose tensor is 2, 4 or 8
SAME = 2e-6  # of float32 sums, relative to the largest


class Case:
    def __init__(self):
        rng = np.random.default_rng(0)
        self.hidden = rng.normal(size=(B, T, D)).astype(np.float32)
        self.weight = rng.normal(size=(PADDED, D)).astype(np.float32)  # of padding too: a mistake would show
        self.targets = rng.integers(V, size=(B, T), dtype=np.int32)
        self.weights = rng.choice([0, 0.5, 1, 2], size=(B, T)).astype(np.float32)

    def scores(self) -> np.ndarray:
        return self.hidden.astype(np.float64) @ self.weight[:V].T.astype(np.float64)

    def log_probabilities(self) -> np.ndarray:
        scores = self.scores()
        total = np.log(np.exp(scores).sum(axis=-1))
        return np.take_along_axis(scores, self.targets[..., None], -1)[..., 0] - total

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the loss by hidden and by weight."""
        scores = self.scores()
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        by_score = self.weights[..., None] * (probabilities - np.eye(V)[self.targets])
        by_weight = np.zeros(self.weight.shape)
        by_weight[:V] = np.einsum("btv,btd->vd", by_score, self.hidden)
        return by_score @ self.weight[:V], by_weight


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def loss(hidden: Any, weight: Any, case: Case, *, chunk: int = 5, mesh: Mesh | None = None) -> Sums:
    targets, weights = jnp.asarray(case.targets), jnp.asarray(case.weights)
    return cross_entropy(hidden, weight, targets, weights, vocab_size=V, chunk=chunk, mesh=mesh)


def loss_of(case: Case, **settings: Any) -> Any:
    def only(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, Sums]:
        sums = loss(hidden, weight, case, **settings)
        return sums.loss, sums

    return only


def close(found: Any, expected: Any) -> bool:
    return bool(np.abs(np.asarray(found) - expected).max() < SAME * np.abs(expected).max())


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (8, 1, 1), (1, 1, 8), (1, 8, 1)], ids=str)
def test_loss_and_gradients(case: Case, shape: tuple[int, int, int] | None):
    """52 tokens in chunks of 5, whole rows or not: 8 data shards do not divide 4 rows."""
    mesh = None if shape is None else make_mesh(data=shape[0], expert=shape[1], tensor=shape[2])
    go = jax.jit(jax.value_and_grad(loss_of(case, mesh=mesh), (0, 1), has_aux=True))
    (_, sums), (by_hidden, by_weight) = go(case.hidden, case.weight)
    expected = case.log_probabilities()
    best = case.scores().argmax(axis=-1) == case.targets
    assert close(sums.loss, -np.sum(case.weights * expected))
    assert float(sums.weight) == case.weights.sum()
    assert float(sums.correct) == np.sum(case.weights * best) > 0
    expected_by_hidden, expected_by_weight = case.gradients()
    assert close(by_hidden, expected_by_hidden)
    assert close(by_weight, expected_by_weight)
    assert not np.any(np.asarray(by_weight)[V:])


@pytest.mark.parametrize("chunk", [1, 52, 1000])
def test_any_chunk_gives_the_same(case: Case, chunk: int):
    assert close(
        jax.jit(functools.partial(loss, case=case, chunk=chunk))(case.hidden, case.weight).loss,
        -np.sum(case.weights * case.log_probabilities()),
    )


def test_each_target_has_its_own(case: Case):
    operands = map(jnp.asarray, (case.hidden, case.weight, case.targets))
    found, is_best = log_probabilities(*operands, vocab_size=V, chunk=8)
    assert close(found, case.log_probabilities())
    np.testing.assert_array_equal(is_best, case.scores().argmax(axis=-1) == case.targets)


def test_scores_that_overflow_exponentials(case: Case):
    big = functools.partial(loss_of(case), jnp.asarray(100 * case.hidden))
    value, by_weight = jax.jit(jax.value_and_grad(lambda weight: big(weight)[0]))(100 * case.weight)
    scores = 1e4 * case.scores()
    expected = np.take_along_axis(scores, case.targets[..., None], -1)[..., 0] - scores.max(axis=-1)
    assert abs(float(value) + np.sum(case.weights * expected)) < 1e-5 * abs(float(value))
    assert np.all(np.isfinite(by_weight))


def test_a_target_that_does_not_count_may_be_anything(case: Case):
    """Of weight zero and with no finite hidden state, as a position of padding might have."""
    hidden = np.where(case.weights[..., None] > 0, case.hidden, np.inf).astype(np.float32)
    value = jax.jit(functools.partial(loss, case=case))(hidden, case.weight).loss
    assert close(value, -np.sum(case.weights * case.log_probabilities()))


def test_bfloat16_adds_its_gradient_up_in_float32():
    """600 chunks, each of which adds to one entry less than bfloat16 could tell from it."""
    tokens = 600
    hidden = jnp.ones((1, tokens, 1), jnp.bfloat16)
    weight = jnp.zeros((2, 1), jnp.bfloat16)
    targets, weights = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens))

    def value(weight: jax.Array) -> jax.Array:
        return cross_entropy(hidden, weight, targets, weights, vocab_size=2, chunk=1).loss

    go = jax.jit(jax.grad(value))
    np.testing.assert_array_equal(np.asarray(go(weight), np.float32), [[-300], [300]])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_scores_of_all_tokens_never_exist(shape: tuple[int, int, int] | None, trains: bool):
    """Neither on the way back; and a weight that does not train has no gradient made."""
    mesh = None if shape is None else make_mesh(data=shape[0], expert=shape[1], tensor=shape[2])
    rows, tokens, width, ids, chunk = 4, 256, 64, 8192, 4

    def array(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)) if mesh else None)

    def value(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
        weights = jnp.ones(targets.shape)
        return cross_entropy(hidden, weight, targets, weights, vocab_size=ids, chunk=chunk, mesh=mesh).loss

    go = jax.jit(jax.grad(value, (0, 1) if trains else 0))
    operands = (
        array((rows, tokens, width), jnp.float32, "data"),
        array((ids, width), jnp.float32, "tensor"),
        array((rows, tokens), jnp.int32, "data"),
    )
    memory: Any = go.lower(*operands).compile().memory_analysis()
    found = memory.temp_size_in_bytes
    own_ids = ids // (1 if mesh is None else 2)
    gradient = 4 * own_ids * width if trains else 0
    scores = 4 * chunk * own_ids
    assert found < 4 * scores + 3 * gradient + 4 * (4 * rows * tokens * width)
    assert found < 4 * rows * tokens // (1 if mesh is None else 4) * own_ids  # what all of a device's would take


# ---- the router's loss -----------------------------------------------------------------------------------------------


def test_an_even_load_costs_one_and_a_crowded_one_as_much_as_there_are_experts():
    even = RouterStats(jnp.full((2, 8), 5.0), jnp.full((2, 8), 1 / 8))
    crowded = RouterStats(jnp.eye(8)[:2] * 40, jnp.eye(8)[:2])
    assert float(router_loss(even)) == 1
    assert float(router_loss(crowded)) == 8


def test_the_routers_loss_pushes_away_from_where_all_go():
    visits = jnp.array([[30.0, 10, 0]])

    def cost(scores: jax.Array) -> jax.Array:
        return router_loss(RouterStats(visits, jax.nn.softmax(scores)))

    slope = np.asarray(jax.grad(cost)(jnp.zeros((1, 3))))[0]
    np.testing.assert_allclose(slope, 3 * (np.array([0.75, 0.25, 0]) - 1 / 3) / 3, rtol=1e-5)
