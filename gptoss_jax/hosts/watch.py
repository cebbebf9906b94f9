"""Notices when another process ends or falls silent, and ends this one then. Knows sockets; knows no jax.

A process that waits for another inside a collective cannot be woken: a thread beside it listens, and ends the program.
All others are connected with process 0, which passes on what it learns.

    {"alive": true}        now and then: a machine that is gone closes no connection
    {"failed": "why"}      to process 0: I end with this error
    {"lost": "sentence"}   from process 0: someone has ended, so all do, "after" so many seconds
    {"done": true}         I have come to my end; what follows is no loss
"""

import atexit
import contextlib
import dataclasses
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from gptoss_jax.errors import UserError
from gptoss_jax.hosts.link import Link
from gptoss_jax.hosts.meeting import Card, Guest, refuse_latecomer

EXIT_LOST = 3  # the exit code where another process is the reason

_CLEARING_UP = 10.0  # seconds that the program has to end by itself after another has failed, with what it began
_LAST_BREATH = 1.0  # the same after another has been killed
_VERDICT = 2.0  # seconds after which an error is thought to be our own, and no consequence of another's end

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Peer:
    card: Card
    link: Link
    heard: float
    done: bool = False


class Watch:
    """The thread that listens to the other processes; `fail` tells them of an error here."""

    def __init__(
        self,
        me: Card,
        guests: Sequence[Guest],
        *,
        listener: socket.socket | None,
        silence: float,
        on_loss: Callable[[str], None] | None,
    ):
        now = time.monotonic()
        self._me = me
        self._peers = [_Peer(guest.card, guest.link, now) for guest in guests]
        self._listener = listener  # process 0's
        self._silence = silence
        self._on_loss = on_loss or _log_and_exit
        self._reason = ""
        self._lost = threading.Event()
        self._exit_code: int | None = None
        threading.Thread(target=self._run, name="gptoss_jax watch", daemon=True).start()
        # jax waits for all processes when a program ends. This runs before: what is registered last goes first.
        atexit.register(self._leave)

    def fail(self, error: BaseException, *, exit_code: int) -> None:
        """Tells the others that this process ends with `error`; the program then ends without waiting for them.

        The end of another process often shows first as a broken connection here. So an error that is not surely our
        own waits a moment for such news, and if they come, the program ends with those: this call does not return.
        """
        own = isinstance(error, UserError | KeyboardInterrupt)
        if not own and self._lost.wait(_VERDICT):
            self._end()
        self._exit_code = exit_code
        self._announce(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": "))

    def give_up(self, sentence: str) -> None:
        """Ends all processes, from whichever thread here finds that there is no going on."""
        self._announce(sentence)
        self._lose(sentence, after=0)

    def _announce(self, reason: str) -> None:
        if self._me.process_id == 0:
            self._tell({"lost": f"{self._me} failed: {reason}", "after": _CLEARING_UP})
        else:
            self._tell({"failed": reason})

    def _lose(self, sentence: str, *, after: float, source: _Peer | None = None) -> None:
        """Ends this process in `after` seconds, and from process 0 all others, because one of them is gone."""
        if self._lost.is_set():
            return
        self._reason = sentence
        self._lost.set()
        if self._me.process_id == 0:
            self._tell({"lost": sentence, "after": after}, but=source)
        time.sleep(after)
        self._end()

    def _end(self) -> None:
        self._on_loss(f"{self._reason} (so all processes stop)")

    def _run(self) -> None:
        beat = min(self._silence / 4, 5.0)
        next_beat = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.link.socket, selectors.EVENT_READ, peer)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ, None)
            while not self._lost.is_set():
                for key, _ in selector.select(max(next_beat - time.monotonic(), 0)):
                    if key.data is None:
                        assert self._listener is not None
                        refuse_latecomer(self._listener, self._me)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() >= next_beat:
                    self._tell({"alive": True})
                    next_beat = time.monotonic() + beat
                self._look_for_silence()

    def _hear(self, peer: _Peer) -> bool:
        """Whether more can come."""
        try:
            messages = peer.link.receive()
        except TimeoutError:
            return True
        except EOFError:
            if not peer.done:
                reason = f"{peer.card} has ended without a word: killed, or out of memory"
                self._lose(reason, after=_LAST_BREATH, source=peer)
            return False
        peer.heard = time.monotonic()
        for message in messages:
            if "lost" in message:
                self._lose(str(message["lost"]), after=float(message["after"]))
            elif "failed" in message:
                self._lose(f"{peer.card} failed: {message['failed']}", after=_CLEARING_UP, source=peer)
            peer.done |= "done" in message
        return True

    def _look_for_silence(self) -> None:
        for peer in self._peers:
            if not peer.done and time.monotonic() - peer.heard > self._silence:
                self._lose(
                    f"{peer.card} has not been heard of for {self._silence:g} s: its machine or the network is down, "
                    "or it was stopped",
                    after=_LAST_BREATH,
                    source=peer,
                )

    def _tell(self, message: dict[str, object], *, but: _Peer | None = None) -> None:
        for peer in self._peers:
            if peer is not but:
                peer.link.send(message)

    def _leave(self) -> None:
        """At the end of the program: the good one is announced, the bad one not waited with."""
        uncaught = getattr(sys, "last_value", None)
        if self._exit_code is None and uncaught is not None:
            self.fail(uncaught, exit_code=1)
        if self._exit_code is None:
            self._tell({"done": True})
            return
        # jax would wait for the others, and those do not come.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self._exit_code)


def _log_and_exit(sentence: str) -> None:
    _logger.critical(sentence)
    os._exit(EXIT_LOST)
