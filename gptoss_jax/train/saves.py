"""The saves of a run: written beside the training, whole or absent, checked when read. Knows arrays and JSON alone.

saves/
  1200/            the step after which it was taken
    state/         trained parameters, optimizer state and step, as Orbax keeps arrays; no base weights
    about/         where the data stands, the evaluation loss, and a digest of each array

Orbax gives a save its name when all of it is on the disk. It notices no flipped bit: the digests do.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from isal import isal_zlib
from jax.sharding import SingleDeviceSharding

from gptoss_jax.errors import UserError
from gptoss_jax.hosts import barrier, is_first
from gptoss_jax.train.digest import digests

Tree = TypeVar("Tree")

_STATE, _ABOUT = "state", "about"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of saves that are being written
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
    """What a save says beside its arrays.

    Attributes:
        position: of the data, as JSON: what the next step reads.
        loss: on the evaluation files after this step; None where it was not taken.
    """

    position: Mapping[str, Any]
    loss: float | None = None


class Saves:
    """The saves in one folder, which is made with the first. All processes of a run call each method together.

    Args:
        folder: a path that all processes share. What is unfinished in it is removed: no other run may be at work there.
        keep_last: so many of the newest are kept.
        keep_best: and so many of the others, of the lowest loss.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1):
        self.folder = folder.absolute()
        self._keep = _Keep(last=keep_last, best=keep_best)
        _clear_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._keep, save_root_metadata=False)
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _ABOUT: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)
        self._keep.losses |= {step: self._loss_of(step) for step in self.steps()}

    def steps(self) -> list[int]:
        """Of the saves that are whole, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The step of the newest save; None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the save with the lowest loss; None where no save has one."""
        with_loss = [(loss, step) for step in self.steps() if (loss := self._keep.losses.get(step)) is not None]
        return min(with_loss)[1] if with_loss else None

    def save(self, step: int, state: Any, notes: Notes) -> None:
        """Takes a copy of the state and writes it while training goes on; waits for an earlier save first.

        Raises:
            UserError: the earlier save, or the beginning of this one, has failed.
        """
        arrays = _named(state)
        leaves = {
            name: {"dtype": str(arrays[name].dtype), "shape": list(arrays[name].shape), "digest": digest}
            for name, digest in digests(arrays).items()
        }
        about = _sealed({"step": step, **dataclasses.asdict(notes), "leaves": leaves})
        self._keep.losses[step] = notes.loss
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        with self._reported():
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """
        Raises:
            UserError: a save that was being written has failed.
        """
        with self._reported():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            UserError: it could not be written.
        """
        with self._reported():
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, Notes]:
        """The save of that step, laid out as the abstract state says: on any mesh.

        Args:
            step: one of `steps`.
            abstract: a tree of jax.ShapeDtypeStruct, with shardings where there is a mesh.

        Raises:
            UserError: it is damaged, or of another shape.
        """
        about = self._about(step)
        wanted = {name: _placed(leaf) for name, leaf in _named(abstract).items()}
        self._check_leaves(step, about["leaves"], wanted)
        with self._damaged(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            found = self._manager.restore(step, args=args)[_STATE]
        wrong = [name for name, digest in digests(found).items() if digest != about["leaves"][name]["digest"]]
        if wrong:
            raise self._damage(step, f"{wrong[0]} is not what was saved" + _others(wrong))
        notes = Notes(position=about["position"], loss=about["loss"])
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted]), notes

    def notes(self, step: int) -> Notes:
        """What the save of that step says beside its arrays, which are not read.

        Raises:
            UserError: it is damaged.
        """
        about = self._about(step)
        return Notes(position=about["position"], loss=about["loss"])

    def close(self) -> None:
        """Waits for what is being written, and gives its threads back.

        Raises:
            UserError: it could not be written.
        """
        with self._reported():
            self._manager.close()

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
            return
        with contextlib.suppress(UserError):  # the first error is what is to be told
            self.close()

    def _about(self, step: int) -> dict[str, Any]:
        with self._damaged(step):
            args = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self._manager.restore(step, args=args)[_ABOUT]
        if not isinstance(about, dict) or about.get("crc32") != _sealed(about)["crc32"]:
            raise self._damage(step, "what it says beside its arrays does not fit its own CRC-32")
        return about

    def _loss_of(self, step: int) -> float | None:
        try:
            return self._about(step)["loss"]
        except UserError as error:  # half removed when a run was killed, say: no reason not to go on from another
            _logger.warning("%s", error)
            return None

    def _check_leaves(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """That the save has these arrays and no others."""
        where = self.folder / str(step)
        for name in [*wanted, *saved]:
            if (name in wanted) != (name in saved):
                there, missing = ("the save", "the run") if name in saved else ("the run", "the save")
                raise UserError(
                    f"{where}: {there} has {name}, {missing} has not; it is of a run that trains other parameters: "
                    "give the configuration that it was made with, or another run folder"
                )
            found = (saved[name]["dtype"], tuple(saved[name]["shape"]))
            expected = (str(wanted[name].dtype), wanted[name].shape)
            if found != expected:
                raise UserError(
                    f"{where}: {name} is {found[0]} {found[1]}, the run has {expected[0]} {expected[1]}: "
                    "give the configuration that it was made with, or another run folder"
                )

    @contextlib.contextmanager
    def _damaged(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises no more than that for a piece that cannot be decoded
            raise self._damage(step, f"it cannot be read ({_first_line(error)})") from error

    def _damage(self, step: int, what: str) -> UserError:
        others = [other for other in self.steps() if other < step]
        way_out = f"to go on from step {others[-1]}" if others else "to begin anew"
        return UserError(
            f"{self.folder / str(step)} is damaged: {what}; remove this folder, then run the same command {way_out}"
        )

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A save that fails leaves the earlier ones as they are."""
        try:
            yield
        except Exception as error:  # whatever was raised in the threads that write
            whole = [step for step in self.steps() if (self.folder / str(step)).is_dir()]
            kept = f"the save of step {whole[-1]} is whole" if whole else "there is no earlier save"
            raise UserError(
                f"{self.folder}: a save cannot be written ({_first_line(error)}); {kept}: make room on the disk, "
                "then run the same command to go on from there"
            ) from error


@dataclasses.dataclass
class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest, and the best of the others. `losses` is by step."""

    last: int
    best: int
    losses: dict[int, float | None] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        """Asked by Orbax after each save; `checkpoints` are its own notes, oldest first."""
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self.last :])
        losses = {step: loss for step in steps if (loss := self.losses.get(step)) is not None and math.isfinite(loss)}
        # A tie goes to the older one: what came later is among the newest anyway.
        kept |= set(sorted(losses, key=lambda step: (losses[step], step))[: self.best])
        return [step in kept for step in steps]


def _clear_unfinished(folder: Path) -> None:
    """What a killed run was writing. Orbax would do so in a thread of its own, which the next save runs into."""
    if is_first():
        for path in folder.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)  # one that stays is in nobody's way
    barrier("cleared")


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their path, such as "optimizer.0.mu.layers.3.attention.q.adapter.a"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(found) == len(leaves), "two leaves have one path"
    return found


def _placed(leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """With a CRC-32 of everything else in it."""
    rest = {key: value for key, value in document.items() if key != "crc32"}
    return rest | {"crc32": f"{isal_zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"}


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _others(names: Sequence[str]) -> str:
    return f", nor are {len(names) - 1} other arrays" if len(names) > 1 else ""
