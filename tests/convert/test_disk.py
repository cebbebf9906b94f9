"""Bytes of files come whole, wherever they lie in the file, in memory and in the system's cache."""

import os
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.convert.boxes import aligned_empty
from gptoss_jax.convert.disk import opened
from gptoss_jax.errors import UserError

SIZE = (18 << 20) + 777  # three pieces, the last one small and no multiple of a block


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def on_disk(folder: Path, content: np.ndarray, *, is_cached: bool) -> Path:
    path = folder / "file"
    with path.open("wb") as file:
        file.write(content.tobytes())
        file.flush()
        os.fsync(file.fileno())
        if not is_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize(
    ("offset", "shift"),
    [(0, 0), (512, 0), (0, 8), (4096 + 13, 0), (4096 + 13, 13), (SIZE - 100, 0), (SIZE, 0)],
)
def test_what_is_read_is_what_was_written(tmp_path, content, offset: int, shift: int, is_cached: bool):
    """Aligned, and not: only the first can be read past the cache."""
    path = on_disk(tmp_path, content, is_cached=is_cached)
    buffer = aligned_empty((SIZE - offset + shift,), np.dtype(np.uint8))
    buffer[:] = 0
    with opened(path) as file:
        assert file.size == SIZE
        file.fill(buffer[shift:], offset=offset)
    np.testing.assert_array_equal(buffer[shift:], content[offset:])
    assert not buffer[:shift].any()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory")
def test_a_file_system_without_a_disk(content):
    path = Path("/dev/shm") / f"gptoss_jax_test_{os.getpid()}"
    try:
        path.write_bytes(content.tobytes())
        buffer = aligned_empty((SIZE,), np.dtype(np.uint8))
        with opened(path) as file:
            file.fill(buffer, offset=0)
        np.testing.assert_array_equal(buffer, content)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_long_read_of_a_file_that_shrank(tmp_path, content, is_cached: bool):
    path = on_disk(tmp_path, content, is_cached=is_cached)
    with opened(path) as file:
        os.truncate(path, SIZE // 2)
        with pytest.raises(UserError, match=rf"ends at byte {SIZE // 2:,}, expected .* shrank while being read"):
            file.fill(aligned_empty((SIZE,), np.dtype(np.uint8)), offset=0)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="expected a regular file"), opened(tmp_path / "pipe"):
        pass
