"""What a step is said to hold, against what its compiler counts and against sums by hand."""

import argparse
import dataclasses
from typing import Any

import pytest

from gptoss_jax.cli import train_plan
from gptoss_jax.configs import model_config
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.plan import lower, step_memory
from gptoss_jax.train.toml import build
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(1))
LENGTH = 12
FULL = {"kind": "full"}


def config(name: str = "tiny", **sections: dict[str, Any]) -> TrainConfig:
    """The checkpoint need not be there: no plan reads a weight."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"checkpoint": name},
        "method": {"rank": 8},
        "data": {"files": ["a.jsonl"]},
        "loop": {"steps": 10, "rows": 4},
    }
    return build(TrainConfig, {key: defaults.get(key, {}) | sections.get(key, {}) for key in defaults | sections})


def sizes_of_the_release() -> int:
    """By hand, in bfloat16; codes, scales, norms and sinks have sizes of their own."""
    ends = 2 * 201_088 * 2880 * 2 + 2880 * 4
    projections = (4096 + 512 + 512) * (2880 + 1) + 2880 * (4096 + 1)
    packed = 3 * 2880 * 2880 // 32 * 17 + (3 * 2880) * 2
    layer = projections * 2 + 64 * 4 + 32 * (2880 + 1) * 2 + 32 * packed + 2 * 2880 * 4
    return ends + 24 * layer


def options(*, chip: str | None = None, compiles: bool = False) -> argparse.Namespace:
    return argparse.Namespace(chip=chip, compile=compiles)


@pytest.mark.parametrize(
    ("mesh", "method", "optimizer"),
    [
        ({"data": 2, "tensor": 3}, {"targets": ["q", "router", "down"]}, "adamw"),
        pytest.param({"data": 1}, {"layers": [0]}, "lion", marks=pytest.mark.slow),
        pytest.param({"expert": 2}, {"targets": ["q", "router", "down"]}, "muon", marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 3, "fully_sharded": True}, FULL, "adafactor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_lasts_is_what_the_compiled_step_is_given(
    mesh: dict[str, Any], method: dict[str, Any], optimizer: str
) -> None:
    asked = config(
        model={"dtype": "float32"},
        method=method,
        mesh=mesh,
        optimizer={"name": optimizer},
        data={"row_length": LENGTH},
        compute={"loss_chunk": 16},
    )
    experts = "bf16" if method is FULL else "mxfp4"
    shape = dataclasses.asdict(asked.mesh.shape)
    lowered = lower(asked, CONFIG, experts, mesh=make_mesh(**shape))
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    batch = 4 // asked.mesh.data * LENGTH * (4 * 4 + 1)  # four arrays of words, one of booleans
    number_of_the_step = 4
    found = step_memory(asked, CONFIG, experts)
    assert memory.argument_size_in_bytes == found.lasting + batch + number_of_the_step


def test_the_parts_of_the_release() -> None:
    """Rank 8 on q, k, v, o and all experts of 20b, whose width and expert width are 2880."""
    sizes = model_config("gpt-oss-20b")
    found = step_memory(config("gpt-oss-20b", loop={"rows": 1}), sizes, "mxfp4")
    attention = 8 * ((2880 + 4096) + 2 * (2880 + 512) + (4096 + 2880))
    experts = 32 * 8 * ((2880 + 2 * 2880) + (2880 + 2880))
    assert found.masters == 24 * (attention + experts) * 4
    assert found.optimizer == 2 * found.masters + 2 * 4  # and two counters
    assert found.gradients == found.masters
    assert found.inputs == 24 * 2048 * 2880 * 2
    assert sum(found.frozen.values()) == sizes_of_the_release()


def test_more_is_held_where_more_is_asked() -> None:
    sizes = model_config("gpt-oss-20b")

    def total(**sections: dict[str, Any]) -> int:
        return step_memory(config("gpt-oss-20b", **sections), sizes, "mxfp4").total

    remat = [total(compute={"remat": each}) for each in ("layer", "dots", "none")]
    assert remat == sorted(set(remat))
    assert total(method={"rank": 32}, loop={"rows": 1, "accumulate": 2}) > total(method={"rank": 32}, loop={"rows": 1})
    assert total(data={"row_length": 4096}) > total()
    assert total(mesh={"expert": 4}) < total() / 2
    table = 201_088 * 2880 * 2
    assert total(model={"checkpoint": "gpt-oss-20b", "embedding": "host"}) == total() - table


def test_one_device_is_enough_or_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    asked = config("gpt-oss-20b", loop={"rows": 1})
    assert train_plan.run(asked, options(chip="rtx4090")) == 0
    assert "RTX 4090 has 24.31 GB: fits, with" in capsys.readouterr().out
    assert train_plan.run(config("gpt-oss-20b", method=FULL), options(chip="h100")) == 1
    assert "does not fit" in capsys.readouterr().out
    assert train_plan.run(asked, options()) == 0
    out = capsys.readouterr().out
    assert "frozen: experts" in out
    assert "of memory" not in out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (options(compiles=True), "--compile needs to know for which devices: name one with --chip, of v5e"),
        (options(chip="h10"), "no devices are named 'h10-1'"),
    ],
)
def test_devices_that_nobody_knows(asked: argparse.Namespace, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_plan.run(config("gpt-oss-20b"), asked)
