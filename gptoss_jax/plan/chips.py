"""What one device of each kind has: memory, bandwidth, compute, links, as published. Knows numbers; measures nothing.

Sources, per chip (a v7x chip shows as two devices, so its row has the halves):

    v5e, v5p, v6e, v7x    Google Cloud's "System architecture" page of each generation: HBM bandwidth, peak bf16, and
                          inter-chip bandwidth, which is given for both directions together. Memory is what libtpu's
                          compiler lets a program use: its message when a program does not fit names it.
    a100 … b200           NVIDIA's data sheets of the SXM modules: bandwidth, dense bf16 (half of the figure with
                          sparsity), NVLink in both directions together. Memory is what the CUDA driver reports.
    rtx4090, rtx5090      NVIDIA's Ada and Blackwell (GB202) whitepapers: bf16 with float32 sums; PCIe 4.0 and 5.0 x16.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_GIB = 1 << 30

# The CUDA context, the libraries' code and NCCL's buffers are no part of a program's memory. An allowance.
_CUDA_OVERHEAD = _GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as jax shows it.

    Attributes:
        name: as people write it.
        memory: bytes that a program can have.
        bandwidth: of the memory, bytes per second.
        flops: bf16 multiplications and additions per second, dense.
        links: bytes per second to other devices, in one direction, all links together.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    links: float


def _tpu(name: str, *, gib: float, bandwidth: float, flops: float, links: float) -> Chip:
    return Chip(name=name, memory=int(gib * _GIB), bandwidth=bandwidth, flops=flops, links=links / 2)


def _gpu(name: str, *, memory: int, bandwidth: float, flops: float, links: float) -> Chip:
    return Chip(name=name, memory=memory - _CUDA_OVERHEAD, bandwidth=bandwidth, flops=flops, links=links / 2)


# By the names of gptoss_jax.aot.chips().
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": _tpu("TPU v5e", gib=15.75, bandwidth=819e9, flops=197e12, links=400e9),
        "v6e": _tpu("TPU v6e", gib=31.25, bandwidth=1638e9, flops=918e12, links=800e9),
        "v5p": _tpu("TPU v5p", gib=95.74, bandwidth=2765e9, flops=459e12, links=1200e9),
        "v7x": _tpu("TPU v7x (half a chip)", gib=94.75, bandwidth=3690e9, flops=1153.5e12, links=600e9),
        "a100": _gpu("A100 80GB", memory=85_100_068_864, bandwidth=2039e9, flops=312e12, links=600e9),
        "a100-40gb": _gpu("A100 40GB", memory=42_405_855_232, bandwidth=1555e9, flops=312e12, links=600e9),
        "h100": _gpu("H100 80GB", memory=84_942_979_072, bandwidth=3352e9, flops=989e12, links=900e9),
        "h200": _gpu("H200 141GB", memory=151_397_597_184, bandwidth=4800e9, flops=989e12, links=900e9),
        "b200": _gpu("B200 180GB", memory=191_514_411_008, bandwidth=7700e9, flops=2250e12, links=1800e9),
        "rtx4090": _gpu("RTX 4090", memory=25_386_352_640, bandwidth=1008e9, flops=165.2e12, links=64e9),
        "rtx5090": _gpu("RTX 5090", memory=33_660_600_320, bandwidth=1792e9, flops=209.5e12, links=128e9),
    }
)
