"""A released folder into our checkpoint: streaming, resumable, checked. Knows the order of the steps and the journal.

    SRC ─► batch of parameters ─► shards on the mesh ─► Orbax ─► CRC-32 of each file ─┐
    SRC ─► SHA-256 of each tensor ───────────────────────────────────────────────────┴─► journal ─► manifest ─► DST

Everything grows in DST.unfinished, which is renamed to DST at the end: DST exists whole or not at all. The journal says
what is done; whatever it does not name is done again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptoss_jax.convert import store
from gptoss_jax.convert.files import INDEX_NAME, TensorFolder
from gptoss_jax.convert.json_file import read_object, write_object
from gptoss_jax.convert.manifest import Manifest, SourceTensor, StoredFile
from gptoss_jax.convert.source import Parameters, Repacked, Source, read_sharded
from gptoss_jax.errors import UserError
from gptoss_jax.kernels.mxfp4 import ScaleRule
from gptoss_jax.model.transformer import Experts, abstract_model, parameters
from gptoss_jax.sharding import MeshShape, make_mesh, place

_BATCH_BYTES = 256 << 20
_PLAN_NAME = "plan.json"
_SMALL_SUFFIXES = (".json", ".jinja", ".md", ".txt", "")  # config, tokenizer, chat template, licence
_LARGEST_SMALL = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One parameter of the checkpoint to be."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def convert(
    source_path: Path,
    destination: Path,
    *,
    mesh: MeshShape = MeshShape(),
    experts: Experts | None = None,
    scale_rule: ScaleRule = "even",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Converts the release in `source_path` into the checkpoint `destination`, or goes on where it was interrupted.

    Args:
        source_path: a folder of Hugging Face's or OpenAI's layout.
        destination: must not exist. Meanwhile `destination`.unfinished grows.
        mesh: files are cut for the shards of this mesh; any other can restore them.
        experts: how to store them; None keeps them as they are, byte for byte.
        scale_rule: of MXFP4 scales when bf16 experts are to be packed.
        on_progress: called with bytes stored so far and in all.

    Raises:
        UserError: bad source, destination or mesh, or no room; nothing is left behind that was not there before.
    """
    source = Source.open(source_path)
    _check_destination(source_path, destination)
    stored: Parameters = source
    if experts is not None and experts != source.experts:
        stored = Repacked(source, experts, scale_rule=scale_rule)
    devices = make_mesh(**dataclasses.asdict(mesh))
    targets = _targets(stored, devices)
    staging = destination.with_name(destination.name + ".unfinished")
    plan = _plan(source, stored, mesh, scale_rule)
    _begin(staging, plan, sum(target.nbytes for target in targets))
    journal = Journal(staging)
    try:
        _store(stored, source, targets, staging, journal, on_progress)
    except UserError:
        shutil.rmtree(staging)  # the source is bad: there is nothing to go on with
        raise
    finally:
        journal.close()
    return _finish(source, stored, mesh, staging, destination)


class Journal:
    """What is done, one JSON line each, by this process; reading brings together the lines of all processes."""

    def __init__(self, staging: Path):
        self._staging = staging
        self._lock = threading.Lock()
        self._file = (staging / f"journal.{jax.process_index()}.jsonl").open("a", encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(staging: Path) -> tuple[dict[str, SourceTensor], dict[str, dict[str, StoredFile]]]:
        """Tensors that are hashed, and the files of the parameters that are stored."""
        tensors: dict[str, SourceTensor] = {}
        stored: dict[str, dict[str, StoredFile]] = {}
        for path in sorted(staging.glob("journal.*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that was being written when the process was killed
                    continue
                if "tensor" in entry:
                    tensors[entry["tensor"]] = SourceTensor(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
                else:
                    stored[entry["parameter"]] = {name: StoredFile(*file) for name, file in entry["files"].items()}
        return tensors, stored


def _store(
    stored: Parameters,
    source: Source,
    targets: list[Target],
    staging: Path,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> None:
    """Stores what the journal does not name yet; source tensors are hashed and files read back beside it."""
    if (staging / store.PARAMETERS).exists():
        return  # only the manifest is missing
    hashed, done = Journal.read(staging)
    if jax.process_index() == 0:
        store.forget_other_batches(staging, set(done))
    store.barrier("resuming")
    progress = sum(target.nbytes for target in targets if target.name in done)
    total = sum(target.nbytes for target in targets)
    on_progress(progress, total)
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs: list[Future[None]] = [pool.submit(_hash_tensors, source, set(hashed), journal)]
        for number, batch in enumerate(_batches([target for target in targets if target.name not in done])):
            _raise_failed(jobs)
            store.save(staging, {target.name: read_sharded(stored, target.name, target.sharding) for target in batch})
            if number % jax.process_count() == jax.process_index():
                jobs.append(pool.submit(_checksum, staging, [target.name for target in batch], journal))
            progress += sum(target.nbytes for target in batch)
            on_progress(progress, total)
        for job in jobs:
            job.result()
    store.barrier("stored")


def _hash_tensors(source: Source, done: set[str], journal: Journal) -> None:
    mine = source.tensors[jax.process_index() :: jax.process_count()]
    for tensor in mine:
        if tensor.name not in done:
            dtype = str(source.folder.tensors[tensor.name].dtype)
            sha256 = source.folder.sha256(tensor.name)
            journal.add({"tensor": tensor.name, "dtype": dtype, "shape": tensor.shape, "sha256": sha256})


def _checksum(staging: Path, names: list[str], journal: Journal) -> None:
    for name in names:
        files = {file: dataclasses.astuple(StoredFile.of(path)) for file, path in store.saved_files(staging, name)}
        journal.add({"parameter": name, "files": files})


def _raise_failed(jobs: list[Future[None]]) -> None:
    for job in jobs:
        if job.done():
            job.result()


def _batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Neighbours, together at most `_BATCH_BYTES` unless one alone is more: memory follows the largest parameter."""
    batch: list[Target] = []
    for target in targets:
        if batch and sum(other.nbytes for other in batch) + target.nbytes > _BATCH_BYTES:
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch


def _targets(stored: Parameters, mesh: Mesh) -> list[Target]:
    declared = parameters(abstract_model(stored.config, experts=stored.experts))
    return [
        Target(
            name=name,
            shape=parameter.shape,
            dtype=stored.dtype(name),
            sharding=place(name, parameter.shape, parameter.axes, mesh),
        )
        for name, parameter in declared.items()
    ]


def _plan(source: Source, stored: Parameters, mesh: MeshShape, scale_rule: ScaleRule) -> dict[str, Any]:
    """What a second run must agree with to go on with the first one's work."""
    repacks = stored.experts == "mxfp4" and source.experts == "bf16"
    return {
        "source": fingerprint(source.folder),
        "experts": stored.experts,
        "mesh": str(mesh),
        "scale_rule": scale_rule if repacks else None,
    }


def fingerprint(folder: TensorFolder) -> str:
    """Changes when a file of the folder is replaced or its header changes; reads no weights."""
    digest = hashlib.sha256()
    for info in sorted(folder.tensors.values(), key=lambda info: info.name):
        file = info.file.stat()
        entry = (info.name, info.code, info.shape, info.file.name, info.offset, file.st_size, file.st_mtime_ns)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _check_destination(source: Path, destination: Path) -> None:
    if destination.resolve() == source.resolve():
        raise UserError(f"{destination} is the source itself; name another destination")
    if destination.exists():
        raise UserError(f"{destination} exists; expected a destination that does not: remove it or name another")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} is no folder; expected the one that {destination.name} is to be made in: create it")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written to; name a destination in a folder where you may write")


def _begin(staging: Path, plan: Mapping[str, Any], nbytes: int) -> None:
    """Makes the staging folder, or checks that the one there was begun by the same command."""
    path = staging / _PLAN_NAME
    if jax.process_index() == 0:
        if path.exists():
            _check_same_plan(staging, read_object(path), plan)
        taken = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        free = shutil.disk_usage(staging.absolute().parent).free
        if nbytes - taken > free:
            raise UserError(
                f"{staging.parent.absolute()} has {free:,} bytes free, the checkpoint needs {nbytes - taken:,}: "
                "make room or name a destination on another disk"
            )
        staging.mkdir(exist_ok=True)
        write_object(path, plan)
    store.barrier("begun")


def _check_same_plan(staging: Path, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    for key, value in plan.items():
        if begun.get(key) != value:
            what = "another source, or its files changed" if key == "source" else f"{key}={begun.get(key)}, now {value}"
            raise UserError(
                f"{staging} was begun with {what}: repeat that command to go on with it, or remove the folder to begin anew"
            )


def _finish(source: Source, stored: Parameters, mesh: MeshShape, staging: Path, destination: Path) -> Manifest:
    """Merges, adds the small files and the manifest, and gives the folder its name."""
    store.finish(staging)
    tensors, parameter_files = Journal.read(staging)
    files = {name: file for per_parameter in parameter_files.values() for name, file in per_parameter.items()}
    if jax.process_index() == 0:
        _copy_small_files(source.path, staging)
    store.barrier("copied")
    ours = {path.name for path in staging.glob("journal.*.jsonl")} | {_PLAN_NAME}
    for path in sorted(staging.rglob("*")):
        name = str(path.relative_to(staging))
        if path.is_file() and name not in files and name not in ours:
            files[name] = StoredFile.of(path)
    manifest = Manifest(
        layout=source.layout,
        experts=stored.experts,
        source_experts=source.experts,
        mesh=str(mesh),
        tensors={tensor.name: tensors[tensor.name] for tensor in source.tensors},
        files=dict(sorted(files.items())),
    )
    store.barrier("counted")
    if jax.process_index() == 0:
        manifest.write(staging)
        for name in ours:
            (staging / name).unlink()
        staging.rename(destination)
    store.barrier("converted")
    return manifest


def _copy_small_files(source: Path, staging: Path) -> None:
    """Config, tokenizer, chat template, licence. OpenAI's `original/` keeps its tokenizer in the folder above."""
    small = [path for path in sorted(source.iterdir()) if path.is_file() and path.name != INDEX_NAME]
    above = source.parent / "tokenizer.json"
    if source.name == "original" and above.is_file() and not (source / "tokenizer.json").exists():
        small.append(above)
    for path in small:
        if path.suffix in _SMALL_SUFFIXES and path.stat().st_size <= _LARGEST_SMALL and not path.name.startswith("."):
            shutil.copyfile(path, staging / path.name)
