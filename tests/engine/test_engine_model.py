"""The engine on a real model: `generate`, which runs one request alone, says what every answer must be."""

import dataclasses
import importlib
import random
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.request import Request, SamplingParams, Token
from gptoss_jax.engine.runner import Runner
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.engine.stream import Answer
from gptoss_jax.errors import UserError
from gptoss_jax.kernels import native
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), max_context=200)
LIMITS = Limits(
    max_rows=4,
    page_size=8,
    num_full_pages=60,
    num_sliding_pages=40,
    window=CONFIG.sliding_window,
    max_context=150,
    programs=(Program(4, 1, 0, 0), Program(4, 1, 2, 16)),
)
SHARED = random.Random(1).choices(range(CONFIG.vocab_size), k=60)  # what many prompts begin with


def make_model(impl: str | None = None) -> GptOss:
    model = GptOss(CONFIG, dtype=jnp.float32, impl=impl, rngs=nnx.Rngs(0))
    weight = parameters(model)["unembedding.weight"]
    weight[...] = 3 * weight[...]  # surer of its next token: greedy text repeats itself, so that guesses are right
    return model


@pytest.fixture(scope="module")
def model() -> GptOss:
    return make_model()


@pytest.fixture(scope="module", autouse=True)
def few_programs_of_the_judge() -> Iterator[None]:
    """Prompts of 9 ids or more are all fed to it in chunks of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("gptoss_jax.engine.generate"), "_CHUNK", 16)
        yield


@pytest.fixture(scope="module")
def engine(model: GptOss) -> Iterator[Engine]:
    with open_engine(model, LIMITS) as engine:
        yield engine
        assert_nothing_leaked(engine)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA compiles, as it happens."""
    seen: list[str] = []
    is_on = True

    def listen(event: str, duration: float, **_: object) -> None:
        if is_on and "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    is_on = False  # a listener can only be unregistered by a private name


def open_engine(model: GptOss, limits: Limits) -> Engine:
    runner = Runner(model, limits)
    runner.warm_up()
    draft_tokens = max(program.decode_width for program in limits.programs) - 1
    vocab_size = model.config.vocab_size
    return Engine.on(runner, limits=limits, vocab_size=vocab_size, draft_tokens=draft_tokens, token_bytes=token_bytes)


def token_bytes(token_id: int) -> bytes:
    return bytes([ord("a") + token_id % 7])


def assert_nothing_leaked(engine: Engine) -> None:
    engine._scheduler.check()
    counts = engine.stats().queue
    assert (counts.running, counts.waiting, counts.held_full_pages, counts.held_sliding_pages) == (0, 0, 0, 0)


def random_request(rng: random.Random) -> Request:
    prompt = [*SHARED[: rng.choice([0, 0, 8, 30, 60])], *rng.choices(range(CONFIG.vocab_size), k=rng.randint(9, 40))]
    return Request(
        prompt=prompt,
        max_new_tokens=rng.randint(1, 30),
        sampling=random_sampling(rng),
        stop_ids=rng.sample(range(CONFIG.vocab_size), rng.choice([0, 8])),
        n=rng.choice([1, 1, 1, 2]),
        priority=rng.choice([0, 0, 3]),
    )


def random_sampling(rng: random.Random) -> SamplingParams:
    penalises = rng.random() < 0.2
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.2]) if penalises else 1.0,
        presence_penalty=rng.choice([0.0, 0.7]) if penalises else 0.0,
        frequency_penalty=rng.choice([0.0, 0.4]) if penalises else 0.0,
        logit_bias=dict.fromkeys(rng.sample(range(CONFIG.vocab_size), 3), 2.5) if rng.random() < 0.2 else {},
        seed=rng.randrange(100),
    )


def expected_ids(model: GptOss, request: Request, index: int = 0) -> list[int]:
    return list(
        generate(
            model,
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling.of_continuation(index),
            stop_ids=request.stop_ids,
            constraint=request.constraint,
        )
    )


def check(model: GptOss, request: Request, answers: Sequence[Answer], *, may_be_cut: bool = False) -> None:
    assert [answer.index for answer in answers] == list(range(request.n))
    for answer in answers:
        expected = expected_ids(model, request, answer.index)
        if answer.finished.reason == "abort":
            assert may_be_cut
            assert answer.ids == expected[: len(answer.ids)]
        else:
            assert answer.finished.reason in ("stop", "length"), answer.finished
            assert answer.ids == expected


def serve(engine: Engine, model: GptOss, requests: Sequence[Request], *, aborted: Collection[int] = ()) -> None:
    """All at once; those to be aborted as soon as they have begun."""
    streams = [engine.submit(request) for request in requests]
    first = {number: next(streams[number]) for number in aborted}
    for number in aborted:
        streams[number].abort()
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        answers = stream.result()
        if number in first:  # one event was read before
            found = first[number]
            assert isinstance(found, Token)
            own = answers[found.index]
            answers[found.index] = dataclasses.replace(own, tokens=(found, *own.tokens))
        check(model, request, answers, may_be_cut=number in first)


def test_random_requests_are_answered_as_alone_and_nothing_is_compiled(
    engine: Engine, model: GptOss, compilations: list[str]
):
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(40)]
    before = engine.stats().programs
    answers = [stream.result() for stream in [engine.submit(request) for request in requests]]
    assert compilations == []
    assert engine.stats().programs == before
    for request, found in zip(requests, answers, strict=True):
        check(model, request, found)
    assert engine.stats().queue.cached_tokens > 0


def test_aborts_leave_the_others_alone(engine: Engine, model: GptOss):
    rng = random.Random(1)
    serve(engine, model, [random_request(rng) for _ in range(24)], aborted=rng.sample(range(24), 8))
    assert_nothing_leaked(engine)


@pytest.mark.slow
def test_a_thousand_random_requests(engine: Engine, model: GptOss):
    rng = random.Random(2)
    for _ in range(20):
        serve(engine, model, [random_request(rng) for _ in range(50)], aborted=rng.sample(range(50), 10))
    assert_nothing_leaked(engine)


def test_sequences_that_give_up_their_pages_are_answered_the_same(engine: Engine, model: GptOss):
    """Four rows of up to 140 positions do not fit into 480 of the cache."""
    before = engine.stats().queue.preemptions
    rng = random.Random(3)
    requests = [
        Request(prompt=rng.choices(range(CONFIG.vocab_size), k=40), max_new_tokens=100, stop_ids=(), priority=i % 2)
        for i in range(6)
    ]
    serve(engine, model, requests)
    assert engine.stats().queue.preemptions > before
    assert_nothing_leaked(engine)


def test_a_warm_prompt_is_answered_as_a_cold_one(engine: Engine, model: GptOss):
    """Three times, and once more with what was answered in the prompt, as a conversation goes on."""
    prompt = random.Random(4).choices(range(CONFIG.vocab_size), k=100)
    first = Request(prompt=prompt, max_new_tokens=20, stop_ids=())
    before = engine.stats().queue.cached_tokens
    (cold,) = engine.submit(first).result()
    assert engine.stats().queue.cached_tokens == before
    for _ in range(2):
        (warm,) = engine.submit(first).result()
        assert warm.ids == cold.ids
    assert engine.stats().queue.cached_tokens - before == 2 * 96
    check(model, first, [cold])
    second = Request(prompt=[*prompt, *cold.ids, 1, 2, 3], max_new_tokens=20, stop_ids=())
    check(model, second, engine.submit(second).result())
    assert engine.stats().queue.cached_tokens - before == 2 * 96 + 112  # 119 ids were computed, in 14 whole pages


def test_logprobs_are_those_of_a_whole_forward(engine: Engine, model: GptOss):
    prompt = random.Random(5).choices(range(CONFIG.vocab_size), k=30)
    settings = SamplingParams(logprobs=4, temperature=0.8, logit_bias={3: 2.0})
    (answer,) = engine.submit(Request(prompt=prompt, max_new_tokens=8, sampling=settings, stop_ids=())).result()
    logits = np.asarray(model(jnp.array([[*prompt, *answer.ids]])), np.float64)[0, len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, token in zip(expected, answer.tokens, strict=True):
        best = np.argsort(-row)[:4].tolist()
        assert [i for i, _ in token.top] == best
        # float32 logits of a few units, computed in another order
        np.testing.assert_allclose([logprob for _, logprob in token.top], row[best], atol=1e-4)
        np.testing.assert_allclose(token.logprob, row[token.id], atol=1e-4)


def check_prompt_scores(engine: Engine, model: GptOss) -> None:
    """Of prompts of many chunks and of one, beside others that want none."""
    rng = random.Random(6)
    prompts = [rng.choices(range(CONFIG.vocab_size), k=k) for k in (75, 33, 2)]
    asked = [Request(prompt=each, max_new_tokens=0, prompt_logprobs=4 - k) for k, each in enumerate(prompts)]
    company = engine.submit(random_request(rng))
    streams = [engine.submit(each) for each in asked]
    for request, stream in zip(asked, streams, strict=True):
        (answer,) = stream.result()
        logits = np.asarray(model(jnp.array([request.prompt])), np.float64)[0, :-1]
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert answer.prompt_scores is not None
        assert [token.id for token in answer.prompt_scores] == request.prompt[1:]
        for row, token in zip(expected, answer.prompt_scores, strict=True):
            best = np.argsort(-row)[: request.prompt_logprobs].tolist()
            assert [i for i, _ in token.top] == best
            # float32 logits of a few units, computed in another order
            np.testing.assert_allclose([logprob for _, logprob in token.top], row[best], atol=1e-4)
            np.testing.assert_allclose(token.logprob, row[token.id], atol=1e-4)
    company.result()


def test_scores_of_a_prompt_are_those_of_a_whole_forward(engine: Engine, model: GptOss):
    check_prompt_scores(engine, model)


class Multiples:
    """Allows multiples of three, then of two, by turns."""

    def __init__(self):
        self.number = 3

    def mask(self):
        allowed = np.arange(CONFIG.vocab_size) % self.number == 0
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def accept(self, token_id):
        assert token_id % self.number == 0
        self.number = 5 - self.number


def test_constraints_beside_others(engine: Engine, model: GptOss):
    rng = random.Random(6)
    requests = [
        dataclasses.replace(random_request(rng), constraint=Multiples if number % 2 else None) for number in range(12)
    ]
    serve(engine, model, requests)


class FailsAfterAStep:
    """A runner whose third step raises when the device has done it, and so has consumed the pages."""

    def __init__(self, runner: Runner):
        self.runner, self.steps = runner, 0

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def execute(self, step, masks):
        self.steps += 1
        sampled = self.runner.execute(step, masks)
        if self.steps == 3:
            raise RuntimeError("the device is gone")
        return sampled


def test_after_a_step_that_raised_the_others_are_answered(engine: Engine, model: GptOss):
    rng = random.Random(7)
    requests = [dataclasses.replace(random_request(rng), n=1, max_new_tokens=20, stop_ids=()) for _ in range(10)]
    runner = engine._runner
    engine._runner = FailsAfterAStep(runner)
    try:
        answers = [stream.result() for stream in [engine.submit(request) for request in requests]]
    finally:
        engine._runner = runner
    failed = [number for number, (answer,) in enumerate(answers) if answer.finished.reason == "error"]
    assert 1 <= len(failed) <= 4
    for number, (request, found) in enumerate(zip(requests, answers, strict=True)):
        if number not in failed:
            check(model, request, found)
    assert_nothing_leaked(engine)


def test_guesses_change_no_answer(model: GptOss):
    """Half of the requests say again what they said: greedy text of so small a model goes round in circles."""
    limits = dataclasses.replace(LIMITS, programs=(Program(4, 4, 0, 0), Program(4, 4, 2, 16)))
    rng = random.Random(8)
    requests = [dataclasses.replace(random_request(rng), max_new_tokens=40) for _ in range(20)]
    requests[::2] = [dataclasses.replace(each, sampling=SamplingParams(temperature=0)) for each in requests[::2]]
    with open_engine(model, limits) as engine:
        serve(engine, model, requests)
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.proposed_tokens
        assert_nothing_leaked(engine)


@pytest.mark.parametrize("axes", [{"expert": 4, "tensor": 2}])
def test_on_eight_devices(model: GptOss, axes: dict[str, int]):
    mesh = make_mesh(**axes)
    spread = GptOss(CONFIG, dtype=jnp.float32, mesh=mesh, rngs=nnx.Rngs(0))
    weight = parameters(spread)["unembedding.weight"]
    weight[...] = 3 * weight[...]
    rng = random.Random(9)
    with open_engine(spread, LIMITS) as engine:
        serve(engine, model, [random_request(rng) for _ in range(24)], aborted=[3, 11])
        check_prompt_scores(engine, model)
        assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    "impl",
    [
        pytest.param("xla", marks=pytest.mark.slow),
        pytest.param(
            "moe_matmul=cpu-invariant",
            marks=pytest.mark.skipif(not native.available(), reason="kernels for CPUs are not compiled"),
        ),
    ],
)
def test_batch_invariant_logprobs_are_equal_to_the_bit(impl: str):
    """Alone, in company, warm, and as a sequence that gave up its pages."""
    model = make_model(impl)
    settings = EngineSettings(
        max_rows=3, page_size=8, cache_tokens=240, max_context=150, prefill_tokens=16, batch_invariant=True
    )
    rng = random.Random(10)
    request = Request(prompt=[*SHARED, *rng.choices(range(CONFIG.vocab_size), k=10)], max_new_tokens=60, stop_ids=())
    others = [
        Request(
            prompt=[*SHARED, *rng.choices(range(CONFIG.vocab_size), k=20)], max_new_tokens=60, stop_ids=(), priority=1
        )
        for _ in range(4)
    ]
    with Engine(model, settings=settings) as engine:
        (alone,) = engine.submit(request).result()
        streams = [engine.submit(each) for each in (*others[:2], request, *others[2:])]
        (company,) = [stream.result() for stream in streams][2]
        assert engine.stats().queue.preemptions > 0
        assert company.tokens == alone.tokens  # logprobs are compared bit for bit
        check(model, request, [alone])
        assert_nothing_leaked(engine)


@pytest.mark.skipif(not native.available(), reason="kernels for CPUs are not compiled")
def test_kernels_that_sum_by_company_are_no_batch_invariant_engine():
    with pytest.raises(UserError, match=r'load the model with impl="moe_matmul=cpu-invariant"'):
        Engine(make_model("cpu"), settings=EngineSettings(batch_invariant=True))
