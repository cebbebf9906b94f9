"""Sampling against a twin that sorts, in NumPy: which ids are possible, and how often each is drawn."""

import functools
import math

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gptoss_jax.engine.sampling import check_sampling, keep, sample
from gptoss_jax.errors import UserError

DRAWS = 20_000
LOGITS = np.array([0.3, 2.0, -1.0, 2.5, 0.0, 1.0, -4.0, 2.0, 0.9, -0.5, 1.7], np.float32)
draw = jax.jit(sample)


def sampled(logits: np.ndarray, *, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    settings = {"temperature": jnp.float32(temperature), "top_k": jnp.int32(top_k), "top_p": jnp.float32(top_p)}
    return np.asarray(draw(jnp.asarray(logits), jax.random.key(seed), **settings))


def sorted_probabilities(logits: np.ndarray, *, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(ids, their probabilities) in float64, best first, ties to the lower id."""
    best_first = np.argsort(-logits, kind="stable")
    scaled = (logits[best_first].astype(np.float64) - logits.max()) / temperature
    return best_first, np.exp(scaled) / np.exp(scaled).sum()


def probabilities(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The slow twin: sorts, cuts at top_k, sums up to top_p."""
    ids, whole = sorted_probabilities(logits, temperature=temperature)
    ids, whole = ids[: top_k or None], whole[: top_k or None] / whole[: top_k or None].sum()
    before = np.cumsum(whole) - whole
    kept = (before < top_p) | (top_p == 1)
    out = np.zeros(len(logits))
    out[ids[kept]] = whole[kept] / whole[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (6, 0.5), (3, 0.9), (1000, 0.999)])
def test_ids_are_drawn_as_often_as_they_should(temperature: float, top_k: int, top_p: float):
    rows = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    ids = sampled(rows, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = np.bincount(ids, minlength=len(LOGITS))
    p = probabilities(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
    assert not counts[p == 0].any()
    possible = p > 0
    chi_square = ((counts - DRAWS * p)[possible] ** 2 / (DRAWS * p[possible])).sum()
    freedom = possible.sum() - 1
    # Mean and variance of chi-square are its degrees of freedom and twice that; four sigmas, and the seed is fixed.
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


SIZE = 37
NEARLY = 1e-5  # of top_p: sums of 37 float32 err by less, so beyond it the cut is the same


@functools.partial(jax.jit, static_argnames="temperature")
def kept_of(logits: jax.Array, temperature: float, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    odds = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    return keep(logits, odds, top_k=top_k, top_p=top_p)


@given(
    # Few values make many ties, at both zeros too; an id that is masked has -inf.
    logits=hypothesis.extra.numpy.arrays(
        np.float32,
        SIZE,
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.5, 2.25, -math.inf]) | st.floats(-20, 20, width=32),
    ),
    temperature=st.sampled_from([0.25, 1.0, 7.0]),
    top_k=st.integers(0, SIZE + 4),
    top_p=st.just(1.0) | st.floats(1e-3, 0.9999),
)
def test_the_ids_that_are_kept_are_those_of_the_twin(logits: np.ndarray, temperature: float, top_k: int, top_p: float):
    assume(np.isfinite(logits).any())
    _, whole = sorted_probabilities(logits, temperature=temperature)
    sums = np.cumsum(whole[: top_k or None]) / whole[: top_k or None].sum()
    assume(top_p == 1 or np.abs(sums - top_p).min() > NEARLY)
    kept = kept_of(jnp.asarray(logits[None]), temperature, jnp.int32(top_k), jnp.float32(top_p))[0]
    possible = np.asarray(kept) & np.isfinite(logits)
    expected = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p) > 0
    np.testing.assert_array_equal(possible, expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (0, 0.8), (1000, 0.9), (201_000, 1.0), (0, 0.999)])
def test_a_whole_vocabulary_is_cut_where_the_twin_cuts_it(top_k: int, top_p: float):
    """Scores in steps of 1/16, as rounding makes them: thousands of ties at the cut. The sums of 201,088 float32 odds
    err by up to 1e-5, which near 0.999 is a few of the tail's ids.
    """
    logits = (np.random.default_rng(3).standard_normal(201_088) * 48).round().astype(np.float32) / 16
    kept = kept_of(jnp.asarray(logits[None]), 1.0, jnp.int32(top_k), jnp.float32(top_p))[0]
    expected = probabilities(logits, temperature=1.0, top_k=top_k, top_p=top_p) > 0
    differing = np.flatnonzero(np.asarray(kept) != expected)
    assert len(differing) <= (0 if top_p == 1 else 1e-3 * expected.sum())
    assert len(np.unique(logits[differing])) <= 1  # the ties at the cut, of which a few more or fewer are kept


def test_equal_ids_are_kept_from_the_lowest_up_in_each_row():
    logits = np.array([[1, 1, 1, 1, 0], [2, 1, 1, 1, 1], [0, 1, 2, 3, 4], [7, 7, 0, 7, 7]], np.float32)
    kept = kept_of(jnp.asarray(logits), 1.0, jnp.int32(3), jnp.float32(1.0))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[0, 1, 2], [0, 1, 2], [2, 3, 4], [0, 1, 3]]


def test_masked_ids_are_never_drawn():
    rows = np.full((500, 40), -np.inf, np.float32)
    rows[:, [3, 20]] = [0.5, 0.0]
    for setting in ({}, {"top_k": 10}, {"top_p": 0.99}, {"top_k": 30, "top_p": 0.999}):
        assert set(sampled(rows, temperature=2.0, **setting)) == {3, 20}
    assert set(sampled(rows, temperature=0.0)) == {3}


def test_ids_that_pad_the_vocabulary_change_nothing():
    rows = np.random.default_rng(5).standard_normal((6, 41)).astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, 3)), constant_values=-np.inf)
    for setting in ({}, {"top_k": 7}, {"top_p": 0.8}):
        np.testing.assert_array_equal(
            sampled(rows, temperature=1.0, **setting), sampled(padded, temperature=1.0, **setting)
        )


def test_temperature_zero_is_greedy_and_a_tie_goes_to_the_lower_id():
    logits = np.array([[1, 5, 5, 0], [3, 3, 3, 3], [-2, -9, -1, -1]], np.float32)
    for seed in range(3):
        assert sampled(logits, temperature=0.0, seed=seed).tolist() == [1, 0, 2]


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}])
def test_the_best_id_is_always_possible(setting: dict[str, float]):
    """Also when many tie for it: then it is the lowest."""
    rows = np.zeros((300, 7), np.float32)
    assert not sampled(rows, temperature=3.0, **setting).any()
    rows[:, 4] = 1e-3
    assert (sampled(rows, temperature=3.0, **setting) == 4).all()


def test_a_tie_at_the_kth_place_goes_to_the_lower_id():
    logits = np.broadcast_to(np.array([1, 2, 1, 2, 1], np.float32), (500, 5))
    assert set(sampled(logits, temperature=5.0, top_k=3)) == {0, 1, 3}


def test_the_id_that_crosses_top_p_is_included():
    logits = np.broadcast_to(np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32)), (2000, 4))
    for top_p, possible in ((0.45, {1}), (0.55, {1, 3}), (0.7, {1, 3}), (0.8, {0, 1, 3}), (0.9, {0, 1, 2, 3})):
        assert set(sampled(logits, temperature=1.0, top_p=top_p)) == possible


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-42])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float):
    """Quotients pass the largest float, and the last temperature is itself a denormal."""
    rows = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32) * 30
    np.testing.assert_array_equal(sampled(rows, temperature=temperature), rows.argmax(axis=-1))


def test_a_high_temperature_is_nearly_uniform():
    counts = np.bincount(sampled(np.broadcast_to(LOGITS, (DRAWS, 11)), temperature=1e30), minlength=11)
    assert (np.abs(counts - DRAWS / 11) < 5 * math.sqrt(DRAWS / 11)).all()


def test_rows_are_independent_and_the_key_decides():
    rows = np.broadcast_to(LOGITS, (400, len(LOGITS)))
    first = sampled(rows, temperature=1.0, seed=1)
    np.testing.assert_array_equal(first, sampled(rows, temperature=1.0, seed=1))
    assert (first != sampled(rows, temperature=1.0, seed=2)).any()
    assert len(set(first)) > 5
    assert first.dtype == np.int32


def test_settings_are_no_part_of_the_program():
    before = draw._cache_size()
    rows = np.broadcast_to(LOGITS, (400, len(LOGITS)))
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (0.7, 5, 0.3), (1.3, 0, 0.9)):
        sampled(rows, temperature=temperature, top_k=top_k, top_p=top_p)
    assert draw._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_settings_outside_their_range_are_refused(setting: dict[str, float], complaint: str):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | setting
    with pytest.raises(UserError, match=complaint):
        check_sampling(**settings)


@pytest.mark.parametrize("setting", [(0.0, 0, 1.0), (5.0, 10**6, 1e-9)])
def test_settings_at_the_edge_are_taken(setting: tuple[float, int, float]):
    check_sampling(**dict(zip(("temperature", "top_k", "top_p"), setting, strict=True)))
