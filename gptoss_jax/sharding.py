"""Which logical axis lies on which mesh axis: one table, and how each axis is fitted to its cut. Knows no model.

An axis that its mesh axis does not divide is padded; key/value heads that are fewer than the devices are repeated:

    90 blocks over tensor=4       23 | 23 | 23 | 21 + 2 of padding
    8 kv heads over tensor=16     0 | 0 | 1 | 1 | 2 | 2 | … | 7 | 7
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError

MESH_AXES = ("data", "expert", "tensor")

Axes: TypeAlias = tuple[str | None, ...]  # the logical axis of each dimension; None lies whole on every device
AnyMesh: TypeAlias = Mesh | AbstractMesh  # of devices, or of their number only: enough to say what lies where

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


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """A mesh of so many devices, none of which has to be there."""
    # Newer versions of jax call axes that nobody names a type for explicit: then each array says where it lies.
    return AbstractMesh((shape.data, shape.expert, shape.tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition(axes: Axes) -> P:
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


@dataclasses.dataclass(frozen=True)
class Fit:
    """How one logical axis is fitted: each of `size` entries `repeat` times in a row, then padding up to `fitted`."""

    size: int
    fitted: int
    repeat: int = 1

    @classmethod
    def padded(cls, size: int, parts: int) -> "Fit":
        """As few entries more as make `parts` divide them."""
        return cls(size, -(-size // parts) * parts)

    @property
    def changes(self) -> bool:
        return self.fitted != self.size

    def stored(self, cut: slice) -> tuple[slice, np.ndarray, int]:
        """Where a cut of the fitted axis comes from: (the stored entries, which of them in order, padding behind)."""
        start, stop, _ = cut.indices(self.fitted)
        entries = np.arange(start, min(stop, self.size * self.repeat)) // self.repeat
        first = int(entries[0]) if entries.size else 0
        last = int(entries[-1]) + 1 if entries.size else 0
        return slice(first, last), entries - first, stop - start - entries.size


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's arrays lie: its mesh, and the fit of each logical axis that has one. Padding is zeros.

    Attributes:
        mesh: None is one device.
        fits: by logical axis; an axis that is not named lies as it is.
    """

    mesh: AnyMesh | None = None
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)

    def fitted(self, axis: str, size: int) -> int:
        """The size of a logical axis as it lies on the mesh."""
        fit = self.fits.get(axis)
        return size if fit is None else fit.fitted

    def axis_fits(self, shape: tuple[int, ...], axes: Axes) -> tuple[Fit, ...]:
        """The fit of each dimension of an array of the released shape."""
        return tuple(self._fit(size, axis) for size, axis in zip(shape, axes, strict=True))

    def fit(self, array: jax.Array, axes: Axes) -> jax.Array:
        """Repeats and pads an array of the released shape."""
        for dimension, fit in enumerate(self.axis_fits(array.shape, axes)):
            if fit.changes:
                array = jnp.repeat(array, fit.repeat, axis=dimension)
                width = [(0, fit.fitted - array.shape[dimension] if d == dimension else 0) for d in range(array.ndim)]
                array = jnp.pad(array, width)
        return array

    def lay(self, array: jax.Array, axes: Axes) -> jax.Array:
        """Lays an array of the fitted shape on the mesh; also where jax is tracing."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, place("a parameter", array.shape, axes, self.mesh))

    def sharding(self, name: str, shape: tuple[int, ...], axes: Axes) -> NamedSharding | None:
        """Where the array `name` of the fitted shape lies; None without a mesh."""
        return None if self.mesh is None else place(name, shape, axes, self.mesh)

    def _fit(self, size: int, axis: str | None) -> Fit:
        fit = self.fits.get(axis) if axis else None
        if fit is None:
            return Fit(size, size)
        assert fit.size == size, (axis, fit, size)
        return fit


WHOLE = Placement()


def place(name: str, shape: tuple[int, ...], axes: Axes, mesh: AnyMesh) -> NamedSharding:
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


def row_axis(num_rows: int, mesh: AnyMesh) -> str | None:
    """The mesh axis for rows; rows that `data` does not divide (one prompt, say) run whole on every data shard."""
    return "data" if num_rows % mesh.shape["data"] == 0 else None


def constrain(x: jax.Array, axes: Axes, mesh: AnyMesh | None) -> jax.Array:
    """Lays out an activation or a cache as the table says; its first axis is rows. Without a mesh nothing happens."""
    if mesh is None:
        return x
    spec = partition((None, *axes[1:]))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(row_axis(x.shape[0], mesh), *spec[1:])))


def _divisors(size: int, at_most: int) -> list[int]:
    return [n for n in range(1, at_most + 1) if size % n == 0]
