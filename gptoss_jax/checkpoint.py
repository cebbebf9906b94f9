"""A model from any folder: our checkpoint, or a release in either layout. Knows formats; knows no tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from gptoss_jax.convert import store
from gptoss_jax.convert.json_file import read_object
from gptoss_jax.convert.manifest import MANIFEST_NAME, Manifest
from gptoss_jax.convert.source import CONFIG_NAME, Source, read_sharded
from gptoss_jax.convert.stored import unfinished_at
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import GptOss, abstract_model, parameters, with_parameters
from gptoss_jax.sharding import place

Format = Literal["checkpoint", "hf", "original"]


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> GptOss:
    """Loads a model, each parameter straight to its place on the mesh; a process reads only its own shards.

    Args:
        path: a converted checkpoint, or a released folder of either layout.
        mesh: where to (see sharding.make_mesh); None is the first device.
        dtype: of computation and of the parameters outside packed experts: bfloat16 (default) or float32.

    Raises:
        UserError: nothing that can be loaded is there, it is not whole, or the mesh does not divide it.
    """
    path = Path(path)
    kind = sniff(path)
    source = None if kind == "checkpoint" else Source.open(path)
    if source is None:
        manifest = Manifest.read(path)
        manifest.check_sizes(path)
        config, experts = ModelConfig.from_json(read_object(path / CONFIG_NAME)), manifest.experts
    else:
        config, experts = source.config, source.experts
    model = abstract_model(config, dtype=jnp.bfloat16 if dtype is None else dtype, experts=experts, mesh=mesh)
    wanted = {
        name: jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=_sharding(name, parameter, mesh))
        for name, parameter in parameters(model).items()
    }
    found = _from_checkpoint(path, wanted) if source is None else _from_source(source, wanted)
    return with_parameters(model, {name: _cast(array, wanted[name].dtype) for name, array in found})


def sniff(path: Path) -> Format:
    """What kind of folder `path` is.

    Raises:
        UserError: it is none of ours, or a conversion into it has not finished.
    """
    expected = "expected a converted checkpoint, or a released folder (Hugging Face's, or OpenAI's original/)"
    if (path / MANIFEST_NAME).is_file():
        return "checkpoint"
    if unfinished_at(path) is not None:
        raise UserError(f"{path}: its conversion has not finished; run the same convert command again to go on with it")
    if not path.is_dir():
        raise UserError(f"{path} is no folder; {expected}")
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} has no {CONFIG_NAME}; {expected}")
    config = read_object(path / CONFIG_NAME)
    ModelConfig.from_json(config)
    return "hf" if "num_local_experts" in config else "original"


def _sharding(name: str, parameter: nnx.Param, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return place(name, parameter.shape, parameter.axes, mesh)


def _from_checkpoint(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    held = store.stored(path)
    as_stored = {}
    for name, leaf in wanted.items():
        found = held[name].shape if name in held else None
        if found != leaf.shape:
            raise UserError(
                f"{path}: parameter {name} has shape {found}, its {CONFIG_NAME} asks for {leaf.shape}: "
                "convert the release again"
            )
        as_stored[name] = jax.ShapeDtypeStruct(leaf.shape, held[name].dtype, sharding=leaf.sharding)
    return store.restore(path, as_stored)


def _from_source(source: Source, wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    for name, leaf in wanted.items():
        assert leaf.sharding is not None
        yield name, read_sharded(source, name, leaf.sharding)


def _cast(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    return array if array.dtype == dtype else array.astype(dtype)
