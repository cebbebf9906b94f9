"""The scripted engine against what `Engine` promises: the same streams, the same ends."""

import asyncio
import time

import numpy as np
import pytest

from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.request import Finished, PromptScores, Request, SamplingParams, Token
from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.errors import UserError
from gptoss_jax.testing import ScriptedEngine


def request(prompt=(1, 2, 3), max_new_tokens=100, **kwargs) -> Request:
    return Request(prompt=prompt, max_new_tokens=max_new_tokens, **({"stop_ids": ()} | kwargs))


def test_it_is_an_engine():
    with ScriptedEngine([], vocab_size=7, max_context=9) as engine:
        assert isinstance(engine, AnyEngine)
        assert (engine.vocab_size, engine.max_context, engine.num_open) == (7, 9, 0)


def test_scripts_are_played_in_order_and_the_requests_remembered():
    with ScriptedEngine([[5, 6, 7], [8, 9]]) as engine:
        first, second = engine.submit(request()), engine.submit(request([4]))
        assert [first.result()[0].ids, second.result()[0].ids] == [[5, 6, 7], [8, 9]]
        assert [list(each.prompt) for each in engine.requests] == [[1, 2, 3], [4]]
        assert engine.num_open == 0
        with pytest.raises(UserError, match="request 3 of an engine with 2 scripts"):
            engine.submit(request())


def test_events_say_what_an_engine_s_say():
    with ScriptedEngine([[5, 16]]) as engine:
        assert list(engine.submit(request(sampling=SamplingParams(logprobs=2)))) == [
            Token(0, 5, -0.75, ((5, -0.75), (6, -1.25))),
            Token(0, 16, -0.125, ((16, -0.125), (17, -0.625))),
            Finished(0, "length"),
        ]


@pytest.mark.parametrize(
    ("settings", "ids", "end"),
    [
        ({"stop_ids": {6}}, [5, 6], Finished(0, "stop")),
        ({"max_new_tokens": 1}, [5], Finished(0, "length")),
        ({"stop": ["gh"]}, [5], Finished(0, "stop", stop=b"gh")),
        ({"stop": ["de"], "max_new_tokens": 2}, [5, 6], Finished(0, "length")),
        ({}, [5, 6, 7], Finished(0, "length")),
    ],
)
def test_it_ends_where_an_engine_would(settings, ids, end):
    with ScriptedEngine([[5, 6, 7]], token_bytes=lambda i: bytes([ord("a") + i])) as engine:
        (answer,) = engine.submit(request(**settings)).result()
        assert (answer.ids, answer.finished) == (ids, end)


class Only:
    """Allows ids below a bound, and counts what it is told."""

    def __init__(self, bound: int):
        self.bound = bound
        self.accepted: list[int] = []

    def mask(self) -> np.ndarray:
        bits = np.arange(64) < self.bound
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id: int, /) -> None:
        self.accepted.append(token_id)


def test_a_constraint_is_asked_and_told():
    constraint = Only(40)
    with ScriptedEngine([[39, 33, 40, 1]], vocab_size=64) as engine:
        (answer,) = engine.submit(request(constraint=lambda: constraint)).result()
    assert (answer.ids, constraint.accepted) == ([39, 33], [39, 33])
    assert answer.finished == Finished(0, "error", "the script says id 40, which the constraint forbids")


def test_continuations_have_their_own_seeds_and_places():
    with ScriptedEngine(lambda asked: [asked.sampling.seed] * 2) as engine:
        answers = engine.submit(request(n=3, sampling=SamplingParams(seed=10))).result()
    assert [(answer.index, answer.ids) for answer in answers] == [(0, [10, 10]), (1, [11, 11]), (2, [12, 12])]


def test_a_prompt_is_scored_before_anything_is_generated():
    with ScriptedEngine([[5]]) as engine:
        events = list(engine.submit(request([8, 9, 10], 0, prompt_logprobs=1)))
    scores = (Token(0, 9, -0.25, ((9, -0.25),)), Token(0, 10, -0.375, ((10, -0.375),)))
    assert events == [PromptScores(0, scores), Finished(0, "length")]


def test_what_prompts_have_in_common_counts_as_cached():
    with ScriptedEngine(lambda _: [5]) as engine:
        cached = []
        for prompt in ([1, 2, 3], [1, 2, 9, 9], [1, 2, 9, 9], [7]):
            (answer,) = engine.submit(request(prompt)).result()
            cached.append(answer.finished.cached_tokens)
    assert cached == [0, 2, 3, 0]


def test_an_abort_ends_it_at_once():
    with ScriptedEngine(lambda _: [1] * 50, seconds_per_token=5) as engine:
        began = time.monotonic()
        stream = engine.submit(request())
        next(stream)  # the first comes without a wait
        stream.abort()
        assert list(stream) == [Finished(0, "abort")]
        assert time.monotonic() - began < 2
        assert engine.num_open == 0


def test_close_ends_what_plays_and_refuses_more():
    engine = ScriptedEngine(lambda _: [1] * 50, seconds_per_token=5)
    stream = engine.submit(request())
    engine.close()
    engine.close()
    assert list(stream)[-1] == Finished(0, "abort")
    with pytest.raises(UserError, match="closed"):
        engine.submit(request())


def test_it_takes_its_time():
    with ScriptedEngine([[1, 2, 3]], seconds_per_token=0.03) as engine:
        began = time.monotonic()
        engine.submit(request()).result()
        assert time.monotonic() - began >= 0.06


def test_no_more_than_may_be_open_are():
    with ScriptedEngine(lambda _: [1] * 50, seconds_per_token=5, max_open=1) as engine:
        with engine.submit(request()) as stream, pytest.raises(QueueFull, match="1 requests are open"):
            engine.submit(request())
        list(stream)
        engine.submit(request()).abort()


def test_no_more_than_may_play_do():
    with ScriptedEngine(lambda _: [1] * 3, seconds_per_token=0.02, max_rows=2) as engine:
        streams = [engine.submit(request()) for _ in range(3)]
        next(streams[0])
        counts = engine.stats().queue
        assert (counts.running, counts.waiting, engine.num_open) == (2, 1, 3)
        assert [stream.result()[0].finished for stream in streams[1:]] == [Finished(0, "length")] * 2


def test_a_loop_reads_many_at_a_time():
    async def read(number: int) -> list[int]:
        (answer,) = await engine.submit(request([number])).result_async()
        return answer.ids

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*map(read, range(50)))

    with ScriptedEngine(lambda asked: [asked.prompt[0]] * 4) as engine:
        assert asyncio.run(read_all()) == [[number] * 4 for number in range(50)]
        assert engine.stats().generated_tokens == 200
        assert engine.stats().queue.running == 0


def test_it_refuses_what_an_engine_refuses():
    with ScriptedEngine([[1]], vocab_size=10, max_context=20) as engine:
        for wrong in (request([10]), request([1], 20), request([]), request(stop=["x"])):
            with pytest.raises(UserError):
                engine.submit(wrong)
        assert engine.requests == []
