"""One engine on several processes: process 0 decides and tells, all execute. Knows steps; knows no requests, no plans.

    process 0                                           every other process
      Engine ─► LockstepRunner                            execute_what_is_told
                  stage(plan) ─► StepInput ─── told ────► StepInput
                  execute ◄════════ collectives ════════► execute

A step is told through the service by which jax's processes know each other, as bytes under a number. A collective would
do, but one that waits for an idle engine's next request runs into its time limit.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public name for its service
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.programs import Drawn, num_places
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.runner import History, Result, Runner, StepInput
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.engine.sequence import Plan
from gptoss_jax.engine.sequence import Sequence as Scheduled
from gptoss_jax.hosts import agree
from gptoss_jax.model.transformer import GptOss

_KEPT = 64  # messages; a process that follows is one step behind at most, since a step takes all of them
_PATIENCE = 10_000  # milliseconds of one question for the next message; then it is asked again
_STEP, _MASKS, _RESET, _CLOSE = b"S", b"M", b"R", b"C"
_SETTINGS = jax.tree.structure(RowSettings.of([SamplingParams()]))

_logger = logging.getLogger(__name__)


def spans_processes(model: GptOss) -> bool:
    """Whether the model lies on devices of more than one process."""
    return isinstance(model.mesh, Mesh) and model.mesh.is_multi_process


class LockstepRunner:
    """Process 0's runner: what it executes, the other processes execute too."""

    def __init__(self, runner: Runner, limits: Limits):
        agree("the engine's settings", repr(limits))
        self._runner = runner
        self._line = _Line()

    @property
    def num_programs(self) -> int:
        return self._runner.num_programs

    def admit(self, sequence: Scheduled, sampling: SamplingParams) -> None:
        self._runner.admit(sequence, sampling)

    def retire(self, slot: int) -> None:
        self._runner.retire(slot)

    def stage(self, plan: Plan, *, is_masked: bool) -> StepInput:
        return self._runner.stage(plan, is_masked=is_masked)

    def masks(self, plan: Plan, allowed: Mapping[int, np.ndarray]) -> np.ndarray:
        return self._runner.masks(plan, allowed)

    def execute(self, step: StepInput, masks: Callable[[], np.ndarray]) -> Drawn:
        def told_masks() -> np.ndarray:
            found = masks()
            self._line.tell(_MASKS + found.tobytes())
            return found

        self._line.tell(_STEP + write_step(step))
        return self._runner.execute(step, told_masks)

    def results(self, plan: Plan, drawn: Drawn) -> Sequence[Result]:
        return self._runner.results(plan, drawn)

    def reset(self) -> None:
        self._line.tell(_RESET)
        self._runner.reset()

    def close(self) -> None:
        """Lets the other processes go."""
        self._line.tell(_CLOSE)


def execute_what_is_told(runner: Runner, limits: Limits) -> None:
    """What every process but 0 does, until the engine of process 0 is closed.

    Raises:
        UserError: process 0 has other limits.
    """
    agree("the engine's settings", repr(limits))
    line = _Line()
    failed: Exception | None = None
    while (message := line.hear()) != _CLOSE:
        if message == _RESET:
            failed = None
            runner.reset()
        elif failed is not None:
            raise failed  # process 0 went on, so this was no mistake of the step
        else:
            try:
                step = read_step(message[len(_STEP) :])
                runner.execute(step, functools.partial(_hear_masks, line, num_places(step.program)))
            except Exception as error:
                _logger.exception("a step failed")
                failed = error


def _hear_masks(line: "_Line", num_places: int) -> np.ndarray:
    message = line.hear()
    if not message.startswith(_MASKS):
        line.unhear()
        raise RuntimeError("process 0 gave the step up before it told the masks")
    return np.frombuffer(message, np.uint32, offset=len(_MASKS)).reshape(num_places, -1)


def write_step(step: StepInput) -> bytes:
    """A line that says which arrays follow, and their bytes."""
    arrays = [step.words, *(history.ids for history in step.histories)]
    if step.settings is not None:
        arrays += [np.asarray(leaf) for leaf in jax.tree.leaves(step.settings)]
    head = {
        "program": [
            step.program.decode_rows,
            step.program.decode_width,
            step.program.prefill_rows,
            step.program.prefill_width,
        ],
        "histories": [[history.slot, history.num_prompt] for history in step.histories],
        "has_settings": step.settings is not None,
        "is_masked": step.is_masked,
        "arrays": [[array.dtype.name, array.shape] for array in arrays],
    }
    return json.dumps(head).encode() + b"\n" + b"".join(array.tobytes() for array in arrays)


def read_step(message: bytes) -> StepInput:
    """What `write_step` wrote."""
    line, _, rest = message.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    arrays, begin = [], 0
    for dtype, shape in head["arrays"]:
        count = math.prod(shape)
        arrays.append(np.frombuffer(rest, dtype, count, begin).reshape(shape))
        begin += arrays[-1].nbytes
    words, *arrays = arrays
    histories = []
    for slot, num_prompt in head["histories"]:
        histories.append(History(slot=slot, ids=arrays.pop(0), num_prompt=num_prompt))
    settings = None
    if head["has_settings"]:
        settings = jax.tree.unflatten(_SETTINGS, arrays)
    return StepInput(
        program=Program(*head["program"]),
        words=words,
        settings=settings,
        histories=tuple(histories),
        is_masked=head["is_masked"],
    )


class _Line:
    """Messages from process 0 to all others, in order."""

    def __init__(self) -> None:
        client = distributed.global_state.client
        assert client is not None, "the processes have not met"
        self._client = client
        self._number = 0
        # Process 0 counts its engines, so that one never hears what was told to another.
        own = client.key_value_increment("gptoss_jax/engines", 1) if jax.process_index() == 0 else 0
        self._name = f"gptoss_jax/engine/{int(multihost_utils.broadcast_one_to_all(np.int32(own)))}"

    def tell(self, message: bytes) -> None:
        self._client.key_value_set_bytes(f"{self._name}/{self._number}", message)
        if self._number >= _KEPT:
            self._client.key_value_delete(f"{self._name}/{self._number - _KEPT}")
        self._number += 1

    def unhear(self) -> None:
        """The last message is for the next who listens."""
        self._number -= 1

    def hear(self) -> bytes:
        while True:
            try:
                message = self._client.blocking_key_value_get_bytes(f"{self._name}/{self._number}", _PATIENCE)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            else:
                self._number += 1
                return message
