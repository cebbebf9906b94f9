"""What a step of training holds on each device, before anything runs. Knows sizes and cuts; allocates nothing.

    lasting     frozen weights, masters, what the optimizer keeps: to the byte
    passing     forward     the layers' inputs grow, and nothing else is kept of them
                loss        all inputs, and the scores of one chunk of tokens
                back        inputs go and gradients come, with one layer computed again

Passing memory depends on what a compiler makes of the step: `lower` gives it the very step, of shapes alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.attention.xla import SCORES_AT_ONCE
from gptoss_jax.model.adapter import EXPERTS, Shape
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import Load
from gptoss_jax.model.footprint import GROUPS, entry_bytes, group, kv_heads_here, rows_here, shard_size
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, GptOss, abstract_model, released
from gptoss_jax.sharding import AnyMesh, abstract_mesh, row_axis
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.leaves import Trained, master_sharding, trained_shapes
from gptoss_jax.train.optimizer import make_optimizer, map_state
from gptoss_jax.train.settings import method, step_settings
from gptoss_jax.train.step import Trainer

_FLOAT32 = 4  # bytes
_IMPL = "attention=xla"  # the others take rows of one text each


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
        frozen: parameters that do not train, by the names of footprint.GROUPS.
        masters: what trains, in float32.
        optimizer: what it keeps for them.
        gradients: of the masters; of several batches in one step two of each.
        inputs: of all layers, kept for the way back, with whatever else the policy keeps of them.
        layers: how many.
        layer: what the largest computes again on the way back, with its copies of the masters.
        scores: of one chunk of the loss.
    """

    frozen: Mapping[str, int]
    masters: int
    optimizer: int
    gradients: int
    inputs: int
    layers: int
    layer: int
    scores: int

    @property
    def lasting(self) -> int:
        return sum(self.frozen.values()) + self.masters + self.optimizer

    @property
    def passing(self) -> int:
        """At the fullest moment: the loss, or the way back through the last layer or the first."""
        loss, last = self.inputs + self.scores, self.inputs + self.layer
        return max(loss, last, self.gradients + self.inputs // self.layers + self.layer)

    @property
    def total(self) -> int:
        return self.lasting + self.passing

    def parts(self) -> dict[str, int]:
        """All of them by what they are, those of zero left out; not all are there at once."""
        found = {f"frozen: {name}": nbytes for name, nbytes in self.frozen.items()}
        found |= {
            "trained, in float32": self.masters,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "inputs of layers": self.inputs,
            "largest layer": self.layer,
            "scores of a chunk": self.scores,
        }
        return {name: nbytes for name, nbytes in found.items() if nbytes}


def step_memory(config: TrainConfig, sizes: ModelConfig, experts: Experts) -> StepMemory:
    """Of a run on its mesh. No device is asked for.

    Args:
        config: of the run.
        sizes: of its model.
        experts: as they lie in the model.

    Raises:
        UserError: the model cannot be cut so, or the method does not go with it.
    """
    mesh = abstract_mesh(config.mesh.shape)
    chosen = method(config)
    _check(config, sizes, experts, mesh)
    shapes = trained_shapes(sizes, experts, chosen)
    masters = {
        name: _shard(size, master_sharding((size, axes), mesh, fully=chosen.fully_sharded), _FLOAT32)
        for name, (size, axes) in shapes.items()
    }
    frozen = dict.fromkeys(GROUPS, 0)
    for name, nbytes in _parameters(config, sizes, experts, mesh).items():
        frozen[group(name)] += 0 if name in shapes else nbytes
    held = sum(masters.values())
    return StepMemory(
        frozen=frozen,
        masters=held,
        optimizer=_optimizer(config, shapes, masters),
        gradients=held * (2 if config.loop.accumulate > 1 else 1),
        inputs=sizes.num_layers * _kept(config, sizes),
        layers=sizes.num_layers,
        layer=max(_attention(config, sizes), _experts(config, sizes)) + _copies(config, masters),
        scores=_scores(config, sizes),
    )


def lower(config: TrainConfig, sizes: ModelConfig, experts: Experts, *, mesh: AnyMesh) -> jax.stages.Lowered:
    """The run's step, for the compiler of the mesh's devices, which need not be here.

    Raises:
        UserError: as `step_memory`.
    """
    trained = Trained(_model(config, sizes, experts, mesh, impl=config.model.impl or _IMPL), method(config))
    optimizer = make_optimizer(config.optimizer, steps=config.optimizer.warmup + 1)
    return Trainer(trained, optimizer, step_settings(config)).lower(_batches(config, mesh))


def _model(config: TrainConfig, sizes: ModelConfig, experts: Experts, mesh: AnyMesh, *, impl: str) -> GptOss:
    settings: dict[str, Any] = {"mesh": mesh, "impl": impl, "dispatch": config.model.dispatch}
    settings |= {"embedding": config.model.embedding}
    return abstract_model(sizes, dtype=jnp.dtype(config.model.dtype), experts=experts, **settings)


def _batches(config: TrainConfig, mesh: AnyMesh) -> Batch:
    shape = (config.loop.accumulate, config.loop.rows, config.data.row_length)
    sharding = NamedSharding(mesh, P(None, row_axis(config.loop.rows, mesh)))

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = array(jnp.int32)
    return Batch(tokens=ids, targets=ids, weights=array(jnp.float32), starts=ids, is_real=array(jnp.bool_))


# ---- lasting ---------------------------------------------------------------------------------------------------------


def _check(config: TrainConfig, sizes: ModelConfig, experts: Experts, mesh: AnyMesh) -> None:
    """That the method goes with such a model, of which one layer stands for all: to trace 36 takes a minute."""
    one_layer = dataclasses.replace(sizes, layer_kinds=sizes.layer_kinds[:1])
    chosen = method(config)
    if chosen.adapter is not None:
        chosen = dataclasses.replace(chosen, adapter=dataclasses.replace(chosen.adapter, layers=(0,)))
    # Whatever implementation will run: without devices there is none to choose.
    Trained(_model(config, one_layer, experts, mesh, impl="xla"), dataclasses.replace(chosen, frozen=()))


def _parameters(config: TrainConfig, sizes: ModelConfig, experts: Experts, mesh: AnyMesh) -> dict[str, int]:
    """Bytes of each parameter of the model, as it is fitted to the mesh."""
    placement = place_model(sizes, mesh)
    found = {}
    for name, (size, axes) in released(sizes, experts).items():
        fitted = tuple(fit.fitted for fit in placement.axis_fits(size, axes))
        on_host = name == "embedding.weight" and config.model.embedding == "host"
        bytes_each = 0 if on_host else entry_bytes(name, _itemsize(config))
        found[name] = _shard(fitted, placement.sharding(name, fitted, axes), bytes_each)
    return found


def _optimizer(config: TrainConfig, shapes: Mapping[str, Shape], masters: Mapping[str, int]) -> int:
    """What has a master's shape lies as it does; the rest lies whole everywhere."""
    optimizer = make_optimizer(config.optimizer, steps=config.optimizer.warmup + 1)
    leaves = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, (size, _) in shapes.items()}
    found = map_state(optimizer, leaves, lambda kept, name: _whole(kept) if name is None else masters[name])
    return sum(jax.tree.leaves(found))


def _shard(size: tuple[int, ...], sharding: Sharding | None, itemsize: int) -> int:
    """Bytes of one device's part."""
    return math.prod(size if sharding is None else sharding.shard_shape(size)) * itemsize


def _whole(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


# ---- passing ---------------------------------------------------------------------------------------------------------


def _tokens(config: TrainConfig) -> int:
    return rows_here(config.loop.rows, config.mesh.shape) * config.data.row_length


def _itemsize(config: TrainConfig) -> int:
    return jnp.dtype(config.model.dtype).itemsize


def _heads(config: TrainConfig, sizes: ModelConfig) -> int:
    """Of queries, keys and values together."""
    shape = config.mesh.shape
    return shard_size("heads", sizes.num_heads, sizes, shape) + 2 * kv_heads_here(sizes, shape)


def _kept(config: TrainConfig, sizes: ModelConfig) -> int:
    """Of one layer, by the policy: its input; also its products of whole rows; or all."""
    tokens = _tokens(config)
    stream = tokens * sizes.width * _itemsize(config)
    match config.compute.remat:
        case "layer":
            return stream
        case "dots":
            outputs = _heads(config, sizes) * sizes.head_dim + sizes.width + sizes.num_experts
            return stream + tokens * outputs * _FLOAT32
        case "none":
            return stream + _attention(config, sizes) + _experts(config, sizes)


def _attention(config: TrainConfig, sizes: ModelConfig) -> int:
    """Queries, keys and values, their gradients, and the scores of some queries at a time."""
    tokens, rows = _tokens(config), rows_here(config.loop.rows, config.mesh.shape)
    heads = shard_size("heads", sizes.num_heads, sizes, config.mesh.shape)
    scores = min(SCORES_AT_ONCE, rows * heads * config.data.row_length**2) * _FLOAT32
    mixed = 2 * _heads(config, sizes) * sizes.head_dim + 2 * sizes.width
    return scores + tokens * mixed * (_itemsize(config) + _FLOAT32)


def _experts(config: TrainConfig, sizes: ModelConfig) -> int:
    """What a visit is at its expert, forward and back. An adapter adds to the sums before their swiglu, which then are
    held: gate and up, what is added, and both gradients."""
    width = shard_size("expert_width", sizes.expert_width, sizes, config.mesh.shape)
    size = _itemsize(config)
    apart = config.method.kind == "lora" and set(config.method.targets) & set(EXPERTS)
    sums = 4 * 2 * width * _FLOAT32 if apart else 2 * width * size
    return _visits(config, sizes) * (sums + sizes.width * (2 * size + (0 if apart else 2 * _FLOAT32)))


def _visits(config: TrainConfig, sizes: ModelConfig) -> int:
    """Rows that a device brings to experts at once: to see which of all are its own, or those of one round."""
    shape, rows = config.mesh.shape, config.loop.rows
    load = Load(
        num_tokens=_tokens(config),
        width=sizes.width,
        itemsize=_itemsize(config),
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        expert_shards=shape.expert,
        tensor_shards=shape.tensor,
        token_shards=shape.expert if rows % shape.data == 0 else shape.data * shape.expert,
    )
    way = config.model.dispatch or load.choose_way()
    if shape.num_devices == 1 or way == "reduce":
        return load.num_tokens * load.experts_per_token
    return load.room(way) * (1 if way == "ragged" else load.expert_shards)


def _copies(config: TrainConfig, masters: Mapping[str, int]) -> int:
    """Of the masters of one module, a layer or the embedding, in the model's dtype; of the largest."""
    found: dict[str, int] = {}
    for name, nbytes in masters.items():
        module = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        found[module] = found.get(module, 0) + nbytes * _itemsize(config) // _FLOAT32
    return max(found.values())


def _scores(config: TrainConfig, sizes: ModelConfig) -> int:
    """In float32, with what is made of them, and as an operand of the product that goes back."""
    tokens = min(config.compute.loss_chunk, _tokens(config))
    vocab = shard_size("vocab", sizes.vocab_size, sizes, config.mesh.shape)
    return tokens * vocab * (_FLOAT32 + _itemsize(config))
