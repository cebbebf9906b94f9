"""What an engine of a given size may hold and compiles."""

import pytest

from gptoss_jax.engine.limits import Program
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import UserError
from tests.tiny import TINY


def test_the_programs_are_few_and_hold_every_row():
    assert EngineSettings().programs() == (
        Program(1, 1, 0, 0),
        Program(2, 1, 0, 0),
        Program(4, 1, 0, 0),
        Program(8, 1, 0, 0),
        Program(8, 1, 1, 64),
        Program(8, 1, 1, 128),
        Program(8, 1, 1, 512),
        Program(8, 1, 8, 64),
    )
    assert EngineSettings(max_rows=1, draft_tokens=3, prefill_tokens=16).programs() == (
        Program(1, 4, 0, 0),
        Program(1, 4, 1, 2),
        Program(1, 4, 1, 4),
        Program(1, 4, 1, 16),
    )
    assert EngineSettings(batch_invariant=True).programs() == (Program(8, 1, 0, 0), Program(0, 0, 1, 512))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("prefill_tokens", [1, 7, 8, 512])
def test_any_size_makes_limits(max_rows: int, prefill_tokens: int):
    """Which check themselves."""
    settings = EngineSettings(max_rows=max_rows, prefill_tokens=prefill_tokens)
    limits = settings.limits(TINY)
    programs = limits.programs
    assert len(set(programs)) == len(programs) <= 11
    assert limits.max_context == min(TINY.max_context, 4096 * max_rows)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_rows": 0}, "max_rows is 0; expected at least 1"),
        ({"cache_tokens": 1}, "cache_tokens is 1; expected at least 2"),
        ({"draft_tokens": -1}, "draft_tokens is -1; expected 0"),
        (
            {"cache_tokens": 100, "page_size": 16, "max_context": 200},
            "max_context is 200; the model's is 131072 and the cache has 112 positions: give a smaller max_context",
        ),
    ],
)
def test_mistakes(changes: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        EngineSettings(**changes).limits(TINY)
