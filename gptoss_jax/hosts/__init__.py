"""Several processes as one: they find each other, wait for each other and fail together. Knows no files, no model."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src import xla_bridge  # jax.distributed.initialize asks it too, when the others have waited already
from jax.experimental import multihost_utils

import gptoss_jax
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import launcher, meeting
from gptoss_jax.hosts.relay import Relay
from gptoss_jax.hosts.watch import EXIT_LOST, Watch

__all__ = ["EXIT_LOST", "Hosts", "agree", "barrier", "is_first", "start_hosts", "together"]

JOIN_TIMEOUT = 300.0
SILENCE_TIMEOUT = 30.0
_SHOWN = 32  # bytes of a value in a message; of a longer one its hash
_HEARTBEAT_TIMEOUT = 100  # jax's own, at least: ours is to come first, since jax ends the program from C++


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """This process among all that work together."""

    process_id: int = 0
    num_processes: int = 1
    watch: Watch | None = None

    def fail(self, error: BaseException, *, exit_code: int = 1) -> None:
        """Tells the other processes that this one ends with `error`, so that they do not wait for it.

        The program is to end with `exit_code` soon. If `error` is a consequence of another process's end, this ends it.
        """
        if self.watch is not None:
            self.watch.fail(error, exit_code=exit_code)


def start_hosts(
    coordinator: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_timeout: float = JOIN_TIMEOUT,
    silence_timeout: float = SILENCE_TIMEOUT,
    on_loss: Callable[[str], None] | None = None,
) -> Hosts:
    """Joins the other processes, so that jax.devices() are those of all of them. A single process stays untouched.

    Call it before jax looks for devices. What is not given is found on SLURM, Open MPI, indexed jobs of Kubernetes and
    TPU pods; where there is no launcher, or it started one process only, nothing happens. Nor does it where the program
    has called jax.distributed.initialize itself.

    From then on a thread watches the other processes. One that is killed is noticed at once, one that fails by itself
    with its message, a machine that vanishes after `silence_timeout` seconds; then this program ends with EXIT_LOST.

    Args:
        coordinator: HOST:PORT where process 0 can be reached; it listens there itself.
        num_processes: how many there are.
        process_id: which this is, from 0.
        join_timeout: seconds to wait until all are there.
        silence_timeout: seconds without a sign of life after which a process counts as lost.
        on_loss: called with one sentence, from the watching thread, instead of logging it and ending the program.

    Raises:
        UserError: a process is missing, there twice, or counts differently; the numbers make no sense; or jax has
            started already.
    """
    if jax.distributed.is_initialized():
        return Hosts(process_id=jax.process_index(), num_processes=jax.process_count())
    seat = _seat(coordinator, num_processes, process_id, join_timeout)
    if seat is None:
        return Hosts()
    if xla_bridge.backends_are_initialized():
        raise UserError(
            f"jax has found its devices before the {seat.num_processes} processes met: "
            "call start_hosts before anything else asks for devices"
        )
    assert seat.coordinator is not None
    address = meeting.Address.parse(seat.coordinator)
    me = meeting.Card(
        process_id=seat.process_id,
        num_processes=seat.num_processes,
        host=socket.gethostname(),
        software=f"gptoss_jax {gptoss_jax.__version__} and jax {jax.__version__}",
    )
    watch = _meet(
        address,
        me,
        join_timeout=join_timeout,
        silence_timeout=silence_timeout,
        launched=coordinator is None,
        on_loss=on_loss,
    )
    return Hosts(process_id=me.process_id, num_processes=me.num_processes, watch=watch)


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together(step: str) -> Iterator[None]:
    """A step that all processes leave at once: by a UserError if one of them raised one, so that none waits for it."""
    failed: UserError | None = None
    try:
        yield
    except UserError as error:
        failed = error
    if jax.process_count() > 1:
        flags = np.ravel(multihost_utils.process_allgather(np.array(failed is not None)))
        if failed is None and flags.any():
            raise UserError(f"process {int(flags.argmax())} failed at {step}; its own message says why: run it again")
    if failed is not None:
        raise failed


def agree(what: str, value: str) -> None:
    """Checks that all processes hold the same `value`, which may be of any length.

    Raises:
        UserError: they do not; on all of them, with the first that differs from process 0. Or they have different
            numbers of devices, which jax cannot gather from.
    """
    if jax.process_count() == 1:
        return
    _check_even()
    digest = hashlib.sha256(value.encode())
    short = len(value.encode()) <= _SHOWN and value.isprintable()
    shown = value if short else f"SHA-256 {digest.hexdigest()[:12]}…"
    own = np.frombuffer(digest.digest() + shown.encode().ljust(_SHOWN), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, own.size)
    other = int((found != found[0]).any(axis=1).argmax())
    if other:
        first, second = (found[i, digest.digest_size :].tobytes().decode().rstrip() for i in (0, other))
        raise UserError(
            f"{what} is not the same everywhere: process 0 has {first!r}, process {other} has {second!r}; "
            "give all processes the same"
        )


def _check_even() -> None:
    held = Counter(device.process_index for device in jax.devices())
    for process_id, count in held.items():
        if count != held[0]:
            raise UserError(
                f"process 0 has {held[0]} devices, process {process_id} has {count}; expected as many everywhere: "
                "give all the same --host-devices, or let each see the same number of GPUs"
            )


def _seat(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> launcher.Seat | None:
    """Where this process sits; None for one that is alone."""
    if None in (coordinator, num_processes, process_id):
        found = launcher.find_seat(timeout=timeout)
        if found is not None:
            coordinator = found.coordinator if coordinator is None else coordinator
            num_processes = found.num_processes if num_processes is None else num_processes
            process_id = found.process_id if process_id is None else process_id
        elif coordinator is num_processes is process_id is None:
            return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"of coordinator={coordinator}, num_processes={num_processes} and process_id={process_id} one is missing, "
            "and no launcher says it: give all three, or none"
        )
    if num_processes < 1:
        raise UserError(f"num_processes is {num_processes}; expected at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id is {process_id}; expected 0 to {num_processes - 1} with num_processes={num_processes}"
        )
    if num_processes == 1:
        return None
    return launcher.Seat(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def _meet(
    address: meeting.Address,
    me: meeting.Card,
    *,
    join_timeout: float,
    silence_timeout: float,
    launched: bool,
    on_loss: Callable[[str], None] | None,
) -> Watch:
    """Waits for all, starts the watch, then jax."""
    start = functools.partial(
        _start_jax, me=me, join_timeout=join_timeout, silence_timeout=silence_timeout, launched=launched
    )
    if me.process_id == 0:
        listener, guests = meeting.host(address, me, timeout=join_timeout)
        with meeting.reserved_port(address) as port:
            at = [me.host, *(guest.card.host for guest in guests)]
            for guest in guests:
                guest.link.send({"port": port, "hosts": at})
            watch = Watch(me, guests, listener=listener, silence=silence_timeout, on_loss=on_loss)
            start(address.with_port(port), at, watch=watch)
        return watch
    link, answer = meeting.join(address, me, timeout=join_timeout)
    first = dataclasses.replace(me, process_id=0, host=answer["hosts"][0])
    watch = Watch(me, [meeting.Guest(first, link)], listener=None, silence=silence_timeout, on_loss=on_loss)
    relay = Relay(address.with_port(answer["port"]), timeout=join_timeout, on_failure=watch.give_up)
    start(meeting.Address("127.0.0.1", relay.port), answer["hosts"], watch=watch)
    return watch


def _start_jax(
    service: meeting.Address,
    hosts: list[str],
    *,
    me: meeting.Card,
    join_timeout: float,
    silence_timeout: float,
    launched: bool,
    watch: Watch,
) -> None:
    neighbours = [i for i, host in enumerate(hosts) if host == me.host]
    devices = launcher.own_devices(neighbours.index(me.process_id), len(neighbours)) if launched else None
    try:
        jax.distributed.initialize(
            str(service),
            me.num_processes,
            me.process_id,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(join_timeout) + 30,
            heartbeat_timeout_seconds=max(_HEARTBEAT_TIMEOUT, math.ceil(4 * silence_timeout)),
            coordinator_bind_address=str(service) if service.is_loopback else None,
        )
    except Exception as error:
        watch.fail(error, exit_code=1)
        raise
