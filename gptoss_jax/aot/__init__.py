"""Devices of machines that are not here, to compile for. Knows chips and how they are joined; knows no model.

Programs are lowered and compiled for such devices by the real compilers (libtpu's, or XLA's for CUDA with ptxas), and
tell their memory, collectives and machine code; they cannot be run:

    mesh = Mesh(np.array(topology_devices("v5e-8")).reshape(1, 4, 2), MESH_AXES)
    jax.jit(f).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))).compile()
"""

import dataclasses
import difflib
import importlib.resources
import os
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
from jax.experimental import topologies

from gptoss_jax.errors import Unsupported, UserError

Devices: TypeAlias = list[jax.Device]  # pyright: ignore[reportInvalidTypeForm]  (jax assigns it)

_TARGETS = importlib.resources.files(__name__) / "targets"

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}

# Slices of each TPU generation as libtpu names them. A v7x chip shows as two devices, every other chip as one: v5p-8
# is eight chips here, where Google Cloud, which counts cores, would call it v5p-16.
_TPU_SLICES: Mapping[str, Mapping[int, str]] = {
    "v5e": {count: f"v5e:{layout}" for count, layout in _FLAT.items()},
    "v6e": {count: f"v6e:{layout}" for count, layout in _FLAT.items()},
    "v5p": {count: f"v5p:{layout}" for count, layout in _CUBE.items()},
    "v7x": {2 * count: f"tpu7x:{layout}" for count, layout in _CUBE.items()},
}

_QUIET: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",  # else minutes of retries where there is no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # some type: else it complains that there is none
    "TPU_WORKER_HOSTNAMES": "localhost",  # likewise
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process that compiles is refused
    "TPU_LOG_DIR": "disabled",
}
_GPUS_PER_HOST = 8
_INSTALL = {
    "tpu": 'pip install "gptoss-jax[tpu]" (libtpu; no TPU is needed)',
    "gpu": 'pip install "gptoss-jax[cuda]" (the CUDA plugin, ptxas and libdevice; no GPU is needed)',
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind, as in "v5e-8"; a device is what jax shows as one."""

    chip: str
    count: int

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Reads CHIP-COUNT, as in "h100-8".

        Raises:
            UserError: no such chip, or it does not come in that number.
        """
        chip, _, count = name.rpartition("-")
        if chip not in chips():
            close = difflib.get_close_matches(chip or name, chips(), n=1)
            hint = f"did you mean {close[0]}-8? " if close else ""
            known = ", ".join(chips())
            raise UserError(f"no devices are named {name!r}: {hint}expected CHIP-COUNT, as in v5e-8, with CHIP {known}")
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"{name!r} asks for {count!r} devices; expected a positive number, as in {chip}-8")
        return cls(chip, int(count))._checked()

    @property
    def platform(self) -> Literal["tpu", "gpu"]:
        return "tpu" if self.chip in _TPU_SLICES else "gpu"

    def __str__(self) -> str:
        return f"{self.chip}-{self.count}"

    def _checked(self) -> "Topology":
        if self.platform == "tpu":
            known = _TPU_SLICES[self.chip]
            if self.count not in known:
                raise UserError(f"{self.chip} does not come in {self.count} devices; expected {_either(known)}")
        elif self.count > _GPUS_PER_HOST and self.count % _GPUS_PER_HOST:
            raise UserError(
                f"{self.count} GPUs are no whole number of hosts with {_GPUS_PER_HOST}: "
                f"expected 1 to {_GPUS_PER_HOST}, or a multiple of {_GPUS_PER_HOST}"
            )
        return self


def chips() -> tuple[str, ...]:
    """The kinds of devices that have a name: TPUs first."""
    files = (entry.name for entry in _TARGETS.iterdir())
    return *_TPU_SLICES, *sorted(name.removesuffix(".txtpb") for name in files if name.endswith(".txtpb"))


def topology_devices(name: str) -> Devices:
    """Devices to build a mesh of, in the compiler's order: neighbours on TPU, host by host on GPU.

    Where this machine has no accelerator, jax must have been told so before (jax_platforms=cpu), or it looks for one.

    Raises:
        UserError: nothing has that name; the message lists what has.
        Unsupported: the compiler is not installed; the message says how to.
    """
    topology = Topology.parse(name)
    return _tpus(topology) if topology.platform == "tpu" else _gpus(topology)


def quiet_libtpu() -> None:
    """Keeps libtpu from asking the cloud where it runs, from locking, and from writing to stderr and temporary files.

    Only environment variables tell it so, and only before it is loaded: for main programs that compile and run nothing
    on a TPU, never for libraries. What is set already stays.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _tpus(topology: Topology) -> Devices:
    # By default libtpu takes hosts of 2x2 chips, which do not divide one chip.
    options = {"chips_per_host_bounds": (1, 1, 1)} if _num_chips(topology) == 1 else {}
    layout = _TPU_SLICES[topology.chip][topology.count]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise
        raise Unsupported(f"compiling for {topology} needs libtpu: {_INSTALL['tpu']}") from error


def _num_chips(topology: Topology) -> int:
    return topology.count // 2 if topology.chip == "v7x" else topology.count


def _gpus(topology: Topology) -> Devices:
    hosts, per_host = max(1, topology.count // _GPUS_PER_HOST), min(topology.count, _GPUS_PER_HOST)
    target = (_TARGETS / f"{topology.chip}.txtpb").read_text(encoding="utf-8")
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=str(topology), target_config=target, topology=f"1x{hosts}x{per_host}"
        ).devices
    except NotImplementedError as error:
        raise Unsupported(f"compiling for {topology} needs jax's CUDA plugin: {_INSTALL['gpu']}") from error


def _either(counts: Mapping[int, str]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last}"
