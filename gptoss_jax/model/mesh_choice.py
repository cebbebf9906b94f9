"""Which mesh a model shall lie on, and why. Knows sizes and memory; knows no chip, no speed and no devices.

One decode step reads its weights and its cache once, and little else takes time: so of the meshes that fit, the one is
taken whose busiest device reads the fewest bytes. What that weighs:

    tensor   cuts everything, and busy experts evenly; but the expert width is cut in whole blocks (90 over 8 are 96),
             and past the key/value heads their cache is repeated instead of cut
    expert   cuts the experts without padding; but few tokens meet few experts, and some device has most of them
    data     cuts the cache and its rows; weights are repeated
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.footprint import Footprint, footprint, reads
from gptoss_jax.model.layers import Memory
from gptoss_jax.model.transformer import Experts
from gptoss_jax.sharding import MeshShape


def choose_mesh(
    config: ModelConfig,
    num_devices: int,
    *,
    batch: int,
    context: int,
    bytes_per_device: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    experts: Experts = "mxfp4",
    embedding: Memory = "device",
) -> tuple[MeshShape, str]:
    """The mesh over all of the devices, and a sentence that says why.

    Args:
        config: the model.
        num_devices: all of them are used.
        batch: rows that are decoded together.
        context: tokens of each row, all of them cached.
        bytes_per_device: for weights and cache; None is enough. Where no mesh fits, the one that holds least is taken.
        dtype: of the model.
        experts: how their weights lie.
        embedding: the memory that its table lies in; the host's has it whole, so `tensor` is 1 then.

    Raises:
        UserError: the devices are none, or more than the model has heads and experts to give them.
    """
    candidates = mesh_shapes(config, num_devices)
    if embedding == "host":
        candidates = [shape for shape in candidates if shape.tensor == 1]
    settings: dict[str, Any] = {"dtype": dtype, "experts": experts, "embedding": embedding}
    held = {shape: footprint(config, shape, rows=batch, capacity=context, **settings) for shape in candidates}
    fitting = [shape for shape in candidates if bytes_per_device is None or held[shape].total <= bytes_per_device]
    if not fitting:
        assert bytes_per_device is not None  # else all of them fit
        least = min(candidates, key=lambda shape: held[shape].total)
        return least, (
            f"no mesh of {len(candidates)} keeps weights and cache within {_size(bytes_per_device)} on a device; "
            f"this one holds least, {_size(held[least].total)}"
        )
    # Past the key/value heads tensor repeats their cache, and shards become too thin for a matrix unit.
    moderate = [shape for shape in fitting if shape.tensor <= config.num_kv_heads] or fitting
    read = {shape: reads(config, shape, held[shape], rows=batch).total for shape in moderate}
    best, *others = sorted(moderate, key=lambda shape: (read[shape], shape.tensor, shape.data))
    return best, _why(best, others, read, held, num_left_out=len(candidates) - len(fitting), batch=batch)


def mesh_shapes(config: ModelConfig, num_devices: int) -> list[MeshShape]:
    """Every mesh of exactly so many devices that leaves none without a head or an expert.

    Raises:
        UserError: there is none.
    """
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    found = [
        MeshShape(data=num_devices // (expert * tensor), expert=expert, tensor=tensor)
        for expert in sizes
        for tensor in sizes
        if num_devices % (expert * tensor) == 0 and expert <= config.num_experts and tensor <= config.num_heads
    ]
    if not found:
        raise UserError(f"a mesh of {num_devices} devices is asked for; expected at least 1")
    return found


def _why(
    best: MeshShape,
    others: list[MeshShape],
    read: dict[MeshShape, int],
    held: dict[MeshShape, Footprint],
    *,
    num_left_out: int,
    batch: int,
) -> str:
    step = "a decoded token" if batch == 1 else f"a decode step of {batch} rows"
    left_out = f", {num_left_out} more would not fit" if num_left_out else ""
    if not others:
        return f"the only mesh; {step} reads {_size(read[best])} on a device{left_out}"
    return (
        f"of {len(others) + 1} meshes its busiest device reads least in {step}, {_size(read[best])}, and holds "
        f"{_size(held[best].total)} of weights and cache; next is {others[0]} with {_size(read[others[0]])}{left_out}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"
