"""Bytes of files into memory, as fast as a disk gives them. Knows files and buffers; knows no array and no format.

What is read once should not push other things out of memory to be kept twice: a long run that the system does not have
in its cache already is read past it. On a machine whose memory the weights fill, that is three times as fast.
"""

import concurrent.futures
import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptoss_jax.errors import UserError

_PIECE = 8 << 20  # that one thread reads of a long run: one thread alone gets a fifth of what a disk gives
_THREADS = 4
_LONG = 1 << 20  # shorter reads are left to the system, which reads ahead
_BLOCK = 512  # of a disk: addresses, offsets and sizes are multiples of it
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux: only what is in the cache
_DIRECT = getattr(os, "O_DIRECT", None)  # Linux: past the cache


class OpenFile:
    """A regular file to read from; threads may share it. From `opened`.

    Attributes:
        path: where it is.
        size: its bytes.
    """

    def __init__(self, path: Path, descriptor: int, direct: int | None):
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._direct = direct

    def fill(self, buffer: np.ndarray, *, offset: int) -> None:
        """Reads exactly the contiguous buffer's bytes from `offset` on, by several threads if they are many.

        Raises:
            UserError: the file ends before.
        """
        view = memoryview(buffer).cast("B") if buffer.nbytes else memoryview(b"")
        pieces = [(view[start : start + _PIECE], offset + start) for start in range(0, len(view), _PIECE)]
        if len(pieces) == 1:
            self._fill(*pieces[0])
        elif pieces:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
                for done in [threads.submit(self._fill, piece, at) for piece, at in pieces]:
                    done.result()

    def _fill(self, view: memoryview, offset: int) -> None:
        """Every read names its place, so that threads need no lock."""
        done = 0
        if self._direct is not None and len(view) >= _LONG and not self._is_cached(offset + len(view) // 2):
            done = self._read_past_cache(view, offset, self._direct)
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise UserError(
                    f"{self.path}: ends at byte {offset + done:,}, expected {offset + len(view):,}: "
                    "it shrank while being read"
                )
            done += count

    def _is_cached(self, offset: int) -> bool:
        """Whether the system has that byte in its cache, and so, most likely, what lies around it."""
        if _NOWAIT is None:
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], offset, _NOWAIT) == 1
        except OSError as error:
            if error.errno == errno.EAGAIN or error.errno in _NOT_SUPPORTED:
                return False
            raise

    def _read_past_cache(self, view: memoryview, offset: int, direct: int) -> int:
        """How many bytes came from the disk: none, where they do not lie in memory as they do on it."""
        size = len(view) // _BLOCK * _BLOCK
        if not size or offset % _BLOCK or np.frombuffer(view, np.uint8).ctypes.data % _BLOCK:
            return 0
        try:
            return os.preadv(direct, [view[:size]], offset)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return 0
            raise


@contextlib.contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """
    Raises:
        UserError: it is no regular file, or the system refuses to read it.
    """
    with reported(path, "read"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise UserError(f"{path}: expected a regular file, found something else")
        with contextlib.ExitStack() as descriptors:
            descriptor = _open(path, 0, descriptors)
            if hasattr(os, "posix_fadvise"):  # what is asked for, and nothing around it
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            direct = None
            if _DIRECT is not None and os.fstat(descriptor).st_size >= _LONG:
                with contextlib.suppress(OSError):  # memory's file systems know no disk
                    direct = _open(path, _DIRECT, descriptors)
            yield OpenFile(path, descriptor, direct)


@contextlib.contextmanager
def reported(path: Path, action: str) -> Iterator[None]:
    """What the operating system refuses is a user's matter too: a missing right, a full disk, a file for a folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be {action}: {error.strerror or error}") from error


def _open(path: Path, flags: int, descriptors: contextlib.ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    descriptors.callback(os.close, descriptor)
    return descriptor
