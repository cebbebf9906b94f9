"""The engine on a runner without a model: streams, stops, aborts, errors, many at a time; every answer is known."""

import asyncio
import dataclasses
import random
import threading
import time

import numpy as np
import pytest

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.request import Finished, PromptScores, Request, SamplingParams, Token
from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.errors import UserError
from tests.engine.fake import BROKEN, VOCAB, FakeRunner, expected_ids

LIMITS = Limits(
    max_rows=4,
    page_size=4,
    num_full_pages=60,
    num_sliding_pages=40,
    window=5,
    max_context=90,
    programs=(Program(1, 1, 0, 0), Program(4, 1, 0, 0), Program(4, 1, 2, 8), Program(0, 0, 1, 8)),
    max_queue=200,
)
DRAFTING = dataclasses.replace(LIMITS, programs=(Program(4, 4, 0, 0), Program(4, 4, 2, 8)))
GREEDY = SamplingParams(temperature=0)


def token_bytes(token_id: int) -> bytes:
    """One to three letters."""
    return bytes(ord("a") + (token_id * step) % 5 for step in range(1, 2 + token_id % 3))


def open_engine(limits: Limits = LIMITS, *, before_run=lambda plan: None, **kwargs) -> Engine:
    runner = FakeRunner(limits, before_run)
    draft_tokens = max(program.decode_width for program in limits.programs) - 1
    return Engine.on(
        runner, limits=limits, vocab_size=VOCAB, draft_tokens=draft_tokens, token_bytes=token_bytes, **kwargs
    )


@pytest.fixture
def engine():
    with open_engine() as engine:
        yield engine
        assert_nothing_leaked(engine)


def assert_nothing_leaked(engine: Engine) -> None:
    engine._scheduler.check()
    counts = engine.stats().queue
    assert (counts.running, counts.waiting, counts.held_full_pages, counts.held_sliding_pages) == (0, 0, 0, 0)
    assert not engine._entries
    assert not engine._runner.slots


def request(prompt=(1, 2, 3), max_new_tokens=9, **kwargs) -> Request:
    return Request(prompt=prompt, max_new_tokens=max_new_tokens, **({"stop_ids": ()} | kwargs))


class Gate:
    """Holds the engine in front of each step until it is told to go on."""

    def __init__(self):
        self.steps = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def __call__(self, plan):
        self.reached.release()
        self.steps.acquire()

    def open(self):
        self.steps.release(1_000_000)


# One request


def test_events_come_in_order_and_end_with_finished(engine: Engine):
    asked = request()
    events = list(engine.submit(asked))
    assert events[-1] == Finished(0, "length")
    assert events[:-1] == [Token(0, i, -float(i), ((i, -float(i)),)) for i in expected_ids(asked)]


def test_a_stop_id_is_the_last(engine: Engine):
    ids = expected_ids(request())
    (answer,) = engine.submit(request(stop_ids={ids[4]})).result()
    assert answer.ids == ids[: ids.index(ids[4]) + 1]
    assert answer.finished == Finished(0, "stop")


def test_a_prompt_may_be_scored_and_nothing_generated(engine: Engine):
    prompt = [number % VOCAB for number in range(30)]
    for max_new_tokens in (0, 2):
        asked = request(prompt, max_new_tokens, prompt_logprobs=0)
        events = list(engine.submit(asked))
        assert events[0] == PromptScores(0, tuple(Token(0, i, -float(i)) for i in prompt[1:]))
        assert [event.id for event in events[1:-1]] == expected_ids(asked)
        assert events[-1] == Finished(0, "length")
    (answer,) = engine.submit(request([7], 0, prompt_logprobs=0)).result()
    assert (answer.ids, answer.prompt_scores) == ([], ())
    with pytest.raises(UserError, match="max_new_tokens is 0; expected at least 1"):
        engine.submit(request(prompt, 0))
    with pytest.raises(UserError, match="prompt_logprobs is 21; expected 0 to 20"):
        engine.submit(request(prompt, 0, prompt_logprobs=21))


def test_an_answer_says_how_much_of_its_prompt_was_cached(engine: Engine):
    prompt = [number % VOCAB for number in range(30)]
    cached = [engine.submit(request(prompt, **asked)).result()[0].finished.cached_tokens for asked in ({}, {})]
    assert cached == [0, 28]  # whole pages of 4, and one position is left to compute
    (scored,) = engine.submit(request(prompt, prompt_logprobs=0)).result()
    assert scored.finished.cached_tokens == 0  # what is not computed has no score


def test_async_for_reads_the_same(engine: Engine):
    async def read(asked: Request) -> list[int]:
        return [event.id async for event in engine.submit(asked) if isinstance(event, Token)]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*[read(asked) for asked in requests])

    requests = [request([7, n], 20) for n in range(10)]
    assert asyncio.run(read_all()) == [expected_ids(asked) for asked in requests]


def test_a_stream_may_be_read_by_turns():
    """By a coroutine, a thread and a loop, which one after the other wait for the engine."""
    gate = Gate()
    with open_engine(before_run=gate) as engine:
        asked = request(max_new_tokens=4)
        stream = engine.submit(asked)

        async def read_one() -> Token:
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.01)
            assert not task.done()
            gate.steps.release()
            return await task

        found = [asyncio.run(read_one()).id]
        thread = threading.Thread(target=lambda: found.append(next(stream).id))
        thread.start()
        gate.steps.release()
        thread.join()
        found.append(asyncio.run(read_one()).id)
        gate.open()
        found += [event.id for event in stream if isinstance(event, Token)]
        assert found == expected_ids(asked)
        assert list(stream) == []


def test_a_reader_that_gives_up_does_not_take_an_event_with_it():
    gate = Gate()
    with open_engine(before_run=gate) as engine:
        stream = engine.submit(request(max_new_tokens=1))

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)

        asyncio.run(give_up())
        gate.open()
        assert [answer.ids for answer in stream.result()] == [expected_ids(request(max_new_tokens=1))]


def test_a_coroutine_awaits_the_whole_answer(engine: Engine):
    asked = request(n=2)
    answers = asyncio.run(engine.submit(asked).result_async())
    assert [answer.ids for answer in answers] == [expected_ids(asked, 0), expected_ids(asked, 1)]


# Stop strings


def judge_stop(asked: Request) -> tuple[list[int], Finished]:
    """The answer by a search of the whole text after each token."""
    text, begins = b"", []
    stops = [stop.encode() if isinstance(stop, str) else stop for stop in asked.stop]
    ids = expected_ids(asked)
    for count, token_id in enumerate(ids, start=1):
        if token_id in asked.stop_ids:
            return ids[:count], Finished(0, "stop")
        begins.append(len(text))
        for byte in token_bytes(token_id):
            text += bytes([byte])
            found = max((stop for stop in stops if text.endswith(stop)), key=len, default=None)
            if found is not None:
                begin = len(text) - len(found)
                whole = [begin >= end for end in [*begins[1:], len(text)]]
                kept = whole.index(False)
                return ids[:kept], Finished(0, "stop", stop=found, tail=text[begins[kept] : begin])
    return ids, Finished(0, "length")


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_against_a_search_of_the_whole_text(engine: Engine, seed: int):
    rng = random.Random(seed)
    requests = [
        request(
            [rng.randrange(VOCAB)],
            20,
            stop=["".join(rng.choices("abcde", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))],
            stop_ids=rng.sample(range(VOCAB), 2),
            sampling=SamplingParams(seed=seed),
        )
        for _ in range(10)
    ]
    streams = [engine.submit(asked) for asked in requests]
    for asked, stream in zip(requests, streams, strict=True):
        (answer,) = stream.result()
        assert (answer.ids, answer.finished) == judge_stop(asked)


def test_a_token_is_held_back_only_while_a_stop_string_can_swallow_it():
    gate = Gate()
    asked = request(max_new_tokens=3)
    ids = expected_ids(asked)
    first, second = (token_bytes(i) for i in ids[:2])
    never = bytes([second[0] ^ 1])  # does not go on as the second id does
    with open_engine(before_run=gate) as engine:
        engine.submit(request(max_new_tokens=1))
        gate.reached.acquire()  # its step is held: both of these are there when the next one is planned
        held = engine.submit(request(max_new_tokens=3, stop=[first[-1:] + never]))
        free = engine.submit(request(max_new_tokens=3, stop=[b"\xff"]))
        gate.steps.release(2)
        assert next(free).id == ids[0]
        assert not held._unread
        gate.steps.release()
        assert next(held).id == ids[0]
        gate.open()
        assert [event.id for event in held if isinstance(event, Token)] == ids[1:]


# Many requests


def random_request(rng: random.Random) -> Request:
    """Prompts begin alike, so that they share pages."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][: rng.randrange(13)] + rng.choices(
        range(VOCAB), k=rng.randint(1, 30)
    )
    return request(
        prompt,
        rng.randint(1, 40),
        n=rng.choice([1, 1, 1, 2, 3]),
        priority=rng.choice([0, 0, 0, 1, 5]),
        stop_ids=rng.sample(range(VOCAB), rng.choice([0, 1])),
        sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(5)),
        prompt_logprobs=rng.choice([None, None, None, 0]),
    )


@pytest.mark.parametrize("limits", [LIMITS, DRAFTING, dataclasses.replace(LIMITS, num_full_pages=23)])
def test_random_requests_a_quarter_of_them_aborted(limits: Limits):
    rng = random.Random(5)
    with open_engine(limits) as engine:
        for _ in range(2):
            requests = [random_request(rng) for _ in range(50)]
            streams = [engine.submit(asked) for asked in requests]
            aborted = set(rng.sample(range(50), 12))
            for number in aborted:
                time.sleep(0.0005)
                streams[number].abort()
            for number, (asked, stream) in enumerate(zip(requests, streams, strict=True)):
                check_answers(asked, stream, may_be_cut=number in aborted)
        assert_nothing_leaked(engine)
        stats = engine.stats()
        assert stats.queue.cached_tokens > 0
        assert stats.failed_steps == 0
        assert (stats.queue.preemptions > 0) == (limits.num_full_pages == 23)
        assert (0 < stats.accepted_tokens < stats.proposed_tokens) == (limits is DRAFTING)


def check_prompt_scores(asked: Request, answers) -> None:
    """Each id of the prompt once, however often a preemption began again; only the first continuation tells them."""
    assert all(answer.prompt_scores is None for answer in answers[1:])
    if answers[0].finished.reason != "abort" or answers[0].tokens:
        expected = None if asked.prompt_logprobs is None else tuple(Token(0, i, -float(i)) for i in asked.prompt[1:])
        assert answers[0].prompt_scores == expected


def check_answers(asked: Request, stream, *, may_be_cut: bool) -> None:
    answers = stream.result()
    assert [answer.index for answer in answers] == list(range(asked.n))
    check_prompt_scores(asked, answers)
    for answer in answers:
        expected = expected_ids(asked, answer.index)
        if answer.finished.reason == "abort":
            assert may_be_cut
            assert answer.ids == expected[: len(answer.ids)]
        else:
            assert answer.ids == expected
            stopped = expected[-1] in asked.stop_ids
            assert answer.finished == Finished(answer.index, "stop" if stopped else "length")


def test_many_threads_submit_at_once(engine: Engine):
    failed = []

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            asked = random_request(rng)
            try:
                check_answers(asked, engine.submit(asked), may_be_cut=False)
            except AssertionError as error:
                failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_siblings_compute_their_prompt_once(engine: Engine):
    asked = request(list(range(20)), 5, n=4)
    answers = engine.submit(asked).result()
    assert [answer.ids for answer in answers] == [expected_ids(asked, index) for index in range(4)]
    assert len({tuple(answer.ids) for answer in answers}) == 4
    counts = engine.stats().queue
    assert counts.cached_tokens == 3 * 16  # four whole pages each; the last of the prompt's ids is always computed
    assert counts.prefilled_tokens == 20 + 3 * 4


# Abort and close


def test_abort_frees_the_pages_before_the_next_step():
    gate = Gate()
    with open_engine(before_run=gate) as engine:
        first, second = engine.submit(request(max_new_tokens=50)), engine.submit(request([9], 30))
        gate.steps.release(3)
        for _ in range(4):
            gate.reached.acquire()
        held = engine.stats().queue.held_full_pages
        first.abort()
        gate.steps.release()
        gate.reached.acquire()  # the next step stands ready
        assert engine.stats().queue.held_full_pages < held
        assert engine.stats().queue.running == 1
        gate.open()
        (answer,) = first.result()
        assert answer.finished.reason == "abort"
        assert answer.ids == expected_ids(request(max_new_tokens=50))[: len(answer.ids)]
        check_answers(request([9], 30), second, may_be_cut=False)


def test_what_waits_can_be_aborted_and_so_can_what_has_ended(engine: Engine):
    stream = engine.submit(request())
    stream.result()
    stream.abort()
    waiting = [engine.submit(request([n], 60)) for n in range(20)]
    waiting[-1].abort()
    assert waiting[-1].result()[0].finished.reason == "abort"
    for stream in waiting:
        stream.abort()
    for stream in waiting[:-1]:
        stream.result()


def test_leaving_the_block_of_a_stream_aborts_it(engine: Engine):
    with engine.submit(request(max_new_tokens=80)) as stream:
        next(stream)
    assert stream.result()[0].finished.reason in ("abort", "length")


def test_close_ends_what_runs_and_waits_and_leaves_no_thread():
    gate = Gate()
    engine = open_engine(before_run=gate)
    streams = [engine.submit(request([n], 50)) for n in range(10)]
    gate.reached.acquire()
    gate.open()
    engine.close()
    engine.close()
    assert not engine._thread.is_alive()
    assert {stream.result()[0].finished.reason for stream in streams} <= {"abort", "length"}
    assert streams[-1].result() == []  # it was read
    with pytest.raises(UserError, match="the engine is closed; requests go to an engine that is open"):
        engine.submit(request())
    assert_nothing_leaked(engine)


# Limits and mistakes


def test_a_full_queue_refuses_all_continuations_or_none():
    gate = Gate()
    with open_engine(dataclasses.replace(LIMITS, max_queue=3), before_run=gate) as engine:
        running = engine.submit(request([1], 5))
        gate.reached.acquire()
        waiting = engine.submit(request([1, 2], 5, n=2))
        with pytest.raises(QueueFull, match="2 requests wait and 2 more came; the queue takes 3: try again later"):
            engine.submit(request([1, 2, 3], 5, n=2))
        last = engine.submit(request([3], 5))
        gate.open()
        assert [len(stream.result()) for stream in (running, waiting, last)] == [1, 2, 1]
        assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": []}, "the prompt has 0 ids"),
        ({"prompt": [50]}, "the prompt holds id 50; expected 0 to 49"),
        ({"max_new_tokens": 88}, "3 prompt ids and 88 new ones are 91; .* context is 90"),
        ({"sampling": SamplingParams(top_p=0)}, "top_p is 0"),
        ({"stop": [""]}, "stop holds an empty text"),
    ],
)
def test_mistakes_are_told_at_submit(engine: Engine, changes: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        engine.submit(request(**changes))


def test_stop_strings_need_bytes():
    with (
        Engine.on(FakeRunner(LIMITS), limits=LIMITS, vocab_size=VOCAB) as engine,
        pytest.raises(UserError, match="stop strings need the bytes of ids"),
    ):
        engine.submit(request(stop=["a"]))


class FailsOnce:
    """Raises in the step of the plan that holds these ids as a prompt, or whatever else a test thinks of."""

    def __init__(self, *, in_run: int):
        self.in_run, self.runs, self.failed = in_run, 0, set()

    def __call__(self, plan):
        self.runs += 1
        if self.runs == self.in_run:
            self.failed = {piece.sequence.id for piece in (*plan.decode, *plan.prefill)}
            raise RuntimeError("out of paper")


@pytest.mark.parametrize("in_run", [1, 2, 7, 20])
def test_a_step_that_raises_fails_those_in_it_and_no_other(in_run: int):
    before_run = FailsOnce(in_run=in_run)
    with open_engine(before_run=before_run) as engine:
        requests = [request(list(range(n, n + 11)), 12) for n in range(12)]
        streams = [engine.submit(asked) for asked in requests]
        failed = set()
        for number, (asked, stream) in enumerate(zip(requests, streams, strict=True)):
            (answer,) = stream.result()
            if answer.finished.reason == "error":
                assert answer.finished.message == "RuntimeError: out of paper"
                failed.add(number)
            else:
                assert answer.ids == expected_ids(asked)
        assert failed == before_run.failed
        assert 1 <= len(failed) <= 6
        check_answers(request(), engine.submit(request()), may_be_cut=False)
        assert engine.stats().failed_steps == 1
        assert_nothing_leaked(engine)


def test_scores_that_are_no_numbers_end_their_request_and_no_other():
    with open_engine() as engine:
        requests = [request([*(BROKEN if n % 3 == 0 else [n]), *range(10)], 12) for n in range(12)]
        streams = [engine.submit(asked) for asked in requests]
        for number, (asked, stream) in enumerate(zip(requests, streams, strict=True)):
            (answer,) = stream.result()
            if number % 3 == 0:
                assert answer.ids == expected_ids(asked)[:3]
                assert answer.finished == Finished(0, "error", "the model's scores are no numbers")
            else:
                assert answer.ids == expected_ids(asked)
        assert engine.stats().failed_steps == 0
        assert_nothing_leaked(engine)


def test_a_runner_that_cannot_begin_again_closes_the_engine():
    gate, fails = Gate(), FailsOnce(in_run=2)
    engine = open_engine(before_run=lambda plan: (gate(plan), fails(plan)))
    engine._runner.reset = lambda: 1 / 0
    streams = [engine.submit(request([n], 30)) for n in range(9)]
    gate.open()
    assert {stream.result()[0].finished.reason for stream in streams} == {"error"}
    engine._thread.join()
    with pytest.raises(UserError, match=r"the engine has ended by an error \(ZeroDivisionError: division by zero\)"):
        engine.submit(request())
    engine.close()


def test_a_mistake_of_the_scheduler_ends_the_requests_and_not_the_engine():
    with open_engine() as engine:
        engine._scheduler.commit = lambda plan, sampled: 1 / 0
        (answer,) = engine.submit(request()).result()
        assert answer.finished == Finished(0, "error", "ZeroDivisionError: division by zero")
        check_answers(request(), engine.submit(request()), may_be_cut=False)
        assert_nothing_leaked(engine)


# Constraints


class OnlyEven:
    """Allows even ids, after `bad_after` of them something wrong."""

    def __init__(self, bad_after: int = 99, bad=lambda: 1 / 0):
        self.accepted, self.bad_after, self.bad = [], bad_after, bad

    def mask(self):
        if len(self.accepted) == self.bad_after:
            return self.bad()
        return np.array([0x55555555, 0x15555], np.uint32)

    def accept(self, token_id):
        assert token_id % 2 == 0
        self.accepted.append(token_id)


def test_a_constraint_decides_what_may_come():
    for limits in (LIMITS, DRAFTING):
        with open_engine(limits) as engine:
            made = []

            def make(made=made):
                made.append(OnlyEven())
                return made[-1]

            answers = engine.submit(request(n=2, constraint=make, sampling=GREEDY)).result()
            for answer, constraint in zip(answers, made, strict=True):
                assert len(answer.ids) == 9
                assert not any(i % 2 for i in answer.ids)
                assert constraint.accepted == answer.ids[:-1]
            assert engine.stats().proposed_tokens == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: np.zeros(2, np.uint32), "the constraint allows no id at all"),
        (lambda: np.ones(3, np.uint32), r"the constraint's mask is uint32\[3\]; expected uint32\[2\]"),
    ],
)
def test_a_constraint_that_fails_fails_its_continuation_only(engine: Engine, bad, message: str):
    other = engine.submit(request())
    (answer,) = engine.submit(request(constraint=lambda: OnlyEven(4, bad))).result()
    assert len(answer.ids) == 4
    assert answer.finished.reason == "error"
    assert answer.finished.message.startswith(message.replace("\\", ""))
    check_answers(request(), other, may_be_cut=False)


def test_token_bytes_that_fails_fails_its_continuation_only():
    def picky(token_id: int) -> bytes:
        if token_id == ids[3]:
            raise KeyError(token_id)
        return b"."

    ids = expected_ids(request())
    with Engine.on(FakeRunner(LIMITS), limits=LIMITS, vocab_size=VOCAB, token_bytes=picky) as engine:
        other = engine.submit(request())
        (answer,) = engine.submit(request(stop=["x"])).result()
        assert answer.ids == ids[: ids.index(ids[3])]
        assert answer.finished == Finished(0, "error", f"KeyError: {ids[3]}")
        check_answers(request(), other, may_be_cut=False)
