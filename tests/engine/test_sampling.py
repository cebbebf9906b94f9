"""Sampling against a twin that sorts, in NumPy, and against transformers: which ids are drawn, and how often."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.engine.noise import gumbel
from gptoss_jax.engine.penalties import RowCounts, TokenCounts
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.sampling import RowSettings, Sampled, sample_rows
from tests.engine.twin import Judged, judge, words

DRAWS = 20_000
LOGITS = np.array([0.3, 2.0, -1.0, 2.5, 0.0, 1.0, -4.0, 2.0, 0.9, -0.5, 1.7], np.float32)
EVERY_ID = np.uint32(0xFFFFFFFF)
draw = jax.jit(sample_rows)


def sampled(
    logits: np.ndarray,
    rows: SamplingParams | Sequence[SamplingParams],
    *,
    index: Sequence[int] | np.ndarray | None = None,
    counts: RowCounts | None = None,
    allowed: np.ndarray | None = None,
) -> Sampled:
    """One setting for all rows or each its own; without an index each row is another id of the sequence."""
    rows = [rows] * len(logits) if isinstance(rows, SamplingParams) else rows
    index = np.arange(len(logits)) if index is None else np.asarray(index)
    masks = None if allowed is None else jnp.asarray(allowed)
    found = draw(
        jnp.asarray(logits), RowSettings.of(rows), index=jnp.asarray(index, jnp.int32), counts=counts, allowed=masks
    )
    return jax.tree.map(np.asarray, found)


def ids_of(logits: np.ndarray, rows: SamplingParams | Sequence[SamplingParams], **settings: Any) -> np.ndarray:
    return np.asarray(sampled(logits, rows, **settings).ids)


def noise(seed: int, index: int, size: int) -> np.ndarray:
    """As jax.random makes it."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
    return np.asarray(jax.random.gumbel(key, (size,)))


def counted(prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], *, vocab_size: int) -> RowCounts:
    """Each row its slot, the last row the first."""
    times = [[np.bincount(np.array(ids, int), minlength=vocab_size) for ids in each] for each in (prompts, generated)]
    table = TokenCounts(jnp.asarray(np.stack(times[0])[::-1] > 0), jnp.asarray(np.stack(times[1])[::-1], jnp.uint16))
    return RowCounts(table, jnp.arange(len(prompts))[::-1], jnp.zeros((len(prompts), 0), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Row:
    """All that a row's id depends on."""

    logits: np.ndarray
    sampling: SamplingParams
    prompt: list[int]
    generated: list[int]
    allowed: list[int] | None
    index: int

    def judged(self) -> Judged:
        return judge(self.logits, self.sampling, prompt=self.prompt, generated=self.generated, allowed=self.allowed)

    def expected(self) -> int:
        judged = self.judged()
        noisy = judged.scaled + noise(self.sampling.seed, self.index, len(self.logits))
        return int(np.where(judged.kept, noisy, -np.inf).argmax())


def random_row(random: np.random.Generator, *, size: int) -> Row:
    """Each setting is off in some rows; scores are rounded in some, which makes ties."""
    sampling = SamplingParams(
        temperature=float(random.choice([0.0, 0.3, 1.0, 2.5])),
        top_k=int(random.choice([0, 1, 5, 30, size + 9])),
        top_p=float(random.choice([1.0, 0.2, 0.7, 0.97])),
        min_p=float(random.choice([0.0, 0.03, 0.5])),
        repetition_penalty=float(random.choice([1.0, 1.3, 0.7])),
        presence_penalty=float(random.choice([0.0, 0.6, -1.1])),
        frequency_penalty=float(random.choice([0.0, 0.45, -0.2])),
        logit_bias={int(i): float(random.normal(scale=4)) for i in random.choice(size, random.choice([0, 3]), False)},
        seed=int(random.integers(2**32)),
    )
    logits = random.standard_normal(size) * 3
    return Row(
        logits=(logits if random.random() < 0.5 else np.round(logits * 2) / 2).astype(np.float32),
        sampling=sampling,
        prompt=random.integers(size, size=random.integers(6)).tolist(),
        generated=random.integers(min(9, size), size=random.integers(12)).tolist(),
        allowed=random.choice(size, 20, False).tolist() if random.random() < 0.3 else None,
        index=int(random.integers(5000)),
    )


def run(rows: Sequence[Row]) -> Sampled:
    size = len(rows[0].logits)
    masks = [
        np.full(-(-size // 32), EVERY_ID) if r.allowed is None else words(r.allowed, vocab_size=size) for r in rows
    ]
    return sampled(
        np.stack([row.logits for row in rows]),
        [row.sampling for row in rows],
        index=[row.index for row in rows],
        counts=counted([row.prompt for row in rows], [row.generated for row in rows], vocab_size=size),
        allowed=np.stack(masks),
    )


@pytest.mark.parametrize("seed", range(6))
def test_rows_with_settings_of_their_own_draw_the_twins_ids(seed: int):
    """100 rows at once; all that a chain of settings can do to each other happens in some of them."""
    random = np.random.default_rng(seed)
    rows = [random_row(random, size=83) for _ in range(100)]
    found = run(rows).ids
    # float32 scores are right to 1e-6 of their size, so a verdict that was nearer is left out, and a near tie of noisy
    # scores is next to impossible in so few.
    clear = [i for i, row in enumerate(rows) if row.judged().margin > 1e-5]
    assert len(clear) > 90
    assert [int(found[i]) for i in clear] == [rows[i].expected() for i in clear]


def test_a_row_is_drawn_alike_alone_and_in_any_company():
    """Ids and logprobs, bit for bit: in another place, in a batch of another size, beside rows with other settings."""
    random = np.random.default_rng(11)
    rows = [random_row(random, size=1009) for _ in range(9)]
    together, backwards = run(rows), run(rows[::-1])
    pairs = run(rows[:2])
    for i, row in enumerate(rows):
        alone = run([row])
        for found, place in ((together, i), (backwards, 8 - i), *([(pairs, i)] if i < 2 else [])):
            assert found.ids[place] == alone.ids[0]
            assert found.logprobs[place] == alone.logprobs[0]


@pytest.mark.parametrize("temperature", [0.5, *(pytest.param(other, marks=pytest.mark.slow) for other in (1.0, 2.0))])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.7, 0.0), (6, 0.5, 0.0), (3, 0.9, 0.0), (1000, 0.999, 0.0), (0, 1.0, 0.3)],
)
@pytest.mark.parametrize("by", ["index", "seed"])
def test_ids_are_drawn_as_often_as_they_should(temperature: float, top_k: int, top_p: float, min_p: float, by: str):
    """Along one sequence, and over the first ids of as many sequences."""
    settings = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    if by == "index":
        ids = ids_of(rows, settings)
    else:
        one = RowSettings.of([settings]).rows(jnp.zeros(DRAWS, jnp.int32))
        each = dataclasses.replace(one, seed=jnp.arange(DRAWS, dtype=jnp.uint32))
        ids = np.asarray(draw(jnp.asarray(rows), each, index=jnp.zeros(DRAWS, jnp.int32)).ids)
    counts = np.bincount(ids, minlength=len(LOGITS))
    p = judge(LOGITS, settings).probabilities
    assert not counts[p == 0].any()
    possible = p > 0
    chi_square = ((counts - DRAWS * p)[possible] ** 2 / (DRAWS * p[possible])).sum()
    freedom = possible.sum() - 1
    # Mean and variance of chi-square are its degrees of freedom and twice that; four sigmas, and the seed is fixed.
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_noise_is_that_of_jax_random():
    """Bit for bit, at the edges of seed and index too, and no different in a larger vocabulary."""
    seeds, indices = [0, 1, 2**31, 2**32 - 1], [0, 131_071, 1, 2**31 - 1]
    found = gumbel(jnp.array(seeds, jnp.uint32), jnp.array(indices, jnp.int32), vocab_size=1003)
    for row, (seed, index) in enumerate(zip(seeds, indices, strict=True)):
        key = jax.random.fold_in(jax.random.key(np.uint32(seed), impl="threefry2x32"), index)
        np.testing.assert_array_equal(found[row], jax.random.gumbel(key, (1003,)))
    more = gumbel(jnp.array(seeds, jnp.uint32), jnp.array(indices, jnp.int32), vocab_size=1040)
    np.testing.assert_array_equal(more[:, :1003], found)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(repetition_penalty=1.4),
        SamplingParams(repetition_penalty=0.6, temperature=0.7),
        SamplingParams(temperature=1.8, top_k=7),
        SamplingParams(temperature=0.6, top_p=0.8),
        SamplingParams(temperature=1.4, min_p=0.1),
        SamplingParams(repetition_penalty=1.2, temperature=1.3, top_k=25, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_transformers_draws_the_same_ids(sampling: SamplingParams):
    """Its processors, in the order in which its generate has them, and then our noise."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    random, size = np.random.default_rng(2), 211
    logits = (random.standard_normal((60, size)) * 3).astype(np.float32)
    seen = random.integers(size, size=(60, 15))
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
        transformers.TopKLogitsWarper(sampling.top_k or size),
        transformers.TopPLogitsWarper(sampling.top_p),
        transformers.MinPLogitsWarper(sampling.min_p),
    ]
    scores = torch.tensor(logits)
    for process in processors:
        scores = process(torch.tensor(seen), scores)
    noisy = [row + noise(0, index, size) for index, row in enumerate(scores.numpy())]
    counts = counted(seen[:, :10].tolist(), seen[:, 10:].tolist(), vocab_size=size)
    np.testing.assert_array_equal(ids_of(logits, sampling, counts=counts), np.argmax(noisy, axis=1))


def test_ids_without_a_score_are_never_drawn():
    rows = np.full((500, 40), -np.inf, np.float32)
    rows[:, [3, 20]] = [0.5, 0.0]
    for setting in ({}, {"top_k": 10}, {"top_p": 0.99}, {"top_k": 30, "top_p": 0.999}, {"logit_bias": {5: 100.0}}):
        assert set(ids_of(rows, SamplingParams(temperature=2.0, **setting))) == {3, 20}
    assert set(ids_of(rows, SamplingParams(temperature=0.0))) == {3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_possible_id_gets_none(temperature: float):
    """Neither an id that is forbidden nor one by chance; nor does a row of NaN. The row beside is as ever."""
    rows = np.stack([LOGITS, LOGITS, np.full_like(LOGITS, np.nan)])
    allowed = np.array([[0], [EVERY_ID], [EVERY_ID]], np.uint32)
    found = sampled(rows, SamplingParams(temperature=temperature, top_p=0.9), allowed=allowed)
    assert found.ids[0] == found.ids[2] == -1
    assert found.ids[1] == ids_of(rows, SamplingParams(temperature=temperature, top_p=0.9))[1]


@pytest.mark.parametrize("size", [31, 32, 33, 70])
def test_a_mask_allows_by_its_bits(size: int):
    """Also an id that the model likes least, and none past the words, as padding lies."""
    allowed = [1, 13, size - 1]
    rows = np.zeros((300, size + 40), np.float32)
    rows[:, size - 1] = -5
    masks = np.broadcast_to(words(allowed, vocab_size=size), (300, -(-size // 32)))
    assert set(ids_of(rows, SamplingParams(temperature=20.0), allowed=masks)) == set(allowed)


def test_ids_that_pad_the_vocabulary_change_nothing():
    rows = np.random.default_rng(5).standard_normal((6, 41)).astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, 3)), constant_values=-np.inf)
    counts = counted([[1]] * 6, [[5, 40]] * 6, vocab_size=41)
    for setting in ({}, {"top_k": 7}, {"top_p": 0.8}, {"repetition_penalty": 2.0}, {"logprobs": 20}):
        settings = SamplingParams(**setting)
        expected, found = (sampled(each, settings, counts=counts) for each in (rows, padded))
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)
        # The sum of exponentials has three zeros more, and another order.
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6)


def test_temperature_zero_is_greedy_and_a_tie_goes_to_the_lower_id():
    """Whatever else is asked, and beside a row that is drawn."""
    logits = np.array([[1, 5, 5, 0], [3, 3, 3, 3], [-2, -9, -1, -1], [0, 0, 0, 0]], np.float32)
    for seed in range(3):
        greedy = SamplingParams(temperature=0.0, seed=seed)
        assert ids_of(logits[:3], greedy).tolist() == [1, 0, 2]
        settings = [dataclasses.replace(greedy, top_p=0.5), dataclasses.replace(greedy, top_k=3), greedy]
        assert ids_of(logits, [*settings, SamplingParams(top_p=0.9)])[:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-50}, {"top_k": 1, "top_p": 0.5}])
def test_the_best_id_is_always_possible(setting: dict[str, Any]):
    """Also when many tie for it: then it is the lowest."""
    rows = np.zeros((300, 7), np.float32)
    assert not ids_of(rows, SamplingParams(temperature=3.0, **setting)).any()
    rows[:, 4] = 1e-3
    assert (ids_of(rows, SamplingParams(temperature=3.0, **setting)) == 4).all()


def test_min_p_1_leaves_the_best_and_its_equals():
    rows = np.broadcast_to(np.array([1, 2, 1.99, 2, 0], np.float32), (300, 5))
    assert set(ids_of(rows, SamplingParams(temperature=9.0, min_p=1.0))) == {1, 3}


def test_the_id_that_crosses_top_p_is_included():
    logits = np.broadcast_to(np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32)), (2000, 4))
    for top_p, possible in ((0.45, {1}), (0.55, {1, 3}), (0.7, {1, 3}), (0.8, {0, 1, 3}), (0.9, {0, 1, 2, 3})):
        assert set(ids_of(logits, SamplingParams(top_p=top_p))) == possible


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-42, 1e-60])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float):
    """Quotients pass the largest float; the fourth temperature is itself a denormal, and the last is none."""
    rows = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32) * 30
    np.testing.assert_array_equal(ids_of(rows, SamplingParams(temperature=temperature)), rows.argmax(axis=-1))


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_high_temperature_is_nearly_uniform(temperature: float):
    """Also past the largest float32, and still among the ids that have a score."""
    logits = np.append(LOGITS, np.float32(-np.inf))
    counts = np.bincount(ids_of(np.broadcast_to(logits, (DRAWS, 12)), SamplingParams(temperature=temperature)))
    assert len(counts) == 11
    assert (np.abs(counts - DRAWS / 11) < 5 * math.sqrt(DRAWS / 11)).all()


def test_settings_are_no_part_of_the_program():
    rows = np.broadcast_to(LOGITS, (400, len(LOGITS)))
    ids_of(rows, SamplingParams())
    before = draw._cache_size()
    for row in (
        SamplingParams(temperature=0),
        SamplingParams(top_k=5, top_p=0.3),
        SamplingParams(logprobs=7, min_p=0.1),
    ):
        ids_of(rows, row)
        ids_of(rows, dataclasses.replace(row, logit_bias={3: 1.0}, presence_penalty=1.0, seed=9))
    assert draw._cache_size() == before


@pytest.mark.parametrize("wanted", [1, 5, 20])
def test_logprobs_are_the_models_own(wanted: int):
    """No setting changes them. The best come first, of equals the lower id; what has no score is not among them."""
    random = np.random.default_rng(wanted)
    logits = np.round(random.standard_normal((4, 50)) * 3).astype(np.float32)
    logits[1, 12:] = -np.inf  # fewer than 20 have a score
    rows = [
        SamplingParams(logprobs=wanted, temperature=0.2, logit_bias={7: 30.0}, top_k=3),
        SamplingParams(logprobs=3),
        SamplingParams(logprobs=None, temperature=0),
        SamplingParams(logprobs=0, presence_penalty=2.0),
    ]
    found = sampled(logits, rows, counts=counted([[1]] * 4, [[2, 3]] * 4, vocab_size=50))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert found.ids[0] == 7
    # 1e-5: float32 numbers of up to 20, and a sum of 50 of them.
    np.testing.assert_allclose(found.logprobs, exact[np.arange(4), found.ids], atol=1e-5)
    for row in range(4):
        best = np.argsort(-logits[row], kind="stable")[: max(wanted, 3)]
        best = best[np.isfinite(logits[row, best])]
        assert found.top_ids[row].tolist() == [*best, *[-1] * (20 - len(best))]
        np.testing.assert_allclose(found.top_logprobs[row, : len(best)], exact[row, best], atol=1e-5)
        assert (found.top_logprobs[row, len(best) :] == -np.inf).all()


def test_nothing_is_asked_for_and_nothing_is_told():
    found = sampled(np.stack([LOGITS, LOGITS]), SamplingParams())
    assert (np.asarray(found.top_ids) == -1).all()
    assert found.ids.dtype == np.int32
