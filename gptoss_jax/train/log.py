"""What a run says of itself, a JSON object a line, and the same for TensorBoard. Knows numbers and files; no model.

log.jsonl
  {"kind": "step", "step": 1200, "loss": 0.913, "gradient_norm": 0.41, "learning_rate": 1.9e-4, "tokens": 15871, …}
  {"kind": "evaluation", "step": 1200, "loss": 0.951, "trained_tokens": 40218, "seconds": 7.1}
  {"kind": "sample", "step": 1200, "prompt": "…", "answer": "…"}

A step has one line, whatever was interrupted in between: a run that goes on from step 1200 first drops the lines of
later steps, which it takes anew.
"""

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gptoss_jax.errors import Unsupported, UserError

LOG_NAME = "log.jsonl"

Kind = Literal["step", "evaluation", "sample"]
Listener = Callable[[Mapping[str, Any]], None]


class Log:
    """The log of one run, open to be written on; of several processes one has it.

    Args:
        folder: of the run.
        step: the last step whose lines are kept.
        tensorboard: writes events into `folder`/tensorboard too.
        on_entry: is told of each entry as it is written.

    Raises:
        UserError: the file cannot be written, or is no log of ours.
        Unsupported: TensorBoard's events are asked for and tensorboardX is not installed.
    """

    def __init__(
        self, folder: Path, *, step: int = 0, tensorboard: bool = False, on_entry: Listener = lambda entry: None
    ):
        self.path = folder / LOG_NAME
        self._events = _events(folder, step) if tensorboard else None
        self._on_entry = on_entry
        try:
            _keep_until(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def add(self, kind: Kind, step: int, **values: Any) -> None:
        """Writes an entry, so that whoever reads along sees it at once.

        Raises:
            UserError: the disk is full, say.
        """
        entry = {"kind": kind, "step": step} | {name: _finite(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._on_entry(entry)
        if self._events is not None:
            _add_events(self._events, entry)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a run's log, of one that is being written too; a last line that is half written is left out.

    Raises:
        UserError: there is none, or a line of it is no entry.
    """
    path = folder / LOG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; expected the folder of a run") from error
    whole, _, _ = text.rpartition("\n")
    for number, line in enumerate(whole.splitlines(), 1):
        yield _entry(path, number, line)


def _keep_until(path: Path, step: int) -> None:
    """Drops later steps' lines, and one that is half written. The file is replaced, so a kill leaves one of the two."""
    if not path.exists():
        return
    kept = [entry for entry in read_log(path.parent) if entry["step"] <= step]
    changed = path.with_name(f"{path.name}.new")
    with changed.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
        file.flush()
        os.fsync(file.fileno())
    changed.replace(path)


def _entry(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: expected a JSON object, but {error}; remove the line") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or not isinstance(entry.get("kind"), str):
        raise UserError(f"{path}:{number}: {line[:40]!r} has no kind and step; expected a log of ours: remove the line")
    return entry


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def _events(folder: Path, step: int) -> Any:
    """TensorBoard itself drops what was written of later steps before."""
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ModuleNotFoundError as error:
        raise Unsupported('loop.tensorboard needs tensorboardX: pip install "gptoss-jax[train]"') from error
    return writer(logdir=str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _add_events(events: Any, entry: Mapping[str, Any]) -> None:
    kind, step = entry["kind"], entry["step"]
    if kind == "sample":
        events.add_text(entry["prompt"], entry["answer"], step)
        return
    for name, value in entry.items():
        if isinstance(value, int | float) and name != "step":
            events.add_scalar(f"{kind}/{name}", value, step)
    for layer, share in enumerate(entry.get("busiest", ())):
        events.add_scalar(f"busiest expert/layer {layer}", share, step)
