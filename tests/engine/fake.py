"""A runner without a model: the next id is a hash of what lies in the pages. So a wrong page is a wrong answer.

What lies there is marked by the adapter that it was computed with, and no other may see it.

A sequence whose prompt begins with BROKEN has no scores behind its third id.
"""

from collections.abc import Sequence

from gptoss_jax.engine.limits import Limits
from gptoss_jax.engine.request import Request, SamplingParams, Token
from gptoss_jax.engine.runner import Result

VOCAB = 50
BROKEN = [49, 48, 49, 48]


def next_id(ids: Sequence[int], sampling: SamplingParams, index: int) -> int:
    """Greedy: of the last two ids, so that text repeats itself. Else of all ids, the seed and the index."""
    if sampling.temperature == 0:
        return hash((ids[-1] % 3, ids[-2] % 3 if len(ids) > 1 else 0)) % VOCAB
    return hash((tuple(ids), sampling.seed, index)) % VOCAB


def expected_ids(request: Request, index: int = 0) -> list[int]:
    """What a request is to be answered, stop strings apart."""
    sampling, ids = request.sampling.of_continuation(index), list(request.prompt)
    while len(ids) < len(request.prompt) + request.max_new_tokens:
        ids.append(next_id(ids, sampling, len(ids) - len(request.prompt)))
        if ids[-1] in request.stop_ids:
            break
    return ids[len(request.prompt) :]


class FakeRunner:
    """Pages are lists of ids. `before_run` may wait, or raise."""

    num_programs = 0

    def __init__(self, limits: Limits, before_run=lambda plan: None):
        self.limits, self.before_run = limits, before_run
        self.reset()

    def reset(self):
        size = self.limits.page_size
        self.full = [[None] * size for _ in range(self.limits.num_full_pages)]
        self.sliding = [[None] * size for _ in range(self.limits.num_sliding_pages)]
        self.slots = {}

    def admit(self, sequence, sampling):
        self.slots[sequence.slot] = sampling

    def retire(self, slot):
        del self.slots[slot]

    def stage(self, plan, *, is_masked):
        return plan, is_masked

    def masks(self, plan, allowed):
        return allowed

    def execute(self, step, masks):
        plan, is_masked = step
        self.before_run(plan)
        assert plan.program in self.limits.programs
        allowed = masks() if is_masked else {}
        return [self._run_piece(piece, allowed) for piece in (*plan.decode, *plan.prefill)]

    def results(self, plan, drawn):
        pieces = (*plan.decode, *plan.prefill)
        return [self._result(piece, ids) for piece, ids in zip(pieces, drawn, strict=True)]

    def _result(self, piece, ids):
        sequence, scores = piece.sequence, None
        if sequence.prompt_logprobs is not None:
            scores = [Token(0, i, -float(i)) for i in piece.scored]
        if ids and sequence.ids[: len(BROKEN)] == BROKEN and len(sequence.ids) - sequence.num_prompt >= 3:
            return Result(is_broken=True)
        return Result(ids, [-float(i) for i in ids], [((i, -float(i)),) for i in ids], scores=scores)

    def _run_piece(self, piece, allowed):
        size, sequence = self.limits.page_size, piece.sequence
        for position, token in enumerate(piece.tokens, start=piece.start):
            held = (sequence.adapter, token)
            self.full[sequence.full_pages[position // size]][position % size] = held
            self.sliding[sequence.sliding_pages[position // size]][position % size] = held
        drawn = []
        for guess in (*piece.draft, None) if piece.samples else ():
            end = len(sequence.ids) + len(drawn)
            drawn.append(self._draw(sequence, end, allowed.get(sequence.slot)))
            if drawn[-1] != guess:
                break
        return drawn

    def _draw(self, sequence, end, mask):
        size = self.limits.page_size
        held = [self.full[sequence.full_pages[p // size]][p % size] for p in range(end)]
        seen = range(max(0, end - self.limits.window), end)
        assert [self.sliding[sequence.sliding_pages[p // size]][p % size] for p in seen] == held[seen.start :]
        adapters, ids = zip(*held, strict=True)
        assert {*adapters} == {sequence.adapter}
        found = next_id(ids, self.slots[sequence.slot], end - sequence.num_prompt)
        if mask is not None:
            allowed_ids = [i for i in range(VOCAB) if mask[i // 32] >> (i % 32) & 1]
            found = min(allowed_ids, key=lambda i: (i < found, i))  # the next one that is allowed
        return found
