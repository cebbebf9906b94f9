"""Converts and loads in processes of their own, which the tests can kill, join and measure. Run as a script.

    worker.py convert SRC DST      worker.py load CHECKPOINT      worker.py kill SRC ROOT --at 0.5

Prints one JSON object.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoint import load
from gptoss_jax.convert import conversion, store
from gptoss_jax.hosts import start_hosts
from gptoss_jax.model.transformer import parameters
from gptoss_jax.sharding import MeshShape, make_mesh

# What Python tells its audit hooks before it happens: every step by which our folders change, but for the data files,
# which are written beneath Python and get their names above it.
_STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.copyfile")


def main() -> None:
    options = _options()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    conversion.BATCH_BYTES = options.batch_bytes
    store._CHUNK_BYTES = options.chunk_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest_file, resource.RLIM_INFINITY))
    if options.processes > 1:
        start_hosts(f"127.0.0.1:{options.port}", num_processes=options.processes, process_id=options.process)
    mesh = MeshShape.parse(options.mesh)
    match options.command:
        case "convert":
            _convert(options.source, options.destination, mesh)
            print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        case "load":
            devices = make_mesh(data=mesh.data, expert=mesh.expert, tensor=mesh.tensor)
            readings = []
            for _ in range(3):  # the first reads Python modules too; nothing can make one read less than it needs
                before = _bytes_read()
                model = load(options.source, mesh=devices)
                readings.append(_bytes_read() - before)
            print(json.dumps({"bytes_read": min(readings), "shards": shard_digests(parameters(model))}))
        case "kill":
            print(json.dumps(_kill_and_resume(options.source, options.destination, mesh, options.at)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["convert", "load", "kill"])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path, nargs="?")
    parser.add_argument("--mesh", default="data=1")
    parser.add_argument("--batch-bytes", type=int, default=conversion.BATCH_BYTES)
    parser.add_argument("--chunk-bytes", type=int, default=store._CHUNK_BYTES)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--largest-file", type=int, default=resource.RLIM_INFINITY)
    parser.add_argument("--at", action="append", default=[])
    return parser.parse_args()


def _convert(source: Path, destination: Path, mesh: MeshShape) -> None:
    conversion.convert(source, destination, mesh=mesh)


def _kill_and_resume(source: Path, root: Path, mesh: MeshShape, points: list[str]) -> dict[str, list[int]]:
    """Converts into ROOT/whole without being killed, and into ROOT/n with a kill at each point and then once more.

    A point is a part of all steps, such as 0.25, or the first step of a name, such as os.rename:checkpoint. Children
    are forked before jax starts its threads: importing everything anew would take most of the time.
    """
    steps = multiprocessing.Value("i", 0)

    def child(destination: Path, *, until: str) -> int:
        steps.value = 0
        return _in_child(lambda: _count(steps, root, until) or _convert(source, destination, mesh))

    found = {"whole": [child(root / "whole", until="never")]}
    count = steps.value
    for n, point in enumerate(points):
        until = point if ":" in point else str(max(1, round(float(point) * count)))
        found[str(n)] = [child(root / str(n), until=until), child(root / str(n), until="never")]
    return found


def _count(steps: Any, root: Path, until: str) -> None:
    """Counts the steps below `root` and kills this process before the step `until`, a number or a name and path."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not (event in _STEPS or (event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE)):
            return
        below = any(str(arg).startswith(str(root)) for arg in args)
        inside_rmtree = event in ("os.remove", "os.rmdir") and args[1] != -1  # only its name: its folder is open
        if below or inside_rmtree:
            steps.value += 1
            if until in (str(steps.value), f"{event}:{Path(args[0]).name}"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _in_child(run: Callable[[], None]) -> int:
    """The signal that ended it, or 0 for a good end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:  # a forked child must not go on as its parent
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return -os.waitstatus_to_exitcode(status)


def _bytes_read() -> int:
    """By all reads of this process, wherever the system took the bytes from."""
    text = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


def shard_digests(arrays: dict[str, jax.Array]) -> dict[str, dict[str, str]]:
    """SHA-256 of every shard that this process holds, by parameter and index."""
    return {
        name: {
            str([cut.indices(size)[:2] for cut, size in zip(shard.index, array.shape, strict=True)]): hashlib.sha256(
                np.asarray(shard.data).tobytes()
            ).hexdigest()
            for shard in array.addressable_shards
        }
        for name, array in arrays.items()
    }


if __name__ == "__main__":
    main()
