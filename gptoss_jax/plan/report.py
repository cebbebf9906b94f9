"""A plan for people and for machines: tables, JSON, a picture. Knows how numbers are written; computes none of them."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.plan.compiled import Compiled
from gptoss_jax.plan.estimate import Estimate, Step, estimate

PLOT_FORMATS = (".png", ".svg")
_MOST_ROWS_PLOTTED = 256


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are written; all columns but the first hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An estimate, why its mesh was taken, and the compiler's figures beside it where they were asked for.

    Attributes:
        model: the name.
        why: nothing where the mesh was given.
        compiled: by "decode" and "prefill".
        notes: what else is to be said, a sentence each.
    """

    model: str
    estimate: Estimate
    why: str = ""
    compiled: dict[str, Compiled] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        found = {"model": self.model, "why_this_mesh": self.why} | self.estimate.to_json()
        compiled = {name: dataclasses.asdict(step) for name, step in self.compiled.items()}
        return found | {"compiled": compiled, "notes": list(self.notes)}


def sentences(plan: Plan) -> list[str]:
    """The answer first, then what was asked."""
    found, job = plan.estimate, plan.estimate.job
    each = "the device" if job.topology.count == 1 else f"each of {job.topology.count} devices"
    if found.fits:
        answer = f"fits, with {_gb(found.spare)} to spare on {each}"
    elif found.longest_context:
        answer = f"does not fit: {_gb(-found.spare)} are missing on {each}; {found.longest_context:,} tokens would fit"
    else:
        answer = f"does not fit: {_gb(-found.spare)} are missing on {each}, at any context"
    if not found.fits and job.mesh.tensor == 1 and found.spare + found.held.weights["embedding"] >= 0:
        answer += "; it fits with --embedding host"
    return [
        f"{plan.model} on {job.topology} ({job.chip.name}, {_gb(job.chip.memory)}): {answer}.",
        f"batch {job.rows} with {job.context:,} tokens each, {job.dtype}, experts in {job.experts}"
        + (", the embedding in the host's memory" if job.embedding == "host" else ""),
        f"mesh {job.mesh}" + (f": {plan.why}" if plan.why else ""),
        *plan.notes,
    ]


def tables(plan: Plan) -> list[Table]:
    """Memory, the steps, their collectives, and the compiler's figures if there are any."""
    found = [_memory(plan.estimate), _steps(plan.estimate)]
    if plan.estimate.decode.sends:
        found.append(_sends(plan.estimate))
    return [*found, *(_compiled(plan.estimate, name, step) for name, step in plan.compiled.items())]


def plot(plan: Plan, path: Path) -> None:
    """What lies on a device, and the decode roof over the batch, as PNG or SVG.

    Raises:
        UserError: the file's name has another ending.
        Unsupported: matplotlib is not installed.
    """
    if path.suffix not in PLOT_FORMATS:
        raise UserError(f"{path} ends in {path.suffix!r}; expected {' or '.join(PLOT_FORMATS)}")
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise Unsupported('a plot needs matplotlib: pip install "gptoss-jax[plot]"') from error
    figure = figure_class(figsize=(11, 4.5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    job = plan.estimate.job
    figure.suptitle(f"{plan.model} on {job.topology}, mesh {job.mesh}, context {job.context:,}")
    _plot_memory(memory, plan.estimate)
    _plot_speed(speed, plan.estimate)
    figure.savefig(path)


def _memory(found: Estimate) -> Table:
    parts = [*_parts(found), ("total", found.total), ("memory", found.job.chip.memory), ("spare", found.spare)]
    memory = found.job.chip.memory
    rows = tuple((name, _gb(nbytes), f"{nbytes / memory:.1%}") for name, nbytes in parts)
    return Table("Memory of one device", ("", "bytes", "of memory"), rows)


def _parts(found: Estimate) -> list[tuple[str, int]]:
    held = found.held
    tiles = [("padding of tiles", found.tiles)] if found.tiles else []
    return [
        *held.weights.items(),
        ("cache of full layers", held.full_cache),
        ("cache of sliding layers", held.sliding_cache),
        *tiles,
        ("temporaries", found.temporaries),
    ]


def _steps(found: Estimate) -> Table:
    """The mean over a prompt as long as the context stands for prefill."""
    steps = (found.decode, found.prefill)

    def row(name: str, cells: Sequence[str]) -> tuple[str, ...]:
        return name, *cells

    rows = (
        row("tokens, of all rows", [f"{step.tokens:,}" for step in steps]),
        row("cached before, in each row", [f"{step.cached:,}" for step in steps]),
        row("reads weights", [_gb(step.reads.dense) for step in steps]),
        row("reads experts with tokens", [_gb(step.reads.experts) for step in steps]),
        row("reads cache", [_gb(step.reads.cache) for step in steps]),
        row("computes", [f"{step.flops / 1e9:,.1f} GFLOP" for step in steps]),
        row("sends", [_gb(sum(each.nbytes for each in step.sends)) for step in steps]),
        row("memory takes", [_ms(step, "memory") for step in steps]),
        row("compute takes", [_ms(step, "compute") for step in steps]),
        row("links take", [_ms(step, "links") for step in steps]),
        row("bound by", [step.bound for step in steps]),
        row("roof, tokens/s", [f"{step.tokens_per_second:,.0f}" for step in steps]),
    )
    return Table("One step on the busiest device, at published peaks", ("", "decode", "prefill"), rows)


def _sends(found: Estimate) -> Table:
    counts: dict[str, dict[str, str]] = {}
    for name, step in (("decode", found.decode), ("prefill", found.prefill)):
        for each in step.sends:
            counts.setdefault(each.what, {})[name] = f"{each.count} × {each.nbytes / each.count / 1e3:,.1f} kB"
    rows = tuple((what, cells.get("decode", ""), cells.get("prefill", "")) for what, cells in counts.items())
    return Table("Collectives of one step, and what a device sends in each", ("", "decode", "prefill"), rows)


def _compiled(found: Estimate, name: str, compiled: Compiled) -> Table:
    lasting = found.held.total + found.tiles
    step = found.decode if name == "decode" else found.prefill
    passing = step.temporaries
    compared = (
        ("weights and cache", lasting, compiled.arguments),
        ("temporaries", passing, compiled.temporaries + compiled.outputs),
        ("total", lasting + passing, compiled.peak),
    )
    rows = [
        (what, _gb(ours), _gb(theirs), f"{(ours - theirs) / compiled.peak:+.1%}") for what, ours, theirs in compared
    ]
    if compiled.flops is not None:
        counted = f"{compiled.flops / 1e9:,.1f} GFLOP"
        rows.append(("computes; the compiler sees no kernels", f"{step.flops / 1e9:,.1f} GFLOP", counted, ""))
    rows += [
        (f"{each.count} × {each.name}", "", f"{each.nbytes / 1e3:,.1f} kB", "") for each in compiled.collectives[:8]
    ]
    title = f"The {name} step as its compiler sees it ({compiled.seconds:.0f} s to compile)"
    return Table(title, ("", "estimate", "compiler", "off, of the total"), tuple(rows))


def _plot_memory(axes: Any, found: Estimate) -> None:
    left = 0.0
    for name, nbytes in _parts(found):
        axes.barh([0], [nbytes / 1e9], left=left, label=name)
        left += nbytes / 1e9
    axes.axvline(found.job.chip.memory / 1e9, color="black", linestyle="--", label="memory of the device")
    axes.set(xlabel="GB on one device", yticks=[], ylim=(-0.5, 0.5))
    axes.legend(ncols=2, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _plot_speed(axes: Any, found: Estimate) -> None:
    """A line for each of three contexts; points are hollow where the batch does not fit."""
    sizes = [1 << power for power in range(_MOST_ROWS_PLOTTED.bit_length())]
    for number, context in enumerate(sorted({max(1, found.job.context // part) for part in (1, 8, 64)})):
        batches = [estimate(dataclasses.replace(found.job, rows=rows, context=context)) for rows in sizes]
        speeds = [batch.decode.tokens_per_second for batch in batches]
        color = f"C{number}"
        axes.plot(sizes, speeds, "-", color=color, label=f"{context:,} tokens cached in each row")
        for fits, inside in ((True, color), (False, "white")):
            chosen = [i for i, batch in enumerate(batches) if batch.fits is fits]
            points = [sizes[i] for i in chosen], [speeds[i] for i in chosen]
            axes.plot(*points, "o", color=color, markerfacecolor=inside)
    axes.set(xlabel="batch (hollow: does not fit)", ylabel="decode roof, tokens/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _ms(step: Step, what: str) -> str:
    return f"{step.seconds[what] * 1e3:,.3f} ms"


def _gb(nbytes: float) -> str:
    """1.16 GB, in powers of 1000 as the releases' own sizes."""
    return f"{nbytes / 1e9:,.2f} GB" if abs(nbytes) >= 1e7 else f"{nbytes / 1e6:,.3f} MB"
