"""Estimates against sums by hand, and against what they must do when a job or a chip changes."""

import dataclasses

import pytest

from gptoss_jax.aot import Topology
from gptoss_jax.configs import model_config
from gptoss_jax.errors import UserError
from gptoss_jax.plan.estimate import Estimate, Job, auto_mesh, estimate
from gptoss_jax.sharding import MeshShape

WHOLE = 131072


def job(name: str, devices: str, mesh: str | None = None, **settings) -> Job:
    topology = Topology.parse(devices)
    shape = MeshShape(data=topology.count) if mesh is None else MeshShape.parse(mesh)
    found = Job(config=model_config(name), topology=topology, mesh=shape, **{"context": WHOLE} | settings)
    return dataclasses.replace(found, mesh=auto_mesh(found)[0]) if mesh is None else found


def plan(name: str, devices: str, mesh: str | None = None, **settings) -> Estimate:
    return estimate(job(name, devices, mesh, **settings))


@pytest.mark.parametrize("devices", ["v5e-8", "v6e-8", "h200-1"])
def test_the_large_model_fits_with_its_whole_context(devices: str) -> None:
    assert plan("gpt-oss-120b", devices).fits


# 65 GB of weights and 4.8 GB of cache for each row.
@pytest.mark.parametrize(("devices", "rows", "fits"), [("v5e-4", 1, False), ("h100-1", 1, True), ("h100-1", 4, False)])
def test_the_large_model_fits_where_it_can(devices: str, rows: int, fits: bool) -> None:
    assert plan("gpt-oss-120b", devices, rows=rows).fits is fits


def test_the_longest_context_is_the_longest() -> None:
    found = plan("gpt-oss-20b", "v5e-1")
    assert 0 < found.longest_context < WHOLE
    assert plan("gpt-oss-20b", "v5e-1", context=found.longest_context).fits
    # One token of 12 full layers is 24 kB: a few of them are what rounding may leave.
    assert not plan("gpt-oss-20b", "v5e-1", context=found.longest_context + 4).fits


def test_the_cache_of_a_token_is_that_of_the_full_layers() -> None:
    short, long = (plan("gpt-oss-20b", "h100-1", context=context) for context in (1000, 1001))
    assert long.held.total - short.held.total == 12 * 2 * 8 * 64 * 2


def test_a_decoded_token_of_a_short_context_is_bound_by_its_weights() -> None:
    found = plan("gpt-oss-20b", "h100-1", context=1).decode
    assert found.bound == "memory"
    assert found.tokens_per_second == pytest.approx(3352e9 / 3.708e9, rel=2e-3)  # 3.70 GB, and the router


def test_prefill_computes_what_its_tokens_meet() -> None:
    found = plan("gpt-oss-120b", "h200-1", context=512)
    active = 36 * (4 * 24.88e6 + 26.55e6 + 0.37e6)  # weights of experts, attention and router that a token meets
    scores = 4 * 64 * 64 * 18 * (256 + 128)
    assert found.prefill.flops == pytest.approx(512 * (2 * active + scores) + 2 * 0.579e9, rel=0.01)


def test_one_device_sends_nothing() -> None:
    assert plan("gpt-oss-20b", "h100-1").decode.sends == ()


def test_a_sum_over_eight_devices_sends_seven_quarters_of_it() -> None:
    found = plan("gpt-oss-120b", "h100-8", "tensor=8").decode  # of float32, but for the embedding
    assert {each.count for each in found.sends} == {1, 36}
    assert sum(each.nbytes for each in found.sends) == pytest.approx(1.75 * 2880 * (2 + 36 * 4 + 36 * 4))


def test_only_a_tpu_has_tiles() -> None:
    found = plan("gpt-oss-20b", "v5e-8", "tensor=8")
    # By hand, for 384 of the expert width: 90 rows of scales to 96, 12 to 16, and 2880 lanes to 2944.
    gate_up, down = 2 * 6 * 384, 192 * 64 + 16 * 2944 - 12 * 2880
    assert found.tiles == 24 * 32 * (gate_up + down) + 25136 * 64 * 2
    assert plan("gpt-oss-20b", "h100-8", "tensor=8").tiles == 0


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_every_number_can_be_written_as_json(experts: str) -> None:
    found = plan("gpt-oss-20b", "h100-8", experts=experts).to_json()
    sizes = found["bytes_per_device"]
    assert sum(sizes["weights"].values()) + sizes["full_cache"] + sizes["sliding_cache"] < sizes["total"]
    assert sizes["spare"] == sizes["memory"] - sizes["total"]
    assert found["decode"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "tensor=4"}, "has 4 devices, v5e-8 has 8"),
        ({"context": WHOLE + 1}, "the context is 131073"),
        ({"context": 0}, "the context is 0"),
        ({"rows": 0}, "the batch is 0"),
    ],
)
def test_a_wrong_job_says_what_is_right(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        job("gpt-oss-120b", "v5e-8", **{"mesh": "tensor=8"} | settings)
