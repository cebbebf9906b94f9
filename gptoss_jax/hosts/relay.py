"""Stands between jax and process 0's service, so that jax does not see process 0 die. Knows sockets; knows no jax.

jax ends a process from C++, with a stack trace, in the moment in which its connection to process 0 breaks. Through the
relay that connection only falls silent, which leaves `watch` the time to say what has happened in one sentence.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from gptoss_jax.hosts.meeting import Address

_PIECE = 1 << 16
_RETRY = 0.05


class Relay:
    """Listens on this machine and passes on what it hears, both ways.

    Attributes:
        port: where it listens.
    """

    def __init__(self, target: Address, *, timeout: float, on_failure: Callable[[str], None]):
        self._target = target
        self._timeout = timeout
        self._on_failure = on_failure
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        _start(self._accept)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            _start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        deadline = time.monotonic() + self._timeout
        while True:  # process 0 starts its service when all have met, so maybe after us
            try:
                far = socket.create_connection((self._target.host, self._target.port), timeout=self._timeout)
                break
            except OSError as error:
                if time.monotonic() + _RETRY > deadline:
                    self._on_failure(
                        f"{self._target}, where process 0 serves jax, does not answer within {self._timeout:g} s "
                        f"({error.strerror or error}): processes need open ports between their hosts"
                    )
                    return
                time.sleep(_RETRY)
        far.settimeout(None)
        _start(_to_process_0, near, far)
        with contextlib.suppress(OSError):
            while piece := far.recv(_PIECE):
                near.sendall(piece)
        # Process 0 is gone, and `near` stays open: that is what the relay is for.


def _to_process_0(near: socket.socket, far: socket.socket) -> None:
    with near, far, contextlib.suppress(OSError):
        while piece := near.recv(_PIECE):
            with contextlib.suppress(OSError):  # what nobody hears any more is dropped, for the same reason
                far.sendall(piece)


def _start(function: Callable[..., None], *arguments: socket.socket) -> None:
    threading.Thread(target=function, args=arguments, name="gptoss_jax relay", daemon=True).start()
