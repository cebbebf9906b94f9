"""The runner on plans made by hand, judged by `generate`: many sequences in a step, drafts, masks, errors, meshes."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.runner import Result, Runner, StepInput
from gptoss_jax.engine.sequence import Piece, Plan
from gptoss_jax.engine.sequence import Sequence as Scheduled
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
MIXED = Program(4, 3, 2, 16)  # 4 rows that decode with up to 2 guesses, beside 2 chunks
LIMITS = Limits(
    max_rows=5,
    page_size=8,
    num_full_pages=57,
    num_sliding_pages=51,
    window=CONFIG.sliding_window,
    max_context=83,
    programs=(MIXED, Program(5, 1, 1, 16)),
)
NEW = 12  # ids that are generated

GREEDY = SamplingParams(temperature=0)
# Prompts between 33 and 64 ids share the programs of `generate`; each sequence asks for something else.
REQUESTS: Sequence[tuple[int, SamplingParams]] = [
    (37, GREEDY),
    (64, SamplingParams(temperature=0, logprobs=3)),
    (50, SamplingParams(temperature=0.8, top_k=30, seed=5)),
    (33, SamplingParams(seed=7, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2)),
    (41, SamplingParams(seed=1, min_p=0.02, logit_bias={3: 5.0, 351: -50.0})),
]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss(CONFIG, dtype=jnp.float32, impl="xla", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def warm(model: GptOss) -> Runner:
    runner = Runner(model, LIMITS)
    runner.warm_up()
    return runner


@pytest.fixture
def runner(warm: Runner) -> Runner:
    """As new, but for what is compiled."""
    warm.reset()
    return warm


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(CONFIG.vocab_size, size=size).tolist() for size, _ in REQUESTS]


@pytest.fixture(scope="module")
def expected(model: GptOss, prompts: list[list[int]]) -> list[list[int]]:
    return [answer(model, prompt, sampling) for prompt, (_, sampling) in zip(prompts, REQUESTS, strict=True)]


def answer(model: GptOss, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=NEW, sampling=sampling, stop_ids=()))


class Hand:
    """Makes plans, and keeps the sequences: pages in shuffled order, and none of the sliding ones behind the window."""

    def __init__(self, runner: Runner, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.runner = runner
        self.full, self.sliding = (
            rng.permutation(number).tolist() for number in (LIMITS.num_full_pages, LIMITS.num_sliding_pages)
        )

    def admit(self, slot: int, ids: Sequence[int], sampling: SamplingParams) -> Scheduled:
        sequence = Scheduled(id=100 + slot, ids=list(ids), max_new_tokens=NEW)
        sequence.slot = slot
        self.runner.admit(sequence, sampling)
        return sequence

    def step(
        self,
        program: Program,
        *,
        decode: Sequence[Scheduled] = (),
        prefill: Sequence[tuple[Scheduled, int]] = (),
        drafts: Mapping[int, Sequence[int]] | None = None,
        allowed: Mapping[int, np.ndarray] | None = None,
    ) -> list[Result]:
        """Ids are appended as they come; of a chunk it is said how many ids it has."""
        guesses = {sequence: tuple((drafts or {}).get(sequence.slot, ())) for sequence in decode}
        plan = Plan(
            tuple(self.piece(each, 1 + len(guesses[each]), guesses[each]) for each in decode),
            tuple(self.piece(each, count) for each, count in prefill),
            program,
        )
        results = self.runner.run(plan, allowed=allowed)
        for piece, result in zip((*plan.decode, *plan.prefill), results, strict=True):
            sequence = piece.sequence
            sequence.ids += result.ids
            sequence.computed = piece.start + piece.count if not result.ids else len(sequence.ids) - 1
        return results

    def piece(self, sequence: Scheduled, count: int, draft: tuple[int, ...] = ()) -> Piece:
        start, size = sequence.computed, LIMITS.page_size
        while len(sequence.full_pages) * size < start + count:
            sequence.full_pages.append(self.full.pop())
            sequence.sliding_pages.append(self.sliding.pop())
        for page in range(LIMITS.first_visible_page(start)):
            sequence.sliding_pages[page] = None
        samples = start + count - len(draft) == len(sequence.ids)
        return Piece(sequence, start, count, samples, draft)


def generated(sequence: Scheduled) -> list[int]:
    return sequence.ids[sequence.num_prompt :]


def all_at_once(hand: Hand, prompts: list[list[int]]) -> list[Scheduled]:
    """Sequences come one after the other, in odd chunks, while those before them decode."""
    running: list[Scheduled] = []
    for slot, (prompt, (_, sampling)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        sequence = hand.admit(slot, prompt, sampling)
        while sequence.computed < len(prompt):
            chunk = min(16, 7 + sequence.computed, len(prompt) - sequence.computed)
            decoding = [each for each in running if len(generated(each)) < NEW]
            hand.step(MIXED, decode=decoding[:4], prefill=[(sequence, chunk)])
        running.append(sequence)
    while decoding := [each for each in running if len(generated(each)) < NEW]:
        hand.step(Program(5, 1, 1, 16), decode=decoding)
    return running


@pytest.mark.slow
def test_many_sequences_at_once_give_what_generate_gives(runner, prompts, expected):
    found = all_at_once(Hand(runner), prompts)
    assert [generated(sequence) for sequence in found] == expected


def test_nothing_is_compiled_after_the_warm_up(runner, prompts):
    compiled = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if "compile" in event:
            compiled.append(event)

    before = runner.num_programs
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        all_at_once(Hand(runner, seed=1), prompts)
        runner.reset()
        assert not compiled
        jax.jit(lambda x: x + 3).lower(1.0).compile()
        assert compiled, "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # The steps, the drawing of constrained places (14 and 6 of them), empty pages, and a slot's counts anew.
    assert runner.num_programs == before == 2 * len(LIMITS.programs) + 2


def test_logprobs_are_those_of_the_logits(model, runner, prompts):
    hand, prompt = Hand(runner), prompts[1]
    first = hand.admit(3, prompt, SamplingParams(temperature=0, logprobs=3))
    second = hand.admit(1, prompts[0], GREEDY)
    for start in range(0, 64, 16):
        *_, result = hand.step(MIXED, prefill=[(first, 16)])
        assert len(result.ids) == (start == 48)
    quiet, told = hand.step(MIXED, prefill=[(second, 5), (first, 1)])
    assert (quiet.ids, quiet.top) == ((), ())
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([first.ids[:65]]))
    scores = np.asarray(jax.nn.log_softmax(logits[0, 64]))
    best = np.argsort(-scores)[:3]
    assert list(told.ids) == [best[0]]
    np.testing.assert_allclose(told.logprobs, scores[best[:1]], atol=1e-4)  # float32 sums in another order
    assert [token_id for token_id, _ in told.top[0]] == best.tolist()
    np.testing.assert_allclose([logprob for _, logprob in told.top[0]], scores[best], atol=1e-4)


@pytest.mark.parametrize("request_number", [0, 2], ids=["greedy", "sampled"])
def test_drafts_change_nothing_but_the_number_of_steps(runner, prompts, expected, request_number):
    """Right guesses, wrong ones, right ones before wrong ones, none; beside a row that has none."""
    hand = Hand(runner)
    sampling, truth = REQUESTS[request_number][1], expected[request_number]
    sequence, other = hand.admit(4, prompts[request_number], sampling), hand.admit(0, prompts[1], REQUESTS[1][1])
    for each in (sequence, other):
        while each.computed < each.num_prompt:
            hand.step(MIXED, prefill=[(each, min(16, each.num_prompt - each.computed))])

    def wrong(token_id: int) -> int:
        return (token_id + 1) % CONFIG.vocab_size

    accepted = []
    for right in (2, 0, 1, 2, 0):
        at = len(generated(sequence))
        guesses = [id_ if i < right else wrong(id_) for i, id_ in enumerate(truth[at : at + 2])]
        result, _ = hand.step(MIXED, decode=[sequence, other], drafts={4: guesses})
        accepted.append(len(result.ids) - 1)
        assert len(result.ids) == len(result.logprobs) == len(result.top)
    assert accepted == [2, 0, 1, 2, 0]
    assert generated(sequence) == truth[: len(generated(sequence))]
    assert generated(other) == expected[1][:6]


def test_only_allowed_ids_come(runner, prompts, expected):
    hand = Hand(runner)
    sequence, other = hand.admit(2, prompts[0], GREEDY), hand.admit(3, prompts[1], GREEDY)
    for each in (sequence, other):
        while each.computed < each.num_prompt:
            hand.step(MIXED, prefill=[(each, min(16, each.num_prompt - each.computed))])
    mask = np.zeros(-(-CONFIG.vocab_size // 32), np.uint32)
    mask[4] = 1 << 17 | 1 << 30
    for _ in range(3):
        hand.step(MIXED, decode=[other, sequence], allowed={2: mask})
    assert set(generated(sequence)[1:]) <= {4 * 32 + 17, 4 * 32 + 30}
    assert generated(other) == expected[1][:4]


def test_a_slot_forgets_who_was_there_before(runner, prompts, expected):
    """Settings, counts and pages: the next sequence is as if it were alone."""
    hand = Hand(runner)
    for number in (3, 0, 3):
        sequence = hand.admit(1, prompts[number], REQUESTS[number][1])
        while len(generated(sequence)) < 4:
            left = sequence.num_prompt - sequence.computed
            if left > 0:
                hand.step(MIXED, prefill=[(sequence, min(16, left))])
            else:
                hand.step(MIXED, decode=[sequence])
        assert generated(sequence) == expected[number][:4], number
        runner.retire(1)


def test_a_preempted_sequence_is_computed_again_with_what_it_had_said(runner, prompts, expected):
    """Its generated ids count for penalties as before."""
    hand, number = Hand(runner), 3
    again = hand.admit(0, [*prompts[number], *expected[number][:5]], REQUESTS[number][1])
    again.num_prompt = len(prompts[number])
    while again.computed < len(again.ids) and len(generated(again)) == 5:
        hand.step(MIXED, prefill=[(again, min(16, len(again.ids) - again.computed))])
    while len(generated(again)) < NEW:
        hand.step(MIXED, decode=[again])
    assert generated(again) == expected[number]


def test_a_step_that_raised_leaves_a_runner_that_can_be_reset(runner, prompts, expected):
    hand = Hand(runner)
    sequence = hand.admit(0, prompts[0], GREEDY)
    jax.tree.map(lambda x: x.delete(), runner._state)  # as an error on the device leaves what was donated
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        hand.step(MIXED, prefill=[(sequence, 16)])
    runner.reset()
    assert [generated(each) for each in all_at_once(Hand(runner), prompts)] == expected


def test_scores_that_are_no_numbers_are_told(model, prompts):
    graph, parameters = nnx.split(model)
    broken = nnx.merge(graph, jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, parameters))
    limits = dataclasses.replace(LIMITS, programs=(Program(5, 1, 1, 16),))
    runner = Runner(broken, limits)
    runner.warm_up()
    hand = Hand(runner)
    sequence = hand.admit(0, prompts[0][:9], GREEDY)
    (result,) = hand.step(limits.programs[0], prefill=[(sequence, 9)])
    assert result.is_broken
    assert not result.ids


def test_what_a_step_needs_is_plain_and_may_come_from_another_process(model, runner, prompts, expected):
    """A second runner that only executes what the first one staged gives the same."""
    follower = Runner(model, LIMITS)
    follower._programs = runner._programs  # which has no state, and takes long to compile
    steps: list[StepInput] = []
    execute = runner.execute

    def both(step: StepInput, masks):
        steps.append(step)
        here, there = execute(step, masks), follower.execute(step, masks)
        for field in dataclasses.fields(here):
            np.testing.assert_array_equal(getattr(here, field.name), getattr(there, field.name))
        return here

    runner.execute = both
    try:
        found = all_at_once(Hand(runner), prompts)
    finally:
        del runner.execute
    assert [generated(sequence) for sequence in found] == expected
    assert sum(step.settings is not None for step in steps) <= len(REQUESTS) + 1  # only when somebody came
    assert [history.slot for step in steps for history in step.histories] == [3]  # who penalises


@pytest.mark.parametrize(
    ("expert", "tensor"),
    [(2, 2), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)],
    ids=str,
)
def test_on_a_mesh_the_ids_are_the_same(prompts, expected, expert, tensor):
    mesh = make_mesh(expert=expert, tensor=tensor)
    model = GptOss(CONFIG, dtype=jnp.float32, impl="xla", mesh=mesh, rngs=nnx.Rngs(0))
    runner = Runner(model, LIMITS)
    runner.warm_up()
    found = all_at_once(Hand(runner), prompts)
    assert [generated(sequence) for sequence in found] == expected


def test_a_step_copies_no_pages(model):
    """What a step needs beside its arguments is less than one of the four pools, 1.7 MB each."""
    limits = dataclasses.replace(LIMITS, num_full_pages=800, num_sliding_pages=800, programs=(Program(5, 1, 1, 16),))
    runner = Runner(model, limits)
    runner.warm_up()
    memory = runner._programs.memory(limits.programs[0])
    pools = [x.nbytes for x in jax.tree.leaves(runner._state.cache)]
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(runner._state))
    assert memory.temp_size_in_bytes < min(pools)


def test_a_mesh_that_cuts_rows_and_a_strange_dtype_are_refused(model):
    cut = GptOss(CONFIG, mesh=make_mesh(data=2, tensor=2), impl="xla", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"data=2 cuts rows.*run 2 engines"):
        Runner(cut, LIMITS)
    with pytest.raises(UserError, match=r"kv_dtype is float16; expected None .float32, as the model. or int8"):
        Runner(model, LIMITS, kv_dtype="float16")
