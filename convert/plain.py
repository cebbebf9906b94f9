"""A zarr array whose files hold one plain chunk each, read straight into place. Knows zarr files; knows no parameter.

TensorStore reads these files too, but into memory of its own that lies where jax has to copy it from: a model is then
held twice while it is loaded. A file, as Orbax writes it without compression:

    | the chunk's elements, row-major | where they are: offset 0, bytes | CRC-32C of the two |
                                        8                 8               4
"""

import concurrent.futures
import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.convert.boxes import Box, Region, aligned_empty
from gptoss_jax.convert.disk import opened
from gptoss_jax.errors import UserError

_THREADS = 4  # at once in the kernel's copying; more than the cores of a small machine, for disks that answer late
_INDEX = struct.Struct("<QQ")
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8)}
_ORDERS = ({"name": "bytes"}, {"name": "bytes", "configuration": {"endian": "little"}})  # one-byte types have no order


class PlainArray:
    """An array in zarr's plain files. Threads may share it."""

    def __init__(self, home: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype):
        self.home = home
        self.shape = shape
        self.chunk = chunk
        self.dtype = dtype

    @classmethod
    def open(cls, home: Path) -> "PlainArray | None":
        """The array in the folder `home`; None if its files hold anything but one plain chunk each."""
        metadata = json.loads((home / "zarr.json").read_text(encoding="utf-8"))
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        is_plain = (
            _holds_one_chunk(metadata["codecs"], chunk)
            and metadata["chunk_key_encoding"] == {"name": "default"}
            and metadata["data_type"] in _DTYPES
        )
        return cls(home, tuple(metadata["shape"]), tuple(chunk), _DTYPES[metadata["data_type"]]) if is_plain else None

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The box that `index` cuts out with one slice per axis. The array starts at a 64-byte boundary.

        Raises:
            UserError: a file is missing, cut short or holds its chunk elsewhere.
        """
        box = Region(self.home, 0, self.shape, self.dtype).box(index)
        out = aligned_empty(tuple(stop - start for start, stop in box), self.dtype)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for done in [threads.submit(self._read_part, at, box, out) for at in self._chunks(box)]:
                done.result()
        return out

    def _chunks(self, box: Box) -> Iterator[tuple[int, ...]]:
        """Where in the grid the chunks lie that the box touches."""
        touched = (range(start // size, -(-stop // size)) for (start, stop), size in zip(box, self.chunk, strict=True))
        return itertools.product(*touched)

    def _read_part(self, at: tuple[int, ...], box: Box, out: np.ndarray) -> None:
        """Of one chunk what lies in the box."""
        region = Region(self.home.joinpath("c", *map(str, at)), 0, self.chunk, self.dtype)
        _check_index(region)
        first = [i * size for i, size in zip(at, self.chunk, strict=True)]
        part = [
            (max(start, low), min(stop, low + size))
            for (start, stop), low, size in zip(box, first, self.chunk, strict=True)
        ]
        inside = tuple((start - low, stop - low) for (start, stop), low in zip(part, first, strict=True))
        target = out[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, box, strict=True))]
        if target.flags.c_contiguous:
            region.read(inside, target)
            return
        found = aligned_empty(target.shape, self.dtype)
        region.read(inside, found)
        target[...] = found


def _holds_one_chunk(codecs: list[dict[str, Any]], chunk: list[int]) -> bool:
    """Whether a file is a shard of one chunk, unchanged, with its index behind."""
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return False
    inner = codecs[0]["configuration"]
    return (
        inner["chunk_shape"] == chunk
        and inner.get("index_location", "end") == "end"
        and len(inner["codecs"]) == 1
        and inner["codecs"][0] in _ORDERS
        and [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
    )


def _check_index(region: Region) -> None:
    nbytes = math.prod(region.shape) * region.dtype.itemsize
    index = np.empty(_INDEX.size, np.uint8)
    with opened(region.file) as file:
        file.fill(index, offset=nbytes)
    offset, found = _INDEX.unpack(index.tobytes())
    if (offset, found) != (0, nbytes):
        raise UserError(
            f"{region.file}: its index says {found:,} bytes from byte {offset:,} on, expected {nbytes:,} from 0 on: "
            "copy or convert the checkpoint again"
        )
