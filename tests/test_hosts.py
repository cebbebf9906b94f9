"""Several processes as one: they meet, agree, and none waits for one that is gone. Real processes over loopback."""

import contextlib
import dataclasses
import json
import queue
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.hosts import Hosts, launcher, meeting, start_hosts
from gptoss_jax.hosts.link import Link
from gptoss_jax.hosts.meeting import Address, Card
from gptoss_jax.hosts.relay import Relay
from tests.hosts.processes import Ended, free_port, run_all

WORKER = Path(__file__).with_name("hosts") / "worker.py"
SILENCE = 3


def card(process_id: int, num_processes: int = 3, **changes: object) -> Card:
    known = Card(process_id=process_id, num_processes=num_processes, host=f"host-{process_id}", software="a 1 and b 2")
    return dataclasses.replace(known, **changes)


def meet(*cards: Card, timeout: float = 5.0) -> list[object]:
    """What each brings home from a meeting in threads: who came, the answer, or the sentence it was refused with."""
    address = Address("127.0.0.1", free_port())

    def take_part(me: Card) -> object:
        try:
            if me.process_id:
                link, answer = meeting.join(address, me, timeout=timeout)
                link.close()
                return answer
            listener, guests = meeting.host(address, me, timeout=timeout)
        except UserError as error:
            return str(error)
        listener.close()
        for guest in guests:
            guest.link.send({"port": 1})
            guest.link.close()
        return [guest.card for guest in guests]

    with ThreadPoolExecutor(len(cards)) as pool:
        return list(pool.map(take_part, cards))


def test_all_are_introduced_to_process_0():
    assert meet(card(0), card(2), card(1)) == [[card(1), card(2)], {"port": 1}, {"port": 1}]


@pytest.mark.parametrize(
    ("cards", "complaint"),
    [
        (
            (card(0), card(1, 4)),
            "process 1 of 4 on host-1 and process 0 of 3 on host-0 do not agree on the number of processes: "
            "give all the same --num-processes",
        ),
        (
            (card(0), card(1), card(1, host="host-7")),
            "there are two: process 1 of 3 on .*, and another on .*; give each its own --process-id",
        ),
        (
            (card(0), card(1, software="a 2 and b 2")),
            "process 1 of 3 on host-1 runs a 2 and b 2, process 0 of 3 on host-0 runs a 1 and b 2: install the same",
        ),
    ],
)
def test_a_contradiction_is_told_to_all(cards: tuple[Card, ...], complaint: str):
    found = meet(*cards)
    assert len(set(found)) == 1
    assert re.match(complaint, str(found[0]))


def test_who_is_missing_is_told_to_all():
    host, guest = meet(card(0, 4), card(2, 4), timeout=0.5)
    assert host == guest
    assert re.match(r"processes 1, 3 of 4 did not come to 127.0.0.1:\d+ within 0.5 s, 2 did: start all", str(host))


def test_nobody_waits_for_process_0_for_ever():
    (found,) = meet(card(1), timeout=0.5)
    assert re.match(
        r"process 1 of 3 on host-1: process 0 does not answer at 127.0.0.1:\d+ within 0.5 s \(Connection refused\): "
        "start it there",
        str(found),
    )


def test_two_processes_0_on_one_machine():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match=f"cannot listen at port {address.port}: another program, or another proc"):
            meeting.host(address, card(0), timeout=1)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process_id": true}\n', b"[" * 70_000])
def test_a_stranger_at_the_port_is_shown_the_door(said: bytes):
    address = Address("127.0.0.1", free_port())
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(meeting.host, address, card(0, 2), timeout=10)
        with connected(address) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            guest = pool.submit(meeting.join, address, card(1, 2), timeout=10)
            listener, guests = host.result()
            guests[0].link.send({"port": 5})
            link, answer = guest.result()
    assert answer == {"port": 5}
    for opened in (listener, link, guests[0].link):
        opened.close()


def test_a_program_that_is_not_ours_at_the_coordinator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "_LAST_WORD", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(
            UserError, match=r"had no answer within 0\.2 s: expected process 0 there, and maybe another"
        ):
            meeting.join(address, card(1), timeout=0.2)


def test_a_latecomer_is_told_so():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(meeting.join, address, card(3, 4), timeout=5)
            meeting.refuse_latecomer(listener, card(0, 3))
            with pytest.raises(UserError, match="process 3 of 4 on host-3 comes too late: all 3 processes of this job"):
                late.result()


def test_a_message_may_come_in_pieces():
    near, far = tcp_pair()
    link = Link(near)
    for piece in (b'{"a"', b": 1}\n{", b'"b": 2}\n'):
        threading.Timer(0.05, far.sendall, (piece,)).start()
        time.sleep(0.1)
    assert link.wait(time.monotonic() + 1) == {"a": 1}
    near.close()
    far.close()


def test_a_relay_passes_on_both_ways_and_hides_the_other_end_dying():
    with socket.create_server(("127.0.0.1", 0)) as service:
        relay = Relay(Address("127.0.0.1", service.getsockname()[1]), timeout=5, on_failure=pytest.fail)
        with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as near:
            far, _ = service.accept()
            with far:
                near.sendall(b"to process 0")
                assert far.recv(100) == b"to process 0"
                far.sendall(b"back")
                assert near.recv(100) == b"back"
            near.settimeout(0.3)
            for _ in range(2):
                near.sendall(b"is anybody there?")
                with pytest.raises(TimeoutError):  # and neither an end nor a reset
                    near.recv(1)


def test_a_relay_that_reaches_nobody_says_so():
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    relay = Relay(Address("127.0.0.1", free_port()), timeout=0.2, on_failure=told.put)
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5):
        assert "does not answer within 0.2 s (Connection refused): processes need open ports" in told.get(timeout=5)


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:http", "1.2.3.4:-1"])
def test_an_address_that_is_none(text: str):
    with pytest.raises(UserError, match="expected HOST:PORT of process 0"):
        Address.parse(text)


def test_addresses():
    assert Address.parse("10.0.0.1:8476") == Address("10.0.0.1", 8476)
    assert str(Address.parse("[fe80::1]:80")) == "[fe80::1]:80"
    assert [Address(host, 1).is_loopback for host in ("localhost", "127.0.0.9", "::1", "10.0.0.1")] == [True] * 3 + [
        False
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"coordinator": "a:1"}, "num_processes=None and process_id=None one is missing, and no launcher says it"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2; expected 0 to 1 with num_pro"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "process_id is -1; expected 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes is 0; expected at least 1"),
    ],
)
def test_numbers_that_make_no_sense(arguments: dict[str, object], complaint: str):
    with pytest.raises(UserError, match=complaint):
        start_hosts(**arguments)


def test_one_process_stays_as_it_is():
    assert start_hosts() == start_hosts("nowhere:1", num_processes=1, process_id=0) == Hosts()


SLURM = {
    "SLURM_JOB_ID": "65541",
    "SLURM_STEP_NODELIST": "node[007-009,012]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("variables", "host", "process_id"), [(SLURM, "node007", 2), (OPEN_MPI, "10.96.0.1", 3)], ids=["slurm", "openmpi"]
)
def test_a_launcher_says_who_is_who(monkeypatch, variables: dict[str, str], host: str, process_id: int):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seat = launcher.find_seat(timeout=1)
    assert seat is not None
    assert (seat.num_processes, seat.process_id) == (4, process_id)
    assert Address.parse(seat.coordinator).host == host


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # the shell of `salloc --ntasks 4`
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # the script of an sbatch, outside srun
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod, that of a notebook say
    ],
    ids=["no launcher", "salloc", "srun -n 1", "sbatch", "mpirun -n 1", "lone pod"],
)
def test_a_process_that_was_started_alone_stays_alone(monkeypatch, variables: dict[str, str]):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.find_seat(timeout=1) is None


def test_gpus_are_dealt_out_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher.own_devices(0, 1) is None  # alone on its host: all of them
    assert launcher.own_devices(2, 4) == [2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert launcher.own_devices(3, 4) == [3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # srun --gpus-per-task=1 has done it
    assert launcher.own_devices(3, 4) is None


# --- real processes -----------------------------------------------------------------------------------------------


def work(*steps: str, num_processes: int = 3, silence: float = 30, stopped: tuple[int, ...] = ()) -> list[Ended]:
    port = free_port()
    words = [word for step in steps for word in ("--step", step)]
    command = (sys.executable, WORKER, port, num_processes)
    commands = [(*command, i, *words, "--silence-timeout", silence) for i in range(num_processes)]
    return run_all(commands, stopped=stopped)


def said(process: Ended) -> dict[str, object]:
    """All that it printed, but for what gloo prints."""
    return {k: v for line in process.stdout.splitlines() if line.startswith("{") for k, v in json.loads(line).items()}


def test_they_compute_and_end_together():
    for number, process in enumerate(work("gather", "barrier", "agree:same")):
        assert process.code == 0, process.stderr
        assert said(process) == {"met": 3, "gathered": [1, 2, 3], "first": number == 0, "devices": 3}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_at_once(victim: int):
    """In the middle of a collective; process 0 is where jax's own service lives."""
    ended = work("gather", f"kill@{victim}", "gather", "sleep:60")
    death = ended[victim]
    assert death.code == -9
    for process in [process for number, process in enumerate(ended) if number != victim]:
        assert process.code == 3
        reason = f"process {victim} of 3 on {socket.gethostname()} has ended without a word: killed, or out of memory"
        assert process.stderr.splitlines()[-1] == f"{reason} (so all processes stop)"
        assert process.seconds - death.seconds < 10  # one, and what a busy machine takes
        assert "Check failure stack trace" not in process.stderr  # of jax's service, in C++


def test_a_process_that_falls_silent_ends_the_others_in_time():
    *others, _ = work("gather", "stop@2", "gather", "sleep:60", silence=SILENCE, stopped=(2,))
    for process in others:
        assert process.code == 3
        assert f"process 2 of 3 on {socket.gethostname()} has not been heard of for {SILENCE} s" in process.stderr
        assert process.seconds < 50


@pytest.mark.parametrize(
    ("step", "code", "reason"),
    [("mistake@1", 2, "the paper is empty; expected words"), ("bug@1", 1, "RuntimeError: a bug")],
)
def test_an_error_is_told_to_the_others(step: str, code: int, reason: str):
    first, failed, third = work("gather", step, "gather", "sleep:60")
    assert failed.code == code
    assert reason in failed.stderr
    for process in (first, third):
        assert process.code == 3
        assert f"process 1 of 3 on {socket.gethostname()} failed: {reason} (so all processes stop)" in process.stderr


def test_disagreement_and_failing_together():
    for process in work("agree:same", "agree-own"):
        assert process.code == 2
        assert re.search(
            r"the test's value is not the same everywhere: process 0 has 'SHA-256 \w{12}…', process 1 has 'SHA-256 "
            r"\w{12}…'; give all processes the same",
            process.stderr,
        )
    first, failed = work("together", num_processes=2)
    assert (first.code, failed.code) == (2, 2)
    assert "process 1 failed at thinking; its own message says why" in first.stderr
    assert "this is wrong" in failed.stderr


# ------------------------------------------------------------------------------------------------------------------


def connected(address: Address) -> socket.socket:
    """As soon as somebody listens."""
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((address.host, address.port))
        time.sleep(0.02)
    raise TimeoutError(address)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]
