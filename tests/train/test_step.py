"""One step: what adds up to what, what is left alone, and that neither packing, nor remat, nor a mesh changes a run."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import with_adapters
from gptoss_jax.model.layers import Memory
from gptoss_jax.model.transformer import parameters
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.step import Metrics
from tests.hosts.processes import free_port, run_all
from tests.train import cases, curve

SAME = 2e-6  # of float32 sums in another order, relative to the largest of a leaf

Gradients = dict[str, np.ndarray]


class Steps:
    """One trainer and one program, of two batches of four rows; its optimizer's state is the gradient."""

    def __init__(self, *, embedding: Memory = "device", **settings: Any):
        self.base = cases.make_model(cases.sizes(2), embedding=embedding)
        self.trainer = cases.make_trainer(self.base, **settings)
        self.leaves = cases.random_leaves(self.trainer.trained.shapes)

    def gradients(self, first: Batch, second: Batch) -> tuple[Metrics, Gradients]:
        batches = cases.on_devices(cases.stacked(first, second), None)
        state, metrics = self.trainer.step(cases.state_with(self.trainer, self.leaves), batches)
        return metrics, cases.gradients(state)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


TEXTS = cases.texts()
PACKED = cases.packed(TEXTS)
OTHER = cases.packed(cases.texts(((3,), (8, 4), (), (17,)), seed=1))
EMPTY = cases.packed([[]] * 4)


def assert_same(found: Gradients, expected: Gradients) -> None:
    for path, gradient in found.items():
        assert np.abs(gradient - expected[path]).max() <= SAME * np.abs(expected[path]).max() * 10, path


# ---- what adds up ----------------------------------------------------------------------------------------------------


def test_packed_texts_count_as_they_do_alone(steps: Steps):
    alone = cases.one_by_one(TEXTS)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 4], alone) for i in (0, 4)]
    (packed, by_packed), (apart, by_apart) = steps.gradients(PACKED, EMPTY), steps.gradients(halves[0], halves[1])
    assert float(packed.loss) == pytest.approx(float(apart.loss), rel=SAME)
    assert float(packed.weight) == float(apart.weight) == PACKED.weights.sum()
    np.testing.assert_allclose(packed.load, apart.load, rtol=1e-6)
    assert_same(by_packed, by_apart)


def test_a_target_counts_alike_in_whichever_batch_it_is(steps: Steps):
    """The second batch has fewer: means of batches would count its targets for more."""
    both, by_both = steps.gradients(PACKED, OTHER)
    (first, by_first), (second, by_second) = steps.gradients(PACKED, EMPTY), steps.gradients(EMPTY, OTHER)
    share = float(first.weight) / float(both.weight)
    assert 0.6 < share < 0.95
    assert float(both.loss) == pytest.approx(share * float(first.loss) + (1 - share) * float(second.loss), rel=SAME)
    assert_same(by_both, {path: share * by_first[path] + (1 - share) * by_second[path] for path in by_first})


def test_figures_of_a_step(steps: Steps):
    metrics, gradients = steps.gradients(PACKED, OTHER)
    assert bool(metrics.finite)
    assert metrics.load.shape == (2, 8)
    np.testing.assert_allclose(metrics.load.sum(axis=-1), 1, rtol=1e-6)
    assert 1 <= float(metrics.aux_loss) < 8
    assert 0 <= float(metrics.accuracy) <= 1
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-5)


# ---- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing(steps: Steps, bad: float):
    weights = PACKED.weights.copy()
    weights[1, 3] = bad
    batches = cases.on_devices(cases.stacked(OTHER, dataclasses.replace(PACKED, weights=weights)), None)
    state, metrics = steps.trainer.step(cases.state_with(steps.trainer, steps.leaves), batches)
    assert not bool(metrics.finite)
    assert int(state.step) == 0
    for path, leaf in state.leaves.items():
        np.testing.assert_array_equal(leaf, steps.leaves[path])
        assert not np.any(state.optimizer.trace[path])


def test_no_target_at_all_gives_no_gradient(steps: Steps):
    metrics, gradients = steps.gradients(EMPTY, EMPTY)
    assert (float(metrics.loss), float(metrics.weight), bool(metrics.finite)) == (0, 0, True)
    assert not any(np.any(gradient) for gradient in gradients.values())


# ---- what is computed anew -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_what_is_computed_anew_is_the_same(steps: Steps, remat: str):
    metrics, gradients = Steps(remat=remat).gradients(PACKED, OTHER)
    expected, by_layer = steps.gradients(PACKED, OTHER)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=SAME)
    assert_same(gradients, by_layer)


@pytest.mark.slow
def test_an_embedding_in_the_hosts_memory_gives_the_same(steps: Steps):
    there = Steps(embedding="host")
    assert there.base.embedding.weight[...].sharding.memory_kind == "pinned_host"
    metrics, gradients = there.gradients(PACKED, OTHER)
    expected, on_device = steps.gradients(PACKED, OTHER)
    assert float(metrics.loss) == float(expected.loss)
    assert_same(gradients, on_device)


# ---- states and models -----------------------------------------------------------------------------------------------


def test_the_adapter_and_the_model_of_a_state_are_what_was_trained(steps: Steps):
    """evaluate's loss, the logits of the trainer's model, and the base with the adapter that comes out."""
    state = cases.state_with(steps.trainer, steps.leaves)
    alone = cases.packed([[row[0]] for row in TEXTS])
    sums = steps.trainer.evaluate(state, cases.on_devices(alone, None))
    assert float(sums.weight) == alone.weights.sum()
    model = steps.trainer.model(state)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(alone.tokens)), np.float64)
    found = np.take_along_axis(logits, np.asarray(alone.targets)[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - found
    assert float(sums.loss) == pytest.approx(np.sum(alone.weights * losses), rel=1e-5)
    expected = parameters(with_adapters(steps.base, [steps.trainer.adapter(state)]))
    for path, parameter in parameters(model).items():
        np.testing.assert_array_equal(parameter[...], expected[path][...], err_msg=path)


@pytest.mark.parametrize(("shape", "fully"), [(None, False), ((2, 2, 2), False), ((2, 2, 2), True)], ids=str)
def test_a_state_is_what_it_is_said_to_be(shape: tuple[int, int, int] | None, fully: bool):
    """Shapes, types, and where it lies."""
    model = cases.make_model(
        cases.sizes(1), cases.make_values(cases.sizes(1), experts="bf16"), mesh=cases.mesh_of(shape)
    )
    trainer = cases.make_trainer(model, adapter=None, optimizer=optax.adam(1e-3), fully=fully)
    start, abstract = trainer.start(0), trainer.abstract_state()
    assert jax.tree.structure(start) == jax.tree.structure(abstract)
    for found, said in zip(jax.tree.leaves(start), jax.tree.leaves(abstract), strict=True):
        assert (found.shape, found.dtype) == (said.shape, said.dtype)
        assert shape is None or found.sharding.is_equivalent_to(said.sharding, found.ndim)
    width = start.leaves["layers.0.attention.q.weight"].sharding.shard_shape((12, 16, 160))
    assert width == {(None, False): (12, 16, 160), ((2, 2, 2), False): (6, 16, 160)}.get((shape, fully), (6, 16, 80))


def test_full_training_has_no_adapter():
    values = cases.make_values(cases.sizes(1), experts="bf16")
    trainer = cases.make_trainer(cases.make_model(cases.sizes(1), values), adapter=None)
    with pytest.raises(UserError, match="all of the model is trained, there is no adapter: export the model"):
        trainer.adapter(trainer.abstract_state())


@pytest.mark.slow
def test_the_step_is_compiled_once():
    """Also behind `start`, where weights are bound to their device as those of a checkpoint are."""
    base = cases.make_model(cases.sizes(1))
    for parameter in parameters(base).values():
        parameter[...] = jax.device_put(parameter[...], jax.devices()[0])
    trainer = cases.make_trainer(base)
    state, batches = trainer.start(0), cases.on_devices(cases.stacked(PACKED), None)
    for _ in range(2):
        state, _ = trainer.step(state, batches)
    assert trainer._step._cache_size() == 1


def test_the_compiler_is_not_told_who_called(steps: Steps):
    program = steps.trainer.lower(cases.on_devices(cases.stacked(PACKED, OTHER), None)).as_text(debug_info=True)
    assert "attention" in program
    assert "test_step.py" not in program
    assert jax.config.jax_include_full_tracebacks_in_locations  # elsewhere it is, as always


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_routers_loss_evens_out_the_experts():
    values = cases.make_values(cases.sizes(1), experts="bf16")
    found = {}
    for weight in (0.0, 3.0):
        model = cases.make_model(cases.sizes(1), values)
        trainer = cases.make_trainer(model, adapter=None, optimizer=optax.adam(1e-2), router_loss=weight)
        state, batch = trainer.start(0), cases.on_devices(cases.stacked(PACKED), None)
        for _ in range(10):
            state, metrics = trainer.step(state, batch)
            found[weight] = float(metrics.aux_loss)
    assert found[3.0] < found[0.0] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_run_is_the_same_on_one_device_on_eight_and_in_two_processes(kind: str):
    """Losses of 50 steps."""
    port, worker = free_port(), Path(curve.__file__)
    first, second = run_all([(sys.executable, worker, port, i, kind) for i in range(2)])
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    told, also_told = (json.loads(process.stdout.splitlines()[-1]) for process in (first, second))  # Gloo prints too
    assert told == also_told
    alone, on_eight = curve.losses(kind, None), curve.losses(kind, cases.mesh_of((2, 2, 2)))
    assert alone[-1] < 0.8 * alone[0]
    np.testing.assert_allclose(on_eight, alone, atol=1e-4)
    np.testing.assert_allclose(told, alone, atol=1e-4)
