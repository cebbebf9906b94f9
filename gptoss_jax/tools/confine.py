"""Shuts this process in, for good: read-only, without network, alone. Linux; knows nothing of what will run.

Two walls of the kernel that need no rights to be put up, so they stand in containers and for ordinary users too:

    Landlock    which files can be opened, and then only for reading
    seccomp     which system calls there are at all: none that starts a process or a thread, reaches a network or
                another process, or changes a file's name or rights; what is not listed below is refused

What both let through: whether a file is there, its size and its times (`stat`), and the machine's name and clock.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

_LIBC = ctypes.CDLL(None, use_errno=True)


class Unconfined(OSError):
    """A wall that could not be put up, and why."""


def confine(*, readable: Iterable[str], listable: Iterable[str]) -> None:
    """From here on this process can read files under `readable`, list folders under these and `listable`, and compute.

    Raises:
        Unconfined: the kernel or the processor has not what it takes.
    """
    filters = _program(_calls_here(), own_process=os.getpid())
    _drop_rights()
    _landlock(readable, listable)
    _seccomp(filters)


def limit(*, memory_bytes: int, cpu_s: int, file_bytes: int, open_files: int) -> None:
    """Limits that the kernel holds a process to; one that is stricter already stays.

    Raises:
        OSError, ValueError: a limit that this system does not have.
    """
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_AS: memory_bytes,
    }
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (most, most))


# --- rights -----------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SIGKILL = 9
_CAPABILITIES_V3 = 0x20080522


def die_with_parent() -> None:
    """Whoever started this process takes it along."""
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def _drop_rights() -> None:
    """A server that runs as root is root no longer in here."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITIES_V3, 0)
    _call("capset", header, bytes(24))  # effective, permitted, inheritable: none


def _call(name: str, *arguments: int | bytes) -> int:
    """A function of libc's; every integer of these is as wide as a register."""
    wide = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = getattr(_LIBC, name)(*wide)
    if result < 0:
        number = ctypes.get_errno()
        raise Unconfined(number, f"{name} failed: {os.strerror(number)}")
    return result


# --- Landlock ---------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every processor
_ASK_VERSION = 1
_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights to files each version knows, and whether it knows ports (4) and signals and abstract sockets (6).
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_ALL_PORTS, _ALL_SCOPES = 0b11, 0b11


def _landlock(readable: Iterable[str], listable: Iterable[str]) -> None:
    try:
        version = _call("syscall", _CREATE_RULESET, 0, 0, _ASK_VERSION)
    except Unconfined as error:
        raise Unconfined(
            error.errno, f"this kernel has no Landlock, or it is switched off ({error.strerror})"
        ) from error
    handled = [(1 << _FILE_RIGHTS.get(version, 16)) - 1]
    handled += [_ALL_PORTS] if version >= 4 else []
    handled += [_ALL_SCOPES] if version >= 6 else []
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    ruleset = _call("syscall", _CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        _permit(ruleset, path, _READ_FILE | _READ_DIR)
    for path in listable:
        _permit(ruleset, path, _READ_DIR)
    _call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _permit(ruleset: int, path: str, rights: int) -> None:
    """Grants rights to a file, or to a folder and all in it; a path that is not there needs none."""
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights &= ~0 if os.path.isdir(path) else _READ_FILE
        _call("syscall", _ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, file), 0)
    finally:
        os.close(file)


# --- seccomp ----------------------------------------------------------------------------------------------------------

Condition: TypeAlias = tuple[int, str, tuple[int, ...]]  # where the word lies, "in" or "without", values or bits
Instruction: TypeAlias = tuple[int, int, int, int]

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls by name, and their numbers on x86_64 and aarch64; None where there is no such call.
_FREE: Mapping[str, tuple[int | None, int | None]] = {
    # open files
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "eventfd2": (290, 19),
    # names of files
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "getdents64": (217, 61),
    "umask": (95, 166),
    # waiting for files
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    # a socket pair's
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockopt": (55, 209),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    # memory
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "mincore": (27, 232),
    # signals and time
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "pause": (34, None),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    # itself
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "arch_prctl": (158, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getpgrp": (111, None),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "wait4": (61, 260),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_CONDITIONAL: Mapping[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "openat": (257, 56),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "prlimit64": (302, 261),
    "kill": (62, 129),
    "tgkill": (234, 131),
}
# Calls from here on came after all of the above. A libc tries them and falls back if there are none.
_FIRST_NEW_CALL = 424

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32 = 0x40000000  # bit of x86_64's calls with short pointers

_CHANGES_A_FILE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_AF_UNIX = 1
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: none that signals
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX


def _conditions(own_process: int) -> Mapping[str, tuple[Condition, ...]]:
    """What must hold of a call's arguments."""
    return {
        "open": (_without(1, _CHANGES_A_FILE),),
        "openat": (_without(2, _CHANGES_A_FILE),),
        "fcntl": (_one_of(1, *_FCNTLS),),
        "ioctl": (_one_of(1, *_IOCTLS),),
        "socketpair": (_one_of(0, _AF_UNIX),),  # asyncio wakes itself by one
        "sendto": _null(4),  # to the other end of the pair, to no address
        "prlimit64": (_one_of(0, 0), *_null(2)),  # asking, for itself
        "kill": (_one_of(0, own_process),),
        "tgkill": (_one_of(0, own_process),),
    }


def _one_of(argument: int, *values: int) -> Condition:
    return _low(argument), "in", values


def _without(argument: int, bits: int) -> Condition:
    return _low(argument), "without", (bits,)


def _null(argument: int) -> tuple[Condition, Condition]:
    return (_low(argument), "in", (0,)), (_low(argument) + 4, "in", (0,))


def _low(argument: int) -> int:
    """Where the lower word of an argument lies in what a filter sees; both processors are little-endian."""
    return 16 + 8 * argument


def _calls_here() -> tuple[int, int]:
    """The processor's column in the tables, and its number for the filter."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES or struct.calcsize("P") != 8:
        raise Unconfined(_ENOSYS, f"no table of system calls for {machine!r}; there is one for x86_64 and aarch64")
    return list(_ARCHITECTURES).index(machine), _ARCHITECTURES[machine]


def _program(here: tuple[int, int], *, own_process: int) -> list[Instruction]:
    """The filter: the processor's mode first, then one block for each call, which falls to the next if it is another's.

    load number ─► number = read?  ─yes─► allow
                        │no
                   number = openat? ─yes─► load flags ─► a bit that changes files? ─yes─► refuse
                        │no                                      └─no─► allow
                       …             ─► refuse
    """
    column, architecture = here
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for numbers in _FREE.values():
        program += _block(numbers[column], ())
    conditions = _conditions(own_process)
    for name, numbers in _CONDITIONAL.items():
        program += _block(numbers[column], conditions[name])
    return [
        *program,
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_AT_LEAST, 0, 1, _FIRST_NEW_CALL),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]


def _block(number: int | None, conditions: Sequence[Condition]) -> list[Instruction]:
    if number is None:
        return []
    inner: list[Instruction] = []
    for offset, kind, values in conditions:
        inner.append((_LOAD, 0, 0, offset))
        if kind == "in":
            inner += [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        else:
            inner += [(_ANY_BIT, 0, 1, values[0])]
        inner.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    inner.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(inner), number), *inner]


def _seccomp(program: Sequence[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, 2, description, 0, 0)
