"""Many streams at once at a server's process, a third of them cut at random: the others are right, and nothing is left.

How long it takes is measured by benchmarks/server_load.py.
"""

import asyncio

import pytest

from benchmarks.server_load import Load, Outcome, run_load, running, settled


async def _run(port: int, load: Load) -> tuple[Outcome, dict[str, float]]:
    return await run_load(port, load), await settled(port)


@pytest.mark.parametrize("streams", [32, pytest.param(256, marks=pytest.mark.slow)])
def test_a_third_of_the_streams_is_cut_and_the_others_are_right(streams):
    load = Load(streams=streams, tokens=40, cut=1 / 3, seed=7)
    with running(tokens=load.tokens, step_ms=10, rows=streams * 3 // 4) as (port, told):
        outcome, counts = asyncio.run(_run(port, load))
    assert (outcome.wrong, outcome.completed + outcome.cut) == (0, streams)
    assert streams / 5 < outcome.cut < streams / 2
    assert counts["gptoss_prompt_tokens_total"] == sum(len(f"stream {number}") for number in range(streams))
    # Who left early was noticed: what it did not read was not generated, or was at most a step's.
    assert counts["gptoss_generated_tokens_total"] < load.tokens * streams * 0.95
    assert told["open_streams"] == 0
