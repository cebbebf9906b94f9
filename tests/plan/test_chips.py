"""The numbers of chips agree with each other wherever one chip's stand in two places."""

import importlib.resources
import re

import pytest

from gptoss_jax.aot import Topology, chips
from gptoss_jax.plan.chips import CHIPS

GPUS = [chip for chip in chips() if Topology(chip, 1).platform == "gpu"]


def test_every_chip_that_can_be_compiled_for_has_its_numbers() -> None:
    assert set(CHIPS) == set(chips())


@pytest.mark.parametrize("chip", GPUS)
def test_the_compiler_is_told_the_same(chip: str) -> None:
    target = (importlib.resources.files("gptoss_jax.aot") / "targets" / f"{chip}.txtpb").read_text(encoding="utf-8")
    told = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)$", target, re.MULTILINE)}
    assert told["memory_bandwidth"] == CHIPS[chip].bandwidth
    assert told["device_memory_size"] - CHIPS[chip].memory == 1 << 30  # what CUDA itself takes


@pytest.mark.parametrize("chip", chips())
def test_units_are_right(chip: str) -> None:
    """A byte too many or a factor of 1000 shows as a chip that is far from all others."""
    found = CHIPS[chip]
    assert 15e9 < found.memory < 200e9
    assert 0.5e12 < found.bandwidth < 10e12
    assert 50 < found.flops / found.bandwidth < 1000  # operations per byte, for which chips are balanced
    assert 0.01 < found.links / found.bandwidth < 0.5
