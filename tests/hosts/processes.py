"""Starts several processes that are to find each other on this machine, and collects what becomes of them."""

import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "import sys; from gptoss_jax.cli import main; sys.exit(main())")
_TIMEOUT = 240
_PORTS = range(20_000, 32_000)  # below those that the system gives to whoever asks for any


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a process left: `seconds` is when it ended, counted from the start of all."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def environment(**more: str) -> dict[str, str]:
    """Of a process that chooses its devices itself and sees no launcher. It compiles as this one does, to the bit."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return {**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT), **more}


@contextlib.contextmanager
def started(commands: Sequence[Sequence[object]], *, cwd: Path | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """None of them outlives the block."""
    processes = [
        subprocess.Popen(
            [str(word) for word in command],
            env=environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_all(
    commands: Sequence[Sequence[object]], *, cwd: Path | None = None, stopped: Collection[int] = ()
) -> list[Ended]:
    """Runs them side by side until all have ended; the `stopped` never do, and are killed when the others have."""
    with started(commands, cwd=cwd) as processes:
        return collect(processes, stopped=stopped)


def collect(processes: Sequence[subprocess.Popen[str]], *, stopped: Collection[int] = ()) -> list[Ended]:
    """Reads all of them until they have ended."""
    begin = time.monotonic()
    ended: dict[int, Ended] = {}

    def read(number: int) -> None:
        stdout, stderr = processes[number].communicate(timeout=_TIMEOUT)
        ended[number] = Ended(processes[number].returncode, stdout, stderr, time.monotonic() - begin)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    for number in sorted(range(len(processes)), key=lambda number: number in stopped):
        if number in stopped:
            processes[number].kill()
        threads[number].join()
        assert number in ended, f"process {number} still runs after {_TIMEOUT} s"
    return [ended[number] for number in range(len(processes))]


def side_by_side(*commands: Sequence[object]) -> list[Sequence[object]]:
    """`gptoss-jax` commands as processes that are to find each other."""
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", len(commands), "--join-timeout", 120)
    return [(*COMMAND, *command, *where, "--process-id", i) for i, command in enumerate(commands)]
