"""Boxes of row-major arrays that lie in files: which bytes, and reads them. Knows offsets; knows no file format."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np

from gptoss_jax.convert.disk import OpenFile, opened

ALIGNMENT = 512  # jax takes a NumPy array without a copy on CPU from multiples of 64, a disk writes to those of 512

_WINDOW = 1 << 20  # scratch for strided reads
_LARGEST_GAP = 8192  # reading over a gap costs less than a call into the kernel below about this many bytes

Box = tuple[tuple[int, int], ...]  # (start, stop) of every axis


@dataclasses.dataclass(frozen=True)
class Region:
    """An array's elements, end to end from byte `offset` of the file on."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def box(self, index: tuple[slice, ...]) -> Box:
        """Of a slice (of step 1) for each leading axis."""
        if len(index) > len(self.shape):
            raise ValueError(f"{len(index)} slices for an array of shape {self.shape} in {self.file}")
        box = [(0, size) for size in self.shape]
        for axis, cut in enumerate(index):
            start = 0 if cut.start is None else cut.start
            stop = self.shape[axis] if cut.stop is None else cut.stop
            if cut.step not in (None, 1) or not 0 <= start <= stop <= self.shape[axis]:
                raise ValueError(f"{cut} on axis {axis} of an array of shape {self.shape}: not a range inside")
            box[axis] = (start, stop)
        return tuple(box)

    def read(self, box: Box, out: np.ndarray) -> None:
        """Fills `out`, whose elements lie end to end, with the box.

        Rows of whole trailing axes come with one read; other boxes run by run, over gaps of less than a few pages.
        """
        if out.nbytes:
            with opened(self.file) as file:
                _read_box(file, self, box, out.reshape(-1).view(np.uint8))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a boundary of ALIGNMENT bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _read_box(file: OpenFile, region: Region, box: Box, out: np.ndarray) -> None:
    """Fills the flat byte buffer `out` with the box.

    The last cut axis and all whole axes behind it make runs of adjacent bytes; the axis before it repeats the run at
    an even pitch; the axes before those are looped over:

        file   |..RRRR..|..RRRR..|..RRRR..|    R a run; |......| a pitch
    """
    cut = max((axis for axis, size in enumerate(region.shape) if box[axis] != (0, size)), default=0)
    inner = region.dtype.itemsize * math.prod(region.shape[cut + 1 :])
    strides = [inner * math.prod(region.shape[axis + 1 : cut + 1]) for axis in range(cut + 1)]
    start, stop = box[cut] if region.shape else (0, 1)
    run = (stop - start) * inner
    first_row, last_row = box[cut - 1] if cut else (0, 1)
    pitch = strides[cut - 1] if cut else run
    rows = out.reshape(-1, last_row - first_row, run)
    outer_axes = range(max(cut - 1, 0))
    for target, position in zip(rows, itertools.product(*(range(*box[axis]) for axis in outer_axes)), strict=True):
        offset = sum(at * strides[axis] for axis, at in zip(outer_axes, position, strict=True))
        offset += region.offset + first_row * pitch + start * inner
        _read_rows(file, target, offset=offset, pitch=pitch)


def _read_rows(file: OpenFile, target: np.ndarray, *, offset: int, pitch: int) -> None:
    """Fills target[rows, run] with runs that lie `pitch` bytes apart in the file."""
    rows, run = target.shape
    if rows == 1 or pitch - run > _LARGEST_GAP or pitch > _WINDOW:
        for row in range(rows):
            file.fill(target[row], offset=offset + row * pitch)
        return
    step = _WINDOW // pitch
    window = np.empty(step * pitch, np.uint8)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        # The last row's gap may lie behind the end of the file.
        file.fill(window[: count * pitch - (pitch - run)], offset=offset + row * pitch)
        target[row : row + count] = window[: count * pitch].reshape(count, pitch)[:, :run]
