"""What lies in a folder: config, tensors, bytes, and where a mesh would put them. Reads headers; reads no weights."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import AbstractMesh

from gptoss_jax.convert.manifest import MANIFEST_NAME
from gptoss_jax.convert.names import FileTensor, Layout, Part, View
from gptoss_jax.convert.source import CONFIG_NAME, Source
from gptoss_jax.convert.staging import SUFFIX, Journal, Staging
from gptoss_jax.convert.stored import StoredParameters, unfinished_at
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, released
from gptoss_jax.sharding import MESH_AXES, Axes, MeshShape, Placement, partition

Format = Literal["checkpoint", "hf", "original", "unfinished"]
Kind = Literal["embedding", "attention", "norm", "router", "experts", "unembedding"]

# By a word of the parameter's path; the first that is in it counts.
_KINDS: Mapping[str, Kind] = {
    "embedding": "embedding",
    "attention": "attention",
    "router": "router",
    "moe": "experts",
    "attention_norm": "norm",
    "moe_norm": "norm",
    "norm": "norm",
    "unembedding": "unembedding",
}
_VALUES_PER_BYTE = 2  # of MXFP4 blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as it is stored, or one parameter of a checkpoint.

    Attributes:
        name: in its folder.
        kind: the part of the model that it belongs to.
        dtype: as stored.
        shape: as stored.
        num_values: numbers of the model: two for a byte of MXFP4 blocks, none for scales.
        nbytes: of its values.
        stored_nbytes: of its files, if it has files of its own.
        file: where it is: a safetensors file, or the folder of a parameter.
        chunk: the box that each file of a parameter holds.
        sharding: for each axis the mesh axis that cuts it, if a mesh was given.
        fitted_shape: as `load` makes it for the mesh: some axes are padded, key/value heads may be repeated.
        device_nbytes: of the part of that on one device of the mesh, in the stored dtype.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    num_values: int
    nbytes: int
    stored_nbytes: int
    file: str
    chunk: tuple[int, ...] | None = None
    sharding: Axes | None = None
    fitted_shape: tuple[int, ...] | None = None
    device_nbytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """The sum over tensors."""

    num_tensors: int
    num_values: int
    nbytes: int
    stored_nbytes: int
    device_nbytes: int | None

    @classmethod
    def of(cls, tensors: Sequence[TensorEntry]) -> "Total":
        parts = [tensor.device_nbytes for tensor in tensors if tensor.device_nbytes is not None]
        return cls(
            num_tensors=len(tensors),
            num_values=sum(tensor.num_values for tensor in tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            stored_nbytes=sum(tensor.stored_nbytes for tensor in tensors),
            device_nbytes=sum(parts) if len(parts) == len(tensors) else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The release that a checkpoint was made from, and the mesh whose shards its files are cut for."""

    layout: Layout
    experts: Experts
    mesh: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unfinished:
    """How far a conversion has come."""

    plan: dict[str, Any]
    num_tensors_hashed: int
    num_parameters_stored: int
    stored_nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found. Of an unfinished conversion there is `unfinished`, and nothing else is known.

    Attributes:
        path: what was looked at.
        format: what it is.
        config: the sizes.
        experts: how experts are stored.
        origin: of a checkpoint.
        mesh: that the sharding is for.
        tensors: in the order of the model.
        unfinished: of a conversion that has to go on.
    """

    path: Path
    format: Format
    config: ModelConfig | None = None
    experts: Experts | None = None
    origin: Origin | None = None
    mesh: MeshShape | None = None
    tensors: tuple[TensorEntry, ...] = ()
    unfinished: Unfinished | None = None

    @property
    def total(self) -> Total:
        return Total.of(self.tensors)

    @property
    def totals(self) -> dict[Kind, Total]:
        """By the part of the model, in its order."""
        found: dict[Kind, list[TensorEntry]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.kind, []).append(tensor)
        return {kind: Total.of(tensors) for kind, tensors in found.items()}

    def grouped(self) -> list["Group"]:
        """Tensors that differ in nothing but the layer, together."""
        groups: dict[tuple[Any, ...], list[TensorEntry]] = {}
        for tensor in self.tensors:
            name = re.sub(r"(^|\.)(layers|block)\.\d+\.", r"\1\2.*.", tensor.name)
            key = (name, tensor.dtype, tensor.shape, tensor.chunk)
            groups.setdefault(key, []).append(tensor)
        return [Group(name=key[0], tensors=tuple(tensors)) for key, tensors in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain values, the same keys whatever was found."""
        return {
            "path": str(self.path),
            "format": self.format,
            "experts": self.experts,
            "config": _plain(self.config),
            "origin": _plain(self.origin),
            "mesh": _plain(self.mesh),
            "unfinished": _plain(self.unfinished),
            "total": _plain(self.total),
            "totals": {kind: _plain(total) for kind, total in self.totals.items()},
            "tensors": [_plain(tensor) for tensor in self.tensors],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors alike in all layers, as a row of a table."""

    name: str
    tensors: tuple[TensorEntry, ...]

    @property
    def total(self) -> Total:
        return Total.of(self.tensors)


def inspect_folder(path: Path, *, mesh: MeshShape | None = None) -> Inspection:
    """Looks at a checkpoint, at a release of either layout, or at a conversion that has not finished.

    Args:
        path: the folder.
        mesh: also say where each tensor would lie on such a mesh. No device is needed.

    Raises:
        UserError: it is none of these, it is not whole, or the mesh has more devices on `tensor` than there are heads.
    """
    unfinished = unfinished_at(path)
    if unfinished is not None:
        return _unfinished(path, unfinished)
    if (path / MANIFEST_NAME).is_file():
        return _checkpoint(path, mesh)
    return _release(path, mesh)


def _unfinished(path: Path, folder: Path) -> Inspection:
    staging = Staging(folder.with_name(folder.name.removesuffix(SUFFIX)))
    hashed, stored = Journal.read(staging)
    progress = Unfinished(
        plan=staging.plan() or {},
        num_tensors_hashed=len(hashed),
        num_parameters_stored=len(stored),
        stored_nbytes=sum(file.nbytes for files in stored.values() for file in files.values()),
    )
    return Inspection(path=path, format="unfinished", unfinished=progress)


def _checkpoint(path: Path, mesh: MeshShape | None) -> Inspection:
    stored = StoredParameters.open(path, check=False)
    places = _places(stored.config, stored.experts, mesh)
    tensors = []
    for name, shape in stored.shapes.items():
        own_axes = View(shape, tuple(range(len(shape))), tuple((axis,) for axis in range(len(shape))))
        tensor = FileTensor(name, stored.dtype(name), shape, (Part(name, own_axes, 0),))
        files = stored.files(name)
        entry = _entry(tensor, file=os.path.commonpath(files), places=places)
        stored_nbytes = sum(stored.manifest.files[file].nbytes for file in files)
        tensors.append(dataclasses.replace(entry, stored_nbytes=stored_nbytes, chunk=stored.chunk(name)))
    manifest = stored.manifest
    return Inspection(
        path=path,
        format="checkpoint",
        config=stored.config,
        experts=stored.experts,
        origin=Origin(layout=manifest.layout, experts=manifest.source_experts, mesh=manifest.mesh),
        mesh=mesh,
        tensors=tuple(tensors),
    )


def _release(path: Path, mesh: MeshShape | None) -> Inspection:
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} has no {CONFIG_NAME}; expected a checkpoint, a Hugging Face or an original/ folder")
    source = Source.open(path)
    places = _places(source.config, source.experts, mesh)
    tensors = []
    for tensor in source.tensors:
        info = source.folder.tensors[tensor.name]
        as_stored = dataclasses.replace(tensor, dtype=info.dtype)
        tensors.append(_entry(as_stored, file=info.file.name, places=places))
    return Inspection(
        path=path,
        format=source.layout,
        config=source.config,
        experts=source.experts,
        mesh=mesh,
        tensors=tuple(tensors),
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """How one parameter of ours lies on the mesh."""

    cuts: Axes  # the mesh axis that cuts each of its axes
    fitted: tuple[int, ...]
    shard: tuple[int, ...]


def _places(config: ModelConfig, experts: Experts, mesh: MeshShape | None) -> dict[str, _Place]:
    """By parameter; empty without a mesh."""
    if mesh is None:
        return {}
    sizes = dataclasses.asdict(mesh)
    placement = place_model(config, AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES))
    return {name: _place(placement, sizes, shape, axes) for name, (shape, axes) in released(config, experts).items()}


def _place(placement: Placement, sizes: Mapping[str, int], shape: tuple[int, ...], axes: Axes) -> _Place:
    cuts = tuple(name if name is not None and sizes[name] > 1 else None for name in partition(axes))
    fitted = tuple(fit.fitted for fit in placement.axis_fits(shape, axes))
    return _Place(cuts, fitted, tuple(n // (sizes[cut] if cut else 1) for n, cut in zip(fitted, cuts, strict=True)))


def _entry(tensor: FileTensor, *, file: str, places: Mapping[str, _Place]) -> TensorEntry:
    entry = TensorEntry(
        name=tensor.name,
        kind=_kind(tensor.parts[0].parameter),
        dtype=str(tensor.dtype),
        shape=tensor.shape,
        num_values=_num_values(tensor),
        nbytes=tensor.nbytes,
        stored_nbytes=tensor.nbytes,
        file=file,
    )
    if not places:
        return entry
    views = [(part.view, places[part.parameter]) for part in tensor.parts]
    fitted = [_in_file(view, place.fitted) for view, place in views]
    view, first = views[0]  # q, k and v, which may share a tensor, are cut alike
    return dataclasses.replace(
        entry,
        sharding=tuple(next((first.cuts[axis] for axis in group if first.cuts[axis]), None) for group in view.groups),
        fitted_shape=(sum(rows for rows, *_ in fitted), *fitted[0][1:]),
        device_nbytes=sum(math.prod(place.shard) for _, place in views) * tensor.dtype.itemsize,
    )


def _in_file(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter of ours of this shape would have in a file."""
    return dataclasses.replace(view, shape=shape).file_shape


def _num_values(tensor: FileTensor) -> int:
    if tensor.parts[0].parameter.endswith(".scales"):
        return 0
    per_element = _VALUES_PER_BYTE if tensor.parts[0].parameter.endswith(".blocks") else 1
    return math.prod(tensor.shape) * per_element


def _kind(parameter: str) -> Kind:
    words = parameter.split(".")
    return next(kind for word, kind in _KINDS.items() if word in words)


def _plain(record: Any) -> Any:
    return None if record is None else dataclasses.asdict(record)
