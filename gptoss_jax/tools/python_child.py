"""Runs one program that nobody has looked at. Started by tools/python.py in a process of its own; imports no package.

What it prints is what whoever started it reads; the program comes by standard input, the settings in an argument.
"""

import ast
import contextlib
import json
import linecache
import os
import sys
import traceback
import types
from typing import Any

from gptoss_jax.tools.confine import Unconfined, confine, die_with_parent, limit

NAME = "<program>"
CANNOT_CONFINE = 78  # exit code
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib64", "/etc/ld.so.cache")
_MORE = ("/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
_PACKAGES = ("site-packages", "dist-packages")


def main(argument: str) -> None:
    """Reads the settings and the program, puts up the walls, and runs it."""
    settings: dict[str, Any] = json.loads(argument)
    sys.path[:] = [path for path in sys.path if path != settings["ours"]] + settings["import_paths"]
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with errors, and told if it is killed
    try:
        _shut_in(settings)
    except Unconfined as error:
        print(error.strerror)  # noqa: T201
        sys.exit(CANNOT_CONFINE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gptoss_jax"]:
        del sys.modules[name]
    sys.exit(run(text))


def run(text: str) -> int:
    """Runs a program as a notebook does: an expression at its end is shown. The exit code."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [NAME]
    linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)  # lines for tracebacks
    try:
        _execute(text, module.__dict__)
    except SystemExit as error:
        return _exit_code(error)
    except BaseException as error:
        _show(error)
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):  # the program may have closed it
            sys.stdout.flush()
    return 0


def _execute(text: str, names: dict[str, Any]) -> None:
    tree = compile(text, NAME, "exec", ast.PyCF_ONLY_AST)  # ast.parse would stand in a traceback
    assert isinstance(tree, ast.Module)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), NAME, "eval"), names)
        if value is not None:
            print(repr(value))  # noqa: T201


def _show(error: BaseException) -> None:
    """The traceback, from the program's own first line on."""
    place = error.__traceback__
    while place is not None and place.tb_frame.f_code.co_filename == __file__:
        place = place.tb_next
    traceback.print_exception(error.with_traceback(place), file=sys.stdout)


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0)
    print(error.code)  # noqa: T201
    return 1


def _shut_in(settings: dict[str, Any]) -> None:
    limits = {name: settings[name] for name in ("memory_bytes", "cpu_s", "file_bytes", "open_files")}
    os.nice(10)  # the model goes first
    if not settings["confined"]:
        with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory
            limit(**limits)
        return
    die_with_parent()
    standard = [path for path in sys.path if path not in settings["import_paths"]]
    limit(**limits)
    confine(readable=[*_readable(standard), *settings["import_paths"]], listable=[*standard, os.getcwd()])


def _readable(standard: list[str]) -> list[str]:
    """The system's libraries and Python's own, without the packages that lie among the latter."""
    inside = [
        os.path.join(path, name)
        for path in standard
        if os.path.isdir(path)
        for name in os.listdir(path)
        if name not in _PACKAGES
    ]
    beside = os.path.join(sys.base_prefix, "lib")
    libraries = [name for name in os.listdir(beside) if ".so" in name] if os.path.isdir(beside) else []
    return [*_LIBRARIES, *_MORE, *inside, *(os.path.join(beside, name) for name in libraries)]
