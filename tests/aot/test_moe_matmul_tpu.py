"""The grouped matmul through the TPU's own compiler, at the release's sizes: it fits, and no weights are rewritten."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.aot import topology_devices
from gptoss_jax.kernels.choose import function
from gptoss_jax.kernels.columns import Columns, placed
from gptoss_jax.kernels.moe_matmul import tpu

pytest.importorskip("libtpu")
pytestmark = pytest.mark.aot

CHIPS = ("v5e-4", "v6e-4", "v5p-4", "v7x-2")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's share of a layer's experts, and rows sorted by expert, with the block sizes tuned for the device."""

    name: str
    rows: int
    experts: int
    inputs: int
    outputs: int
    swiglu: bool
    packed: bool = True
    dtype: jax.typing.DTypeLike = jnp.bfloat16

    def compile(self, chip: str, *, weights_placed: bool = True) -> jax.stages.Compiled:
        """Rows and results lie row by row, as between the layers of a model; weights too, unless left to XLA."""
        device = topology_devices(chip)[0]
        sharding = SingleDeviceSharding(device)
        moe_matmul = function("moe_matmul", "moe_matmul", "tpu", device_kind=device.device_kind)

        def array(*shape: int, dtype: jax.typing.DTypeLike, leave: bool = False) -> jax.ShapeDtypeStruct:
            place = sharding if leave else placed(sharding, ndim=len(shape))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        lead = (self.experts, 2) if self.swiglu else (self.experts,)
        if self.packed:
            weight = Columns(
                array(*lead, self.inputs // 2, self.outputs, dtype=jnp.uint8, leave=not weights_placed),
                array(*lead, self.inputs // 32, self.outputs, dtype=jnp.uint8, leave=not weights_placed),
            )
        else:
            weight = array(*lead, self.inputs, self.outputs, dtype=self.dtype)
        x = array(self.rows, self.inputs, dtype=self.dtype)
        bias = array(self.experts, self.outputs, *([2] if self.swiglu else []), dtype=jnp.bfloat16, leave=True)
        group_sizes = array(self.experts, dtype=jnp.int32)

        def run(x, weight, bias, group_sizes):
            return moe_matmul(x, weight, bias, group_sizes, swiglu_limit=7.0 if self.swiglu else None)

        jitted = jax.jit(run, out_shardings=placed(sharding, ndim=2))
        return jitted.lower(x, weight, bias, group_sizes).compile()

    @property
    def weight_bytes(self) -> int:
        values = self.experts * self.inputs * self.outputs * (2 if self.swiglu else 1)
        return values * 17 // 32 if self.packed else values * jnp.dtype(self.dtype).itemsize

    @property
    def one_matrix_bytes(self) -> int:
        """Of one expert, unpacked."""
        return self.inputs * self.outputs * jnp.dtype(self.dtype).itemsize


SHAPES = [
    Shape("20b-prefill", rows=8192, experts=32, inputs=2880, outputs=2880, swiglu=True),
    Shape("120b-decode", rows=4, experts=128, inputs=2880, outputs=2880, swiglu=False),
    Shape("tensor4-down", rows=64, experts=128, inputs=736, outputs=2880, swiglu=False),
    Shape("tensor8-gate-up", rows=64, experts=128, inputs=2880, outputs=384, swiglu=True),
    Shape("tensor16-down", rows=64, experts=8, inputs=192, outputs=2880, swiglu=False),
    Shape("plain", rows=256, experts=8, inputs=2880, outputs=2880, swiglu=True, packed=False),
]
FLOAT32 = [
    Shape("float32", rows=256, experts=4, inputs=2880, outputs=1440, swiglu=True, dtype=jnp.float32),
    Shape("float32-plain", rows=64, experts=4, inputs=2880, outputs=1440, swiglu=True, packed=False, dtype=jnp.float32),
]


@pytest.mark.parametrize(
    ("chip", "shape"),
    [*((chip, shape) for chip in CHIPS for shape in SHAPES), *(("v5e-4", shape) for shape in FLOAT32)],
    ids=lambda value: getattr(value, "name", value),
)
def test_weights_stay_as_they_are_in_memory(chip: str, shape: Shape):
    compiled = shape.compile(chip)
    memory = compiled.memory_analysis()
    # 192 inputs lie on 2 x 128 lanes, 2880 outputs on 23, 736 on 6; 90 rows of scales on 12 x 8 sublanes, 6 on one.
    rows_bytes = shape.rows * -(-shape.inputs // 128) * 128 * jnp.dtype(shape.dtype).itemsize
    others = rows_bytes + shape.experts * shape.outputs * 4
    assert shape.weight_bytes <= memory.argument_size_in_bytes <= 1.1 * (shape.weight_bytes + others)
    assert memory.temp_size_in_bytes < shape.one_matrix_bytes
    assert not made_bytes(compiled)


def test_left_to_itself_the_compiler_rewrites_all_experts():
    """Why columns.placed is there; and the check above does see it."""
    shape = Shape("120b", rows=4, experts=128, inputs=736, outputs=2880, swiglu=False)
    compiled = shape.compile("v5e-4", weights_placed=False)
    assert made_bytes(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes > shape.weight_bytes * 16 // 17


def test_on_a_mesh_each_device_reads_its_own_shard_in_place():
    """The down projection of 120b, 16 experts and 46 of 92 blocks on a device, as the model calls it."""
    mesh = Mesh(np.array(topology_devices("v5e-16")).reshape(8, 2), ("expert", "tensor"))

    def array(*shape: int, dtype: jax.typing.DTypeLike, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed(NamedSharding(mesh, spec), ndim=len(shape)))

    weight_spec, rows, experts = P("expert", "tensor"), P(None, "tensor"), P("expert")
    codes = array(128, 92 * 16, 2880, dtype=jnp.uint8, spec=weight_spec)
    weight = Columns(codes, array(128, 92, 2880, dtype=jnp.uint8, spec=weight_spec))

    def local(x: jax.Array, weight: Columns, bias: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return jax.lax.psum(tpu.moe_matmul(x, weight, bias, group_sizes), ("expert", "tensor"))

    specs = (rows, weight_spec, experts, experts)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    compiled = run.lower(
        array(64, 92 * 32, dtype=jnp.bfloat16, spec=rows),
        weight,
        array(128, 2880, dtype=jnp.bfloat16, spec=experts),
        array(128, dtype=jnp.int32, spec=experts),
    ).compile()
    assert not made_bytes(compiled)
    assert "all-gather" not in compiled.as_text()
    packed = 128 * 92 * 17 * 2880  # 17 bytes a block
    assert compiled.memory_analysis().argument_size_in_bytes < 1.1 * packed / 16


def made_bytes(compiled: jax.stages.Compiled) -> list[str]:
    """Instructions that make an array of bytes, as codes and scales are.

    copy-start and copy-done change no layout: what is small XLA brings to VMEM ahead of the kernel.
    """
    passed_on = r"(?!parameter|bitcast|get-tuple-element|copy-start|copy-done)"
    return re.findall(rf"^.* = u8\[[\d,]*\]\{{[^}} ]*\}} {passed_on}[\w-]+\(.*$", compiled.as_text(), re.MULTILINE)
