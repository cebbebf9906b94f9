"""The loss of preferences against its formula in float64, and training that raises the margin."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.dpo import PreferenceBatch, dpo_loss
from gptoss_jax.train.step import Trainer
from tests.train import cases, dense_twin

BETA = 0.3
ROUNDING = 2e-5  # of a loss: a row's log-probability is some -100 in float32
CONFIG = cases.sizes(1)


def answers(*, seed: int) -> Batch:
    """Two pairs, each with one prompt: the first five ids are alike, and only what follows counts."""
    rng = np.random.default_rng(seed)
    rows = []
    for lengths in ((14, 9), (20, 17)):
        prompt = rng.integers(CONFIG.vocab_size, size=5, dtype=np.int32)
        for length in lengths:
            ids = np.concatenate([prompt, rng.integers(CONFIG.vocab_size, size=length - 5, dtype=np.int32)])
            rows.append([cases.Text(ids, (np.arange(length) >= 5).astype(np.float32))])
    return cases.packed(rows)


PAIRS = answers(seed=0)


@pytest.fixture(scope="module")
def adapting() -> Trainer:
    return cases.make_trainer(cases.make_model(CONFIG), optimizer=optax.sgd(1e-3), beta=BETA)


def test_loss_is_that_of_the_paper():
    """Equation 7, in float64; the last pair is padding, and counts for nothing whatever it is said to be."""
    rng = np.random.default_rng(0)
    policy, reference = (30 * rng.normal(size=8).astype(np.float32) for _ in range(2))
    weights = np.ones((8, 5), np.float32)
    weights[6:] = 0
    sums = dpo_loss(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(weights), beta=BETA)
    gain = policy.astype(np.float64) - reference
    margin = gain[0:6:2] - gain[1:6:2]
    np.testing.assert_allclose(sums.loss, np.sum(np.log1p(np.exp(-BETA * margin))), rtol=1e-5)
    assert (float(sums.weight), float(sums.correct)) == (3, np.sum(margin > 0))


def test_its_gradient_has_the_weight_of_the_paper():
    """beta · sigmoid(-beta · margin) for the chosen answer, against the rejected one; none for the reference."""
    policy, reference = jnp.array([-3.0, -5, -2, 4]), jnp.array([-4.0, -4, 1, 0])
    weights = jnp.ones((4, 2))
    slope = jax.grad(lambda policy: dpo_loss(policy, reference, weights, beta=BETA).loss)(policy)
    pull = BETA / (1 + np.exp(BETA * np.array([2.0, -7.0])))
    np.testing.assert_allclose(slope, [-pull[0], pull[0], -pull[1], pull[1]], rtol=1e-5)


def test_an_adapter_is_measured_from_its_base(adapting: Trainer):
    """The margin in float64: log-probabilities of the merged model and of the base, by the dense twin."""
    leaves = cases.random_leaves(adapting.trained.shapes)
    weights = dense_twin.decoded(cases.make_values(CONFIG))
    with jax.enable_x64(True):

        def rows(weights: dict[str, jax.Array]) -> np.ndarray:
            found = dense_twin.log_probabilities(weights, CONFIG, PAIRS.tokens, PAIRS.targets)
            return np.asarray(jnp.sum(found * PAIRS.weights, axis=-1))

        base, adapter = ({path: jnp.asarray(x, jnp.float64) for path, x in tree.items()} for tree in (weights, leaves))
        gain = rows(dense_twin.merged(base, adapter, scale=cases.ADAPTER.scale)) - rows(base)
    margin = gain[0::2] - gain[1::2]
    sums = adapting.evaluate(cases.state_with(adapting, leaves), cases.on_devices(PAIRS, None))
    assert np.abs(margin).max() > 0.1
    np.testing.assert_allclose(sums.loss, np.sum(np.log1p(np.exp(-BETA * margin))), rtol=1e-4)
    assert float(sums.weight) == 2


def test_training_raises_the_margin(adapting: Trainer):
    """From log 2 a pair, where there is no margin, for pairs that are all preferred at the end."""
    state, batch = adapting.start(0), cases.on_devices(cases.stacked(PAIRS), None)
    losses, preferred = [], 0.0
    for _ in range(6):
        state, metrics = adapting.step(state, batch)
        losses.append(float(metrics.loss))
        preferred = float(metrics.accuracy)
    assert losses[0] == pytest.approx(np.log(2), abs=ROUNDING)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert preferred == 1


@pytest.mark.slow
def test_full_training_is_measured_from_what_it_is_given():
    """What row_log_probabilities says of the state before the first step."""
    values = cases.make_values(CONFIG, experts="bf16")
    trainer = cases.make_trainer(cases.make_model(CONFIG, values), adapter=None, optimizer=optax.sgd(1e-4), beta=BETA)
    state, batch = trainer.start(0), cases.on_devices(PAIRS, None)
    with pytest.raises(UserError, match="preferences need what the model said before training began"):
        trainer.evaluate(state, batch)
    reference = trainer.row_log_probabilities(state, batch)
    assert reference.shape == (4, 1)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    pairs = jax.tree.map(lambda x: x[None], PreferenceBatch(**fields, reference=reference))
    losses = []
    for _ in range(5):
        state, metrics = trainer.step(state, pairs)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(2), abs=ROUNDING)
    assert losses[-1] < losses[0]
