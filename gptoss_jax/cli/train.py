"""`train`: a configuration in, a bar or lines on stderr, what came of it on stdout. Trains nothing itself."""

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gptoss_jax.cli import devices, exit_codes, programs, train_dump, train_plan
from gptoss_jax.cli.chat_screen import harmless
from gptoss_jax.configs import train_config_file
from gptoss_jax.hosts import Hosts
from gptoss_jax.plan.chips import CHIPS
from gptoss_jax.train.config import read_config
from gptoss_jax.train.run import Opened
from gptoss_jax.train.run import train as run_training

_RUNS = Path("runs")
_SECONDS_BETWEEN_LINES = 10.0

# What jax calls the devices whose peak is published; the first that occurs in the name.
_KINDS: Mapping[str, str] = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6": "v6e", "TPU v5": "v5p", "TPU7": "v7x", "TPU v7": "v7x",
    "A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200", "RTX 4090": "rtx4090", "RTX 5090": "rtx5090",
}  # fmt: skip


def train(options: argparse.Namespace) -> int:
    config = read_config(train_config_file(options.config), options.overrides)
    if options.show_data is not None:
        return train_dump.run(config, number=options.show_data)
    if options.plan:
        return train_plan.run(config, options)
    if options.host_devices is not None:
        devices.simulate(options.host_devices)
    programs.keep()
    folder = Path(options.run_folder) if options.run_folder else _RUNS / Path(options.config).stem
    with devices.joined(options) as hosts, devices.enough_memory(), _Stop() as stop:
        with _screen(shown=hosts.process_id == 0) as screen:

            def on_opened(opened: Opened) -> None:
                screen.opened(opened, folder)
                stop.listen()

            finished = run_training(
                folder,
                config,
                peak_flops=peak_flops(),
                on_opened=on_opened,
                on_entry=screen.entry,
                should_stop=stop.is_asked,
            )
        return _report(hosts, folder, step=finished.result.step, outcome=finished.outcome)


def peak_flops() -> float | None:
    """Of all devices together, in bfloat16; None where it is not known, as of CPUs."""
    kind = jax.devices()[0].device_kind
    chip = next((chip for word, chip in _KINDS.items() if word in kind), None)
    return None if chip is None else CHIPS[chip].flops * jax.device_count()


def _report(hosts: Hosts, folder: Path, *, step: int, outcome: Path | None) -> int:
    first = hosts.process_id == 0
    if outcome is None:
        if first:
            print(f"gptoss-jax train: stopped after step {step}; the same command goes on from there", file=sys.stderr)
        return exit_codes.INTERRUPTED
    if first:
        print(f"{folder}: {step} steps; gptoss-jax plot {folder} draws them", file=sys.stderr)
        print(outcome)
    return 0


class _Stop:
    """Whether somebody has asked to end, by Ctrl-C or as a scheduler does; a second time it happens at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Stop":
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def listen(self) -> None:
        """From here on; before the first step there is nothing to save, and signals do what they always do."""
        with contextlib.suppress(ValueError):  # not the main thread: a program that calls `main` has signals of its own
            self._before = {each: signal.signal(each, self._ask) for each in self._SIGNALS}

    def is_asked(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()
        print("\nsaving after this step; once more ends at once", file=sys.stderr)

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}


# --- while it runs ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Screen:
    """A bar in a terminal, else a line now and then; losses and answers have lines in either."""

    console: Console
    bar: Progress
    shown: bool
    task: TaskID | None = None
    steps: int = 0
    last_line: float = 0.0

    def opened(self, opened: Opened, folder: Path) -> None:
        self.steps = opened.steps
        leaves = opened.trainer.trained.shapes.values()
        trained = sum(_product(shape) for shape, _ in leaves)
        report = opened.feed.train.report
        self._say(
            f"{folder}: {trained:,} parameters train, on {report.tokens:,} tokens of {report.units:,} examples "
            f"({report.efficiency:.0%} of each row), for {opened.steps:,} steps"
        )
        self.task = self.bar.add_task("training", total=opened.steps, said="")

    def entry(self, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        match entry["kind"]:
            case "evaluation":
                self._say(f"step {step}: evaluation loss {_number(entry['loss'])}")
            case "sample":
                self._say(f"step {step}: {entry['prompt']!r} ─► {entry['answer']!r}")
            case _:
                self._step(step, entry)

    def _step(self, step: int, entry: Mapping[str, Any]) -> None:
        said = f"loss {_number(entry['loss'])}, {entry['tokens_per_second']:,.0f} tokens/s"
        said += f", {entry['mfu']:.1%} MFU" if "mfu" in entry else ""
        if self.task is not None:
            self.bar.update(self.task, completed=step, said=said)
        is_due = time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (is_due or step == self.steps):
            self.last_line = time.monotonic()
            self._say(f"step {step} of {self.steps}: {said}")

    def _say(self, text: str) -> None:
        if self.shown:
            self.console.print(harmless(text), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _screen(*, shown: bool) -> Iterator[_Screen]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        yield _Screen(console, bar, shown)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for each in shape:
        product *= each
    return product


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
