"""The grouped matmul for NVIDIA's chips: what it computes, in PTX, and at gpt-oss-20b's sizes what it uses and holds.

PTX is what Triton makes; ptxas, which made the program from it, is asked once more how many registers it took.
"""

import dataclasses
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from gptoss_jax.aot import topology_devices
from gptoss_jax.kernels.choose import function
from gptoss_jax.kernels.moe_matmul import gpu
from gptoss_jax.kernels.mxfp4 import MXFP4
from tests import oracle
from tests.aot import ptx

pytestmark = [
    pytest.mark.aot,
]
pytest.importorskip("jax_cuda13_plugin")

EXPERTS, WIDTH, LIMIT = 32, 2880, 7.0
ARCHITECTURES = {"a100": "sm_80", "rtx4090": "sm_89", "h100": "sm_90a", "b200": "sm_100a", "rtx5090": "sm_120a"}


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled kernel: its PTX, what ptxas says of it, and what XLA made around it."""

    ptx: str
    ptxas: str
    shared_bytes: int
    hlo: str
    temporary_bytes: int
    grid: tuple[int, ...]

    @property
    def spilled_bytes(self) -> int:
        return sum(int(number) for number in re.findall(r"(\d+) bytes spill", self.ptxas))

    @property
    def registers(self) -> int:
        return int(re.findall(r"Used (\d+) registers", self.ptxas)[0])

    @property
    def kernels(self) -> list[str]:
        return re.findall(r"= \S+ (fusion|custom-call|copy|convert|while)\(", self.hlo)


def compiled_for(
    chip: str,
    folder: Path,
    *,
    rows: int,
    units: int | None = None,
    outputs: int = WIDTH,
    inputs: int = WIDTH,
    experts: int = EXPERTS,
    dtype="bfloat16",
) -> Program:
    """gate_up of `units`, or down to `outputs`, for so many rows of x."""
    shape_of_outputs, limit = ((outputs,), None) if units is None else ((units, 2), LIMIT)
    [device] = topology_devices(f"{chip}-1")
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    blocks = shape((experts, *shape_of_outputs, inputs // 32, 16), jnp.uint8)
    scales = shape((experts, *shape_of_outputs, inputs // 32), jnp.uint8)
    call = function("moe_matmul", "moe_matmul", "gpu", device_kind=device.device_kind)
    lowered = jax.jit(functools.partial(call, swiglu_limit=limit)).lower(
        shape((rows, inputs), dtype),
        MXFP4(blocks, scales),
        shape((experts, *shape_of_outputs), dtype),
        shape((experts,), jnp.int32),
    )
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    [file] = (file for file in folder.glob("*.ptx") if "moe_matmul" in file.read_text())
    [thunks] = folder.glob("*thunk_sequence.txt")
    grid = re.findall(r"grid_([xyz]) = (\d+)", lowered.as_text())
    return Program(
        ptx=file.read_text(),
        ptxas=assemble(file, ARCHITECTURES[chip]),
        shared_bytes=max(int(number) for number in re.findall(r"shared_memory: (\d+)", thunks.read_text())),
        hlo=compiled.as_text() or "",
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        grid=tuple(int(size) for _, size in sorted(set(grid))),
    )


def assemble(file: Path, architecture: str) -> str:
    [package] = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    command = [Path(package) / "bin" / "ptxas", "-v", "-arch", architecture, file, "-o", file.with_suffix(".cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def planes_of_x(rows: int, inputs: int) -> int:
    return rows * inputs * 2


MANY_EXPERTS = (0, 1, 3) * 12


@pytest.mark.parametrize(
    ("chip", "limit", "group_sizes", "rows", "inputs"),
    [
        ("h100", LIMIT, (0, 4, 1), 6, 384),  # mma.sync; one row belongs to nobody
        ("h100", None, (9, 4, 8), 22, 736),  # tiles of 16 rows, an odd number of blocks
        ("h100", LIMIT, MANY_EXPERTS, 50, 96),
        ("h100", LIMIT, (130, 7, 40), 180, 224),  # wgmma
        ("h100", None, (130, 7, 40), 180, 192),
        ("a100", None, (1, 4, 0), 5, 96),
        ("a100", LIMIT, (130, 7, 40), 180, 224),
        ("b200", LIMIT, (0, 4, 1), 6, 736),  # its form for many rows, tcgen05, is not run here
        ("rtx4090", LIMIT, (40, 7, 70), 117, 192),
        ("rtx5090", None, (40, 7, 70), 117, 224),
    ],
)
def test_ptx_agrees_with_a_loop(
    chip: str, limit: float | None, group_sizes: tuple[int, ...], rows: int, inputs: int, tmp_path: Path
):
    experts, units, rng = len(group_sizes), 41, np.random.default_rng(0)
    outputs = (2 * units,) if limit is None else (units, 2)
    program = compiled_for(
        chip,
        tmp_path,
        rows=rows,
        inputs=inputs,
        experts=experts,
        outputs=2 * units,
        units=None if limit is None else units,
    )
    blocks = rng.integers(256, size=(experts, *outputs, inputs // 32, 16), dtype=np.uint8)
    scales = rng.integers(121, 125, size=blocks.shape[:-1], dtype=np.uint8)
    x = rng.standard_normal((rows, inputs)).astype(ml_dtypes.bfloat16)
    x[sum(group_sizes) :] = np.nan
    bias = rng.standard_normal((experts, *outputs)).astype(ml_dtypes.bfloat16)
    out = np.full((rows, outputs[0]), np.nan, np.float32 if limit is None else ml_dtypes.bfloat16)
    planes = np.array(gpu._in_planes(jnp.asarray(x)))
    arrays = [planes, blocks, scales, bias, np.array(group_sizes, np.int32), out]
    ptx.run(program.ptx, arrays, grid=program.grid[:2], shared_bytes=program.shared_bytes)

    matrices = oracle.mxfp4_decode(blocks, scales).reshape(experts, -1, inputs)
    expected = np.zeros(out.shape)
    for expert, (size, end) in enumerate(zip(group_sizes, np.cumsum(group_sizes), strict=True)):
        sums = x[end - size : end].astype(np.float64) @ matrices[expert].T + bias[expert].reshape(-1).astype(np.float64)
        expected[end - size : end] = sums if limit is None else oracle.swiglu(sums, limit=limit)
    # Float32 sums in another order; those of swiglu, up to (limit + 1) times as steep, are rounded to bfloat16.
    rounded = 0 if limit is None else 2.0**-8
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=1e-5 * inputs**0.5 * (LIMIT + 1), rtol=rounded)


@pytest.mark.parametrize("rows", [4, 32, 256])
@pytest.mark.parametrize("chip", ["h100", "b200", "a100"])
def test_decode_streams_packed_weights_into_the_tensor_cores(chip: str, rows: int, tmp_path: Path):
    program = compiled_for(chip, tmp_path, rows=rows, units=WIDTH)
    assert program.spilled_bytes == 0
    assert program.registers <= 128  # 8 programs of 2 warps on each multiprocessor
    assert program.grid[:2] == (2 * WIDTH // 32, min(EXPERTS + 1, rows) + max(0, rows - EXPERTS - 1) // 16)
    # x's copy in planes is all that is made, by the only other kernel.
    assert program.kernels == ["fusion", "custom-call"]
    assert program.temporary_bytes == planes_of_x(rows, WIDTH)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in program.ptx
    assert "tf32" not in program.ptx
    # Weights are loaded ahead, 16 bytes by each thread.
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", program.ptx)


@pytest.mark.parametrize(
    ("chip", "instruction"), [("h100", "wgmma.mma_async"), ("b200", "tcgen05.mma"), ("a100", "mma.sync")]
)
@pytest.mark.parametrize("units", [WIDTH, None], ids=["gate_up", "down"])
def test_prefill_uses_the_chips_tensor_cores(chip: str, instruction: str, units: int | None, tmp_path: Path):
    program = compiled_for(chip, tmp_path, rows=8192, units=units)
    assert program.spilled_bytes == 0
    assert instruction in program.ptx
    assert program.kernels == ["fusion", "custom-call"]
    assert program.temporary_bytes == planes_of_x(8192, WIDTH)


@pytest.mark.parametrize("chip", ["rtx4090", "rtx5090"])
@pytest.mark.parametrize("rows", [4, 8192])
def test_the_default_blocks_fit_chips_with_little_shared_memory(chip: str, rows: int, tmp_path: Path):
    assert compiled_for(chip, tmp_path, rows=rows, units=WIDTH).spilled_bytes == 0


@pytest.mark.parametrize("inputs", [96, 192, 736])
def test_shards_of_any_number_of_blocks_compile_as_they_are(inputs: int, tmp_path: Path):
    program = compiled_for("h100", tmp_path, rows=4, inputs=inputs)
    assert program.spilled_bytes <= 16  # ptxas puts one register by for one more program on a multiprocessor
    assert program.kernels == ["fusion", "custom-call"]
    assert program.temporary_bytes == planes_of_x(4, inputs)


def test_float32_stays_off_the_tensor_cores_which_would_round_it(tmp_path: Path):
    program = compiled_for("h100", tmp_path, rows=12, dtype="float32")
    assert program.spilled_bytes == 0
    assert "mma" not in program.ptx.replace("moe_matmul", "")
