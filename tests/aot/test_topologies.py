"""The compilers for devices that are not here take our descriptions of them, and respect what they say."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.aot import Topology, chips, topology_devices

pytestmark = pytest.mark.aot

_COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}


@pytest.mark.parametrize("chip", chips())
@pytest.mark.parametrize("count", [2, 8, 16])
def test_a_sum_over_all_devices_compiles(chip: str, count: int) -> None:
    if count == 2 and chip != "v7x" and Topology(chip, count).platform == "tpu":
        pytest.skip("comes as 1 or 4")
    topology = Topology.parse(f"{chip}-{count}")
    if importlib.util.find_spec(_COMPILERS[topology.platform]) is None:
        pytest.skip(f"needs {_COMPILERS[topology.platform]}")
    devices = topology_devices(str(topology))
    assert len(devices) == count
    sharding = NamedSharding(Mesh(np.array(devices), ("x",)), P("x"))
    rows = jax.ShapeDtypeStruct((count * 128, 256), jnp.bfloat16, sharding=sharding)
    compiled = jax.jit(lambda rows: rows.sum(0)).lower(rows).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 128 * 256 * 2
    assert "all-reduce" in compiled.as_text()
