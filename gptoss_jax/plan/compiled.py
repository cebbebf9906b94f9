"""The real step of a sharded model, compiled for devices that may not be here. Knows the compiler's figures only.

No weight is made: parameters and cache are shapes with shardings, and the step is engine.generate's own.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gptoss_jax.aot import Topology, topology_devices
from gptoss_jax.engine.generate import step
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.errors import Unsupported
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.footprint import bytes_on_host
from gptoss_jax.model.formats import in_memory
from gptoss_jax.model.layers import Dense, Memory
from gptoss_jax.model.transformer import Experts, GptOss, abstract_model, split
from gptoss_jax.sharding import MESH_AXES, MeshShape, partition, row_axis

_ITEMSIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COLLECTIVE = re.compile(
    r"= (?P<result>\S.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


class NoRoom(Unsupported):
    """The step needs more memory than a device has; the compiler's words say how much."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """So many of one kind with results of one size on a device. What stands in a loop is counted once."""

    name: str
    nbytes: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one step, in bytes on one device.

    Attributes:
        arguments: weights, cache and inputs as they lie in memory, the tiles' padding included.
        temporaries: the most that is in use at once beside arguments and results.
        outputs: results that do not take the place of an argument.
        peak: all of them.
        flops: as the compiler counts them, None where it does not; it knows no trip counts and no inside of a kernel.
        collectives: most bytes first.
        seconds: that compiling took here.
    """

    arguments: int
    temporaries: int
    outputs: int
    peak: int
    flops: float | None
    collectives: tuple[Collective, ...]
    seconds: float


def compile_step(
    config: ModelConfig,
    topology: str,
    shape: MeshShape,
    *,
    rows: int,
    context: int,
    tokens: int,
    dtype: DTypeLike = jnp.bfloat16,
    experts: Experts = "mxfp4",
    dense: Dense = "bf16",
    impl: str | None = None,
    dispatch: Way | None = None,
    embedding: Memory = "device",
) -> Compiled:
    """Compiles the step that feeds `tokens` tokens to each of `rows` rows with room for `context`.

    Raises:
        UserError: the model does not fit the mesh, or there are no such devices.
        Unsupported: the compiler is not installed.
        NoRoom: the step needs more memory than a device has.
    """
    mesh = mesh_of(topology, shape)
    settings: dict[str, Any] = {"dense": dense, "impl": impl, "dispatch": dispatch, "embedding": embedding}
    model = abstract_model(config, dtype=dtype, experts=experts, mesh=mesh, **settings)
    lowered = lower_step(model, rows=rows, context=context, tokens=tokens)
    return compile_lowered(lowered, topology, on_host=bytes_on_host(config, dtype=dtype, embedding=embedding))


def mesh_of(topology: str, shape: MeshShape) -> Mesh:
    """Of devices that need not be here.

    Raises:
        UserError: there are no such devices.
        Unsupported: their compiler is not installed.
    """
    devices = np.array(topology_devices(topology)).reshape(shape.data, shape.expert, shape.tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def compile_lowered(lowered: jax.stages.Lowered, topology: str, *, on_host: int = 0) -> Compiled:
    """What the compiler says of a step that is lowered for a mesh of the topology.

    Args:
        on_host: bytes of arguments that lie in the host's memory. The compiler for GPUs that are not here knows no such
            memory and counts them as the device's; they are taken off.

    Raises:
        NoRoom: the step needs more memory than a device has.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoRoom(f"{topology}: the compiler finds no room: {str(error).splitlines()[0]}") from error
    miscounted = on_host if Topology.parse(topology).platform == "gpu" else 0
    return _figures(compiled, miscounted=miscounted, seconds=time.monotonic() - start)


def lower_step(model: GptOss, *, rows: int, context: int, tokens: int) -> jax.stages.Lowered:
    """The step of an abstract model on its mesh, with the cache donated, as generate calls it."""
    mesh = model.mesh
    assert mesh is not None

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    by_row = P(row_axis(rows, mesh))

    def weight(path: str, value: nnx.Variable) -> nnx.Variable:
        sharding = NamedSharding(mesh, partition(value.get_metadata()["axes"]))
        settings: dict[str, Any] = {"impl": model.impl.moe_matmul, "embedding": model.embedding.memory}
        memory = in_memory(path, rank=len(value.shape), sharding=sharding, **settings)
        return value.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=memory))

    graph, _ = split(model)
    state = nnx.state(model)
    weights = [(path, weight(".".join(map(str, path)), value)) for path, value in nnx.to_flat_state(state)]
    greedy = RowSettings.of([SamplingParams(temperature=0)] * rows)  # in form any other
    return step.lower(
        graph,
        jax.tree.leaves(nnx.from_flat_state(weights)),
        array((rows, tokens), jnp.int32, by_row),
        array((rows,), jnp.int32, by_row),
        _cache(model, rows=rows, context=context),
        jax.tree.map(lambda x: array(x.shape, x.dtype, P()), greedy),
        array((rows,), jnp.int32, P()),
    )


def _cache(model: GptOss, *, rows: int, context: int) -> Cache:
    """As empty_cache lays it out."""
    mesh = model.mesh
    assert mesh is not None
    by_row = row_axis(rows, mesh)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(by_row, *partition((None, "kv_heads", "head_dim"))) if leaf.ndim == 4 else P(by_row)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(lambda: model.empty_cache(rows=rows, capacity=context)))


def _figures(compiled: jax.stages.Compiled, *, miscounted: int, seconds: float) -> Compiled:
    memory = compiled.memory_analysis()
    assert memory is not None  # every compiler here has one
    arguments = memory.argument_size_in_bytes - miscounted
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = compiled.cost_analysis()
    return Compiled(
        arguments=arguments,
        temporaries=memory.temp_size_in_bytes,
        outputs=outputs,
        peak=arguments + memory.temp_size_in_bytes + outputs,
        flops=cost.get("flops") if cost else None,
        collectives=collectives(compiled.as_text() or ""),
        seconds=seconds,
    )


def collectives(hlo: str) -> tuple[Collective, ...]:
    """Those of a compiled program's text, alike ones counted, most bytes first."""
    found = Counter(_collectives(hlo))
    counted = (Collective(name, nbytes, count) for (name, nbytes), count in found.items())
    return tuple(sorted(counted, key=lambda c: (-c.nbytes * c.count, c.name, c.nbytes)))


def _collectives(hlo: str) -> Iterator[tuple[str, int]]:
    for match in _COLLECTIVE.finditer(hlo):
        sizes = [_nbytes(array) for array in _ARRAY.finditer(match["result"])]
        # The start of an asynchronous one gives its operands, its results and perhaps some words of state.
        in_flight = match["start"] and match["name"] != "all-reduce"
        yield match["name"], max(sizes) if in_flight else sum(sizes)


def _nbytes(array: re.Match[str]) -> int:
    values = math.prod(int(size) for size in array["shape"].split(",") if size)
    return values * _ITEMSIZES.get(array["dtype"], 1)
