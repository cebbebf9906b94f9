"""Reads folders of safetensors, lazily and safely. Knows bytes, dtypes and names of tensors; knows no model and no jax.

A safetensors file is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes end to end:

    {"name": {"dtype": "BF16", "shape": [160, 32], "data_offsets": [0, 10240]}, ...}

Files come from strangers: nothing a header says is believed before it agrees with the file's size, and nothing is
allocated for a number that a file merely claims. Reading never uses mmap, so resident memory is what was asked for.
"""

import dataclasses
import hashlib
import logging
import math
import os
import re
import reprlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.convert.boxes import Region, aligned_empty
from gptoss_jax.convert.disk import opened, reported
from gptoss_jax.convert.json_file import parse_object
from gptoss_jax.errors import Unsupported, UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_logger = logging.getLogger(__name__)

# Every code of the format. Those without a NumPy dtype are listed in folders, and refused when read.
_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_UNREAD_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
_BITS = {code: dtype.itemsize * 8 for code, dtype in _DTYPES.items()} | _UNREAD_BITS
CODES = {dtype: code for code, dtype in _DTYPES.items()}

_LARGEST_JSON = 100_000_000  # the format's own limit on a header; a released gpt-oss header has about 60 kB
_LARGEST_SIZE = 2**63 - 1
_MOST_AXES = 32  # what every NumPy can hold
_CHUNK = 1 << 20

_SHARD_PATTERN = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors", re.DOTALL)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a file: `nbytes` bytes from `offset` on, checked to lie inside the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype of `code`.

        Raises:
            Unsupported: the format has this dtype, NumPy does not.
        """
        if self.code not in _DTYPES:
            raise Unsupported(
                f"{self.file}: tensor {spell(self.name)} has dtype {self.code}, which is not read; "
                f"expected one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[self.code]


class TensorFolder:
    """The tensors of one safetensors file, or of a folder of them, by name. Threads may share it."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]):
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))

    @classmethod
    def open(cls, path: Path) -> "TensorFolder":
        """Reads and checks every header under `path`: a folder, with or without an index, or a single file.

        Raises:
            UserError: there is nothing to read, or what there is contradicts itself.
        """
        with reported(path, "read"):
            if not path.exists():
                raise UserError(f"{path}: no such file or folder; expected a checkpoint folder or a .safetensors file")
            if not path.is_dir():
                return cls(path, _headers([_only_safetensors(path)]))
            names = frozenset(entry.name for entry in os.scandir(path))
            if INDEX_NAME in names:
                return cls(path, _indexed_tensors(path, names))
            return cls(path, _headers(_loose_files(path, names)))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the box of it that `index` cuts out with one slice (of step 1) per leading axis.

        Rows of whole trailing axes come with one read; other boxes run by run, over gaps of less than a few pages.
        The array starts at a 64-byte boundary.
        """
        info = self._info(name)
        region = Region(info.file, info.offset, info.shape, info.dtype)
        box = region.box(index or ())
        out = aligned_empty(tuple(stop - start for start, stop in box), info.dtype)
        region.read(box, out)
        return out

    def bytes_of(self, name: str, *, chunk: int = _CHUNK) -> Iterator[bytes]:
        """The tensor's bytes as the file holds them, in pieces of at most `chunk`."""
        info = self._info(name)
        with opened(info.file) as file:
            for start in range(0, info.nbytes, chunk):
                piece = np.empty(min(chunk, info.nbytes - start), np.uint8)
                file.fill(piece, offset=info.offset + start)
                yield piece.tobytes()

    def sha256(self, name: str, *, chunk: int = _CHUNK) -> str:
        """The hexadecimal SHA-256 of the tensor's bytes."""
        info, digest = self._info(name), hashlib.sha256()
        # One buffer for all pieces: a fresh one for each costs a quarter more.
        buffer = np.empty(min(chunk, info.nbytes), np.uint8)
        with opened(info.file) as file:
            for start in range(0, info.nbytes, chunk):
                piece = buffer[: info.nbytes - start]
                file.fill(piece, offset=info.offset + start)
                digest.update(piece)
        return digest.hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {spell(name)} is missing; {len(self.tensors)} others are there")
        return self.tensors[name]


# --- what lies at a path ------------------------------------------------------------------------------------------


def _only_safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a folder or a .safetensors file; no other format is read")
    return path


def _loose_files(folder: Path, names: frozenset[str]) -> list[Path]:
    """All safetensors of a folder that has no index; numbered shards must be complete."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if not files:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise UserError(
                f"{folder}: has {spell(pickles[0])} but no .safetensors file; pickled weights can run code and are "
                "never read: save the model again as safetensors"
            )
        raise UserError(f"{folder}: expected {INDEX_NAME} or a .safetensors file, found neither")
    for name in files:
        _check_siblings(folder, name, names)
    return [folder / name for name in files]


def _check_siblings(folder: Path, name: str, names: frozenset[str]) -> None:
    match = _SHARD_PATTERN.fullmatch(name)
    if match is None:
        return
    pattern = re.compile(rf"{re.escape(match['stem'])}-\d{{1,9}}-of-{match['count']}\.safetensors")
    found, expected = sum(1 for other in names if pattern.fullmatch(other)), int(match["count"])
    if found != expected:
        raise UserError(
            f"{folder}: {spell(name)} belongs to {expected} shards, {found} of them are there; "
            "copy or download the folder again"
        )


def _indexed_tensors(folder: Path, names: frozenset[str]) -> dict[str, TensorInfo]:
    """The tensors of a folder with an index, which must list exactly what its files hold."""
    weight_map = _read_index(folder / INDEX_NAME)
    files = sorted(set(weight_map.values()))
    for file in files:
        _check_index_file(folder, file, names)
    for name in sorted(names):
        if name.endswith(".safetensors") and name not in files:
            _logger.warning("%s: %s is not named by %s and is not read", folder, name, INDEX_NAME)
    tensors = _headers([folder / file for file in files])
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{folder / INDEX_NAME}: says tensor {spell(name)} is in {file}, which does not have it; "
                "copy or download the folder again"
            )
        if tensors[name].file.name != file:
            raise UserError(
                f"{folder / INDEX_NAME}: says tensor {spell(name)} is in {file}, "
                f"it is in {tensors[name].file.name}; copy or download the folder again"
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise UserError(
                f"{info.file}: holds tensor {spell(name)}, which {INDEX_NAME} does not list; "
                "copy or download the folder again"
            )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    with opened(path) as file:
        size = file.size
        if size > _LARGEST_JSON:
            raise UserError(f"{path}: has {size:,} bytes; expected an index of at most {_LARGEST_JSON:,}")
        text = np.empty(size, np.uint8)
        file.fill(text, offset=0)
    index = parse_object(text.tobytes(), name=str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is {spell(weight_map)}; expected an object of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise UserError(f"{path}: tensor {spell(name)} is in {spell(file)}; expected the name of a file")
    return weight_map


def _check_index_file(folder: Path, file: str, names: frozenset[str]) -> None:
    # Links are legitimate (Hugging Face's cache is made of them): it is the name that must not walk.
    if "/" in file or "\\" in file or file in ("", ".", ".."):
        raise UserError(
            f"{folder / INDEX_NAME}: names the file {spell(file)}, which points outside its folder; "
            "expected plain file names: do not trust this checkpoint"
        )
    if not file.endswith(".safetensors"):
        raise UserError(f"{folder / INDEX_NAME}: names the file {spell(file)}; only .safetensors files are read")
    if file not in names:
        raise UserError(
            f"{folder / INDEX_NAME}: names the file {spell(file)}, which is missing; copy or download it again"
        )


# --- headers ------------------------------------------------------------------------------------------------------


def _headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(file):
            if info.name in tensors:
                raise UserError(
                    f"{file}: holds tensor {spell(info.name)}, which {tensors[info.name].file.name} also holds; "
                    "expected every tensor once: remove the file that does not belong"
                )
            tensors[info.name] = info
    return tensors


def _read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes, which cover its data without hole or overlap."""
    with opened(file) as source:
        size = source.size
        if size < 8:
            raise UserError(f"{file}: has {size} bytes; a safetensors file has at least 8: copy or download it again")
        head = np.empty(8, np.uint8)
        source.fill(head, offset=0)
        (length,) = struct.unpack("<Q", head.tobytes())
        if length > _LARGEST_JSON:
            raise UserError(
                f"{file}: says its header has {length:,} bytes, at most {_LARGEST_JSON:,} are allowed; "
                "this is no safetensors file"
            )
        if 8 + length > size:
            raise UserError(
                f"{file}: says its header has {length:,} bytes, the file has {size:,}; copy or download it again"
            )
        header = np.empty(length, np.uint8)
        source.fill(header, offset=8)
    entries = parse_object(header.tobytes(), name=str(file))
    _check_metadata(file, entries.pop("__metadata__", None))
    infos = [_tensor_info(file, name, entry, data=8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_cover(file, infos, data=8 + length, size=size)
    return infos


def _check_metadata(file: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{file}: __metadata__ is {spell(metadata)}; expected an object of strings")


def _tensor_info(file: Path, name: str, entry: Any, *, data: int) -> TensorInfo:
    where = f"{file}: tensor {spell(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} is {spell(entry)}; expected exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise UserError(f"{where} has dtype {spell(code)}; the format has {', '.join(_BITS)}")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(_is_size(size) for size in shape):
        raise UserError(f"{where} has shape {spell(shape)}; expected at most {_MOST_AXES} sizes of 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise UserError(f"{where} has data_offsets {spell(offsets)}; expected two byte positions")
    # Sizes of an empty tensor multiply to nothing, yet must fit NumPy, which refuses overflow in the others.
    bits = math.prod(max(size, 1) for size in shape) * _BITS[code]
    if bits // 8 > _LARGEST_SIZE:
        raise UserError(f"{where} has shape {spell(shape)}, which is more than {_LARGEST_SIZE} bytes")
    bits = math.prod(shape) * _BITS[code]
    start, stop = offsets
    if bits % 8 or bits // 8 != stop - start:
        raise UserError(
            f"{where} has {stop - start:,} bytes; {code} of shape {spell(shape)} takes {bits / 8:,.10g}: "
            "copy or download the file again"
        )
    return TensorInfo(name=name, code=code, shape=tuple(shape), file=file, offset=data + start, nbytes=bits // 8)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_SIZE


def _check_cover(file: Path, infos: Sequence[TensorInfo], *, data: int, size: int) -> None:
    end = data
    for info in infos:
        if info.offset != end:
            what = "they overlap" if info.offset < end else "there is a hole"
            raise UserError(
                f"{file}: tensor {spell(info.name)} starts at byte {info.offset:,}, "
                f"the one before it ends at {end:,}: {what}; copy or download the file again"
            )
        end += info.nbytes
    if end != size:
        what = "it is truncated" if end > size else "something is appended"
        raise UserError(
            f"{file}: its header describes {end:,} bytes, the file has {size:,}: {what}; copy or download it again"
        )


# --- reading bytes ------------------------------------------------------------------------------------------------


# --- messages -----------------------------------------------------------------------------------------------------


def spell(value: Any) -> str:
    """A value from a file for a message: of any size and depth there, short here."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)
