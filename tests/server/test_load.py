"""Many streams at once at a server's process, a third of them cut at random: the others are right, and nothing is left.

How long it takes, and how much memory, is measured by benchmarks/server_load.py.
"""

import asyncio

import pytest

from benchmarks.many_streams import Load, Outcome, settled
from benchmarks.server_load import run_real, run_scripted, running, serving_tiny


async def _run(port: int, load: Load) -> tuple[Outcome, dict[str, float]]:
    return await run_scripted(port, load), await settled(port)


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


@pytest.mark.slow
def test_a_server_of_a_model_says_in_company_what_it_says_alone_and_keeps_nothing():
    loads = [Load(streams=256, tokens=24, cut=1 / 3, within_s=1, seed=seed) for seed in (1, 2)]
    with serving_tiny(rows=64) as (port, pid):
        kept = asyncio.run(run_real(port, pid, loads))
    assert [outcome.wrong for outcome in kept.outcomes] == [0, 0]
    assert all(256 / 2 < outcome.completed < 256 * 4 / 5 for outcome in kept.outcomes)
    assert kept.held_pages == (0, 0)
    _, first, second = kept.rss_bytes
    assert second - first < 8 << 20  # 32 KiB of each stream, allocators being what they are; it has more than 1 GB
