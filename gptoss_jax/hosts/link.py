"""One TCP connection between two processes, a JSON object a line each way. Knows sockets; knows no jax."""

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

_LONGEST_LINE = 1 << 16
_SEND_TIMEOUT = 5.0  # a line is short: a peer that has not taken it by then takes nothing any more


class Link:
    """A connection, and what has come over it so far."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._rest = b""
        self._sending = threading.Lock()  # the watch sends its signs of life, the program its error
        self.socket.settimeout(_SEND_TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> bool:
        """Whether the other end could be told; a peer that is gone is noticed by reading, not by writing."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; waits where nothing has.

        Raises:
            EOFError: the other end has closed, or speaks another language.
            TimeoutError: nothing came for a while.
        """
        try:
            piece = self.socket.recv(_LONGEST_LINE)
        except TimeoutError:
            raise
        except OSError as error:  # a reset, say: the process is gone
            raise EOFError from error
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if not piece or len(self._rest) > _LONGEST_LINE:
            raise EOFError
        return [_message(line) for line in lines]

    def wait(self, deadline: float) -> dict[str, Any]:
        """The next message; for the two ends' first words, before several can be under way."""
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            messages = self.receive()
            if messages:
                self.socket.settimeout(_SEND_TIMEOUT)
                return messages[0]

    def close(self) -> None:
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EOFError from error
    if not isinstance(message, dict):
        raise EOFError
    return message
