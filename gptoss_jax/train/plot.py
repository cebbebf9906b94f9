"""Draws what a run's log says: losses, gradients, speed, the load of experts. Knows the log alone."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.train.log import read_log

PLOT_FORMATS = (".png", ".svg")


def plot(run: Path, path: Path) -> None:
    """One picture of the run's folder, of a run that still goes on too.

    Raises:
        UserError: the file's name has another ending, or there is no log with a step.
        Unsupported: matplotlib is not installed.
    """
    if path.suffix not in PLOT_FORMATS:
        raise UserError(f"{path} ends in {path.suffix!r}; expected {' or '.join(PLOT_FORMATS)}")
    figure_class = _figure_class()
    entries = list(read_log(run))
    steps = [entry for entry in entries if entry["kind"] == "step"]
    if not steps:
        raise UserError(f"{run}: the log has no step yet; expected at least one: draw it later")
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]
    figure = figure_class(figsize=(11, 9), layout="constrained")
    figure.suptitle(str(run))
    (loss, gradient), (speed, rate), (busiest, idle) = figure.subplots(3, 2)
    _plot_losses(loss, steps, evaluations)
    _plot_value(gradient, steps, "gradient_norm", label="norm of the gradient")
    gradient.set_yscale("log")
    _plot_speed(speed, steps)
    _plot_value(rate, steps, "learning_rate", label="learning rate")
    _plot_load(busiest, steps, "busiest", label="visits of the busiest expert, 1 is an even share")
    _plot_load(idle, steps, "idle", label="experts without a visit")
    figure.savefig(path)


def _plot_losses(axes: Any, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    _plot_value(axes, steps, "loss", label="loss of a trained token", name="training")
    if evaluations:
        at = [entry["step"] for entry in evaluations]
        axes.plot(at, _values(evaluations, "loss"), "C1o-", label="evaluation")
        axes.legend(fontsize="small")


def _plot_value(axes: Any, steps: Sequence[Mapping[str, Any]], key: str, *, label: str, name: str = "") -> None:
    axes.plot([entry["step"] for entry in steps], _values(steps, key), "C0", linewidth=0.8, label=name)
    axes.set(xlabel="step", ylabel=label)


def _plot_speed(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """Of all devices; the dashed line is the share of their peak, where that is known."""
    _plot_value(axes, steps, "tokens_per_second", label="tokens per second")
    axes.set_ylim(bottom=0)
    if any("mfu" in entry for entry in steps):
        share = axes.twinx()
        share.plot([entry["step"] for entry in steps], 100 * _values(steps, "mfu"), "C3--", linewidth=0.8)
        share.set_ylabel("% of peak FLOP/s (dashed)")
        share.set_ylim(bottom=0)


def _plot_load(axes: Any, steps: Sequence[Mapping[str, Any]], key: str, *, label: str) -> None:
    """Layers from bottom to top, steps from left to right."""
    load = np.array([entry[key] for entry in steps], np.float64).T
    at = [entry["step"] for entry in steps]
    extent = (at[0] - 0.5, at[-1] + 0.5, -0.5, len(load) - 0.5)
    image = axes.imshow(load, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    axes.set(xlabel="step", ylabel="layer", title=label)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes)


def _values(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """NaN, which leaves a gap, where the log has null or nothing."""
    return np.array([entry.get(key) for entry in entries], np.float64)


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise Unsupported('a plot needs matplotlib: pip install "gptoss-jax[plot]"') from error
