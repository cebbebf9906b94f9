"""One engine on two processes: real processes over loopback, judged by `generate` on one device; and what they say."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.limits import Program
from gptoss_jax.engine.lockstep import read_step, write_step
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.runner import History, StepInput
from gptoss_jax.engine.sampling import RowSettings
from tests.engine.lockstep_model import ADAPTERS, REQUESTS, make_model
from tests.hosts.processes import free_port, run_all

WORKER = Path(__file__).with_name("lockstep_worker.py")


def test_two_processes_answer_as_one_device():
    port = free_port()
    first, second = run_all([(sys.executable, WORKER, port, i) for i in range(2)])
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    told, followed = (json.loads(process.stdout.splitlines()[-1]) for process in (first, second))  # Gloo prints too
    models = {None: make_model()} | {name: make_model(name) for name in ADAPTERS}
    for request, answers in zip(REQUESTS, told["ids"], strict=True):
        for index, ids in enumerate(answers):
            sampling = request.sampling.of_continuation(index)
            expected = generate(
                models[request.adapter],
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                sampling=sampling,
                stop_ids=(),
                constraint=request.constraint,
            )
            assert ids == list(expected)
    assert told["steps"] == followed["steps"] > 20


@pytest.mark.parametrize("is_full", [False, True])
def test_a_step_arrives_as_it_was_sent(is_full: bool):
    step = StepInput(program=Program(4, 2, 1, 16), words=np.arange(50, dtype=np.int32))
    if is_full:
        histories = [History(slot=i, ids=np.arange(3 + i, dtype=np.int32), num_prompt=2) for i in (1, 3)]
        step = StepInput(
            program=step.program,
            words=step.words,
            settings=RowSettings.of([SamplingParams(seed=2**32 - 1), SamplingParams(logit_bias={5: -1.5})]),
            histories=tuple(histories),
            is_masked=True,
        )
    found = read_step(write_step(step))
    assert found.program == step.program
    assert [(h.slot, h.num_prompt) for h in found.histories] == [(h.slot, h.num_prompt) for h in step.histories]
    assert (found.settings is None, found.is_masked) == (not is_full, is_full)

    def arrays(step: StepInput) -> list:
        return [step.words, *(h.ids for h in step.histories), *jax.tree.leaves(step.settings)]

    for own, other in zip(arrays(step), arrays(found), strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_array_equal(own, other)
