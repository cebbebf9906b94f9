"""The names of devices that are not here. That they compile is tested in tests/aot."""

import pytest

from gptoss_jax.aot import Topology, chips, topology_devices
from gptoss_jax.errors import UserError


@pytest.mark.parametrize(("name", "chip", "count"), [("v5e-8", "v5e", 8), ("a100-40gb-4", "a100-40gb", 4)])
def test_a_name_is_a_chip_and_a_count(name: str, chip: str, count: int) -> None:
    assert Topology.parse(name) == Topology(chip, count)
    assert str(Topology.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10-8", "did you mean h100-8"),
        ("v5e", "expected CHIP-COUNT"),
        ("", "expected CHIP-COUNT"),
        ("v5e-7", "expected 1, 4, 8, 16, 32, 64, 128 or 256"),
        ("v7x-1", "expected 2, 8, "),
        ("h100-0", "expected a positive number"),
        ("h100-four", "expected a positive number"),
        ("h100-12", "no whole number of hosts"),
    ],
)
def test_a_wrong_name_says_what_is_right(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology_devices(name)


def test_every_chip_has_a_platform() -> None:
    assert {Topology(chip, 8).platform for chip in chips()} == {"tpu", "gpu"}
