"""A model from any folder: our checkpoint, or a release in either layout. Knows formats; knows no tokenizer."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from gptoss_jax import nano
from gptoss_jax.convert.json_file import read_object
from gptoss_jax.convert.manifest import MANIFEST_NAME
from gptoss_jax.convert.source import CONFIG_NAME, Parameters, Source
from gptoss_jax.convert.stored import StoredParameters, unfinished_at
from gptoss_jax.errors import UserError
from gptoss_jax.kernels.choose import layout
from gptoss_jax.kernels.linear.int8 import Int8, pack
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.experts import in_columns, is_expert_matrix
from gptoss_jax.model.formats import in_memory
from gptoss_jax.model.layers import Dense, Memory
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, GptOss, abstract_model, parameters, released, with_parameters
from gptoss_jax.sharding import Axes, Fit, Placement

Kind = Literal["checkpoint", "hf", "original"]

_SLAB_OUTPUTS = 8192  # of a matrix that are rounded to 8 bits at once


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    dense: Dense = "bf16",
    impl: str | None = None,
    dispatch: Way | None = None,
    embedding: Memory = "device",
) -> GptOss:
    """Loads a model, each parameter straight to its place on the mesh; a process reads only its own shards.

    Args:
        path: a converted checkpoint, or a released folder of either layout; "nano" is the one in this package.
        mesh: where to (see sharding.make_mesh); None is the first device.
        dtype: of computation and of the parameters outside packed experts: bfloat16 or float32.
        dense: see GptOss; "int8" rounds each weight as it comes, and the checkpoint stays as it is.
        impl: see GptOss.
        dispatch: see GptOss.
        embedding: see GptOss.

    Raises:
        UserError: nothing that can be loaded is there, it is not whole, or the model does not fit the mesh.
        Unsupported: a named implementation that does not run on these devices, or 8-bit weights on several.
    """
    source = _open(nano.find(path))
    settings: dict[str, Any] = {"dense": dense, "impl": impl, "dispatch": dispatch, "embedding": embedding}
    model = abstract_model(source.config, dtype=dtype, experts=source.experts, mesh=mesh, **settings)
    placement = place_model(source.config, mesh)
    wanted, values = parameters(model), {}
    for name, (_, axes) in released(source.config, source.experts).items():
        array = _read(source, name, axes, placement)
        if name in wanted:
            values[name] = _settle(name, array, wanted[name], placement, model)
        else:
            values |= _in_8_bits(name, array, wanted)
    return with_parameters(model, values)


def sizes(path: str | Path) -> tuple[ModelConfig, Experts]:
    """What `load` would find there: the model's sizes, and how its experts are stored. Reads no weight.

    Raises:
        UserError: as `load`.
    """
    source = _open(nano.find(path))
    return source.config, source.experts


def sniff(path: Path) -> Kind:
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


def _open(path: Path) -> Parameters:
    if sniff(path) == "checkpoint":
        return StoredParameters.open(path, check=False)
    return Source.open(path)


def _read(source: Parameters, name: str, axes: Axes, placement: Placement) -> jax.Array:
    """The parameter on its devices, fitted to the mesh; a shard that several devices of a process hold is read once."""
    fits = placement.axis_fits(source.shape(name), axes)
    shape = tuple(fit.fitted for fit in fits)
    shards: dict[str, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = str(index)
        if key not in shards:
            shards[key] = _fitted(source, name, index, fits)
        return shards[key]

    sharding = placement.sharding(name, shape, axes) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(shape, sharding, shard, dtype=source.dtype(name))


def _fitted(source: Parameters, name: str, index: tuple[slice, ...], fits: tuple[Fit, ...]) -> np.ndarray:
    """The box `index` of the fitted parameter, from the stored entries it needs."""
    cuts = [fit.stored(cut) for fit, cut in zip(fits, index, strict=True)]
    if any(not entries.size for _, entries, _ in cuts):  # a device that got nothing but padding
        shape = tuple(entries.size + padding for _, entries, padding in cuts)
        return np.zeros(shape, source.dtype(name))
    found = source.read(name, tuple(box for box, _, _ in cuts))
    for axis, (fit, (_, entries, padding)) in enumerate(zip(fits, cuts, strict=True)):
        if fit.repeat > 1:
            found = np.take(found, entries, axis=axis)
        if padding:
            found = np.pad(found, [(0, padding if d == axis else 0) for d in range(found.ndim)])
    return found


def _settle(name: str, array: jax.Array, parameter: nnx.Param, placement: Placement, model: GptOss) -> jax.Array:
    """The array in the layout, dtype and memory that the model computes with; it stays on its own device."""
    impl = model.impl.moe_matmul
    sharding = placement.sharding(name, parameter.shape, parameter.get_metadata()["axes"]) or array.sharding
    kept = in_memory(name, rank=parameter.ndim, sharding=sharding, impl=impl, embedding=model.embedding.memory)
    if layout(impl) == "columns" and is_expert_matrix(name):
        return _mover(name.rpartition(".")[2], jnp.dtype(parameter.dtype), kept)(array)
    array = array if array.dtype == parameter.dtype else array.astype(parameter.dtype)
    return array if kept is sharding else jax.device_put(array, kept)


def _in_8_bits(name: str, array: jax.Array, wanted: Mapping[str, nnx.Param]) -> dict[str, jax.Array]:
    """The codes and scales of a released weight, whose outputs and inputs have the axes that theirs have."""
    path = name.removesuffix("weight")
    codes, scales = wanted[f"{path}codes"], wanted[f"{path}scales"]
    packed = _pack(array.reshape(math.prod(scales.shape[:-1]), -1))
    return {
        f"{path}codes": packed.codes.reshape(codes.shape),
        f"{path}scales": packed.scales.reshape(scales.shape),
    }


@jax.jit
def _pack(matrix: jax.Array) -> Int8:
    """Some outputs at a time: in float32 all of the unembedding would take another 2.3 GB."""
    outputs, inputs = matrix.shape
    slabs = next(number for number in itertools.count(-(-outputs // _SLAB_OUTPUTS)) if outputs % number == 0)
    packed = jax.lax.map(pack, matrix.reshape(slabs, -1, inputs))
    return jax.tree.map(lambda x: x.reshape(outputs, -1), packed)


@functools.cache  # one compiled function for the parameters of all layers
def _mover(kind: str, dtype: jnp.dtype, kept: Format | Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: in_columns(kind, array).astype(dtype), out_shardings=kept)
