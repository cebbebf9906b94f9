"""Dispatch compiled for accelerators that are not there: ragged all-to-all, forward and back, and its collectives."""

import functools
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.aot import topology_devices
from gptoss_jax.model.dispatch import Way, mix
from gptoss_jax.sharding import MESH_AXES

pytestmark = pytest.mark.aot

B, T, D, F, E, X = 2, 512, 256, 128, 8, 2
SPECS = (P("expert", "tensor"), P("expert", "tensor"), P("expert", None, "tensor"), P("expert"))
SHAPES = ((E, F, 2, D), (E, F, 2), (E, D, F), (E, D))
COLLECTIVE = r" = \(*(\w+)\[.* ((?:ragged-all|all|reduce-scatter|collective)[a-z-]+?)(?:-start)?(?:\.\d+)?\("


@pytest.fixture(scope="module", params=["v5e-8", "h100-8"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """data=1, expert=4, tensor=2"""
    pytest.importorskip("libtpu" if request.param == "v5e-8" else "jax_cuda13_plugin")
    return Mesh(np.array(topology_devices(request.param)).reshape(1, 4, 2), MESH_AXES)


def operands(mesh: Mesh) -> tuple[Any, ...]:
    def abstract(shape: tuple[int, ...], spec: P, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    experts = tuple(abstract(shape, spec) for shape, spec in zip(SHAPES, SPECS, strict=True))
    return abstract((B, T, D), P()), abstract((B, T, E), P(), jnp.float32), experts


def mixer(mesh: Mesh, way: Way) -> Any:
    settings = {"experts_per_token": X, "limit": 7.0, "impl": "xla"}
    return functools.partial(mix, **settings, mesh=mesh, way=way, expert_specs=SPECS)


@pytest.mark.parametrize("way", get_args(Way))
def test_every_way_compiles_to_its_collectives(mesh: Mesh, way: Way):
    """And sums are of the type that the rule counts: XLA for TPU rounds before them, XLA for GPU after."""
    program = jax.jit(mixer(mesh, way)).lower(*operands(mesh)).compile().as_text()
    found = [(kind, dtype) for dtype, kind in re.findall(COLLECTIVE, program) if not kind.endswith("-done")]
    sums = ("all-reduce", "bf16" if mesh.devices.flat[0].platform == "tpu" else "f32")
    if way == "reduce":
        assert found == [sums]
        return
    travel = ("all-to-all" if way == "exchange" else "ragged-all-to-all", "bf16")
    assert sorted(found) == sorted([("all-gather", "s32"), travel, travel, sums, ("all-gather", "bf16")])


@pytest.mark.parametrize("way", get_args(Way))
def test_every_way_compiles_with_its_gradients(mesh: Mesh, way: Way):
    def total(x: jax.Array, logits: jax.Array, experts: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sum(mixer(mesh, way)(x, logits, experts).astype(jnp.float32) ** 2)

    jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*operands(mesh)).compile()
