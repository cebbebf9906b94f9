"""Sampling against exact probabilities in NumPy: which ids are possible, and how often each is drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.engine.sampling import check_sampling, sample
from gptoss_jax.errors import UserError

DRAWS = 20_000
LOGITS = np.array([0.3, 2.0, -1.0, 2.5, 0.0, 1.0, -4.0, 2.0, 0.9, -0.5, 1.7], np.float32)
draw = jax.jit(sample)


def sampled(logits: np.ndarray, *, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    settings = {"temperature": jnp.float32(temperature), "top_k": jnp.int32(top_k), "top_p": jnp.float32(top_p)}
    return np.asarray(draw(jnp.asarray(logits), jax.random.key(seed), **settings))


def probabilities(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Step by step in float64, best first, ties to the lower id."""
    scaled = logits.astype(np.float64) / temperature
    whole = np.exp(scaled - scaled.max())
    best = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    whole /= whole[best].sum()
    kept, total = np.zeros(len(logits)), 0.0
    for rank, i in enumerate(best):
        if rank and total >= top_p:
            break
        kept[i] = whole[i]
        total += whole[i]
    return kept / kept.sum()


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
