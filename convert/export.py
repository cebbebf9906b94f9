"""A checkpoint back into a released layout, which transformers or OpenAI's loader take. Knows the way, not the formats.

    checkpoint ─► CRC-32 of a parameter's files ─► slabs of it ─► the file's axes ─► safetensors ─► DST

Nothing is held but the slab on its way, so memory does not grow with the model. Parameters that are not repacked leave
with the very bytes with which they came.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8

from gptoss_jax.convert import names
from gptoss_jax.convert.companions import DTYPES_NAME, ORIGINAL_SHARD_NAME, TOKENIZER_NAME, companions
from gptoss_jax.convert.files import INDEX_NAME
from gptoss_jax.convert.manifest import MANIFEST_NAME
from gptoss_jax.convert.names import FileTensor, Layout
from gptoss_jax.convert.source import CONFIG_NAME, Parameters, Repacked, Source
from gptoss_jax.convert.stored import StoredParameters, damage, described, slabs, unfinished_at
from gptoss_jax.convert.writer import SHARD_NAME, write_folder
from gptoss_jax.errors import UserError
from gptoss_jax.kernels.mxfp4 import ScaleRule
from gptoss_jax.model.transformer import Experts

MAX_SHARD_BYTES = 5_000_000_000  # Hugging Face's default

_SMALL_SUFFIXES = (".json", ".jinja", ".md", ".txt", "")
_LARGEST_SMALL = 100_000_000

Base: TypeAlias = StoredParameters | Source


def export(
    checkpoint: Path,
    destination: Path,
    *,
    layout: Layout,
    experts: Experts | None = None,
    scale_rule: ScaleRule = "even",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the checkpoint as a folder of a released layout; damaged parameters are found, not passed on.

    Args:
        checkpoint: the destination of a finished conversion.
        destination: a new or empty folder.
        layout: "hf" for transformers, "original" for OpenAI's loader.
        experts: how to store them; None keeps them as they are, byte for byte.
        scale_rule: of MXFP4 scales when bf16 experts are to be packed.
        max_shard_bytes: more bytes of tensors go into another file.
        on_progress: called with bytes of tensors written so far and in all.

    Raises:
        UserError: no checkpoint, a damaged one, a destination in use, no room, or a config the layout cannot express.
        Unsupported: OpenAI's layout with bf16 experts.
    """
    stored = StoredParameters.open(checkpoint)
    check_destination(checkpoint, destination)
    parameters: Parameters = stored
    if experts is not None and experts != stored.experts:
        parameters = Repacked(stored, experts, scale_rule=scale_rule)
    write_release(
        stored, parameters, destination, layout=layout, max_shard_bytes=max_shard_bytes, on_progress=on_progress
    )


def open_base(path: Path) -> Base:
    """A converted checkpoint, whose parameters are checked as they are read, or a released folder.

    Raises:
        UserError: it is neither, or not whole.
    """
    if (path / MANIFEST_NAME).is_file() or unfinished_at(path) is not None or not path.is_dir():
        return StoredParameters.open(path)
    return Source.open(path)


def write_release(
    base: Base,
    parameters: Parameters,
    destination: Path,
    *,
    layout: Layout,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the parameters as a folder of a released layout, with the small files of the base that they came from."""
    tensors = {tensor.name: tensor for tensor in layout_tensors(parameters, layout)}
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def chunks(name: str) -> Iterator[UInt8[np.ndarray, " bytes"]]:
        nonlocal done
        for chunk in tensor_bytes(parameters, tensors[name]):
            yield chunk
            done += chunk.nbytes
            on_progress(done, total)

    write_folder(
        destination,
        tuple(tensors.values()),
        chunks,
        max_shard_bytes=max_shard_bytes,
        shard_name=ORIGINAL_SHARD_NAME if layout == "original" else SHARD_NAME,
        beside=_small_files(base, parameters, tuple(tensors.values()), layout),
    )


def layout_tensors(parameters: Parameters, layout: Layout) -> tuple[FileTensor, ...]:
    """The tensors of the layout in the dtypes that the parameters have, in order.

    Parameters that share a tensor and differ in dtype are widened to float32, which holds all of bfloat16.

    Raises:
        Unsupported: OpenAI's layout with bf16 experts.
    """
    tensors = names.file_tensors(parameters.config, layout=layout, experts=parameters.experts)
    return tuple(dataclasses.replace(tensor, dtype=_common_dtype(parameters, tensor)) for tensor in tensors)


def tensor_bytes(parameters: Parameters, tensor: FileTensor) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """The bytes of a file's tensor, a slab at a time. Every view keeps the first axis first, so slabs are in order."""
    for part in tensor.parts:
        assert part.view.order[0] == 0, part
        for index in _slabs(parameters, part.parameter):
            slab = part.view.to_file(parameters.read(part.parameter, index))
            yield slab.astype(tensor.dtype, copy=False).reshape(-1).view(np.uint8)


def _slabs(parameters: Parameters, parameter: str) -> Iterator[names.Index]:
    if isinstance(parameters, StoredParameters):
        return parameters.slabs(parameter)
    return slabs(parameters.shape(parameter), parameters.dtype(parameter))


def _common_dtype(parameters: Parameters, tensor: FileTensor) -> np.dtype:
    return np.result_type(*(parameters.dtype(part.parameter) for part in tensor.parts))


def _small_files(
    base: Base, parameters: Parameters, tensors: tuple[FileTensor, ...], layout: Layout
) -> dict[str, bytes]:
    """As they came if the folder becomes what it was; else those that state the layout or its dtypes are made anew."""
    if isinstance(base, StoredParameters):
        kept = {name: _read_small(base, name) for name in base.manifest.files if "/" not in name}
        source_layout, source_experts = base.manifest.layout, base.manifest.source_experts
    else:
        kept = {file.name: file.read_bytes() for file in small_files(base.path)}
        source_layout, source_experts = base.layout, base.experts
    if layout == source_layout and parameters.experts == source_experts:
        return kept
    made = companions(
        base.config, tensors, layout=layout, experts=parameters.experts, tokenizer=kept.get(TOKENIZER_NAME)
    )
    return made | {name: text for name, text in kept.items() if name not in (CONFIG_NAME, DTYPES_NAME)}


def _read_small(stored: StoredParameters, name: str) -> bytes:
    path, expected = stored.path / name, stored.manifest.files[name]
    found = damage(path, expected)
    if found is not None:
        raise UserError(f"{path} is damaged: expected {described(expected)}, found {found}; copy it from the release")
    return path.read_bytes()


def small_files(release: Path) -> list[Path]:
    """Config, tokenizer, chat template, licence. OpenAI's `original/` keeps its tokenizer in the folder above."""
    small = [path for path in sorted(release.iterdir()) if path.is_file() and path.name != INDEX_NAME]
    above = release.parent / TOKENIZER_NAME
    if release.name == "original" and above.is_file() and not (release / TOKENIZER_NAME).exists():
        small.append(above)
    return [
        path
        for path in small
        if path.suffix in _SMALL_SUFFIXES and path.stat().st_size <= _LARGEST_SMALL and not path.name.startswith(".")
    ]


def check_destination(checkpoint: Path, destination: Path) -> None:
    source, target = checkpoint.resolve(), destination.resolve()
    if target == source:
        raise UserError(f"{destination} is the checkpoint itself; name another destination")
    if source in target.parents:
        raise UserError(f"{destination} lies inside the checkpoint {checkpoint}; name a destination outside of it")
