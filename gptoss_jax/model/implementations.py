"""Which implementation of each op a model runs, and for which kind of device. Knows names; knows no arrays."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.choose import choose
from gptoss_jax.sharding import AnyMesh

OPS = ("attention", "moe_matmul")


@dataclasses.dataclass(frozen=True)
class Implementations:
    """The names, resolved: what runs is what they say."""

    attention: str = "xla"
    moe_matmul: str = "xla"

    @classmethod
    def parse(cls, text: str | None, *, platform: str) -> "Implementations":
        """Reads "gpu", which names all ops at once, or "moe_matmul=gpu,attention=xla"; None is the platform's best.

        Raises:
            UserError: an unknown op, or an unknown implementation.
            Unsupported: a named implementation that does not run on the platform.
        """
        named: dict[str, str | None] = dict.fromkeys(OPS)
        for word in (text or "").split(","):
            op, equals, name = (part.strip() for part in word.partition("="))
            if not op:
                continue
            if not equals:
                named.update(dict.fromkeys(OPS, op))
            elif op in OPS:
                named[op] = name
            else:
                raise UserError(
                    f"implementation {text!r} names op {op!r}; expected {' or '.join(OPS)}, as in moe_matmul=xla"
                )
        return cls(**{op: choose(op, name, platform=platform) for op, name in named.items()})


def platform_of(mesh: AnyMesh | None) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices, or of the first device; "cpu" for a mesh without devices."""
    if isinstance(mesh, AbstractMesh):
        return "cpu"
    name = _first_device(mesh).platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind_of(mesh: AnyMesh | None) -> str | None:
    """The kind of those devices, by which kernels have their block sizes; None for a mesh without devices."""
    return None if isinstance(mesh, AbstractMesh) else _first_device(mesh).device_kind


def _first_device(mesh: Mesh | None) -> Any:  # jax.Device is no type to the checker
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]
