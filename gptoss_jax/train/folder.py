"""The folder of one run: what was asked for, who works there, whether it may go on. Knows files; knows no arrays.

RUN/
  config.toml     every setting, as the run was last started
  base            the digest of the model that it goes on from
  log.jsonl       what it said of itself (log.py)
  saves/          what it can go on from (saves.py)
  adapter/        what came of it in the end, or model/
  lock            held by the process that trains; one that is killed lets go of it
"""

import contextlib
import dataclasses
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.convert.lock import claimed_folder
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import agree, barrier, is_first, together
from gptoss_jax.train import toml
from gptoss_jax.train.config import TrainConfig, changes

CONFIG_NAME = "config.toml"
_LOCK = "lock"
_BASE = "base"  # the digest of convert/adapters.py


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run lies; all its processes see it."""

    path: Path

    @property
    def saves(self) -> Path:
        return self.path / "saves"

    @contextlib.contextmanager
    def claimed(self, config: TrainConfig) -> Iterator[None]:
        """Makes the folder, or checks that its run may go on with this configuration; keeps other runs out meanwhile.

        Raises:
            UserError: another process trains there, it holds something else, or the configuration has changed.
        """
        way_out = "wait for it, stop it, or name another folder"
        with claimed_folder(self.path, _LOCK, parents=True, work="training run", way_out=way_out):
            with together("looking into the run folder"):
                self._check(config)
            agree("the configuration", toml.write(config))
            if is_first():
                _write(self.path / CONFIG_NAME, toml.write(config))
            barrier("configured")
            yield

    def check_base(self, digest: str) -> None:
        """Remembers which model the run goes on from: a path alone does not say that it still is the same.

        Raises:
            UserError: it is another one now.
        """
        path = self.path / _BASE
        before = path.read_text(encoding="utf-8").strip() if path.is_file() else digest
        if before != digest:
            raise UserError(
                f"{self.path} was begun with a base of digest {before[:12]}, the checkpoint has {digest[:12]} now: "
                "put the one back that it began with, or name another folder"
            )
        barrier("compared")
        if is_first():
            _write(path, f"{digest}\n")

    def config(self) -> TrainConfig | None:
        """What the run was last started with; None before that.

        Raises:
            UserError: it cannot be read.
        """
        path = self.path / CONFIG_NAME
        try:
            return toml.build(TrainConfig, tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # UserError is one
            raise UserError(f"{path}: {error}; mend it, or name another run folder") from error

    def _check(self, config: TrainConfig) -> None:
        before = self.config()
        if before is None:
            strange = {path.name for path in self.path.iterdir()} - {_LOCK}
            if strange:
                raise UserError(
                    f"{self.path} holds {min(strange)} but no {CONFIG_NAME}, so it is no run's folder: name another"
                )
            return
        changed = changes(before, config)
        if changed:
            raise UserError(
                f"{self.path} was begun with {_listed(changed)}: repeat that to go on with it, or name another folder"
            )


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}={_shown(before)}, not {_shown(now)}" for key, (before, now) in changed.items())


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(list(value)) if isinstance(value, tuple) else repr(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    changed = path.with_name(f"{path.name}.new")
    with changed.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    changed.replace(path)
