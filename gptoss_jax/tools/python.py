"""The `python` tool: runs what the model writes, in a process of its own. Knows processes and limits; knows no model.

call ─► thread ─► python -I -S ─► limits, walls (confine.py) ─► the program
                      │                                            │
                      └──────────── killed: time, output ◄── what it prints ──► the model
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import gptoss_jax
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.harmony.messages import Namespace
from gptoss_jax.tools.base import ToolError
from gptoss_jax.tools.thread import in_thread

_OURS = str(Path(gptoss_jax.__file__).resolve().parents[1])
_START = "import sys; sys.path.append(sys.argv[1]); from gptoss_jax.tools.python_child import main; main(sys.argv[2])"
_FLAGS = ("-I", "-S", "-B", "-X", "utf8")  # no environment, no site-packages, no bytecode written, UTF-8
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # it may start none
_MOST_OUTPUT = 1 << 20  # bytes that are read at all
_OPEN_FILES = 64
_SCRATCH_BYTES = 64 << 20  # of one file, where files can be written
_PROBE = """
import socket
def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return True
print("held" if refused(open, {secret!r}) and refused(socket.socket) else "not held")
"""


class PythonTool:
    """Runs Python for the model, each call in a new process: nothing is kept between calls.

    The answer is what the program printed, errors included, and the value of an expression at its end, as a notebook
    shows it. On Linux (5.13 and newer, Landlock on, x86_64 or aarch64) the kernel keeps a program from

    - the network, and every socket;
    - files, but for the standard library, `import_paths`, /lib, /lib64, /usr/lib, /usr/lib64 and the time zones, which
      it can read; it can write none at all;
    - starting processes and threads, and signals to others;
    - the server's environment, memory and open files;
    - more time, memory or output than it is given.

    It does not keep it from asking whether a file exists, and its size and times; from reading the machine's name and
    clock, and what Spectre-like attacks measure; from using a core until its time is over; and from an error in the
    kernel or the processor. Programs of people who attack you belong on another machine.

    Args:
        timeout_s: of one program, by the clock.
        memory_bytes: of one program, as addresses; Python itself takes about 30 MB.
        output_chars: of an answer; of a longer one the middle is left out.
        import_paths: folders of packages that programs can import, and read.
        max_running: programs at the same time; others wait.
        unprotected: runs programs without these walls, where there are none or on another system: they can read, write
            and send what you can. Only limits of time, output and (on Linux) memory hold. For use within a container
            or a virtual machine that holds nothing else.

    Raises:
        Unsupported: the walls cannot be put up here.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 30.0,
        memory_bytes: int = 512 << 20,
        output_chars: int = 16_000,
        import_paths: Sequence[str | Path] = (),
        max_running: int = 4,
        unprotected: bool = False,
    ):
        _check(timeout_s=timeout_s, memory_bytes=memory_bytes, output_chars=output_chars, max_running=max_running)
        self._timeout_s = timeout_s
        self._output_chars = output_chars
        self._import_paths = [str(_folder(path)) for path in import_paths]
        self._places = threading.BoundedSemaphore(max_running)
        settings = {
            "ours": _OURS,
            "import_paths": self._import_paths,
            "confined": not unprotected,
            "memory_bytes": memory_bytes,
            "cpu_s": int(timeout_s) + 2,
            "file_bytes": _SCRATCH_BYTES if unprotected else 0,
            "open_files": _OPEN_FILES,
        }
        self._command = (sys.executable, *_FLAGS, "-c", _START, _OURS, json.dumps(settings))
        self._unprotected = unprotected
        self._try()

    @property
    def namespace(self) -> Namespace:
        """What the model is told: that nothing is kept, unlike in the notebook that it was trained with."""
        return Namespace(name="python", description=self._description())

    def handles(self, recipient: str) -> bool:
        """Whether the recipient is `python`, or a function that the model takes it to have."""
        return recipient.partition(".")[0] == "python"

    def session(self) -> "PythonTool":
        """Itself: a program knows nothing of those before it."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """Runs a program; cancelling kills it.

        Raises:
            ToolError: it was killed; what it printed before stands in the text.
        """
        run = _Run(self._command, text, timeout_s=self._timeout_s)
        try:
            ended = await in_thread(lambda: self._run(run))
        finally:
            run.kill()
        return self._answer(ended)

    def _run(self, run: "_Run") -> "_Ended":
        with self._places:
            return run.finish()

    def _answer(self, ended: "_Ended") -> str:
        output = _shortened(ended.output.decode("utf-8", "replace"), self._output_chars)
        if ended.why is not None:
            raise ToolError("\n".join(part for part in (output.rstrip("\n"), ended.why) if part))
        return output or "The program ended and printed nothing; print what you want to see."

    def _description(self) -> str:
        packages = "the standard library" + (" and installed packages" if self._import_paths else "")
        bounds = (
            "" if self._unprotected else " It has no network, and can start no thread or process and write no file."
        )
        return (
            "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. "
            "This tool should be used for internal reasoning, but not for code that is intended to be visible to the "
            "user (e.g. when creating plots, tables, or files).\n\n"
            "When you send a message containing Python code to python, it will be executed in a new process, which "
            "keeps nothing of earlier ones. python will respond with what it printed and the value of a last "
            f"expression, or time out after {self._timeout_s:.1f} seconds. It can import {packages}.{bounds}"
        )

    def _try(self) -> None:
        """Runs a program that tries to get out.

        Raises:
            Unsupported: it got out, or did not run.
        """
        if not (hasattr(os, "killpg") and sys.executable):
            raise Unsupported(
                f"the python tool needs process groups and a Python to start; {sys.platform} has not both"
            )
        if self._unprotected:
            return
        if sys.platform != "linux":
            raise Unsupported(_no_walls(f"they need Linux, and this is {sys.platform}"))
        with tempfile.NamedTemporaryFile() as secret:
            ended = _Run(self._command, _PROBE.format(secret=secret.name), timeout_s=60.0).finish()
        said = ended.output.decode("utf-8", "replace").strip()
        if ended.why is not None or said != "held":
            raise Unsupported(_no_walls(ended.why or said))


# --- one program ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ended:
    """What a program printed, and why it was killed, if it was."""

    output: bytes
    why: str | None


class _Run:
    """One process, from its start to its end in one thread; any thread may kill it."""

    def __init__(self, command: Sequence[str], text: str, *, timeout_s: float):
        self._command = command
        self._text = text
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # a process's id may be another's as soon as it was waited for
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def finish(self) -> _Ended:
        """Starts the process, reads what it prints, and sees to its end."""
        with tempfile.TemporaryDirectory(prefix="gptoss-jax-python-", ignore_cleanup_errors=True) as folder:
            process = self._start(folder)
            if process is None:
                return _Ended(b"", "the program was not started: its call was given up")
            assert process.stdout is not None
            with process.stdout as output:
                try:
                    read, why = self._read(output.fileno())
                finally:
                    self._reap(process)
            return _Ended(read, why or _why_it_died(process.returncode))

    def kill(self) -> None:
        """Kills it and all that it started; one that was not started yet never is."""
        with self._lock:
            self._killed = True
            if self._process is not None and self._process.returncode is None:
                _kill_group(self._process.pid)

    def _start(self, folder: str) -> subprocess.Popen[bytes] | None:
        with tempfile.TemporaryFile() as program:
            program.write(self._text.encode("utf-8", "replace"))
            program.seek(0)
            with self._lock:
                if not self._killed:
                    self._process = subprocess.Popen(
                        self._command,
                        stdin=program,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        env=_ENVIRONMENT,
                        start_new_session=True,
                    )
                return self._process

    def _read(self, output: int) -> tuple[bytes, str | None]:
        """All that is printed, and why no more of it is waited for."""
        deadline = time.monotonic() + self._timeout_s
        read = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while selector.select(deadline - time.monotonic() if deadline > time.monotonic() else 0):
                piece = os.read(output, 1 << 16)
                if not piece:
                    return bytes(read), None
                read += piece
                if len(read) > _MOST_OUTPUT:
                    return bytes(read), f"The program was stopped: it printed more than {_MOST_OUTPUT} bytes."
        return bytes(read), f"The program was stopped: it ran for {self._timeout_s:g} s."

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Whoever prints nothing more is not waited for. One that ends by itself keeps its exit code."""
        with self._lock:
            _kill_group(process.pid)
            process.wait()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids it where it finds only the dead
        os.killpg(leader, signal.SIGKILL)


def _why_it_died(code: int) -> str | None:
    """Errors of the program's own speak for themselves."""
    if code >= 0:
        return None
    names = {each.value: each.name for each in signal.Signals}  # most real-time signals have none
    return f"The program was ended by {names.get(-code, f'signal {-code}')}."


def _shortened(text: str, most: int) -> str:
    """Beginning and end: an error stands last."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[len(text) - half :]}"


# --- settings ---------------------------------------------------------------------------------------------------------


def _check(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise UserError(f"{name} of the python tool is {value}; expected more than 0")


def _folder(path: str | Path) -> Path:
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise UserError(f"an import path of the python tool is {str(path)!r}; expected a folder of packages")
    return folder


def _no_walls(why: str) -> str:
    return (
        f"the python tool cannot keep programs from files and network here ({why}); run it on Linux 5.13 or newer with "
        "Landlock, or, in a container that holds nothing else, with unprotected=True"
    )
