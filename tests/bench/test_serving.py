"""Loads, records, roofs and what is made of them, with a runner that has no model; no time is judged."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.bench import serving
from gptoss_jax.bench.drive import Record, run_closed, run_open
from gptoss_jax.bench.load import Lengths, poisson_arrivals, requests
from gptoss_jax.bench.percentiles import Seconds, percentile
from gptoss_jax.bench.roof import Held, least_work
from gptoss_jax.bench.serving import Goals, Warm
from gptoss_jax.bench.serving_plot import plot
from gptoss_jax.bench.start import start
from gptoss_jax.bench.steps import step_flops
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.request import Request
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.footprint import busiest_experts, footprint
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.sharding import MeshShape
from tests.engine.fake import VOCAB, FakeRunner, expected_ids
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
LIMITS = Limits(
    max_rows=8,
    page_size=4,
    num_full_pages=500,
    num_sliding_pages=200,
    window=9,
    max_context=300,
    programs=(Program(8, 1, 0, 0), Program(8, 1, 2, 16)),
)
LENGTHS = Lengths(prompt_tokens=11, new_tokens=6)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def warm(before_run=lambda plan: None, *, max_rows: int = 8) -> Warm:
    limits = dataclasses.replace(LIMITS, max_rows=max_rows)
    return Warm(runner=FakeRunner(limits, before_run), limits=limits, vocab_size=VOCAB)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=70), st.integers(1, 100))
def test_a_percentile_is_numpys_of_the_same_definition(values: list[float], percent: int):
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


def test_durations_in_brief():
    found = Seconds.of([float(i) for i in range(1, 201)])
    assert dataclasses.astuple(found) == (200, 100.5, 100.0, 190.0, 198.0)
    assert dataclasses.astuple(Seconds.of([])) == (0, None, None, None, None)


def test_poisson_arrivals_are_independent_and_as_many_as_stated(rng: np.random.Generator):
    gaps = np.diff(poisson_arrivals(5.0, 10_001, rng=rng))
    assert gaps.min() > 0
    # The mean and the standard deviation of such gaps are 1/5 s. Of 10,000 the mean is off by 1 % in the standard
    # deviation, the deviation itself by 1.4 %; neighbours' correlation by 0.01. Four of each is 1 run in 16,000.
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.04)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.056)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.04


def test_lengths_are_as_stated(rng: np.random.Generator):
    found = requests(LENGTHS, 3000, vocab_size=VOCAB, rng=rng)
    for sizes, low, high in (
        ([len(request.prompt) for request in found], 6, 16),
        ([request.max_new_tokens for request in found], 3, 9),
    ):
        assert (min(sizes), max(sizes)) == (low, high)
        deviation = ((high - low + 1) ** 2 - 1) / 12  # of one length, squared
        assert statistics.fmean(sizes) == pytest.approx((low + high) / 2, abs=4 * (deviation / 3000) ** 0.5)
    assert LENGTHS.longest == 25
    for number in (1, 2, 7, 64):  # so that a point of few requests is not one of long prompts
        some = requests(LENGTHS, number, vocab_size=VOCAB, rng=rng)
        for mean, sizes in (
            (LENGTHS.prompt_tokens, [len(request.prompt) for request in some]),
            (LENGTHS.new_tokens, [request.max_new_tokens for request in some]),
        ):
            assert abs(np.mean(sizes) - mean) <= 1
    alike = requests(dataclasses.replace(LENGTHS, spread="none"), 5, vocab_size=VOCAB, rng=rng)
    assert [(len(request.prompt), request.max_new_tokens) for request in alike] == [(11, 6)] * 5
    assert len({tuple(request.prompt) for request in alike}) == len({r.sampling.seed for r in alike}) == 5
    again = [requests(LENGTHS, 4, vocab_size=VOCAB, rng=np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(UserError, match="new_tokens is 0; expected at least 1"):
        Lengths(prompt_tokens=1, new_tokens=0)


def test_what_must_be_read_and_multiplied_is_counted_step_by_step():
    """Two requests together: as if each prompt were one step, and the ids behind it came from steps of both."""
    sizes = [(5, 4), (13, 4)]
    held = Held(
        config=CONFIG, shape=MeshShape(), dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16, experts="mxfp4", dense="bf16"
    )
    load = [Request(prompt=[1] * prompt, max_new_tokens=new) for prompt, new in sizes]
    found = least_work(held, load, concurrent=2)

    flops = sum(step_flops(CONFIG, rows=1, tokens=prompt, context=0) for prompt, _ in sizes)
    cache = 0
    for prompt, new in sizes:
        for context in range(prompt, prompt + new - 1):
            flops += step_flops(CONFIG, rows=1, tokens=1, context=context)
            cache += sum(min(context + 1, seen) for seen in (9, 1000)) * 2 * 4 * 16 * 2  # k and v, heads, dims, bytes
    assert found.flops == pytest.approx(flops, rel=1e-12)  # both are sums of whole numbers, in float64

    weights = footprint(CONFIG, MeshShape(), rows=1, capacity=1).weights
    step = sum(weights[group] for group in ("attention", "router", "norms", "unembedding"))
    step += 2 * weights["embedding"] // 352 + weights["experts"] * busiest_experts(CONFIG, MeshShape(), tokens=2) / 8
    assert found.nbytes == pytest.approx(4 * step + cache, abs=4)  # bytes of experts are rounded in each step

    half = least_work(dataclasses.replace(held, kv_dtype=jnp.int8), load, concurrent=2)
    assert found.nbytes - half.nbytes == pytest.approx(cache * (1 - (16 + 4) / 32), abs=1e-6)  # a scale for 16 codes


def test_throughput_counts_what_was_delivered(rng: np.random.Generator):
    rows = []
    served = warm(lambda plan: rows.append(len({piece.sequence.id for piece in (*plan.decode, *plan.prefill)})))
    load = served.requests(LENGTHS, 12, rng=rng)
    with served.engine() as engine:
        found = serving.throughput(engine, load, concurrent=3)
        assert engine.stats().generated_tokens == found.output_tokens
    assert max(rows) == 3
    assert (found.requests, found.concurrent_requests, found.steps) == (12, 3, len(rows))
    assert found.prompt_tokens == sum(len(request.prompt) for request in load)
    assert found.output_tokens == sum(request.max_new_tokens for request in load)
    assert found.output_tokens_per_second * found.seconds == pytest.approx(found.output_tokens)
    assert found.total_tokens_per_second * found.seconds == pytest.approx(found.output_tokens + found.prompt_tokens)
    assert found.requests_per_second * found.seconds == pytest.approx(12)
    assert (found.cached_tokens, found.preemptions) == (0, 0)


def test_every_id_of_a_request_is_noted_with_its_time(rng: np.random.Generator):
    served = warm()
    load = served.requests(LENGTHS, 5, rng=rng)
    with served.engine() as engine:
        records = run_open(engine, load, due=[0.02, 0.0, 0.01, 0.0, 0.01])
    assert [record.request for record in records] == load
    for record in records:
        assert record.ids == expected_ids(record.request)
        assert record.due <= record.submitted <= record.times[0]
        assert len(record.gaps) == len(record.ids) - 1
        assert min(record.gaps) >= 0
        assert record.whole_seconds == pytest.approx(record.first_seconds + sum(record.gaps))


def test_arrivals_wait_for_nobody(rng: np.random.Generator):
    """One row, whose first step lasts until all requests are in the queue."""
    engines, held = [], []

    def hold(plan) -> None:
        if not held:
            held.append(plan)
            while (queue := engines[0].stats().queue).running + queue.waiting < 4:
                time.sleep(1e-4)

    served = warm(hold, max_rows=1)
    with served.engine() as engine:
        engines.append(engine)
        records = run_open(engine, served.requests(LENGTHS, 4, rng=rng), due=[0.0, 0.01, 0.02, 0.03])
    assert max(record.submitted for record in records) <= min(record.times[0] for record in records)
    assert [record.found_running + record.found_waiting for record in records] == [0, 1, 2, 3]


def test_a_late_submission_is_the_users_time_too():
    record = Record(
        request=Request(prompt=[1], max_new_tokens=3), due=1.0, submitted=5.0, found_running=0, found_waiting=0
    )
    record.times = [6.0, 8.0, 8.5]
    assert (record.first_seconds, record.whole_seconds, record.gaps) == (5.0, 7.5, [2.0, 0.5])
    assert Goals(first_token_seconds=5, between_tokens_seconds=1.25).are_met(record)
    assert not Goals(first_token_seconds=4.9, between_tokens_seconds=9).are_met(record)
    assert not Goals(first_token_seconds=9, between_tokens_seconds=1.2).are_met(record)


@pytest.mark.parametrize(("seconds", "share"), [(1000.0, 1.0), (0.0, 0.0)])
def test_latency_counts_what_was_delivered(seconds: float, share: float, rng: np.random.Generator):
    served = warm()
    load = served.requests(LENGTHS, 10, rng=rng)
    due = poisson_arrivals(500.0, 10, rng=rng)
    goals = Goals(first_token_seconds=seconds, between_tokens_seconds=seconds)
    with served.engine() as engine:
        found = serving.latency(engine, load, due=due, rate=500.0, goals=goals)
    assert (found.requests, found.good_share) == (10, share)
    assert found.output_tokens == sum(request.max_new_tokens for request in load)
    assert (found.first_token.count, found.between_tokens.count, found.whole.count) == (
        10,
        found.output_tokens - 10,
        10,
    )
    assert found.arrived_requests_per_second == pytest.approx(10 / due[-1])
    assert found.finished_requests_per_second == pytest.approx(10 / found.seconds)
    assert found.good_requests_per_second == share * found.finished_requests_per_second
    assert found.seconds > due[-1]


def test_a_prompt_that_comes_again_is_found(rng: np.random.Generator):
    found = serving.prefix(warm(), prompt_tokens=42, rng=rng)
    assert (found.prompt_tokens, found.output_tokens, found.ids_equal) == (42, serving.PREFIX_NEW_TOKENS, True)
    assert found.cached_tokens_mean == 40  # the whole pages of 4 before the last id, which is computed for its scores
    assert found.warm_share_of_cold == found.warm_first_token_seconds / found.cold_first_token_seconds


def test_overhead_is_of_all_requests_at_once(rng: np.random.Generator):
    rows = []
    served = warm(lambda plan: rows.append(len(plan.decode)))
    load = served.requests(serving.OVERHEAD_LENGTHS, 5, rng=rng)
    with served.engine() as engine:
        found = serving.overhead(engine, load)
    assert max(rows) == found.running_requests == 5
    assert (found.steps, found.output_tokens) == (len(rows), 5 * serving.OVERHEAD_LENGTHS.new_tokens)
    assert found.host_seconds_per_step > 0


def test_a_request_that_fails_fails_the_measurement(rng: np.random.Generator):
    def fail(plan) -> None:
        raise ArithmeticError("broken")

    served = warm(fail)
    with served.engine() as engine, pytest.raises(RuntimeError, match=r"ended by 'error' after 0 of \d ids: .*broken"):
        run_closed(engine, served.requests(LENGTHS, 3, rng=rng), concurrent=2)


def test_warming_up_leaves_nothing_behind(rng: np.random.Generator):
    served = warm()
    served.warm_up(rng=rng)
    with served.engine() as engine:
        assert engine.stats().generated_tokens == 0
    assert served.runner.slots == {}


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What jax says that happens."""
    seen: list[str] = []

    def listen(event: str, **_: object) -> None:
        seen.append(event)

    jax.monitoring.register_event_listener(listen)
    yield seen
    jax.monitoring.unregister_event_listener(listen)


@pytest.mark.slow
def test_an_engine_starts_from_programs_on_disk(events: list[str]):
    config = dataclasses.replace(TINY, layer_kinds=alternating_layers(1))
    model = GptOss(config, dtype=jnp.float32, experts="bf16", impl="xla", rngs=nnx.Rngs(0))
    settings = EngineSettings(max_rows=2, cache_tokens=64, page_size=16, prefill_tokens=16, batch_invariant=True)
    before = {name: value for name, value in jax.config.values.items() if "compilation_cache" in name}
    found = start(model, settings)
    # Everything was compiled once, and everything was found the second time.
    assert events.count("/jax/compilation_cache/cache_misses") >= found.programs
    assert events.count("/jax/compilation_cache/cache_hits") == events.count("/jax/compilation_cache/cache_misses")
    # A step for prompts, one for decoding, and the drawing of constrained ids of each; a state; what was said in it.
    assert found.programs == 6
    assert found.cache_bytes > 0
    assert found.warm_share_of_cold == found.warm_seconds / found.cold_seconds
    assert before == {name: value for name, value in jax.config.values.items() if "compilation_cache" in name}


def test_a_result_without_a_picture_is_an_error(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="expected one of throughput, latency"):
        plot({"decode": []}, tmp_path / "plot.png")
