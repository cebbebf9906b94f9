"""Runs commands and measures them, and puts the disk's cache into a known state. Knows no benchmark and imports no jax.

On Linux only: peak memory, page cache and sync are measured and steered by its calls.
"""

import contextlib
import dataclasses
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from gptoss_jax.errors import UserError

Cache = Literal["warm", "cold"]

_PIECE = 1 << 20
_SHOWN = 4000  # of a failed command's stderr


class CommandFailed(Exception):
    """A command that is measured ended with another exit code than 0: there is no number to report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command took. `seconds` includes `sync_seconds`, until its last byte was on the disk; a command whose
    `cpu_seconds`, those of all its threads, are far fewer waited for the disk or for another program."""

    seconds: float
    sync_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    output: str


def run(command: Sequence[str | Path], *, sync: Path | None = None) -> Finished:
    """Runs a command to its end; `sync` is a folder on the disk whose dirty pages count too.

    The peak is the command's own or that of the largest process it waited for. Linux begins to count it with the memory
    of the process that starts the command, so the scripts that call this import no jax.

    Raises:
        CommandFailed: another exit code than 0; the message holds the end of its stderr.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        usage = _wait(process)
        ended = time.perf_counter()
        if sync is not None:
            sync_disk(sync)
        synced = time.perf_counter()
        if process.returncode:
            raise CommandFailed(f"{shlex.join(words)} ended with {process.returncode}:\n{_text(err)[-_SHOWN:]}")
        return Finished(
            seconds=synced - start,
            sync_seconds=synced - ended,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_rss_bytes=usage.ru_maxrss * 1024,  # Linux counts in KiB
            output=_text(out),
        )


def gptoss_jax(*arguments: str | Path) -> list[str | Path]:
    """The command of the environment that runs this, whatever PATH says.

    Raises:
        UserError: the package is not installed there.
    """
    script = Path(sysconfig.get_path("scripts")) / "gptoss-jax"
    if not script.is_file():
        raise UserError(f"{script} is not there; expected gptoss_jax installed for {sys.executable}: pip install -e .")
    return [script, *arguments]


def module(name: str, *arguments: str | Path) -> list[str | Path]:
    """A module of this package as a command."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def reading(folder: Path) -> list[str | Path]:
    """A command that reads every byte of a folder and does nothing with it: the ceiling of whatever must read it."""
    return ["sh", "-c", 'find "$1" -type f -exec cat {} + > /dev/null', "cat", folder]


def prepare(folder: Path, cache: Cache) -> None:
    """Gets a folder ready to be read: whatever was written is on the disk, and its files are in memory, or are not."""
    sync_disk(folder)
    for path in files(folder):
        if cache == "warm":
            _read(path)
        else:
            _evict(path)


def sync_disk(folder: Path) -> None:
    """Waits until everything written to the disk of `folder` is there."""
    subprocess.run(["sync", "--file-system", folder], check=True)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@contextlib.contextmanager
def work_folder(parent: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A folder that is gone afterwards, also after Ctrl-C, SIGTERM or a failure.

    Raises:
        UserError: `parent` is no folder, or its disk has less than `needed_bytes` free.
    """
    if not parent.is_dir():
        raise UserError(f"{parent} is no folder; expected one on the disk to be measured: create it or name another")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UserError(
            f"{parent} has {free:,} bytes free, this needs {needed_bytes:,} at once: "
            "make room, name a folder on another disk with --dir, or ask for fewer --layers"
        )
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with tempfile.TemporaryDirectory(prefix="gptoss-jax-benchmark-", dir=parent) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _wait(process: subprocess.Popen[bytes]) -> resource.struct_rusage:
    """What the process used, which Popen's own wait would throw away."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C included: a measured command must not outlive the measurement
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(_PIECE):
            pass


def _evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
