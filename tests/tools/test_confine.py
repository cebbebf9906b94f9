"""The filter of system calls, for both processors: its numbers and its jumps."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits are POSIX's")
if not hasattr(os, "O_PATH"):
    pytest.skip("the filter is Linux's", allow_module_level=True)

from gptoss_jax.tools import confine

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}
MACHINES = tuple(confine._ARCHITECTURES)
TABLE = {**confine._FREE, **confine._CONDITIONAL}
OWN = 4711
ALLOW, KILL, REFUSE, NOT_THERE = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def verdict(program: Sequence[tuple[int, int, int, int]], machine: str, number: int, *arguments: int) -> int:
    """What the kernel's machine for filters would say of a call."""
    words = {0: number, 4: confine._ARCHITECTURES[machine]}
    for i, argument in enumerate((*arguments, *[0] * (6 - len(arguments)))):
        words |= {16 + 8 * i: argument & 0xFFFFFFFF, 20 + 8 * i: argument >> 32}
    at, held = 0, 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        match code:
            case 0x20:
                held = words[value]
            case 0x15:
                at += yes if held == value else no
            case 0x35:
                at += yes if held >= value else no
            case 0x45:
                at += yes if held & value else no
            case 0x06:
                return value


def program(machine: str) -> list[tuple[int, int, int, int]]:
    here = (MACHINES.index(machine), confine._ARCHITECTURES[machine])
    return confine._program(here, own_process=OWN)


def number(machine: str, name: str) -> int:
    found = TABLE[name][MACHINES.index(machine)]
    assert found is not None
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_the_kernels(machine: str):
    header = next((Path(path) for path in HEADERS[machine] if Path(path).exists()), None)
    if header is None:
        pytest.skip(f"no headers of Linux for {machine}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text())
    numbers = {name: int(number) for name, number in found}
    numbers |= {"newfstatat": 79} if machine == "aarch64" else {}  # the header has it under another name
    column = MACHINES.index(machine)
    for name, here in TABLE.items():
        # A call that a header of this age has not yet is not compared.
        assert here[column] == numbers.get(name) or (name not in numbers and (here[column] or 0) > 430), name


@pytest.mark.parametrize("machine", MACHINES)
def test_only_listed_calls_are_allowed(machine: str):
    listed = {numbers[MACHINES.index(machine)] for numbers in confine._FREE.values()}
    conditional = {numbers[MACHINES.index(machine)] for numbers in confine._CONDITIONAL.values()}
    rules = program(machine)
    for call in set(range(1000)) - conditional:
        expected = ALLOW if call in listed else NOT_THERE if call >= 424 else REFUSE
        assert verdict(rules, machine, call) == expected
    assert verdict(rules, machine, 0x40000000) == KILL  # x32's
    other = MACHINES[1 - MACHINES.index(machine)]
    assert verdict(rules, other, number(machine, "read")) == KILL
    assert len(rules) < 4096  # the kernel takes no longer ones


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY), True),
        ("openat", (0, 0, os.O_WRONLY), False),
        ("openat", (0, 0, os.O_RDWR), False),
        ("openat", (0, 0, os.O_RDONLY | os.O_TRUNC), False),
        ("openat", (0, 0, os.O_RDONLY | os.O_CREAT), False),
        ("openat", (0, 0, os.O_TMPFILE), False),
        ("fcntl", (3, 2), True),
        ("fcntl", (3, 8, OWN), False),  # F_SETOWN
        ("fcntl", (3, 15), False),  # F_SETOWN_EX
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),  # TIOCSTI
        ("socketpair", (1, 1), True),
        ("socketpair", (2, 1), False),
        ("sendto", (3, 1 << 33, 4, 0, 0), True),
        ("sendto", (3, 0, 4, 0, 1), False),
        ("sendto", (3, 0, 4, 0, 1 << 40), False),
        ("prlimit64", (0, 7, 0, 1 << 40), True),
        ("prlimit64", (0, 7, 1 << 40, 0), False),
        ("prlimit64", (OWN, 7, 0, 0), False),
        ("kill", (OWN, 9), True),
        ("kill", (OWN - 1, 9), False),
        ("kill", (0xFFFFFFFF, 9), False),  # everybody
        ("kill", (0, 9), False),  # its group
        ("tgkill", (OWN, OWN, 6), True),
        ("tgkill", (1, OWN, 6), False),
    ],
)
def test_arguments_decide_over_some_calls(machine: str, name: str, arguments: tuple[int, ...], allowed: bool):
    assert verdict(program(machine), machine, number(machine, name), *arguments) == (ALLOW if allowed else REFUSE)


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(confine.Unconfined, match="no table of system calls for 'riscv64'"):
        confine.confine(readable=(), listable=())
