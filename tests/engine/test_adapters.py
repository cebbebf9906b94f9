"""An engine with several adapters: `generate`, on a model with one of them alone, says what every answer must be."""

import dataclasses
import importlib
import random
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.pages import content_key, root_key
from gptoss_jax.engine.request import Request, SamplingParams
from gptoss_jax.engine.runner import Runner
from gptoss_jax.engine.score import Text, score
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.engine.staging import StepLayout
from gptoss_jax.engine.stream import Answer
from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import AdapterSpec, with_adapters
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, parameters
from tests.engine.fake import VOCAB, FakeRunner, expected_ids
from tests.engine.random_adapter import random_adapter
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), max_context=200)
ADAPTERS = {
    "all": random_adapter(
        CONFIG,
        AdapterSpec(rank=3, alpha=3, targets=("q", "k", "v", "o", "router", "gate_up", "down")),
        seed=1,
    ),
    "some": random_adapter(CONFIG, AdapterSpec(rank=5, alpha=10, targets=("v", "down"), layers=(1,)), seed=2),
}
LIMITS = Limits(
    max_rows=4,
    page_size=8,
    num_full_pages=30,
    num_sliding_pages=40,
    window=CONFIG.sliding_window,
    max_context=150,
    programs=(Program(4, 4, 2, 16),),
    adapters=tuple(ADAPTERS),
)
PLAIN = dataclasses.replace(LIMITS, adapters=())
GREEDY = SamplingParams(temperature=0)
OF_THREE = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(3), 50.0))  # says again what it said
PROMPT = random.Random(1).choices(range(CONFIG.vocab_size), k=70)  # what all prompts begin with
Models = Mapping[str | None, GptOss]


def make_model() -> GptOss:
    model = GptOss(CONFIG, dtype=jnp.float32, impl="xla", rngs=nnx.Rngs(0))
    weight = parameters(model)["unembedding.weight"]
    weight[...] = 3 * weight[...]  # surer of its next token: greedy text repeats itself, so that guesses are right
    return model


@pytest.fixture(scope="module")
def models() -> Models:
    """The base, and with each adapter alone."""
    base = make_model()
    return {None: base} | {name: with_adapters(base, [adapter]) for name, adapter in ADAPTERS.items()}


@pytest.fixture(scope="module")
def several(models: Models) -> GptOss:
    return with_adapters(models[None], list(ADAPTERS.values()))


@pytest.fixture(scope="module", autouse=True)
def few_programs_of_the_judge() -> Iterator[None]:
    """It feeds prompts id by id, as it feeds what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("gptoss_jax.engine.generate"), "_CHUNK", 1)
        yield


@pytest.fixture(scope="module")
def runner(several: GptOss) -> Runner:
    runner = Runner(several, LIMITS)
    runner.warm_up()
    return runner


@pytest.fixture
def engine(runner: Runner) -> Iterator[Engine]:
    """Each test's cache is cold."""
    settings = {"vocab_size": CONFIG.vocab_size, "draft_tokens": 3}
    with Engine.on(runner, limits=LIMITS, **settings) as engine:
        yield engine
        engine._scheduler.check()


def check(models: Models, request: Request, answers: Sequence[Answer]) -> None:
    for answer in answers:
        sampling = request.sampling.of_continuation(answer.index)
        settings = {"max_new_tokens": request.max_new_tokens, "sampling": sampling, "stop_ids": request.stop_ids}
        assert answer.ids == list(generate(models[request.adapter], request.prompt, **settings))


def random_request(rng: random.Random) -> Request:
    own = rng.choices(range(CONFIG.vocab_size), k=rng.randint(9, 30))
    return Request(
        prompt=[*PROMPT[: rng.choice([0, 30, 70])], *own],
        max_new_tokens=rng.randint(20, 50),
        sampling=rng.choice([GREEDY, OF_THREE, SamplingParams(temperature=0.8, seed=rng.randrange(100))]),
        stop_ids=(),
        n=rng.choice([1, 1, 2]),
        priority=rng.choice([0, 0, 3]),
        adapter=rng.choice([None, *ADAPTERS]),
    )


def test_the_adapters_differ(models: Models):
    """Else nothing here could fail."""
    said = [tuple(generate(model, PROMPT, max_new_tokens=8, sampling=GREEDY, stop_ids=())) for model in models.values()]
    assert len(set(said)) == 3


def test_requests_of_all_adapters_beside_each_other(engine: Engine, models: Models):
    """With shared prompts, guesses, several continuations, and pages that are taken away: each as if it were alone."""
    rng = random.Random(2)
    requests = [random_request(rng) for _ in range(16)]
    streams = [engine.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        check(models, request, stream.result())
    stats = engine.stats()
    assert stats.queue.preemptions > 0
    assert stats.queue.cached_tokens > 0
    assert 0 < stats.accepted_tokens < stats.proposed_tokens


def test_no_adapter_finds_another_ones_prompt_in_the_cache(engine: Engine, models: Models):
    for expected in (0, 64):  # cold, then warm: of 70 ids 8 whole pages
        for name in models:
            request = Request(prompt=PROMPT, max_new_tokens=8, sampling=GREEDY, stop_ids=(), adapter=name)
            answers = engine.submit(request).result()
            check(models, request, answers)
            assert answers[0].finished.cached_tokens == expected


def test_scores_of_a_prompt_are_the_adapters(engine: Engine, models: Models):
    company = engine.submit(Request(prompt=PROMPT, max_new_tokens=0, prompt_logprobs=0))
    request = Request(prompt=PROMPT, max_new_tokens=0, prompt_logprobs=0, adapter="all")
    (answer,) = engine.submit(request).result()
    (expected,) = score(models["all"], [Text(tokens=PROMPT)])
    assert answer.prompt_scores is not None
    # float32 logits of a few units, computed in another order
    np.testing.assert_allclose([token.logprob for token in answer.prompt_scores], expected.logprobs, atol=1e-4)
    company.result()


def test_an_unknown_adapter_is_refused_by_name(engine: Engine):
    assert engine.adapters == ("all", "some")
    with pytest.raises(UserError, match=r"there is no adapter 'other'; the engine has 'all', 'some'"):
        engine.submit(Request(prompt=PROMPT, max_new_tokens=1, adapter="other"))
    with (
        Engine.on(FakeRunner(PLAIN), limits=PLAIN, vocab_size=VOCAB) as plain,
        pytest.raises(UserError, match=r"there is no adapter 'all'; the engine has none"),
    ):
        plain.submit(Request(prompt=[1], max_new_tokens=1, adapter="all"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("all",), "the model has 2 adapters and the engine was told 1 names"),
        ((), "the model has 2 adapters and the engine was told 0 names"),
        (("all", "some", "more"), "the model has 2 adapters and the engine was told 3 names"),
        (("all", "all"), "two adapters are named 'all'"),
    ],
)
def test_names_that_are_not_the_models_are_refused(several: GptOss, names: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        Engine(several, adapters=names)


def test_names_without_adapters_are_refused(models: Models):
    with pytest.raises(UserError, match=r"the model has 0 adapters and the engine was told 1 names"):
        Engine(models[None], adapters=["all"])


@pytest.mark.slow
def test_the_only_adapter_needs_no_name(models: Models):
    """It answers every request, and the steps have no more operands than without it."""
    limits = dataclasses.replace(LIMITS, programs=(Program(4, 1, 2, 16),), adapters=())
    runner = Runner(models["all"], limits)
    runner.warm_up()
    request = Request(prompt=PROMPT, max_new_tokens=8, sampling=GREEDY, stop_ids=())
    with Engine.on(runner, limits=limits, vocab_size=CONFIG.vocab_size) as engine:
        answers = engine.submit(request).result()
    check(models, dataclasses.replace(request, adapter="all"), answers)


def test_hundreds_of_requests_never_see_another_adapters_pages():
    """On a runner without a model, which looks at each page: prompts are alike, the cache is short."""
    limits = Limits(
        max_rows=4,
        page_size=4,
        num_full_pages=30,
        num_sliding_pages=30,
        window=5,
        max_context=90,
        programs=(Program(4, 4, 0, 0), Program(4, 4, 2, 8)),
        adapters=("a", "b"),
    )
    rng = random.Random(3)
    requests = [
        Request(
            prompt=[1] * rng.randint(1, 40),
            max_new_tokens=rng.randint(1, 30),
            sampling=rng.choice([GREEDY, SamplingParams(seed=1)]),
            n=rng.choice([1, 2]),
            adapter=rng.choice([None, "a", "b"]),
        )
        for _ in range(300)
    ]
    with Engine.on(FakeRunner(limits), limits=limits, vocab_size=VOCAB, draft_tokens=3) as engine:
        streams = [engine.submit(request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            assert [answer.ids for answer in stream.result()] == [expected_ids(request, i) for i in range(request.n)]
        stats = engine.stats()
        assert min(stats.queue.preemptions, stats.queue.cached_tokens, stats.accepted_tokens) > 0
        engine._scheduler.check()


def test_pages_are_named_by_adapter():
    roots = {root_key(adapter) for adapter in (-1, 0, 1)}
    assert len({content_key(root, [1, 2]) for root in roots}) == 3


def test_without_names_a_step_has_no_operand_for_them():
    """The words of a step, by hand: three arrays of its tokens' width or the tables', and five of its rows."""
    program, pages = Program(4, 2, 3, 16), 19
    plain = dataclasses.replace(LIMITS, programs=(program,), adapters=())
    words = 4 * (2 * 2 + 5 + 2 * pages) + 3 * (2 * 16 + 5 + 2 * pages) + 1
    layout = StepLayout.of(program, plain)
    assert layout.num_words == words
    assert all(part.adapter is None for part in layout.fields(np.zeros(words, np.int32)))
    named = StepLayout.of(program, LIMITS)
    assert named.num_words == words + 4 + 3
    assert [part.adapter.shape for part in named.fields(np.zeros(words + 7, np.int32))] == [(4,), (3,)]


@pytest.mark.slow
def test_batch_invariant_logprobs_are_equal_to_the_bit(several: GptOss, models: Models):
    """Alone, and beside requests with other adapters."""
    settings = EngineSettings(max_rows=3, page_size=8, cache_tokens=240, prefill_tokens=16, batch_invariant=True)
    rng = random.Random(4)
    requests = [dataclasses.replace(random_request(rng), n=1, adapter=name) for name in [*models] * 2]
    with Engine(several, settings=settings, adapters=tuple(ADAPTERS)) as engine:
        alone = [engine.submit(request).result()[0].tokens for request in requests]
        streams = [engine.submit(request) for request in requests]
        assert [stream.result()[0].tokens for stream in streams] == alone
