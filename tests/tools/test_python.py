"""The python tool: what programs print, and programs that try to get out, to stay, or to take all there is."""

import asyncio
import itertools
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.tools.base import Tool, ToolError
from gptoss_jax.tools.python import PythonTool

LIMITS = {"timeout_s": 20.0, "memory_bytes": 256 << 20, "output_chars": 2_000}


@pytest.fixture(scope="module")
def python() -> PythonTool:
    try:
        return PythonTool(**LIMITS)
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def unprotected() -> PythonTool:
    return PythonTool(**LIMITS, unprotected=True)


def run(tool: PythonTool, program: str) -> str:
    return asyncio.run(tool.call("python", program))


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# What a program prints


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print(1)\nprint('é')", "1\né\n"),
        ("x = 20\nx + 1", "21\n"),
        ("x = 20\nNone", "The program ended and printed nothing; print what you want to see."),
        ("", "The program ended and printed nothing; print what you want to see."),
        ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('out')", "out\nerr\nout\n"),
        ("print('before')\nraise SystemExit('bye')", "before\nbye\n"),
        ("import sys\nprint('before')\nsys.exit(3)", "before\n"),
        ("__name__, input.__name__", "('__main__', 'input')\n"),
        (
            "def f():\n    return 1 / 0\nf()",
            'Traceback (most recent call last):\n  File "<program>", line 3, in <module>\n',
        ),
        ("def f(:", '  File "<program>", line 1\n    def f(:\n'),
        ("input()", "Traceback"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)\n"),
    ],
)
def test_a_program_answers_with_what_it_printed_and_its_last_value(python: PythonTool, program: str, output: str):
    assert run(python, program)[: len(output)] == output


def test_the_standard_library_works(python: PythonTool):
    program = """
import asyncio, bz2, ctypes, decimal, fractions, hashlib, json, lzma, random, re, secrets, sqlite3, ssl, statistics
import uuid, zoneinfo
async def nap():
    await asyncio.sleep(0.001)
    return 7
double = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: 2 * x)
print(asyncio.run(nap()), double(4), sqlite3.connect(":memory:").execute("select 1 + 1").fetchone()[0])
print(hashlib.sha256(b"").hexdigest()[:4], bz2.decompress(bz2.compress(b"z")), lzma.decompress(lzma.compress(b"l")))
"""
    assert run(python, program) == "7 8 2\ne3b0 b'z' b'l'\n"


def test_nothing_is_kept_between_programs(python: PythonTool):
    assert run(python, "x = 1\nx") == "1\n"
    assert "NameError" in run(python, "x")


def test_packages_can_be_lent(tmp_path: Path, python: PythonTool):
    packages, secret = tmp_path / "packages", tmp_path / "secret"
    packages.mkdir()
    (packages / "lent.py").write_text("value = 42")
    secret.write_text("the key")
    assert "No module named 'lent'" in run(python, "import lent")
    lending = PythonTool(**LIMITS, import_paths=[packages])
    assert run(lending, "import lent\nlent.value") == "42\n"
    assert "PermissionError" in run(lending, f"open({str(secret)!r})")
    for flag in ("O_TRUNC", "O_RDWR", "O_WRONLY"):
        assert "PermissionError" in run(lending, f"import os, lent\nos.open(lent.__file__, os.{flag})")
    assert (packages / "lent.py").read_text() == "value = 42"
    assert "and installed packages" in lending.namespace.description


def test_it_is_a_tool_that_says_what_it_does(python: PythonTool):
    assert isinstance(python, Tool)
    assert python.session() is python
    assert python.namespace.name == "python"
    assert "keeps nothing of earlier ones" in python.namespace.description
    assert "time out after 20.0 seconds" in python.namespace.description
    assert [python.handles(name) for name in ("python", "python.run", "pythonic", "functions.python")] == [1, 1, 0, 0]


# Getting out


def refused(python: PythonTool, program: str) -> None:
    """The program's attempt ends in an error of the system's, which it tells."""
    indented = "\n    ".join(program.strip().splitlines())
    told = run(
        python, f"try:\n    {indented}\nexcept (OSError, RuntimeError) as e:\n    print('refused', type(e).__name__)"
    )
    assert told.startswith("refused "), told


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/../etc/passwd",
        "/proc/self/environ",
        "/proc/{server}/environ",
        "/proc/{server}/mem",
        "/proc/self/{root}/etc/passwd",
        "{secret}",
        "{module}",
    ],
)
def test_files_of_the_server_cannot_be_read(python: PythonTool, tmp_path: Path, path: str):
    secret = tmp_path / "secret"
    secret.write_text("the key")
    path = path.format(server=os.getpid(), secret=secret, module=__file__, root="root")
    refused(python, f"open({path!r}, 'rb').read(1)")
    refused(python, f"import os\nos.chdir({os.path.dirname(path)!r})\nopen({os.path.basename(path)!r}, 'rb').read(1)")


@pytest.mark.parametrize(
    "program",
    [
        "os.listdir('/')",
        "os.listdir('/proc')",
        "open('written', 'w')",
        "open('/dev/shm/written', 'w')",
        "open(os.open('.', os.O_TMPFILE | os.O_RDWR), 'w')",
        "os.mkdir('made')",
        "os.symlink('/etc/passwd', 'link')",
        "os.chmod('.', 0o777)",
        "os.utime('.', (0, 0))",
        "os.memfd_create('memory')",
        "os.setxattr('.', 'user.a', b'')",
        "os.chroot('.')",
        "os.mkfifo('pipe')",
    ],
)
def test_no_file_can_be_made_or_changed(python: PythonTool, program: str):
    refused(python, f"import os\n{program}")


@pytest.mark.parametrize(
    "program",
    [
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.create_connection(('127.0.0.1', 22), 1)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect('/dev/log')",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, '/dev/log')",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1', timeout=1)",
    ],
)
def test_there_is_no_network(python: PythonTool, program: str):
    refused(python, f"import socket\n{program}")


@pytest.mark.parametrize(
    "program",
    [
        "os.fork()",
        "os.posix_spawn(sys.executable, ['python'], {})",
        "os.execv(sys.executable, ['python'])",
        "import subprocess; subprocess.run(['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 0)",
        "os.killpg(0, 9)",
        "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "os.setsid()",
        "os.setpriority(os.PRIO_PROCESS, 0, -5)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    ],
)
def test_it_stays_alone(python: PythonTool, program: str):
    refused(python, f"import os, sys\n{program}")


@pytest.mark.parametrize(
    "call",
    [
        "PTRACE := 101, 16, {server}, 0, 0",
        "READ_OF_ANOTHER := 310, {server}, 0, 0, 0, 0, 0",
        "CLONE := 56, 17, 0, 0, 0, 0",
        "CLONE_3 := 435, 0, 0",
        "NEW_NAMESPACES := 272, 0x10000000",
        "MOUNT := 165, 0, 0, 0, 0, 0",
        "RING := 425, 8, 0",
        "OPEN_2 := 437, -100, 0, 0, 0",
        "BPF := 321, 0, 0, 0",
        "KEYS := 250, 0, 0",
        "SHARED_MEMORY := 29, 0, 4096, 0o1600",
        "SETUID := 105, 0",
    ],
)
def test_calls_past_python_are_refused_too(python: PythonTool, call: str):
    if platform.machine() != "x86_64":
        pytest.skip("these are x86_64's numbers")
    arguments = call.format(server=os.getpid()).partition(":=")[2]
    program = (
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.syscall({arguments}), ctypes.get_errno())"
    )
    assert run(python, program) in ("-1 1\n", "-1 38\n")  # EPERM, ENOSYS


@pytest.mark.parametrize("code", ["b8140000 00cd80c3", "b8020000400f05c3"], ids=["32-bit", "x32"])
def test_the_other_doors_of_the_kernel_are_shut(python: PythonTool, code: str):
    if platform.machine() != "x86_64":
        pytest.skip("this is x86_64's machine code")
    program = f"""
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex({code!r}))
ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
"""
    with pytest.raises(ToolError, match="ended by SIGSYS"):
        run(python, program)


def test_nothing_of_the_server_is_inherited(python: PythonTool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("API_KEY", "secret")
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        program = f"""
import os
print("secret" in str(os.environ), os.listdir("."), os.getcwd() == {os.getcwd()!r})
try:
    print(os.fstat({file.fileno()}))
except OSError:
    print("closed")
"""
        assert run(python, program) == "False [] False\nclosed\n"


# Taking all there is


def test_memory_is_limited(python: PythonTool):
    assert run(python, "bytearray(1 << 40)").endswith("MemoryError\n")
    assert run(python, "kept = []\nwhile True:\n    kept.append('a' * 1_000_000)").endswith("MemoryError\n")
    assert (
        run(python, "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 24))").count("Error") == 1
    )


def test_limits_cannot_be_lifted(python: PythonTool):
    program = "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    assert "Error" in run(python, program)


def test_open_files_are_limited(python: PythonTool):
    assert "Too many open files" in run(python, "import os\nkept = []\nwhile True:\n    kept.append(os.pipe())")


def test_endless_output_is_stopped(python: PythonTool):
    with pytest.raises(ToolError) as error:
        run(python, "while True:\n    print('x' * 1000)")
    assert str(error.value).endswith("The program was stopped: it printed more than 1048576 bytes.")
    assert len(str(error.value)) < 2_200


def test_of_long_output_both_ends_are_told(python: PythonTool):
    told = run(python, "print('a' * 5000)\n1 / 0")
    assert told.startswith("a" * 1000 + "\n… ")
    assert told.endswith("ZeroDivisionError: division by zero\n")
    assert "characters left out …" in told
    assert len(told) < 2_100


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import os; os.close(1); os.close(2)"]
)
def test_an_endless_program_is_stopped_and_gone(program: str):
    hasty = PythonTool(timeout_s=1, memory_bytes=256 << 20, unprotected=sys.platform != "linux")
    began = time.monotonic()
    with pytest.raises(ToolError) as error:
        run(hasty, f"import os\nprint(os.getpid())\n{program}\nwhile True: pass")
    assert time.monotonic() - began < 10
    process, why = str(error.value).splitlines()
    assert why in ("The program was stopped: it ran for 1 s.", "The program was ended by SIGKILL.")
    assert not is_there(int(process))


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os.kill(os.getpid(), 40)", "signal 40"),
    ],
)
def test_a_program_that_breaks_says_how(python: PythonTool, program: str, name: str):
    with pytest.raises(ToolError, match=f"before\nThe program was ended by {name}"):
        run(python, f"print('before')\n{program}")


def test_cancelling_kills_the_program(python: PythonTool):
    async def cancel() -> float:
        task = asyncio.create_task(python.call("python", "while True: pass"))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return time.monotonic() - began

    assert asyncio.run(cancel()) < 2


def test_programs_beyond_the_limit_wait():
    one = PythonTool(**LIMITS, max_running=1, unprotected=True)

    async def several() -> list[str]:
        program = "import time\nbegan = time.monotonic()\ntime.sleep(0.1)\nprint(began, time.monotonic())"
        return await asyncio.gather(*(one.call("python", program) for _ in range(3)))

    spans = sorted([float(moment) for moment in line.split()] for line in asyncio.run(several()))
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


# Without walls


def test_without_walls_it_runs_in_a_folder_that_goes_away(unprotected: PythonTool):
    told = run(unprotected, "import os\nopen('a', 'w').write('x')\nprint(os.listdir(), os.getcwd())")
    names, folder = told.split(" ")
    assert names == "['a']"
    assert not Path(folder.strip()).exists()
    assert "no network" not in unprotected.namespace.description


def test_without_walls_files_are_limited_and_children_killed(unprotected: PythonTool):
    assert "File too large" in run(unprotected, "open('big', 'wb').write(bytes(80 << 20))")
    program = """
import subprocess, sys
nap = [sys.executable, "-c", "import time; time.sleep(60)"]
print(subprocess.Popen(nap, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""
    child = int(run(unprotected, program))
    for _ in range(100):
        if not is_there(child) or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} is still there")


# Settings


def test_where_walls_cannot_be_had_it_does_not_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Unsupported, match=r"they need Linux, and this is darwin.*unprotected=True"):
        PythonTool()


@pytest.mark.parametrize("setting", [{"timeout_s": 0}, {"memory_bytes": -1}, {"output_chars": 0}, {"max_running": 0}])
def test_settings_are_checked(setting: dict[str, int]):
    with pytest.raises(UserError, match=next(iter(setting))):
        PythonTool(**setting)


def test_an_import_path_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="expected a folder of packages"):
        PythonTool(import_paths=[tmp_path / "none"])
