"""Which logical axis lies on which mesh axis: one table, and errors where a cut does not fit. Knows no model."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError

MESH_AXES = ("data", "expert", "tensor")

# Logical axes that are not named here lie whole on every device.
RULES: Mapping[str, str] = {
    "rows": "data",
    "experts": "expert",
    "expert_width": "tensor",
    "expert_width_blocks": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each mesh axis has."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads "data=1,expert=4,tensor=2"; an axis that is not named has size 1.

        Raises:
            UserError: an unknown or repeated axis, or a size that is no positive integer.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            axis, _, size = word.partition("=")
            axis = axis.strip()
            if axis not in MESH_AXES:
                known = ", ".join(MESH_AXES)
                raise UserError(f"mesh {text!r} names axis {axis!r}; expected {known}, as in expert=4,tensor=2")
            if axis in sizes:
                raise UserError(f"mesh {text!r} names axis {axis!r} twice; name it once")
            if not size.strip().isdecimal() or int(size) < 1:
                raise UserError(f"mesh {text!r} gives {axis} the size {size.strip()!r}; expected a positive integer")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def num_devices(self) -> int:
        return self.data * self.expert * self.tensor

    def __str__(self) -> str:
        return f"data={self.data},expert={self.expert},tensor={self.tensor}"


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data * expert * tensor devices.

    Raises:
        UserError: there are fewer devices.
    """
    shape = MeshShape(data, expert, tensor)
    devices = jax.devices()
    if shape.num_devices > len(devices):
        raise UserError(
            f"mesh {shape} needs {shape.num_devices} devices, there are {len(devices)} ({devices[0].platform}): "
            "make an axis smaller, or simulate CPU devices with --host-devices"
        )
    grid = np.array(devices[: shape.num_devices]).reshape(data, expert, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition(axes: tuple[str | None, ...]) -> P:
    """The mesh axis for each logical axis.

    Raises:
        UserError: two axes of one array would lie on the same mesh axis.
    """
    placed = [RULES.get(axis) if axis else None for axis in axes]
    used = [name for name in placed if name]
    for name in used:
        if used.count(name) > 1:
            raise UserError(f"logical axes {axes} lie on mesh axis {name!r} {used.count(name)} times; once is possible")
    return P(*placed)


def place(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """Where the array `name` lies on the mesh.

    Raises:
        UserError: a dimension does not divide by the mesh axis that cuts it.
    """
    spec = partition(axes)
    for size, axis, mesh_axis in zip(shape, axes, spec, strict=True):
        parts = mesh.shape[mesh_axis] if mesh_axis else 1
        if size % parts:
            raise UserError(
                f"{name} has {axis}={size}, which mesh axis {mesh_axis}={parts} does not divide: "
                f"choose {mesh_axis} among {', '.join(map(str, _divisors(size, parts)))}"
            )
    return NamedSharding(mesh, spec)


def row_axis(num_rows: int, mesh: Mesh) -> str | None:
    """The mesh axis for rows; rows that `data` does not divide (one prompt, say) run whole on every data shard."""
    return "data" if num_rows % mesh.shape["data"] == 0 else None


def constrain(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Lays out an activation or a cache as the table says; its first axis is rows. Without a mesh nothing happens."""
    if mesh is None:
        return x
    spec = partition((None, *axes[1:]))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(row_axis(x.shape[0], mesh), *spec[1:])))


def _divisors(size: int, at_most: int) -> list[int]:
    return [n for n in range(1, at_most + 1) if size % n == 0]
