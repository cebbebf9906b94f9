"""DST.unfinished, where a conversion grows: who works there, what was asked for, what is done. Knows no arrays.

DST.unfinished/
  lock               held by the running conversion; one that is killed lets go of it
  plan.json          what was asked for: only the same command goes on here
  journal.0.jsonl    what process 0 has done, a line each
  checkpoint/        the checkpoint to be, renamed to DST when it is whole
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.convert.json_file import read_object, write_object
from gptoss_jax.convert.lock import claimed_folder
from gptoss_jax.convert.manifest import SourceTensor, StoredFile
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import is_first

SUFFIX = ".unfinished"
_LOCK, _PLAN = "lock", "plan.json"


class Staging:
    """The unfinished folder of one destination."""

    def __init__(self, destination: Path):
        self.path = destination.with_name(destination.name + SUFFIX)
        self.checkpoint = self.path / "checkpoint"

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Makes the folder if need be and keeps other conversions out; if nothing was begun in it, it goes again.

        Raises:
            UserError: it cannot be made, or another conversion works there.
        """
        way_out = "wait for it, or stop it and run this command again"
        return claimed_folder(self.path, _LOCK, work="conversion", way_out=way_out)

    def plan(self) -> dict[str, Any] | None:
        """What was asked for when it was begun; None before that."""
        path = self.path / _PLAN
        return read_object(path) if path.exists() else None

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Writes down what is asked for, or checks that the work that is there was begun by the same command.

        Raises:
            UserError: it was begun by another command, or by none of ours.
        """
        begun = self.plan()
        if begun is not None:
            self._check_same(begun, plan)
            return
        strange = set(os.listdir(self.path)) - {_LOCK, _PLAN, f"{_PLAN}.partial"}
        if strange:
            raise UserError(
                f"{self.path} holds {min(strange)} but no {_PLAN}, so no conversion made it; move it out of the way"
            )
        if is_first():
            write_object(self.path / _PLAN, plan)

    def nbytes(self) -> int:
        """The bytes of its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def discard(self) -> None:
        """Removes everything, the plan last: what is there without one was never ours."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_LOCK, _PLAN):
                path.unlink()
        (self.path / _PLAN).unlink()

    def _check_same(self, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        for key, value in plan.items():
            if begun.get(key) != value:
                found = f"{self.path} was begun with {key}={begun.get(key)}, not {value}"
                if key == "source":
                    found = f"{self.path} was begun from another source, or files of the source have changed since"
                raise UserError(f"{found}: repeat that command to go on with it, or remove the folder to begin anew")


class Journal:
    """What is done, one JSON line each, by this process; reading brings together the lines of all processes."""

    def __init__(self, staging: Staging):
        self._lock = threading.Lock()
        self._file = (staging.path / f"journal.{jax.process_index()}.jsonl").open("a+b")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that a killed process left half written

    def add_tensor(self, name: str, tensor: SourceTensor) -> None:
        """A source tensor is hashed."""
        self._add({"tensor": name, "dtype": tensor.dtype, "shape": tensor.shape, "sha256": tensor.sha256})

    def add_batch(self, batch: Mapping[str, Mapping[str, StoredFile]]) -> None:
        """A batch of parameters is stored, in these files. One line: a batch is done as a whole or not at all."""
        files = {
            parameter: {name: (file.nbytes, file.crc32) for name, file in of_parameter.items()}
            for parameter, of_parameter in batch.items()
        }
        self._add({"stored": files})

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(staging: Staging) -> tuple[dict[str, SourceTensor], dict[str, dict[str, StoredFile]]]:
        """Tensors that are hashed, and the files of the parameters that are stored."""
        tensors: dict[str, SourceTensor] = {}
        stored: dict[str, dict[str, StoredFile]] = {}
        for path in sorted(staging.path.glob("journal.*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # half written by a process that was killed and takes no part in this run
                    continue
                if "tensor" in entry:
                    tensors[entry["tensor"]] = SourceTensor(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
                for parameter, files in entry.get("stored", {}).items():
                    stored[parameter] = {name: StoredFile(*file) for name, file in files.items()}
        return tensors, stored

    def _add(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
