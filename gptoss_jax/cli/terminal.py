"""What people see on stderr and stdout: progress bars and tables. Knows numbers and words; knows no model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

_PIPE_WIDTH = 160


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, rate and time left while a block runs, on stderr if that is a terminal.

    Gives a function of (bytes done, bytes in all).
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; every column but the first is set to the right."""
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        found.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    console = Console()
    # A pipe has no width, and rich would take 80 columns and cut names.
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(found)


def size(nbytes: float) -> str:
    """1.16 GB, in powers of 1000 as the releases' own sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
