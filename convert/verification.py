"""Finds damage in a checkpoint, down to one bit, and says which tensor it hit. Knows checksums; repairs nothing.

A file is held to the length and CRC-32 in the manifest. A release, if there is one to compare with, is held to the
SHA-256 of each of its tensors in the manifest, and so are the same bytes rebuilt from the checkpoint.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptoss_jax.convert.export import layout_tensors, tensor_bytes
from gptoss_jax.convert.manifest import MANIFEST_NAME, Manifest
from gptoss_jax.convert.names import FIRST, LAST, LAYER, FileTensor, Index
from gptoss_jax.convert.source import Repacked, Source
from gptoss_jax.convert.store import PARAMETERS, parameter_of
from gptoss_jax.convert.stored import StoredParameters, damage, described, read_manifest
from gptoss_jax.errors import UserError
from gptoss_jax.kernels import mxfp4

_EXPERTS = (".gate_up", ".down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        file: below the checkpoint, if it is one file that is at fault.
        parameter: of ours that the fault is in; None for metadata and for a tensor of the release.
        tensors: of the release that it is in.
        expected: what should be there, in words.
        found: what is there.
    """

    file: str | None = None
    parameter: str | None = None
    tensors: tuple[str, ...] = ()
    expected: str
    found: str

    def __str__(self) -> str:
        parameter = () if self.parameter is None else (self.parameter,)
        names = ", ".join(dict.fromkeys((*parameter, *self.tensors)))
        subject = names if self.file is None else f"{self.file} ({names})" if names else self.file
        return f"{subject}: expected {self.expected}, found {self.found}"


def verify(
    checkpoint: Path,
    *,
    against: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Fault]:
    """Reads all of a checkpoint and compares it with its manifest, and with the release it came from if that is given.

    Args:
        checkpoint: the destination of a finished conversion.
        against: its source, which is read as well. Experts that the conversion packed are compared code by code under
            the checkpoint's own scales, since the manifest does not say by which rule these were chosen.
        on_progress: called with bytes read so far and in all.

    Returns:
        Every fault; an empty list says that the checkpoint is whole.

    Raises:
        UserError: there is no finished checkpoint, its manifest is damaged, or `against` is no release of its form.
    """
    manifest = read_manifest(checkpoint)
    source = None if against is None else Source.open(against)
    if source is not None:
        _check_same_form(manifest, source)
    progress = _Progress(_total(manifest, source), on_progress)
    faults = [*_file_faults(checkpoint, manifest, progress), *_strangers(checkpoint, manifest)]
    if source is not None:
        faulty = {fault.parameter for fault in faults if fault.parameter is not None}
        faults += _Comparison(checkpoint, manifest, source, faulty, progress).faults()
    progress.finish()
    return faults


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None]):
        self._done, self._total, self._report = 0, total, report
        report(0, total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(min(self._done, self._total), self._total)

    def finish(self) -> None:
        """Damaged parameters are not read twice, and metadata is no part of what is rebuilt."""
        self._report(self._total, self._total)


def _total(manifest: Manifest, source: Source | None) -> int:
    files = sum(file.nbytes for file in manifest.files.values())
    return files if source is None else 2 * files + sum(info.nbytes for info in source.folder.tensors.values())


# --- the files of the checkpoint ----------------------------------------------------------------------------------


def _file_faults(checkpoint: Path, manifest: Manifest, progress: _Progress) -> Iterator[Fault]:
    for file, expected in manifest.files.items():
        found = damage(checkpoint / file, expected)
        progress.add(expected.nbytes)
        if found is not None:
            parameter = parameter_of(file)
            tensors = _release_tensors(parameter, manifest)
            yield Fault(file=file, parameter=parameter, tensors=tensors, expected=described(expected), found=found)


def _strangers(checkpoint: Path, manifest: Manifest) -> Iterator[Fault]:
    """Files among the parameters that no conversion put there: Orbax might take them for chunks."""
    for path in sorted((checkpoint / PARAMETERS).rglob("*")):
        file = path.relative_to(checkpoint).as_posix()
        if file not in manifest.files and not path.is_dir():
            parameter = parameter_of(file)
            tensors = _release_tensors(parameter, manifest)
            found = f"a file that {MANIFEST_NAME} does not name"
            yield Fault(file=file, parameter=parameter, tensors=tensors, expected="no such file", found=found)


def _release_tensors(parameter: str | None, manifest: Manifest) -> tuple[str, ...]:
    """What the release calls the parameter. Found without the config, which may be damaged itself."""
    if parameter is None:
        return ()
    head, _, rest = parameter.partition(".")
    layer = rest.partition(".")[0]
    in_layer = head == "layers" and layer.isdecimal()
    rows = [row.of_layer(int(layer)) for row in LAYER] if in_layer else [*FIRST, *LAST]
    wanted = _as_released(parameter, manifest)
    found = (row.hf if manifest.layout == "hf" else row.original for row in rows if row.ours in wanted)
    return tuple(name for name in found if name is not None)


def _as_released(parameter: str, manifest: Manifest) -> list[str]:
    """The parameter, or its twins in the release if the experts were repacked."""
    stem, _, kind = parameter.rpartition(".")
    if manifest.experts == manifest.source_experts or not stem.endswith(_EXPERTS) or kind == "bias":
        return [parameter]
    kinds = ("blocks", "scales") if manifest.source_experts == "mxfp4" else ("weight",)
    return [f"{stem}.{twin}" for twin in kinds]


# --- the release --------------------------------------------------------------------------------------------------


def _check_same_form(manifest: Manifest, source: Source) -> None:
    if (source.layout, source.experts) != (manifest.layout, manifest.source_experts):
        raise UserError(
            f"{source.path} has the layout {source.layout} and {source.experts} experts, the checkpoint was made from "
            f"the layout {manifest.layout} and {manifest.source_experts} experts: name the folder it was converted from"
        )


class _Comparison:
    """A release beside the checkpoint that was made from it. Parameters in `faulty` are known to be damaged."""

    def __init__(self, checkpoint: Path, manifest: Manifest, source: Source, faulty: set[str], progress: _Progress):
        self._manifest = manifest
        self._source = source
        # The sizes are the release's, since the checkpoint's own config may be what is damaged.
        self._stored = StoredParameters(checkpoint, source.config, manifest, check=False)
        self._unpacked = Repacked(source, "bf16")
        self._faulty = faulty
        self._progress = progress

    def faults(self) -> Iterator[Fault]:
        for tensor in layout_tensors(self._source, self._source.layout):
            yield from self._tensor_faults(tensor)
        for name in sorted(self._manifest.tensors.keys() - self._source.folder.tensors.keys()):
            expected = f"SHA-256 {self._manifest.tensors[name].sha256}"
            yield Fault(tensors=(name,), expected=expected, found=f"no such tensor in {self._source.path}")
        if self._manifest.experts != self._manifest.source_experts:
            yield from self._repacked_faults()

    def _tensor_faults(self, tensor: FileTensor) -> Iterator[Fault]:
        """The release's bytes, and those rebuilt from the checkpoint, against the hash from the time of conversion."""
        found = self._source.folder.sha256(tensor.name)
        self._progress.add(tensor.nbytes)
        if tensor.name not in self._manifest.tensors:
            found = f"it in {self._source.path} only"
            yield Fault(tensors=(tensor.name,), expected=f"a tensor that {MANIFEST_NAME} names", found=found)
            return
        recorded = self._manifest.tensors[tensor.name].sha256
        expected = f"SHA-256 {recorded}"
        if found != recorded:
            yield Fault(tensors=(tensor.name,), expected=expected, found=f"{found} in {self._source.path}")
        parts = [part.parameter for part in tensor.parts]
        if not self._stored.shapes.keys() >= set(parts) or not self._faulty.isdisjoint(parts):
            return  # stored another way, or known to be damaged
        try:
            rebuilt = self._rebuilt(tensor)
        except UserError as error:
            rebuilt = str(error)
        if rebuilt != recorded:
            found = f"{rebuilt} in the checkpoint"
            yield Fault(parameter=", ".join(parts), tensors=(tensor.name,), expected=expected, found=found)

    def _rebuilt(self, tensor: FileTensor) -> str:
        digest = hashlib.sha256()
        for chunk in tensor_bytes(self._stored, tensor):
            digest.update(chunk.data)
            self._progress.add(chunk.nbytes)
        return digest.hexdigest()

    def _repacked_faults(self) -> Iterator[Fault]:
        """Experts that are stored another way than in the release, repacked once more."""
        kind = "weight" if self._stored.experts == "bf16" else "blocks"
        for parameter in self._stored.shapes:
            stem, _, found = parameter.rpartition(".")
            if found != kind or not stem.endswith(_EXPERTS):
                continue
            if self._faulty.isdisjoint((parameter, f"{stem}.scales")) and not self._repacks_alike(parameter):
                yield Fault(
                    parameter=parameter,
                    tensors=_release_tensors(parameter, self._manifest),
                    expected=f"the values of {self._source.path}",
                    found="others in the checkpoint",
                )

    def _repacks_alike(self, parameter: str) -> bool:
        try:
            for index in self._stored.slabs(parameter):
                stored = self._stored.read(parameter, index)
                self._progress.add(stored.nbytes)
                if stored.tobytes() != self._repacked(parameter, index).tobytes():  # bytes: -0 is not 0
                    return False
        except UserError:
            return False
        return True

    def _repacked(self, parameter: str, index: Index) -> np.ndarray:
        if self._stored.experts == "bf16":
            return self._unpacked.read(parameter, index)
        *rows, blocks, _ = index
        stem = parameter.removesuffix(".blocks")
        values = self._source.read(f"{stem}.weight", (*rows, slice(None)))  # slabs are of whole rows
        scales = self._stored.read(f"{stem}.scales", (*rows, blocks))
        return np.asarray(mxfp4.encode(values.astype(np.float32), rule="reuse", scales=scales).blocks)
