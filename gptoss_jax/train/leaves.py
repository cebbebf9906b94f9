"""Which leaves train, and how each becomes a parameter of the model. Knows models and meshes; knows no loss.

A trained leaf, its master, is float32 in the released shape: without the padding and the repeated heads that a mesh
asks for, so that every copy of a head learns the same, and a run may go on on another mesh. What the model computes
with is made of it in every step, one layer at a time:

    master ─► scaled (b of an adapter) ─► model's dtype ─► as MXFP4 would hold it, if asked for ─► fitted ─► on the mesh

Adapters and full training differ only in which leaves these are. All other parameters are frozen as they were loaded.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.choose import layout
from gptoss_jax.kernels.fake_quantise import fake_quantise
from gptoss_jax.model.adapter import EXPERTS, AdapterSpec, Shape, adapter_shapes, attach
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.experts import is_expert_matrix
from gptoss_jax.model.layers import fan_in
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, GptOss, parameters, released, with_parameters
from gptoss_jax.sharding import AnyMesh, partition

Leaves: TypeAlias = dict[str, Array]  # by the paths of model.transformer.parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What trains.

    Attributes:
        adapter: an adapter beside the frozen weights, or None: the weights themselves.
        quantise: the experts' products are those of the MXFP4 that an export will hold: of the weights themselves, or
            of packed ones merged with the adapter on the scales that they have. Gradients pass straight through.
        frozen: patterns of paths that stay in full training, such as "*.router.*".
        fully_sharded: masters, and what an optimiser keeps for them, are cut over `data` as well.
    """

    adapter: AdapterSpec | None = None
    quantise: bool = False
    frozen: tuple[str, ...] = ()
    fully_sharded: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """One module of a model, apart: what is not an array, and its parameters with their paths in the whole model."""

    definition: nnx.GraphDef[Any]
    parameters: Mapping[str, tuple[tuple[Any, ...], nnx.Param]]

    @classmethod
    def of(cls, module: nnx.Module, prefix: str) -> "Piece":
        definition, state = nnx.split(module)
        flat = nnx.to_flat_state(state)
        return cls(definition, {".".join([prefix, *map(str, path)]): (path, value) for path, value in flat})

    def merge(self, values: Mapping[str, Array]) -> Any:
        """The module with these arrays as its parameters."""
        flat = [(path, parameter.replace(values[name])) for name, (path, parameter) in self.parameters.items()]
        return nnx.merge(self.definition, nnx.from_flat_state(flat))


class Trained:
    """A model taken apart into what trains and what does not.

    Attributes:
        model: with room for the adapter; parameters that train are shapes only, but for an adapter's zeros.
        shapes: released shape and logical axes of every trained leaf.
        frozen: all other parameters, as they lie.
        pieces: the model's modules, by "embedding", "layers.0", …, "norm", "unembedding".

    Raises:
        UserError: nothing would train, or the model's experts are not what the method needs.
        Unsupported: the model's experts lie in columns and are to be trained themselves.
    """

    def __init__(self, model: GptOss, method: Method):
        self.method = method
        whole = model if method.adapter is None else attach(model, [method.adapter], merged=method.quantise)
        self.placement = place_model(model.config, model.mesh)
        self.shapes = trained_shapes(model.config, model.experts, method)
        _check(model, method)
        values = {name: value.get_value() for name, value in parameters(whole).items()}
        self.frozen: Leaves = {name: value for name, value in values.items() if name not in self.shapes}
        self._weights: Leaves | None = None
        self.model = whole
        if method.adapter is None:
            self._weights = {name: values[name] for name in self.shapes}
            shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in self._weights.items()}
            self.model = with_parameters(whole, {**self.frozen, **shapes})
        self.pieces = dict(_pieces(self.model))

    def start(self, seed: int) -> Leaves:
        """The masters before the first step: an adapter that changes nothing yet, or the model's own weights."""

        def make(keys: Array, weights: Leaves) -> Leaves:
            if self.method.adapter is None:
                return {name: self._master(name, weights[name]) for name in self.shapes}
            return {name: self._fresh(name, key) for (name, key) in zip(self.shapes, keys, strict=True)}

        assert self.method.adapter is not None or self._weights is not None, "the weights are forgotten"
        keys = jax.random.split(jax.random.key(seed), len(self.shapes))
        shardings = None if self.model.mesh is None else {name: self.sharding(name) for name in self.shapes}
        return jax.jit(make, out_shardings=shardings)(keys, self._weights or {})

    def forget_weights(self) -> None:
        """Lets go of weights that masters have taken the place of: there is no `start` after it."""
        self._weights = None

    def sharding(self, name: str) -> Sharding | None:
        """Where a master lies, and whatever an optimiser keeps for it; None is the only device."""
        mesh = self.model.mesh
        return None if mesh is None else master_sharding(self.shapes[name], mesh, fully=self.method.fully_sharded)

    def laid(self, name: str, master: Array) -> Array:
        """The model's parameter that the master stands for."""
        parameter = parameters_of(self.pieces)[name]
        axes = self.shapes[name][1]
        value = master * self._scale(name)
        if self.method.quantise and is_expert_matrix(name):
            value = fake_quantise(value, scales=None, rule="even")
        return self.placement.lay(self.placement.fit(value.astype(parameter.dtype), axes), axes)

    def _scale(self, name: str) -> float:
        return self.method.adapter.scale if self.method.adapter and name.endswith(".adapter.b") else 1.0

    def _fresh(self, name: str, key: jax.Array) -> Array:
        """Of an adapter b is zero and a is normal with variance 1 / inputs, so that a · x has the scale of x."""
        shape, axes = self.shapes[name]
        make = nnx.initializers.zeros_init()
        if name.endswith(".a"):
            make = fan_in(math.prod(shape[axes.index("rank") + 1 :]))
        return make(key, shape, jnp.float32)

    def _master(self, name: str, parameter: Array) -> Array:
        """A parameter without what its mesh has added to it."""
        fits = self.placement.axis_fits(*self.shapes[name])
        cut = tuple(slice(0, fit.size * fit.repeat, fit.repeat) for fit in fits)
        return parameter[cut].astype(jnp.float32)


def parameters_of(pieces: Mapping[str, Piece]) -> Mapping[str, nnx.Param]:
    return {name: value for piece in pieces.values() for name, (_, value) in piece.parameters.items()}


def trained_shapes(config: ModelConfig, experts: Experts, method: Method) -> Mapping[str, Shape]:
    """Released shape and logical axes of every leaf that trains.

    Raises:
        UserError: none does, or the model has no such layer or parameter.
    """
    if method.adapter is not None:
        return adapter_shapes(config, method.adapter)
    every = released(config, experts)
    found = {
        name: shape for name, shape in every.items() if not any(fnmatch.fnmatch(name, out) for out in method.frozen)
    }
    unused = [out for out in method.frozen if not fnmatch.filter(every, out)]
    if unused:
        raise UserError(f"frozen has {unused[0]!r}, which names no parameter; expected a pattern such as *.router.*")
    if not found:
        raise UserError(f"frozen has {', '.join(method.frozen)}: nothing is left to train")
    return found


def _check(model: GptOss, method: Method) -> None:
    if method.adapter is not None:
        if method.quantise and model.experts != "mxfp4":
            raise UserError("quantise is on and the experts are bf16: an adapter merges on the scales of packed ones")
        if method.quantise and not set(method.adapter.targets) & set(EXPERTS):
            raise UserError(f"quantise is on and the adapter targets no expert: add {' or '.join(EXPERTS)}")
        return
    if model.dense != "bf16":
        raise UserError(f"dense weights are {model.dense}; full training needs bf16")
    if model.experts != "bf16":
        raise UserError(
            "the experts are packed in MXFP4, which full training cannot change: load them as bf16 "
            "(convert --experts bf16), or train an adapter"
        )
    if layout(model.impl.moe_matmul) != "rows":
        raise Unsupported(
            f"moe_matmul's implementation {model.impl.moe_matmul!r} keeps experts in columns, full training in rows: "
            "choose moe_matmul=xla"
        )


def _pieces(model: GptOss) -> Iterator[tuple[str, Piece]]:
    named: dict[str, nnx.Module] = {"embedding": model.embedding}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    named |= {"norm": model.norm, "unembedding": model.unembedding}
    for name, module in named.items():
        yield name, Piece.of(module, name)


def master_sharding(shape: Shape, mesh: AnyMesh, *, fully: bool) -> NamedSharding:
    """As the model's parameter where its mesh axis divides the released size, else whole; `data` where it fits."""
    sizes, axes = shape
    spec: list[str | None] = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(sizes, partition(axes), strict=True)
    ]
    if fully:
        free = [i for i, size in enumerate(sizes) if spec[i] is None and size % mesh.shape["data"] == 0]
        if free:
            spec[max(free, key=lambda i: sizes[i])] = "data"
    return NamedSharding(mesh, P(*spec))
