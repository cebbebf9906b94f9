"""Shows what is trained: every token of an example, coloured by how much it counts. Knows examples; trains nothing.

In a terminal: dim is read, green counts 1, yellow less and magenta more. In a pipe, or with NO_COLOR set, what counts
stands between ⟦ and ⟧, with its weight where that is not 1: ⟦0.5|so much⟧.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gptoss_jax.cli.chat_screen import harmless
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.data import Dataset, Report
from gptoss_jax.train.examples import Example, Preference
from gptoss_jax.train.run import tokenizer_folder
from gptoss_jax.train.settings import data_settings


def run(config: TrainConfig, *, number: int) -> int:
    """What a run with this configuration would train on; no model is read.

    Raises:
        UserError: the tokenizer or the data cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_folder(config))
    settings = data_settings(config.data, seed=config.loop.seed)
    dataset = Dataset.open([Path(file) for file in config.data.files], tokenizer, settings)
    show(dataset, tokenizer, number=number)
    return 0


def show(dataset: Dataset, tokenizer: Tokenizer, *, number: int, console: Console | None = None) -> None:
    """Prints what the data hold and the first examples, or pairs, of the first epoch."""
    console = console or Console()
    _print(console, Text(summary(dataset.report)))
    for unit in itertools.islice(dataset.units(), number):
        if isinstance(unit, Preference):
            _show(console, unit.chosen, tokenizer, label="chosen, ")
            _show(console, unit.rejected, tokenizer, label="rejected, ")
        else:
            _show(console, unit, tokenizer)


def summary(report: Report) -> str:
    """What the data hold, in some lines."""
    trained = ", ".join(f"{part} {count:,}" for part, count in report.trained.items())
    lines = [
        f"read: {report.lines:,} lines, {report.units:,} to train",
        f"tokens: {report.tokens:,}, of the longest {report.longest:,}",
        f"trained: {sum(report.trained.values()):,} tokens, {trained}",
        f"packed: {report.rows:,} rows, {report.efficiency:.1%} of them tokens",
    ]
    for reason, dropped in report.dropped.items():
        lines.append(f"dropped: {dropped.count:,} {reason} ({dropped})")
    return "\n".join(lines)


def _show(console: Console, example: Example, tokenizer: Tokenizer, *, label: str = "") -> None:
    counted = int((example.weights > 0).sum())
    title = f"{example.source}: {label}{len(example)} tokens, {counted} trained"
    _print(console, Text(f"\n{title}", style="bold"))
    has_colours = console.is_terminal and not console.no_color
    shown = Text()
    for weight, text in _runs(example, tokenizer):
        if has_colours:
            shown.append(text, style=_style(weight))
        elif weight:
            shown.append(f"⟦{'' if weight == 1 else f'{weight:g}|'}{text}⟧")
        else:
            shown.append(text)
    _print(console, shown)


def _runs(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[float, str]]:
    """(weight, text) of tokens in a row that count the same: as they are read, or where they count as they are said."""
    begin = 0
    for weight, run in itertools.groupby(example.weights.tolist()):
        end = begin + len(list(run))
        ids = (example.targets if weight else example.ids)[begin:end]
        yield weight, harmless(tokenizer.decode(ids.tolist()))
        begin = end


def _style(weight: float) -> str:
    if not weight:
        return "dim"
    return "green" if weight == 1 else "yellow" if weight < 1 else "magenta"


def _print(console: Console, text: Text) -> None:
    """As it is: a line is not cut at the console's width, and numbers in it have no colours of their own."""
    console.print(text, soft_wrap=True, highlight=False)
