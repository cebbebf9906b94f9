"""Conversion, export and verification of a synthetic release, each beside what the disk itself can do. Knows commands.

init ─► release ─► cp ─► convert ─► cp ─► convert ─► cp ─► cat ─► verify ─► export
                   └─ in turn: what slows the disk slows both ─┘
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import Cache, Finished, folder_bytes, gptoss_jax, module, prepare, reading, run, work_folder
from gptoss_jax.cli.terminal import size, table

_COPIES = 3.1  # at once on the disk: the release, the checkpoint, and a copy or an export; and some room for the rest
_COLUMNS = ("step", "bytes", "seconds", "of it sync", "CPU", "rate", "ceiling", "share", "peak RSS")


def main() -> int:
    parser = report.parser(
        "conversion",
        "Writes a synthetic release, converts it, verifies and exports the checkpoint, each as the command a user\n"
        "would type. Seconds run until the last byte is on the disk. The ceiling of what writes is `cp -r` of the\n"
        "same release in the same run; that of verify, `cat` of the same checkpoint. Everything written is removed.",
    )
    parser.add_argument("--model", default="gpt-oss-20b", help="default: %(default)s")
    parser.add_argument(
        "--layers",
        type=report.positive,
        nargs="+",
        metavar="N",
        help="measure it cut to its first N layers; several show growth",
    )
    parser.add_argument("--mesh", metavar="data=1,expert=4,tensor=2", help="cut the checkpoint for this mesh")
    parser.add_argument(
        "--rounds", type=report.positive, default=2, metavar="N", help="of cp, convert; default: %(default)s"
    )
    parser.add_argument(
        "--cache",
        choices=("warm", "cold"),
        default="warm",
        help="whether what a step reads is in the page cache when it begins; default: %(default)s",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured; default: %(default)s"
    )
    return report.main(_benchmark, parser.parse_args())


def _benchmark(options: argparse.Namespace) -> None:
    result = report.document("conversion", options)
    result |= {"model": options.model, "mesh": options.mesh, "cache": options.cache, "experts": "mxfp4"}
    result["runs"] = []
    for layers in options.layers or [None]:
        cut = [] if layers is None else ["--layers", str(layers)]
        sizes = json.loads(run(module("sizes", "--model", options.model, *cut)).output)
        with work_folder(options.dir, needed_bytes=int(_COPIES * sizes["release"])) as folder:
            result["runs"].append({"layers": sizes["layers"], "steps": _measure(folder, cut, options)})
    result["filesystem"] = run(["df", "--output=fstype", options.dir]).output.split()[-1]
    report.describe(result)
    for measured in result["runs"]:
        title = f"{options.model}, {measured['layers']} layers, page cache {options.cache}, {result['filesystem']}"
        table(title, _COLUMNS, [_row(entry) for entry in measured["steps"]])
    report.write(options.out, result)


def _measure(folder: Path, cut: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    release, checkpoint, exported = folder / "release", folder / "checkpoint", folder / "exported"
    written = run(gptoss_jax("init", release, "--model", options.model, *cut), sync=folder)
    copies, conversions = _alternate(release, checkpoint, folder / "copy", options)
    released, stored = folder_bytes(release), folder_bytes(checkpoint)
    copying = released / min(copy.seconds for copy in copies)  # the fastest: a ceiling must not be too low
    steps = [_step("init", written, released, ceiling=None)]
    steps += [_step("cp", copy, released, ceiling=None) for copy in copies]
    steps += [_step("convert", conversion, released, ceiling=("cp", copying)) for conversion in conversions]

    read = _timed("cat", reading(checkpoint), checkpoint, options.cache)
    verified = _timed("verify", gptoss_jax("verify", checkpoint), checkpoint, options.cache)
    exporting = gptoss_jax("export", checkpoint, exported, "--format", "hf")
    export = _timed("export", exporting, checkpoint, options.cache)
    steps.append(_step("cat", read, stored, ceiling=None))
    steps.append(_step("verify", verified, stored, ceiling=("cat", stored / read.seconds)))
    steps.append(_step("export", export, stored, ceiling=("cp", copying)))
    return steps


def _alternate(
    release: Path, checkpoint: Path, copy: Path, options: argparse.Namespace
) -> tuple[list[Finished], list[Finished]]:
    """cp, convert, cp, …, cp: one copy more than conversions, so that each has one before and one after."""
    # Without --reflink=never a disk that shares blocks would copy nothing.
    copying = ["cp", "-r", "--reflink=never", release, copy]
    mesh = [] if options.mesh is None else ["--mesh", options.mesh]
    converting = gptoss_jax("convert", release, checkpoint, *mesh)
    copies = [_timed("cp", copying, release, options.cache)]
    conversions = []
    for _ in range(options.rounds):
        shutil.rmtree(copy)
        shutil.rmtree(checkpoint, ignore_errors=True)
        conversions.append(_timed("convert", converting, release, options.cache))
        copies.append(_timed("cp", copying, release, options.cache))
    shutil.rmtree(copy)
    return copies, conversions


def _timed(name: str, command: Sequence[str | Path], reads: Path, cache: Cache) -> Finished:
    """One step, from a disk at rest; everything the step writes lies on the disk of `reads`."""
    prepare(reads, cache)
    done = run(command, sync=reads)
    report.step(f"{name}: {done.seconds:.2f} s")
    return done


def _step(name: str, done: Finished, nbytes: int, *, ceiling: tuple[str, float] | None) -> dict[str, Any]:
    """`ceiling` is the step it is compared with, and the bytes per second of that."""
    rate = nbytes / done.seconds
    entry = {
        "step": name,
        "bytes": nbytes,
        "seconds": done.seconds,
        "sync_seconds": done.sync_seconds,
        "cpu_seconds": done.cpu_seconds,
        "bytes_per_second": rate,
        "peak_rss_bytes": done.peak_rss_bytes,
    }
    if ceiling is not None:
        against, most = ceiling
        entry |= {"ceiling": against, "ceiling_bytes_per_second": most, "share_of_ceiling": rate / most}
    return entry


def _row(entry: dict[str, Any]) -> list[str]:
    compared = "ceiling" in entry
    return [
        entry["step"],
        size(entry["bytes"]),
        f"{entry['seconds']:.2f} s",
        f"{entry['sync_seconds']:.2f} s",
        f"{entry['cpu_seconds']:.2f} s",
        f"{size(entry['bytes_per_second'])}/s",
        f"{entry['ceiling']} {size(entry['ceiling_bytes_per_second'])}/s" if compared else "",
        f"{entry['share_of_ceiling']:.0%}" if compared else "",
        size(entry["peak_rss_bytes"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
