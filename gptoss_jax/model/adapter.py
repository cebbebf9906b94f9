"""Adapters of low rank beside a model's weights (LoRA, arXiv:2106.09685). Knows a model's parts; knows no training.

An adapter adds scale · b · a to the matrices it targets. One that is attached lies in its model as two more parameters
of each of them, several in a row along the rank, so that a row of a batch can take its own:

    layers.3.attention.q.adapter.a    [R, D]         layers.3.moe.gate_up.adapter.a    [E, R, D]
    layers.3.attention.q.adapter.b    [N, H, R]      layers.3.moe.gate_up.adapter.b    [E, F, 2, R]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.experts import ExpertLinear
from gptoss_jax.model.layers import LowRank
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import Axes, Placement

Target = Literal["q", "k", "v", "o", "router", "gate_up", "down"]
Shape: TypeAlias = tuple[tuple[int, ...], Axes]  # released, with the logical axis of each dimension

ATTENTION: tuple[Target, ...] = ("q", "k", "v", "o")
EXPERTS: tuple[Target, ...] = ("gate_up", "down")

_LARGEST_RANK = 1024
_HOMES: Mapping[Target, str] = MappingProxyType(
    {target: ("attention" if target in ATTENTION else "moe") for target in get_args(Target)}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter changes, and how strongly.

    Attributes:
        rank: of the update of each matrix.
        alpha: the update is alpha / rank · b · a.
        targets: which matrices of a layer.
        layers: which layers; None is all.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _LARGEST_RANK:
            raise UserError(f"adapter rank is {self.rank}; expected 1 to {_LARGEST_RANK}")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"adapter alpha is {self.alpha}; expected a positive number")
        unknown = sorted(set(self.targets) - set(get_args(Target)))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            known = ", ".join(get_args(Target))
            raise UserError(f"adapter targets are {', '.join(self.targets) or 'none'}; expected some of {known}, once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def paths(self, config: ModelConfig) -> tuple[str, ...]:
        """The modules it changes, such as "layers.3.attention.q".

        Raises:
            UserError: the model has no such layer.
        """
        layers = range(config.num_layers) if self.layers is None else self.layers
        absent = [layer for layer in layers if not 0 <= layer < config.num_layers]
        if absent:
            raise UserError(
                f"the adapter changes layer {absent[0]}, the model has {config.num_layers}, 0 to "
                f"{config.num_layers - 1}: it belongs to another model"
            )
        return tuple(f"layers.{layer}.{_HOMES[target]}.{target}" for layer in layers for target in self.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter: its leaves by path, in released shapes; b is not scaled."""

    spec: AdapterSpec
    leaves: Mapping[str, np.ndarray | jax.Array]


def adapter_shapes(config: ModelConfig, spec: AdapterSpec) -> Mapping[str, Shape]:
    """The released shape and the logical axes of every leaf, by its path."""
    sizes = _matrices(config)
    found: dict[str, Shape] = {}
    for path in spec.paths(config):
        (a_shape, a_axes), (b_shape, b_axes) = sizes[path.rpartition(".")[2]]
        found[f"{path}.adapter.a"] = tuple(spec.rank if size is None else size for size in a_shape), a_axes
        found[f"{path}.adapter.b"] = tuple(spec.rank if size is None else size for size in b_shape), b_axes
    return found


def _matrices(config: ModelConfig) -> dict[str, tuple[tuple[tuple[int | None, ...], Axes], ...]]:
    """Of each target a and b; None stands for the rank."""
    width, expert_width, head_dim = config.width, config.expert_width, config.head_dim
    heads, kv_heads, experts = config.num_heads, config.num_kv_heads, config.num_experts
    into = ((None, width), ("rank", "width"))
    keys = ((kv_heads, head_dim, None), ("kv_heads", "head_dim", "rank"))
    return {
        "q": (into, ((heads, head_dim, None), ("heads", "head_dim", "rank"))),
        "k": (into, keys),
        "v": (into, keys),
        "o": (((None, heads, head_dim), ("rank", "heads", "head_dim")), ((width, None), ("width", "rank"))),
        "router": (into, ((experts, None), ("router_experts", "rank"))),
        "gate_up": (
            ((experts, None, width), ("experts", "rank", "width")),
            ((experts, expert_width, 2, None), ("experts", "expert_width", "gate_up", "rank")),
        ),
        "down": (
            ((experts, None, expert_width), ("experts", "rank", "expert_width")),
            ((experts, width, None), ("experts", "width", "rank")),
        ),
    }


def attach(model: GptOss, specs: Sequence[AdapterSpec], *, merged: bool = False) -> GptOss:
    """The model with room for these adapters, all zeros; its weights are shared, not copied.

    `merged`: packed experts compute as if the adapter, the only one then, had been merged with them on the scales that
    they have, code by code: what an export of the merged model in MXFP4 will compute.

    Raises:
        UserError: an adapter changes layers that the model does not have, some are attached already, or what is to be
            merged is not one adapter of packed experts.
    """
    if merged and (len(specs) != 1 or model.experts != "mxfp4"):
        raise UserError(f"{len(specs)} adapters of {model.experts} experts cannot be merged: expected 1, of mxfp4")
    if any(".adapter." in path for path in parameters(model)):
        raise UserError("the model has adapters already; expected one without: attach all of them at once")
    model = nnx.merge(*nnx.split(model))
    placement = place_model(model.config, model.mesh)
    ranks = _ranks(model.config, specs)
    for path, module in ((path, _module(model, path)) for path in ranks):
        is_merged = merged and isinstance(module, ExpertLinear)
        # What is merged is so in float32, as an export does it.
        module.adapter = _room(model, path, ranks[path], placement, dtype=jnp.float32 if is_merged else model.dtype)
        if is_merged:
            module.merged = True
    return model


def with_adapters(model: GptOss, adapters: Sequence[Adapter], *, merged: bool = False) -> GptOss:
    """The model with these adapters at work, the scale of each in its b. `merged`: see attach.

    Raises:
        UserError: as `attach`; or a leaf is missing, or has another shape than the model asks for.
    """
    for adapter in adapters:
        check_leaves(adapter, model.config)
    specs = [adapter.spec for adapter in adapters]
    model = attach(model, specs, merged=merged)
    placement = place_model(model.config, model.mesh)
    for path in _ranks(model.config, specs):
        room: LowRank = _module(model, path).adapter
        for kind in ("a", "b"):
            parameter: nnx.Param = getattr(room, kind)
            axes = parameter.get_metadata()["axes"]
            name = f"{path}.adapter.{kind}"
            value = jnp.asarray(_in_a_row(name, adapters, axes), parameter.dtype)
            parameter[...] = placed(name, value, axes, placement)
    return model


def placed(name: str, value: jax.Array, axes: Axes, placement: Placement) -> jax.Array:
    """An array of the released shape, fitted and on its devices."""
    fitted = placement.fit(value, axes)
    sharding = placement.sharding(name, fitted.shape, axes)
    return fitted if sharding is None else jax.device_put(fitted, sharding)


def _ranks(config: ModelConfig, specs: Sequence[AdapterSpec]) -> dict[str, tuple[int, ...]]:
    """For each module that any of them changes the rank of each, 0 where it does not."""
    paths = [set(spec.paths(config)) for spec in specs]
    return {
        path: tuple(spec.rank if path in own else 0 for spec, own in zip(specs, paths, strict=True))
        for path in sorted(set().union(*paths))
    }


def _module(model: GptOss, path: str) -> Any:
    found: Any = model
    for word in path.split("."):
        found = found[int(word)] if word.isdecimal() else getattr(found, word)
    return found


def _room(model: GptOss, path: str, ranks: tuple[int, ...], placement: Placement, *, dtype: DTypeLike) -> LowRank:
    (a_shape, a_axes), (b_shape, b_axes) = _matrices(model.config)[path.rpartition(".")[2]]
    total = sum(ranks)

    def make() -> LowRank:
        return LowRank(
            ranks,
            a=(tuple(total if size is None else size for size in a_shape), a_axes),
            b=(tuple(total if size is None else size for size in b_shape), b_axes),
            dtype=dtype,
            rngs=nnx.Rngs(0),
            placement=placement,
        )

    is_abstract = isinstance(model.norm.scale.get_value(), jax.ShapeDtypeStruct)
    return nnx.eval_shape(make) if is_abstract else make()


def _in_a_row(name: str, adapters: Sequence[Adapter], axes: Axes) -> np.ndarray:
    """The leaf of that name of all adapters that have one, along the rank; b is scaled."""
    scaled = [
        np.asarray(adapter.leaves[name], np.float32) * (adapter.spec.scale if name.endswith(".b") else 1.0)
        for adapter in adapters
        if name in adapter.leaves
    ]
    return np.concatenate(scaled, axis=axes.index("rank"))


def check_leaves(adapter: Adapter, config: ModelConfig) -> None:
    """That they are those of its spec, in the shapes of this model.

    Raises:
        UserError: one is missing, too many, or of another shape.
    """
    shapes = adapter_shapes(config, adapter.spec)
    for name, (shape, _) in shapes.items():
        if name not in adapter.leaves:
            raise UserError(f"the adapter has no leaf {name}, which its targets ask for: it is not whole")
        found = tuple(adapter.leaves[name].shape)
        if found != shape:
            raise UserError(f"adapter leaf {name} is {found}, this model asks for {shape}: it belongs to another model")
    strangers = sorted(adapter.leaves.keys() - shapes.keys())
    if strangers:
        raise UserError(f"the adapter has a leaf {strangers[0]}, which its targets do not name: expected none such")
