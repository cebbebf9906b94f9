"""A folder that one command at a time works in, with all its processes. Knows files; knows no command."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from gptoss_jax.errors import UserError
from gptoss_jax.hosts import is_first, together

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed_folder(path: Path, name: str, *, parents: bool = False, work: str, way_out: str) -> Iterator[None]:
    """Makes the folder if need be and keeps others out of it; if nothing was begun in it, it goes again.

    Args:
        path: the folder.
        name: of the file in it that is locked.
        parents: folders above are made too.
        work: what another process does there that has it: "conversion".
        way_out: what to do then.

    Raises:
        UserError: the folder cannot be made, somebody has it, or not all processes see it.
    """
    lock: int | None = None
    with together(f"making the folder of the {work}"):
        if is_first():
            lock = _lock(path, name, parents=parents, work=work, way_out=way_out)
    try:
        with together(f"finding the folder of the {work}"):
            if not path.is_dir():
                raise UserError(
                    f"process {jax.process_index()} does not see {path}, which process 0 has made; "
                    "name a folder on a disk that all processes share"
                )
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                if os.listdir(path) == [name]:
                    (path / name).unlink()
                    path.rmdir()
            os.close(lock)


def _lock(path: Path, name: str, *, parents: bool, work: str, way_out: str) -> int:
    """Closing what it gives unlocks the folder, as does any end."""
    try:
        path.mkdir(parents=parents, exist_ok=True)
        lock = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {error.strerror}; name a destination in a folder where you may write"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(lock)
            raise UserError(f"another {work} is at work in {path}; {way_out}") from None
        _logger.warning("%s: %s; see to it that no other %s works there", path, error.strerror, work)
    return lock
