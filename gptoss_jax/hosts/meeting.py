"""Where processes meet before jax knows of them: who comes, and whether all say the same. Knows sockets, no jax.

jax's own meeting ends the program from C++ where a process is missing, is there twice or counts differently, and does
not say which. So they meet here first, at the coordinator's address, and jax begins when all have come:

    process 1 .. N-1                        process 0, at HOST:PORT
      {"process_id": 1, ...}     ──►          waits until all are there
      {"port": 41035, ...}       ◄──          where jax's service will listen; or {"refused": "why"}

The connections stay open: `watch` notices by them who ends.
"""

import contextlib
import dataclasses
import errno
import socket
import time
from collections.abc import Iterator
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.hosts.link import Link

_RETRY = 0.2
_FIRST_WORD = 2.0  # seconds for a caller to say who it is, so that a port scanner holds nobody up
_LAST_WORD = 10.0  # process 0 knows who is missing: the others give it this much longer to tell them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What a process says of itself."""

    process_id: int
    num_processes: int
    host: str
    software: str  # "gptoss_jax 0.1.0 and jax 0.10.2"

    @classmethod
    def read(cls, message: dict[str, Any]) -> "Card | None":
        """The card in a caller's first message, None where it is none."""
        kinds = {"process_id": int, "num_processes": int, "host": str, "software": str}
        if any(type(message.get(name)) is not kind for name, kind in kinds.items()):
            return None
        return cls(**{name: message[name] for name in kinds})

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.num_processes} on {self.host}"


@dataclasses.dataclass(frozen=True)
class Address:
    """Where process 0 is."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Reads "10.0.0.1:8476" or "[::1]:8476".

        Raises:
            UserError: it is neither.
        """
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UserError(f"the coordinator is {text!r}; expected HOST:PORT of process 0, as in 10.0.0.1:8476")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def with_port(self, port: int) -> "Address":
        return Address(self.host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Guest:
    """Another process, as process 0 knows it."""

    card: Card
    link: Link


def host(address: Address, me: Card, *, timeout: float) -> tuple[socket.socket, list[Guest]]:
    """Process 0's part: waits for all the others. Gives the socket that listens, for latecomers, and who came.

    Raises:
        UserError: somebody is missing, there twice, or one of another job; all who came are told the same sentence.
    """
    deadline = time.monotonic() + timeout
    listener = _listen(address)
    guests: dict[int, Guest] = {}
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(listener)
        try:
            while len(guests) < me.num_processes - 1:
                guest = _next_guest(listener, deadline)
                if guest is None:
                    raise UserError(_missing(me, guests, address, timeout))
                on_error.callback(guest.link.close)
                known = guests.get(guest.card.process_id)
                problem = _contradiction(guest.card, me, None if known is None else known.card)
                if problem is not None:
                    guest.link.send({"refused": problem})
                    raise UserError(problem)
                guests[guest.card.process_id] = guest
        except UserError as error:
            for guest in guests.values():
                guest.link.send({"refused": str(error)})
            raise
        on_error.pop_all()
    return listener, [guests[process_id] for process_id in sorted(guests)]


def join(address: Address, me: Card, *, timeout: float) -> tuple[Link, dict[str, Any]]:
    """The part of all others: calls process 0 until it answers. Gives the connection and process 0's answer.

    Raises:
        UserError: nobody answers, or process 0 says that something is wrong.
    """
    deadline = time.monotonic() + timeout
    link = _call(address, me, deadline, timeout)
    with contextlib.ExitStack() as on_error:
        on_error.callback(link.close)
        link.send(dataclasses.asdict(me))
        try:
            answer = link.wait(deadline + _LAST_WORD)
        except TimeoutError:
            raise UserError(
                f"{me} called {address} and had no answer within {timeout:g} s: expected process 0 there, and maybe "
                "another program listens; give all processes process 0's own address and a free port"
            ) from None
        except EOFError:
            raise UserError(
                f"process 0 at {address} ended before all {me.num_processes} processes were there; "
                "its own message says why: run them all again"
            ) from None
        if "refused" in answer:
            raise UserError(str(answer["refused"]))
        on_error.pop_all()
    return link, answer


def refuse_latecomer(listener: socket.socket, me: Card) -> None:
    """Tells a process that comes when all are there that it is one too many."""
    guest = _next_guest(listener, time.monotonic() + _FIRST_WORD)
    if guest is not None:
        problem = (
            f"{guest.card} comes too late: all {me.num_processes} processes of this job are there already; "
            "give another job another port of the coordinator"
        )
        guest.link.send({"refused": problem})
        guest.link.close()


@contextlib.contextmanager
def reserved_port(address: Address) -> Iterator[int]:
    """A port for jax's service, kept from others until the service has it: gRPC's sockets share their ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reserved:
        if hasattr(socket, "SO_REUSEPORT"):
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1" if address.is_loopback else "", 0))
        yield reserved.getsockname()[1]


def _listen(address: Address) -> socket.socket:
    everywhere = socket.has_dualstack_ipv6()
    place, family = ("::", socket.AF_INET6) if everywhere else ("", socket.AF_INET)
    if address.is_loopback:  # a trial on one machine is nobody else's business
        place, family = ("::1", socket.AF_INET6) if ":" in address.host else ("127.0.0.1", socket.AF_INET)
    try:
        return socket.create_server(
            (place, address.port),
            family=family,
            backlog=1024,
            dualstack_ipv6=everywhere and not address.is_loopback,
        )
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "another program, or another process 0, listens there" if taken else error.strerror
        raise UserError(
            f"process 0 cannot listen at port {address.port}: {why}; give all processes another port of the coordinator"
        ) from error


def _next_guest(listener: socket.socket, deadline: float) -> Guest | None:
    """The next caller that says who it is; None if none does in time."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return None
        link = Link(connection)
        try:
            card = Card.read(link.wait(min(deadline, time.monotonic() + _FIRST_WORD)))
        except (EOFError, TimeoutError):
            card = None
        if card is not None:
            return Guest(card, link)
        link.close()


def _call(address: Address, me: Card, deadline: float, timeout: float) -> Link:
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.001)
            return Link(socket.create_connection((address.host, address.port), timeout=left))
        except OSError as error:  # not there yet, or its name is not known yet
            if time.monotonic() + _RETRY > deadline:
                raise UserError(
                    f"{me}: process 0 does not answer at {address} within {timeout:g} s ({error.strerror or error}): "
                    "start it there, or give all processes the address where it is"
                ) from error
            time.sleep(_RETRY)


def _contradiction(guest: Card, me: Card, known: Card | None) -> str | None:
    if guest.num_processes != me.num_processes:
        return f"{guest} and {me} do not agree on the number of processes: give all the same --num-processes"
    if known is not None or not 0 < guest.process_id < me.num_processes:
        other = me if known is None else known
        return f"there are two: {other}, and another on {guest.host}; give each its own --process-id"
    if guest.software != me.software:
        return f"{guest} runs {guest.software}, {me} runs {me.software}: install the same on all hosts"
    return None


def _missing(me: Card, guests: dict[int, Guest], address: Address, timeout: float) -> str:
    missing = [str(i) for i in range(1, me.num_processes) if i not in guests]
    shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
    who = f"process {shown}" if len(missing) == 1 else f"processes {shown}"
    return (
        f"{who} of {me.num_processes} did not come to {address} within {timeout:g} s, {len(guests) + 1} did: "
        "start all of them with this coordinator; what a missing one printed says more"
    )
