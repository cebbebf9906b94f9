"""Trained adapters on disk: our own folders written and read, PEFT's told apart. Knows no training and no merging.

DST/
  adapter.json       rank, strength and targets, the sizes of the base and what tells it from others, and the length and
                     CRC-32 of every other file; written last
  params/            a and b of each adapted matrix, kept by Orbax as a checkpoint's parameters are

A folder grows under another name and is renamed when it is whole: DST is there whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from gptoss_jax.convert import peft_config, store
from gptoss_jax.convert.disk import reported
from gptoss_jax.convert.json_file import read_object, write_object
from gptoss_jax.convert.manifest import StoredFile
from gptoss_jax.convert.names import BFLOAT16
from gptoss_jax.convert.peft import read_peft
from gptoss_jax.convert.plain import PlainArray
from gptoss_jax.convert.source import Parameters
from gptoss_jax.convert.stored import damage, described
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import is_first, together
from gptoss_jax.model.adapter import Adapter, AdapterSpec, Target, adapter_shapes, check_leaves
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import parameter_shapes

ADAPTER_NAME = "adapter.json"
Kind = Literal["ours", "peft"]

_FORMAT, _VERSION = "gptoss_jax adapter", 1
_STATE = "state"  # Orbax's name for the tree in a checkpoint
_SUFFIX = ".adapter-unfinished"
_SIZES = ("width", "num_heads", "num_kv_heads", "head_dim", "num_experts", "expert_width", "num_layers")
_FLOATS = (BFLOAT16, np.dtype(np.float32))
_SHOWN = 12  # hexadecimal digits of a digest in a message


def base_digest(parameters: Parameters) -> str:
    """What tells a base from others: the SHA-256 of its norms' scales and its sinks.

    These are few (1.2 MB of a 20b in float32), the same in either layout and in a conversion of it, and no adapter
    changes them: a base with one merged into it has the digest that it had before.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(parameter_shapes(parameters.config, parameters.experts).items()):
        if name.endswith((".scale", ".sinks")):
            values = parameters.read(name, tuple(slice(0, size) for size in shape))
            digest.update(name.encode() + values.astype("<f4").tobytes())
    return digest.hexdigest()


def sniff_adapter(path: Path) -> Kind | None:
    """Whose adapter is in the folder; None for no adapter."""
    if (path / ADAPTER_NAME).is_file():
        return "ours"
    return "peft" if (path / peft_config.CONFIG_NAME).is_file() else None


def adapter_kind(path: Path) -> Kind:
    """As `sniff_adapter`, where there has to be one.

    Raises:
        UserError: there is none.
    """
    kind = sniff_adapter(path)
    if kind is None:
        found = "has neither" if path.is_dir() else "is no folder"
        raise UserError(
            f"{path} {found}; expected an adapter: a folder with {ADAPTER_NAME} (ours) or "
            f"{peft_config.CONFIG_NAME} (PEFT)"
        )
    return kind


def load_adapter(path: Path, config: ModelConfig, *, base_digest: str | None = None) -> Adapter:
    """Reads an adapter for a base of these sizes, from our own folder or one of PEFT's, into the host's memory.

    Args:
        path: the folder.
        config: the sizes of the base that it is for.
        base_digest: of that base; None does not ask. PEFT's folders do not say which was theirs.

    Raises:
        UserError: no adapter is there, it is damaged, or it was made for another base.
    """
    if adapter_kind(path) == "ours":
        return _Document.read(path).load(config, base_digest=base_digest)
    return read_peft(path, config)


def base_config(path: Path) -> ModelConfig:
    """The sizes of the base that the adapter in our own folder was made for.

    Raises:
        UserError: there is none of ours.
    """
    return _Document.read(path).config


def save_adapter(path: Path, adapter: Adapter, *, config: ModelConfig, base_digest: str) -> None:
    """Writes our own folder; all processes of a run call it together, their arrays lying on any mesh.

    Raises:
        UserError: something is at `path`, its arrays are not those of its spec, or the disk refuses.
    """
    check_leaves(adapter, config)
    _check_dtypes(adapter)
    with together("beginning the adapter"):
        if os.path.lexists(path):
            raise UserError(f"{path} exists; expected a destination that does not: remove it or name another")
    growing = path.with_name(path.name + _SUFFIX)
    with _cleared(growing):
        with reported(path, "written"):
            store.save(growing, {name: jnp.asarray(leaf) for name, leaf in adapter.leaves.items()})
            store.finish(growing)
        with together("giving the adapter its name"), reported(path, "written"):
            if is_first():
                _Document.of(growing, adapter.spec, config, base_digest).write()
                growing.rename(path)


@contextlib.contextmanager
def _cleared(growing: Path) -> Iterator[None]:
    """An empty folder there, which is gone when the block fails."""
    with together("making the adapter's folder"):
        if is_first():
            with reported(growing, "made"):
                shutil.rmtree(growing, ignore_errors=True)  # of a save that was killed
                growing.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if is_first():
            shutil.rmtree(growing, ignore_errors=True)
        raise


def _check_dtypes(adapter: Adapter) -> None:
    for name, leaf in adapter.leaves.items():
        if leaf.dtype not in _FLOATS:
            raise UserError(f"adapter leaf {name} is {leaf.dtype}; expected {' or '.join(map(str, _FLOATS))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
    """adapter.json of a folder."""

    path: Path
    spec: AdapterSpec
    config: ModelConfig
    base_digest: str
    files: Mapping[str, StoredFile]

    @classmethod
    def of(cls, path: Path, spec: AdapterSpec, config: ModelConfig, base_digest: str) -> "_Document":
        """With every file that is there by now."""
        found = sorted(file for file in path.rglob("*") if file.is_file())
        files = {file.relative_to(path).as_posix(): StoredFile.of(file) for file in found}
        return cls(path=path, spec=spec, config=config, base_digest=base_digest, files=files)

    def write(self) -> None:
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "adapter": dataclasses.asdict(self.spec),
            "base": {"sha256": self.base_digest, "config": self.config.to_hf(mxfp4=True)},
            "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
        }
        write_object(self.path / ADAPTER_NAME, document | {"sha256": _own_digest(document)})

    @classmethod
    def read(cls, path: Path) -> "_Document":
        name, document = path / ADAPTER_NAME, read_object(path / ADAPTER_NAME)
        if (document.get("format"), document.get("version")) != (_FORMAT, _VERSION):
            raise UserError(
                f"{name}: format {document.get('format')!r} version {document.get('version')!r}; expected {_FORMAT!r} "
                f"version {_VERSION}: save the adapter again"
            )
        if document.get("sha256") != _own_digest(document):
            raise UserError(f"{name} is damaged (its own SHA-256 does not fit): copy the adapter again")
        try:
            base = document["base"]
            return cls(
                path=path,
                spec=_spec(document["adapter"]),
                config=ModelConfig.from_hf(base["config"]),
                base_digest=base["sha256"],
                files={name: StoredFile(file["nbytes"], file["crc32"]) for name, file in document["files"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is damaged ({error!r}): copy the adapter again") from error

    def load(self, config: ModelConfig, *, base_digest: str | None) -> Adapter:
        self._check_base(config, base_digest)
        for name, expected in self.files.items():
            found = damage(self.path / name, expected)
            if found is not None:
                raise UserError(
                    f"{self.path / name} is damaged: expected {described(expected)}, found {found}; copy the adapter "
                    "again"
                )
        shapes = adapter_shapes(config, self.spec)
        return Adapter(spec=self.spec, leaves={name: self._leaf(name, shape) for name, (shape, _) in shapes.items()})

    def _check_base(self, config: ModelConfig, base_digest: str | None) -> None:
        for size in _SIZES:
            made, found = getattr(self.config, size), getattr(config, size)
            if made != found:
                raise UserError(
                    f"{self.path}: the adapter was made for a base with {size}={made}, this one has {size}={found}; "
                    "take the base that it was made for"
                )
        if base_digest not in (None, self.base_digest):
            raise UserError(
                f"{self.path}: the adapter was made for a base with digest {self.base_digest[:_SHOWN]}…, this one has "
                f"{str(base_digest)[:_SHOWN]}…: its sizes are right, its weights are not; take the base that it was "
                "made for"
            )

    def _leaf(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        home = f"{store.PARAMETERS}/{_STATE}/{name}"
        array = PlainArray.open(self.path / home) if f"{home}/zarr.json" in self.files else None
        if array is None or array.shape != shape:
            found = "none that can be read" if array is None else f"one of shape {array.shape}"
            raise UserError(f"{self.path}: expected array {name} of shape {shape}, found {found}; save it again")
        return array.read(tuple(slice(0, size) for size in shape))


def _spec(document: Mapping[str, Any]) -> AdapterSpec:
    targets, layers = document["targets"], document["layers"]
    if set(targets) - set(get_args(Target)):
        raise TypeError(f"targets {targets}")
    return AdapterSpec(
        rank=int(document["rank"]),
        alpha=float(document["alpha"]),
        targets=tuple(targets),
        layers=None if layers is None else tuple(map(int, layers)),
    )


def _own_digest(document: Mapping[str, Any]) -> str:
    """Of everything but itself, however the file spaces and sorts it."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
