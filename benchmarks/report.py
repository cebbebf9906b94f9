"""What stands around the numbers: machine, commit, versions, command; the JSON file. Knows no measurement."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.process import CommandFailed
from gptoss_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = ("gptoss-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes")


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = Path("benchmarks/results", f"{name}.json")
    found.add_argument("--out", type=Path, default=ROOT / results, metavar="FILE", help=f"default: {results}")
    return found


def positive(text: str) -> int:
    """The type of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; expected 1 or more")
    return int(text)


def main(benchmark: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs a benchmark. 2 is input that cannot be used, 1 a measured command that failed, 130 Ctrl-C; each says why."""
    try:
        benchmark(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is kept", file=sys.stderr)
        return 130
    return 0


def step(text: str) -> None:
    """Says how far a long run is."""
    print(f"  {text}", file=sys.stderr, flush=True)


def document(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The frame of a result. Taken before the first measurement, since it holds the load of the machine."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(name, options),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **packages},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def describe(result: dict[str, Any]) -> None:
    """Prints what stands over the tables: where and when."""
    machine, commit = result["machine"], result["commit"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['kernel']}")
    print(f"commit {commit['id'][:12]}{' with changes' if commit['dirty'] else ''}, {result['date']}")
    print(f"load before: {machine['load_before']}\n")


def _command(name: str, options: argparse.Namespace) -> str:
    """As it was typed, but DIR or OUT for an absolute path: it is one person's folder, and says nothing to others."""
    paths = {value: key.upper() for key, value in vars(options).items() if isinstance(value, Path)}
    stand_ins = {path: word for path, word in paths.items() if path.is_absolute()}

    def public(word: str) -> str:
        option, equals, value = word.rpartition("=")
        return f"{option}{equals}{stand_ins.get(Path(value), value)}"

    return shlex.join(["python", "-m", f"benchmarks.{name}", *map(public, sys.argv[1:])])


def _commit() -> dict[str, Any]:
    """Results of an earlier benchmark do not make the tree dirty: they change no measurement."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"id": _git("rev-parse", "HEAD") or "unknown", "dirty": status is None or bool(status)}


def _git(*arguments: str) -> str | None:
    """None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),  # near 0, or the numbers mean little
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()  # ARM's cpuinfo names no model
