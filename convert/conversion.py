"""A released folder into our checkpoint: streaming, resumable, checked. Knows the order of the steps.

    SRC ─► batch of parameters ─► shards on the mesh ─► Orbax ─► CRC-32 of each file ─┐
    SRC ─► SHA-256 of each tensor ───────────────────────────────────────────────────┴─► journal ─► manifest ─► DST

Everything grows in DST.unfinished, which is renamed to DST at the end: DST exists whole or not at all. The journal says
what is done; whatever it does not name is done again.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptoss_jax.convert import store
from gptoss_jax.convert.export import small_files
from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.manifest import MANIFEST_NAME, Manifest, SourceTensor, StoredFile
from gptoss_jax.convert.names import FileTensor
from gptoss_jax.convert.source import Parameters, Repacked, Source, read_sharded
from gptoss_jax.convert.staging import Journal, Staging
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import barrier, is_first, together
from gptoss_jax.kernels.mxfp4 import ScaleRule
from gptoss_jax.model.transformer import Experts, released
from gptoss_jax.sharding import MeshShape, make_mesh, place

BATCH_BYTES = 256 << 20
_ONE_DEVICE = MeshShape()


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is converted, how, and where it grows."""

    source: Source
    stored: Parameters  # the source, or its experts repacked
    mesh: MeshShape
    targets: list[Target]
    staging: Staging


def convert(
    source_path: Path,
    destination: Path,
    *,
    mesh: MeshShape = _ONE_DEVICE,
    experts: Experts | None = None,
    scale_rule: ScaleRule = "even",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Converts the release in `source_path` into the checkpoint `destination`, or goes on where it was interrupted.

    Args:
        source_path: a folder of Hugging Face's or OpenAI's layout.
        destination: must not exist. Meanwhile `destination`.unfinished grows.
        mesh: files are cut for the shards of this mesh, which it has to divide; any other can load them.
        experts: how to store them; None keeps them as they are, byte for byte.
        scale_rule: of MXFP4 scales when bf16 experts are to be packed.
        on_progress: called with bytes stored so far and in all.

    Raises:
        UserError: bad source, destination or mesh, or no room: nothing is left behind that was not there before. Or
            the disk refuses halfway: what is there is kept, to go on with.
    """
    source = Source.open(source_path)
    stored: Parameters = source
    if experts is not None and experts != source.experts:
        stored = Repacked(source, experts, scale_rule=scale_rule)
    targets = _targets(stored, make_mesh(**dataclasses.asdict(mesh)))
    _check_destination(source_path, destination)
    staging = Staging(destination)
    if not staging.path.is_dir():
        _refuse_existing(destination)
    job = Job(source=source, stored=stored, mesh=mesh, targets=targets, staging=staging)
    with staging.claimed():
        if not _begin(job, destination, _plan(job, scale_rule)):
            _publish(_convert(job, on_progress), staging, destination)
        if is_first():
            staging.discard()
        barrier("converted")
    return Manifest.read(destination)


def fingerprint(folder: TensorFolder) -> str:
    """Changes when a file of the folder is replaced or its header changes; reads no weights."""
    digest = hashlib.sha256()
    for info in sorted(folder.tensors.values(), key=lambda info: info.name):
        file = info.file.stat()
        entry = (info.name, info.code, info.shape, info.file.name, info.offset, file.st_size, file.st_mtime_ns)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _targets(stored: Parameters, mesh: Mesh) -> list[Target]:
    """Files hold no padding, unlike a model that is loaded: a mesh that they are cut for has to divide all of them."""
    declared = released(stored.config, stored.experts)
    try:
        return [
            Target(name=name, shape=shape, dtype=stored.dtype(name), sharding=place(name, shape, axes, mesh))
            for name, (shape, axes) in declared.items()
        ]
    except UserError as error:
        raise UserError(
            f"{error}; only the files are cut for this mesh, and a checkpoint for any can be loaded onto every other"
        ) from error


def _plan(job: Job, scale_rule: ScaleRule) -> dict[str, Any]:
    """What a second run must agree with to go on with the first one's work."""
    repacks = job.stored.experts == "mxfp4" and job.source.experts == "bf16"
    return {
        "source": fingerprint(job.source.folder),
        "experts": job.stored.experts,
        "mesh": str(job.mesh),
        "scale_rule": scale_rule if repacks else None,
    }


# --- where to -----------------------------------------------------------------------------------------------------


def _check_destination(source: Path, destination: Path) -> None:
    if destination.resolve() == source.resolve():
        raise UserError(f"{destination} is the source itself; name another destination")
    if source.resolve() in destination.resolve().parents:
        raise UserError(f"{destination} lies inside the source {source}; name a destination outside of it")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} is no folder; expected the one that {destination.name} is to be made in: create it")


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):
        raise UserError(f"{destination} exists; expected a destination that does not: remove it or name another")


def _begin(job: Job, destination: Path, plan: dict[str, Any]) -> bool:
    """Checks that the work can begin or go on; True if it was done but for the clearing up when it was interrupted."""
    with together("beginning"):
        finished = os.path.lexists(destination) and job.staging.plan() == plan
        if not finished:
            _refuse_existing(destination)
            if is_first():
                _check_room(job)
            job.staging.begin(plan)
    barrier("begun")
    return finished


def _check_room(job: Job) -> None:
    needed = sum(target.nbytes for target in job.targets) - job.staging.nbytes()
    free = shutil.disk_usage(job.staging.path).free
    if needed > free:
        raise UserError(
            f"{job.staging.path.absolute().parent} has {free:,} bytes free, the checkpoint needs {needed:,}: "
            "make room or name a destination on another disk"
        )


def _publish(manifest: Manifest, staging: Staging, destination: Path) -> None:
    """From here on the destination is there, whole."""
    with together("giving the checkpoint its name"):
        if is_first():
            manifest.write(staging.checkpoint)
            try:
                staging.checkpoint.rename(destination)
            except OSError as error:
                raise UserError(
                    f"{destination} cannot be made: {error.strerror}; if it is there by now, move it out of the way, "
                    "then run the same command again"
                ) from error


# --- the work -----------------------------------------------------------------------------------------------------


def _convert(job: Job, on_progress: Callable[[int, int], None]) -> Manifest:
    """Everything but the manifest and the name."""
    journal = Journal(job.staging)
    try:
        _store(job, journal, on_progress)
        return _finish(job)
    except UserError:
        if is_first():
            job.staging.discard()  # the source is bad: there is nothing to go on with
        raise
    except OSError as error:  # reading has turned its own into UserError
        raise UserError(
            f"{job.staging.path} cannot be written: {error.strerror}; what is there is kept: "
            "make room, then run the same command again to go on with it"
        ) from error
    finally:
        journal.close()


def _store(job: Job, journal: Journal, on_progress: Callable[[int, int], None]) -> None:
    """Stores what the journals do not name yet; source tensors are hashed and files read back beside it."""
    if (job.staging.checkpoint / store.PARAMETERS).exists():
        return  # all is stored and merged
    hashed, done = Journal.read(job.staging)
    barrier("journals read")
    if is_first():
        store.forget_other_batches(job.staging.checkpoint, set(done))
    barrier("resumed")
    total = sum(target.nbytes for target in job.targets)
    progress = sum(target.nbytes for target in job.targets if target.name in done)
    on_progress(progress, total)
    with _worker() as hashing, _worker() as checking:
        unhashed = [tensor for tensor in job.source.tensors if tensor.name not in hashed]
        mine = unhashed[jax.process_index() :: jax.process_count()]
        beside = [hashing.submit(_hash, job.source, tensor, journal) for tensor in mine]
        for number, batch in enumerate(_batches([target for target in job.targets if target.name not in done])):
            _save(job, batch, beside)
            if number % jax.process_count() == jax.process_index():
                beside.append(checking.submit(_checksum, job.staging, batch, journal))
            progress += sum(target.nbytes for target in batch)
            on_progress(progress, total)
        with together("hashing the source"):
            for future in beside:
                future.result()


def _save(job: Job, batch: list[Target], beside: list[Future[None]]) -> None:
    with together("reading the source"):
        for future in beside:
            if future.done():
                future.result()  # what failed beside us fails here
        arrays = {target.name: read_sharded(job.stored, target.name, target.sharding) for target in batch}
    store.save(job.staging.checkpoint, arrays)


def _hash(source: Source, tensor: FileTensor, journal: Journal) -> None:
    dtype = str(source.folder.tensors[tensor.name].dtype)
    journal.add_tensor(tensor.name, SourceTensor(dtype, tensor.shape, source.folder.sha256(tensor.name)))


def _checksum(staging: Staging, batch: list[Target], journal: Journal) -> None:
    saved = {target.name: store.saved_files(staging.checkpoint, target.name) for target in batch}
    journal.add_batch({name: {file: StoredFile.of(path) for file, path in files} for name, files in saved.items()})


@contextlib.contextmanager
def _worker() -> Iterator[ThreadPoolExecutor]:
    """One thread; where an error leaves the block, what it has not begun is dropped."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Neighbours, together at most `BATCH_BYTES` unless one alone is more: memory follows the largest parameter."""
    batch: list[Target] = []
    for target in targets:
        if batch and sum(other.nbytes for other in batch) + target.nbytes > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch


def _finish(job: Job) -> Manifest:
    """Merges what is stored and puts the small files beside it."""
    folder = job.staging.checkpoint
    store.finish(folder)
    if is_first():
        for path in small_files(job.source.path):
            shutil.copyfile(path, folder / path.name)
    barrier("copied")
    tensors, by_parameter = Journal.read(job.staging)
    files = {name: file for of_parameter in by_parameter.values() for name, file in of_parameter.items()}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and not name.startswith(MANIFEST_NAME):  # of a killed run
            files[name] = StoredFile.of(path)
    manifest = Manifest(
        layout=job.source.layout,
        experts=job.stored.experts,
        source_experts=job.source.experts,
        mesh=str(job.mesh),
        tensors={tensor.name: tensors[tensor.name] for tensor in job.source.tensors},
        files=dict(sorted(files.items())),
    )
    manifest.check_sizes(folder)
    barrier("counted")
    return manifest
