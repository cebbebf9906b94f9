"""What a finished conversion says of itself: where it came from and what every stored file holds. Knows no arrays."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from isal import isal_zlib

from gptoss_jax.convert.json_file import read_object, write_object
from gptoss_jax.convert.names import Layout
from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import Experts

MANIFEST_NAME = "manifest.json"
_FORMAT = "gptoss_jax"
_VERSION = 1
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor of the release that the checkpoint was made from."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of the checkpoint: its length and the CRC-32 of its bytes."""

    nbytes: int
    crc32: str

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """Reads the whole file."""
        nbytes = checksum = 0
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                nbytes += len(piece)
                checksum = isal_zlib.crc32(piece, checksum)
        return cls(nbytes, f"{checksum:08x}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written last, so a folder that has one is whole.

    Attributes:
        layout: of the source.
        experts: how the checkpoint stores them.
        source_experts: how the source does.
        mesh: whose shards the files are cut for; any other mesh can read them too.
        tensors: of the source, in its order.
        files: every file of the checkpoint but this one, by its path below the checkpoint.
    """

    layout: Layout
    experts: Experts
    source_experts: Experts
    mesh: str
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, StoredFile]

    def write(self, folder: Path) -> None:
        document = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self)}
        write_object(folder / MANIFEST_NAME, document | {"crc32": _own_checksum(document)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Raises:
            UserError: there is none, or it is not one of ours.
        """
        path = folder / MANIFEST_NAME
        document = read_object(path)
        if document.get("format") != _FORMAT or document.get("version") != _VERSION:
            raise UserError(
                f"{path}: format {document.get('format')!r} version {document.get('version')!r}; "
                f"expected {_FORMAT!r} version {_VERSION}: convert the release again"
            )
        if document.get("crc32") != _own_checksum(document):
            raise UserError(f"{path} is damaged (its own CRC-32 does not fit): copy the checkpoint or convert it again")
        try:
            return cls._from_document(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): convert the release again") from error

    @classmethod
    def _from_document(cls, document: Mapping[str, Any]) -> "Manifest":
        tensors = {
            name: SourceTensor(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
            for name, entry in document["tensors"].items()
        }
        files = {name: StoredFile(entry["nbytes"], entry["crc32"]) for name, entry in document["files"].items()}
        same = {key: document[key] for key in ("layout", "experts", "source_experts", "mesh")}
        if {same["experts"], same["source_experts"]} - set(get_args(Experts)):
            raise ValueError(f"experts are {same['experts']!r} from {same['source_experts']!r}")
        return cls(tensors=tensors, files=files, **same)

    def check_sizes(self, folder: Path) -> None:
        """A quick look that every file is there in full; `verify` reads them.

        Raises:
            UserError: naming the first file that is not.
        """
        for name, stored in self.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != stored.nbytes:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise UserError(
                    f"{path} {what}; expected {stored.nbytes:,} bytes: copy or convert the checkpoint again"
                )


def _own_checksum(document: Mapping[str, Any]) -> str:
    """Of everything but itself, however the file spaces and sorts it."""
    rest = {key: value for key, value in document.items() if key != "crc32"}
    return f"{isal_zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
