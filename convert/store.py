"""Parameters on disk, kept by Orbax: saved a batch at a time, restored in part onto any mesh. Knows no release.

Plain zarr files without compression: MXFP4 does not compress, names and bytes of the files follow from the parameters
alone, and a checksum per file finds a flipped bit, which Orbax itself does not notice.

    params/state/layers.0.moe.gate_up.blocks/c/5/0/0/0/0      expert 5 of layer 0
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from gptoss_jax.hosts import barrier, is_first

PARAMETERS = "params"
_STATE = "state"  # Orbax's name for the tree in a checkpoint
_CHUNK_BYTES = 32 << 20  # a host reads whole chunks: small ones let it read little more than its own shards
_RESTORE_BYTES = 512 << 20


def save(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Adds a batch of parameters to the unfinished ones in `folder`; all processes call it together.

    Raises:
        OSError: the system refuses to write, for want of room say.
    """
    try:
        with _saving():
            ocp.partial.save(str((folder / PARAMETERS).absolute()), _tree(arrays))  # else Orbax refuses
    except ValueError as error:  # TensorStore's word for everything
        refused = re.search(r"os_error_code='(\d+)'", str(error))
        if refused is None:
            raise
        code = int(refused[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


def finish(folder: Path) -> None:
    """Turns the saved batches into one checkpoint, `folder`/params. Killed at any moment, it can be called again.

    Orbax merges batches in place, and half a merge cannot be gone on with; so a copy is merged, of links where the disk
    has them, and the batches go when it is whole.
    """
    done, merging = folder / PARAMETERS, folder / "merging"
    if is_first() and not done.exists():
        shutil.rmtree(merging, ignore_errors=True)
        shutil.copytree(_batches(folder), _batches(merging), copy_function=_link_or_copy)
    barrier("merging")
    if not done.exists():
        with _saving(), _without_false_alarms():
            ocp.partial.finalize(str((merging / PARAMETERS).absolute()))
    barrier("merged")
    if is_first():
        if not done.exists():
            _forget_when_and_where(merging / PARAMETERS)
            (merging / PARAMETERS).rename(done)
        shutil.rmtree(merging, ignore_errors=True)
        shutil.rmtree(_batches(folder), ignore_errors=True)
    barrier("finished")


def forget_other_batches(folder: Path, kept: set[str]) -> None:
    """Drops saved batches with a parameter that is not in `kept`, and what a killed save left behind."""
    for path in folder.glob(f"{PARAMETERS}.*"):
        if path != _batches(folder):
            shutil.rmtree(path)
    if _batches(folder).exists():
        for batch in _batches(folder).iterdir():
            found = {path.parent.name for path in batch.glob(f"{_STATE}/*/zarr.json")}
            if not found or not found <= kept:
                shutil.rmtree(batch)


def saved_files(folder: Path, parameter: str) -> Iterator[tuple[str, Path]]:
    """The files of a parameter saved in an unfinished folder: (path once finished, path now)."""
    (home,) = _batches(folder).glob(f"*/{_STATE}/{parameter}")
    for path in sorted(home.rglob("*")):
        if path.is_file():
            yield f"{PARAMETERS}/{_STATE}/{parameter}/{path.relative_to(home)}", path


def parameter_of(file: str) -> str | None:
    """The parameter that a file of a finished checkpoint holds, by its path in the manifest; None for metadata."""
    parts = file.split("/")
    return parts[2] if len(parts) > 3 and parts[:2] == [PARAMETERS, _STATE] else None


def stored(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each stored parameter."""
    with _without_false_alarms():
        metadata: Any = ocp.metadata(str(folder / PARAMETERS)).metadata
    flat, _ = jax.tree_util.tree_flatten_with_path(metadata, is_leaf=lambda x: hasattr(x, "shape"))
    return {_path_name(path): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in flat}


def restore(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Reads the parameters of `wanted` in their stored dtype where their shardings say, a few hundred MB at a time.

    Each process reads the chunks that its own shards touch.
    """
    batch: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in wanted.items():
        batch[name] = leaf
        if sum(x.size * x.dtype.itemsize for x in batch.values()) >= _RESTORE_BYTES:
            yield from _load(folder, batch)
            batch = {}
    if batch:
        yield from _load(folder, batch)


def _load(folder: Path, batch: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, _without_false_alarms():
        tree = ocp.load(str(folder / PARAMETERS), _tree(batch))
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield _path_name(path), array


def _saving() -> ocp.Context:
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_compression = False
    saving.use_replica_parallel = False  # one file holds a shard, however many devices hold a copy
    saving.enable_write_sharding_file = False  # names the devices of this machine; nobody asks for them
    saving.array_metadata_store = None  # what every process would say again of arrays that say it themselves
    saving.scoped_storage_options_creator = _storage
    context.memory.deepcopy_host_arrays = False  # a batch is saved before anyone touches its arrays again
    return context


def _storage(key: tuple[Any, ...], value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """One expert a file where all of them would be too many bytes; what else is large is cut along its largest axis."""
    by_expert = ".moe." in _path_name(key) and value.nbytes > _CHUNK_BYTES
    axes = (0,) if by_expert else None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)


def _forget_when_and_where(folder: Path) -> None:
    """Rewrites what Orbax says of the saving, so that all bytes follow from the parameters and the mesh alone."""
    (folder / "commit_success.txt").write_text("")  # that it is there counts; it held the path of the unfinished folder
    for path in (folder / "_CHECKPOINT_METADATA", folder / _STATE / "_METADATA"):
        document = json.loads(path.read_bytes())
        times = {key: None for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs") if key in document}
        path.write_text(json.dumps(document | times, sort_keys=True), encoding="utf-8")


@contextlib.contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Drops two warnings of Orbax: no OCDBT to merge, which nobody wants; no data, where it looks for Zarr 2 only."""
    alarms = ("Skipping merge of OCDBT checkpoints", "TensorStore data files not found")

    def real(record: logging.LogRecord) -> bool:
        return not any(alarm in str(record.msg) for alarm in alarms)

    logger = logging.getLogger("absl")
    logger.addFilter(real)
    try:
        yield
    finally:
        logger.removeFilter(real)


def _batches(folder: Path) -> Path:
    return folder / f"{PARAMETERS}.partial_save"


def _link_or_copy(source: str, target: str) -> None:
    """Data files are linked; the small JSON ones are copied, since merging writes into them."""
    if "/c/" in source:
        try:
            os.link(source, target)
            return
        except OSError:  # a disk without links
            pass
    shutil.copy2(source, target)


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)
