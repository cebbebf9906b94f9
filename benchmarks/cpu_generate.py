"""Loading a checkpoint and generating from it on the CPU, beside the disk and the memory. Knows commands."""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import Finished, folder_bytes, gptoss_jax, module, prepare, reading, run, work_folder
from gptoss_jax.cli.terminal import size, table
from gptoss_jax.errors import UserError

_COPIES = 2.1  # at once on the disk: the release and its checkpoint, and some room for the rest
_HEADROOM = 1.25  # of memory over the weights: while it is loaded, the largest parameter is held more than once


def main() -> int:
    parser = report.parser(
        "cpu_generate",
        "Writes a synthetic release, converts it, loads the checkpoint and generates greedily from it, in a process\n"
        "that does nothing else. The roof of tokens per second is the memory bandwidth, measured in the same run,\n"
        "over the bytes of the weights that one token must read; that of loading, `cat` of the same files. The page\n"
        "cache is emptied of the checkpoint before both. Everything written is removed.",
    )
    parser.add_argument("--model", default="gpt-oss-20b", help="default: %(default)s")
    parser.add_argument("--layers", type=report.positive, metavar="N", help="keep only the first N layers")
    parser.add_argument("--prompt-tokens", type=report.positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=report.positive, default=16, metavar="N", help="to generate; default: %(default)s"
    )
    parser.add_argument(
        "--buffer-bytes",
        type=report.positive,
        default=2 << 30,
        metavar="N",
        help="read for the bandwidth; default: %(default)s",
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    return report.main(_benchmark, parser.parse_args())


def _benchmark(options: argparse.Namespace) -> None:
    if options.tokens < 2:
        raise UserError(f"--tokens is {options.tokens}; expected at least 2, of which all but the first give the rate")
    result = report.document("cpu_generate", options)
    cut = [] if options.layers is None else ["--layers", str(options.layers)]
    sizes = json.loads(run(module("sizes", "--model", options.model, *cut)).output)
    _check_memory(sizes["release"])
    with work_folder(options.dir, needed_bytes=int(_COPIES * sizes["release"])) as folder:
        bandwidth = [_bandwidth(options.buffer_bytes)]
        checkpoint = _converted(folder, options.model, cut)
        stored = folder_bytes(checkpoint)
        read = _cold("cat", reading(checkpoint), checkpoint)
        count = ["--prompt-tokens", str(options.prompt_tokens), "--tokens", str(options.tokens)]
        decoded = _cold("load and generate", module("decoding", checkpoint, *count), checkpoint)
    bandwidth.append(_bandwidth(options.buffer_bytes))
    result |= {"model": options.model, "layers": sizes["layers"]}
    result |= {"disk": {"bytes": stored, "seconds": read.seconds, "bytes_per_second": stored / read.seconds}}
    fastest = max(entry["bytes_per_second"] for entry in bandwidth)
    result |= {"memory": {"bytes_per_second": fastest, "before_and_after": bandwidth}, "token_bytes": sizes["token"]}
    result |= {"decoding": json.loads(decoded.output), "peak_rss_bytes": decoded.peak_rss_bytes}
    result |= _against_the_roofs(result)
    _print(result)
    report.write(options.out, result)


def _check_memory(weights: int) -> None:
    """A machine that swaps, or kills, gives no number."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available < _HEADROOM * weights:
        raise UserError(
            f"{available:,} bytes of memory are available, the model needs about {int(_HEADROOM * weights):,}: "
            "end other programs, or ask for fewer --layers"
        )


def _bandwidth(buffer_bytes: int) -> dict[str, Any]:
    found = json.loads(run(module("bandwidth", "--bytes", str(buffer_bytes))).output)
    report.step(f"memory: {size(found['bytes_per_second'])}/s")
    return found


def _converted(folder: Path, model: str, cut: list[str]) -> Path:
    release, checkpoint = folder / "release", folder / "checkpoint"
    for command in (gptoss_jax("init", release, "--model", model, *cut), gptoss_jax("convert", release, checkpoint)):
        done = run(command)
        report.step(f"{command[1]}: {done.seconds:.2f} s")
    shutil.rmtree(release)
    return checkpoint


def _cold(name: str, command: list[str | Path], checkpoint: Path) -> Finished:
    prepare(checkpoint, "cold")
    done = run(command)
    report.step(f"{name}: {done.seconds:.2f} s")
    return done


def _against_the_roofs(result: dict[str, Any]) -> dict[str, Any]:
    """Rates, each with what the machine could do at most."""
    decoding, disk = result["decoding"], result["disk"]
    rate = len(decoding["token_seconds"]) / sum(decoding["token_seconds"])
    roof = result["memory"]["bytes_per_second"] / sum(result["token_bytes"].values())
    loading = disk["bytes"] / decoding["load_seconds"]
    return {
        "load_bytes_per_second": loading,
        "load_share_of_disk": loading / disk["bytes_per_second"],
        "tokens_per_second": rate,
        "roof_tokens_per_second": roof,
        "share_of_roof": rate / roof,
    }


def _print(result: dict[str, Any]) -> None:
    decoding, disk, memory = result["decoding"], result["disk"], result["memory"]
    parts = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in result["token_bytes"].items())
    slowest, usual = max(decoding["token_seconds"]), statistics.median(decoding["token_seconds"])
    rows = [
        ["load()", f"{decoding['load_seconds']:.2f} s", f"{disk['seconds']:.2f} s", "cat of the checkpoint"],
        ["peak memory, loaded", size(decoding["load_peak_rss_bytes"]), size(disk["bytes"]), "the checkpoint's files"],
        ["peak memory, at the end", size(result["peak_rss_bytes"]), size(disk["bytes"]), "the checkpoint's files"],
        ["compiling", f"{decoding['compile_seconds']:.2f} s", "", ""],
        ["first token", f"{decoding['first_token_seconds']:.3f} s", "", f"{decoding['prompt_tokens']} prompt ids"],
        ["a later token, median", f"{usual:.3f} s", "", f"slowest {slowest:.3f} s of {decoding['tokens'] - 1}"],
        [
            "tokens per second",
            f"{result['tokens_per_second']:.2f}",
            f"{result['roof_tokens_per_second']:.2f}",
            f"{size(memory['bytes_per_second'])}/s over {size(sum(result['token_bytes'].values()))} a token",
        ],
        ["share of the roof", f"{result['share_of_roof']:.1%}", "100%", ""],
    ]
    report.describe(result)
    title = f"{result['model']}, {result['layers']} layers, {decoding['dtype']}, experts {decoding['experts']}"
    table(title, ("measured", "value", "at best", "which is"), rows)
    print(f"A token reads {parts}.")


if __name__ == "__main__":
    sys.exit(main())
