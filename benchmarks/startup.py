"""How long a user waits before anything happens: imports and `--help`, beside Python's own start. Knows commands."""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import gptoss_jax, run
from gptoss_jax.cli.terminal import table

_COLUMNS = ("command", "median", "fastest", "slowest", "beside", "over it")


def main() -> int:
    parser = report.parser(
        "startup",
        "Starts each command many times, in turn, and takes the median. What a command is compared with is what it\n"
        "could not be faster than: `python -c pass`, or `import jax` for what needs jax.",
    )
    parser.add_argument(
        "--runs", type=report.positive, default=20, metavar="N", help="of each command; default: %(default)s"
    )
    return report.main(_benchmark, parser.parse_args())


def _benchmark(options: argparse.Namespace) -> None:
    result = report.document("startup", options)
    seconds = _seconds(_commands(), options.runs)
    result |= {"runs": options.runs, "commands": _summary(seconds)}
    report.describe(result)
    table(f"Median of {options.runs} starts", _COLUMNS, [_row(entry) for entry in result["commands"]])
    report.write(options.out, result)


def _commands() -> Mapping[str, tuple[Sequence[str | Path], str | None]]:
    """By name: the command, and the name of the one it stands beside."""
    python, nothing, jax = sys.executable, "python -c pass", "import jax"
    return {
        nothing: ([python, "-c", "pass"], None),
        "import gptoss_jax": ([python, "-c", "import gptoss_jax"], nothing),
        "gptoss-jax --help": (gptoss_jax("--help"), nothing),
        jax: ([python, "-c", "import jax"], nothing),
        # `import gptoss_jax` alone imports no jax; the first name that is used does.
        "gptoss_jax.load": ([python, "-c", "import gptoss_jax; gptoss_jax.load"], jax),
    }


def _seconds(
    commands: Mapping[str, tuple[Sequence[str | Path], str | None]], runs: int
) -> Mapping[str, tuple[list[float], str | None]]:
    """In turn, so that a machine that becomes busy slows all alike; the first turn fills caches and does not count."""
    found = {name: ([], beside) for name, (_, beside) in commands.items()}
    for turn in range(runs + 1):
        for name, (command, _) in commands.items():
            taken = run(command).seconds
            if turn:
                found[name][0].append(taken)
        report.step(f"turn {turn} of {runs}")
    return found


def _summary(seconds: Mapping[str, tuple[list[float], str | None]]) -> list[dict[str, Any]]:
    medians = {name: statistics.median(times) for name, (times, _) in seconds.items()}
    return [
        {
            "command": name,
            "median_seconds": medians[name],
            "fastest_seconds": min(times),
            "slowest_seconds": max(times),
            "beside": beside,
            "seconds_over": None if beside is None else medians[name] - medians[beside],
        }
        for name, (times, beside) in seconds.items()
    ]


def _row(entry: dict[str, Any]) -> list[str]:
    over = entry["seconds_over"]
    times = [f"{entry[f'{word}_seconds']:.3f} s" for word in ("median", "fastest", "slowest")]
    return [entry["command"], *times, entry["beside"] or "", "" if over is None else f"{over:+.3f} s"]


if __name__ == "__main__":
    sys.exit(main())
