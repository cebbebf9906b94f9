"""Writes folders of safetensors, streaming, whole or not at all. Knows bytes and names of tensors; knows no model."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from gptoss_jax.convert.boxes import ALIGNMENT
from gptoss_jax.convert.disk import reported
from gptoss_jax.convert.files import CODES, INDEX_NAME, SINGLE_NAME, spell
from gptoss_jax.errors import UserError

SHARD_NAME = "model-{number:05d}-of-{count:05d}.safetensors"

Chunk: TypeAlias = bytes | bytearray | memoryview | np.ndarray


@runtime_checkable
class TensorSpec(Protocol):
    """What `write_folder` has to know of a tensor before its first byte."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard:
    file: str
    header: bytes
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(_nbytes(tensor) for tensor in self.tensors)


def write_folder(
    folder: Path,
    tensors: Sequence[TensorSpec],
    chunks: Callable[[str], Iterable[Chunk]],
    *,
    max_shard_bytes: int | None = None,
    single_name: str = SINGLE_NAME,
    shard_name: str = SHARD_NAME,
    index: bool = True,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the tensors, asking `chunks(name)` for the bytes of one after the other; memory is that of a chunk.

    More than `max_shard_bytes` of tensors are cut into files named by `shard_name`, with an index if `index` is set.
    `beside` holds small files that belong to the folder (config.json), complete before the weights are.
    Every file has another name until all of them are complete, and the index comes last: a folder that a crash left
    behind is never taken for a whole one, and the same call may use it again.

    Raises:
        UserError: the folder has something in it, or the disk has no room or refuses.
    """
    shards = _plan_shards(tensors, max_shard_bytes, single_name, shard_name, dict(metadata))
    small = dict(beside)
    if index and len(shards) > 1:
        small[INDEX_NAME] = _index_json(shards)
    created = not folder.exists()
    prepare_folder(folder, nbytes=sum(shard.nbytes for shard in shards) + sum(len(text) for text in small.values()))
    try:
        with reported(folder, "written"):
            for name in beside:
                _write_file(folder / _partial(name), [small[name]])
            for shard in shards:
                _write_file(folder / _partial(shard.file), _shard_bytes(shard, chunks))
            if INDEX_NAME in small:
                _write_file(folder / _partial(INDEX_NAME), [small[INDEX_NAME]])
            for name in (*beside, *(shard.file for shard in shards), *(small.keys() - beside.keys())):
                os.replace(folder / _partial(name), folder / name)
            _sync_folder(folder)
    except BaseException:
        _remove_partials(folder, created=created)
        raise


def prepare_folder(folder: Path, *, nbytes: int) -> None:
    """Makes an empty folder on a disk that has room for `nbytes`.

    Raises:
        UserError: something is in the folder (unfinished files of an earlier run aside), or there is no room.
    """
    with reported(folder, "written"):
        found = sorted(os.listdir(folder)) if folder.exists() else []
        whole = [name for name in found if not name.endswith(_partial(""))]
        if whole:
            raise UserError(
                f"{folder}: expected a new or empty folder, found {spell(whole[0])} in it; "
                "name another destination or remove it"
            )
        if found:
            _remove_partials(folder, created=False)
        path = folder.absolute()
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
        if nbytes > free:
            raise UserError(f"{folder}: needs {nbytes:,} bytes, its disk has {free:,} free; make room or name another")
        folder.mkdir(parents=True, exist_ok=True)


def _plan_shards(
    tensors: Sequence[TensorSpec],
    max_shard_bytes: int | None,
    single_name: str,
    shard_name: str,
    metadata: dict[str, str],
) -> list[_Shard]:
    """Cuts the tensors, in their order, where the next one would go over; a larger tensor is alone in its file."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("every tensor must have a name of its own")
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and max_shard_bytes is not None and size + _nbytes(tensor) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += _nbytes(tensor)
    shards = []
    for number, group in enumerate(groups, start=1):
        # Wide elements first: the format allows no padding between tensors, and this keeps each of them aligned.
        ordered = tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize))
        file = single_name if len(groups) == 1 else shard_name.format(number=number, count=len(groups))
        shards.append(_Shard(file=file, header=_header(ordered, metadata), tensors=ordered))
    return shards


def _header(tensors: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + _nbytes(tensor)
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _index_json(shards: Sequence[_Shard]) -> bytes:
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _shard_bytes(shard: _Shard, chunks: Callable[[str], Iterable[Chunk]]) -> Iterator[Chunk]:
    yield shard.header
    for tensor in shard.tensors:
        expected, found = _nbytes(tensor), 0
        for chunk in chunks(tensor.name):
            found += memoryview(chunk).nbytes
            if found > expected:
                break
            yield chunk
        if found != expected:
            raise ValueError(f"tensor {tensor.name!r} was declared with {expected:,} bytes, its chunks have {found:,}")


def _write_file(path: Path, chunks: Iterable[Chunk]) -> None:
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the new names last a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_partials(folder: Path, *, created: bool) -> None:
    for name in os.listdir(folder):
        if name.endswith(_partial("")):
            os.unlink(folder / name)
    if created:
        with contextlib.suppress(OSError):  # renamed files are complete and stay
            folder.rmdir()


def _partial(name: str) -> str:
    return f"{name}.gptoss-partial"  # no one else's name: what ends so is removed


def _nbytes(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
