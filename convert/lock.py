"""A folder that one command at a time works in. Knows files; knows no command."""

import errno
import fcntl
import logging
import os
from pathlib import Path

from gptoss_jax.errors import UserError

_logger = logging.getLogger(__name__)


def lock_folder(path: Path, name: str, *, parents: bool = False, work: str, way_out: str) -> int:
    """Makes the folder if need be and locks its file `name`; closing what it gives unlocks it, as does any end.

    Args:
        path: the folder.
        name: of a file in it.
        parents: folders above are made too.
        work: what another process does there that has it: "conversion".
        way_out: what to do then.

    Raises:
        UserError: the folder cannot be made, or somebody has it.
    """
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
