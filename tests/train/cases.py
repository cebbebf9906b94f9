"""Small models, texts and batches of the training tests: the same on every mesh, packed or each text alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptoss_jax.model.adapter import AdapterSpec, Shape, placed
from gptoss_jax.model.config import ModelConfig, alternating_layers
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.layers import Memory
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import Experts, GptOss, abstract_model, parameters, released, with_parameters
from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.hosts import to_devices
from gptoss_jax.train.leaves import Method, Trained
from gptoss_jax.train.step import State, StepSettings, Trainer
from tests.tiny import TINY

ROWS: tuple[tuple[int, ...], ...] = ((20, 9), (13, 13), (32,), (5, 7, 11))  # lengths of the texts in each row
LENGTH = 32
ADAPTER = AdapterSpec(rank=3, alpha=6.0, targets=("q", "k", "v", "o", "router", "gate_up", "down"))


@dataclasses.dataclass(frozen=True)
class Text:
    """The ids, and how much each counts as a target; the first never is one."""

    ids: np.ndarray
    weights: np.ndarray


def sizes(num_layers: int) -> ModelConfig:
    return dataclasses.replace(TINY, layer_kinds=alternating_layers(num_layers))


def texts(rows: Sequence[Sequence[int]] = ROWS, *, seed: int = 0) -> list[list[Text]]:
    """Random ones of these lengths; a third of the targets counts for nothing, others for a half or one."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> Text:
        weights = rng.choice([0, 0.5, 1], size=length).astype(np.float32)
        weights[0] = 0
        return Text(rng.integers(TINY.vocab_size, size=length, dtype=np.int32), weights)

    return [[text(length) for length in row] for row in rows]


def packed(rows: Sequence[Sequence[Text]], length: int = LENGTH) -> Batch:
    """Written anew and plainly: the packing that training uses has tests of its own."""
    shape = (len(rows), length)
    arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
    arrays |= {"weights": np.zeros(shape, np.float32), "is_real": np.zeros(shape, bool)}
    batch = Batch(**arrays, starts=np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)))  # type: ignore[arg-type]
    for i, row in enumerate(rows):
        start = 0
        for text in row:
            end = start + len(text.ids)
            batch.tokens[i, start:end] = text.ids
            batch.targets[i, start : end - 1] = text.ids[1:]
            batch.weights[i, start : end - 1] = text.weights[1:]
            batch.starts[i, start:end] = start
            batch.is_real[i, start:end] = True
            start = end
    return batch


def one_by_one(rows: Sequence[Sequence[Text]], length: int = LENGTH) -> Batch:
    """Each text in a row of its own."""
    return packed([[text] for row in rows for text in row], length)


def stacked(*batches: Batch) -> Batch:
    """[A B T]."""
    return jax.tree.map(lambda *rows: np.stack(rows), *batches)


def make_values(config: ModelConfig, *, experts: Experts = "mxfp4") -> dict[str, np.ndarray]:
    """Random parameters in released shapes, biases too. Gates and ups reach the clamp here and there."""
    rng = np.random.default_rng(1)
    return {path: _value(rng, path, shape) for path, (shape, _) in released(config, experts).items()}


def _value(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = path.rpartition(".")[2]
    if kind == "blocks":
        return rng.integers(256, size=shape, dtype=np.uint8)
    if kind == "scales":
        return rng.integers(121, 124, size=shape, dtype=np.uint8)  # of codes whose root mean square is 2.9
    normal = rng.normal(size=shape).astype(np.float32)
    if kind == "scale":
        return 1 + 0.2 * normal
    if path.endswith("gate_up.bias"):
        return 4 * normal
    if kind != "weight" or path.startswith("embedding"):
        return normal
    return normal * (math.prod(shape[1:]) if ".o." in path else shape[-1]) ** -0.5


def make_model(
    config: ModelConfig,
    values: Mapping[str, np.ndarray] | None = None,
    *,
    mesh: Mesh | None = None,
    way: Way | None = None,
    dtype: Any = jnp.float32,
    embedding: Memory = "device",
) -> GptOss:
    """With these values, by default packed ones of make_values, on every mesh the same."""
    values = make_values(config) if values is None else values
    experts: Experts = "mxfp4" if "layers.0.moe.down.blocks" in values else "bf16"
    settings: dict[str, Any] = {"impl": "xla", "mesh": mesh, "dispatch": way, "embedding": embedding}
    model = abstract_model(config, dtype=dtype, experts=experts, **settings)
    placement = place_model(config, mesh)
    laid = {}
    for path, parameter in parameters(model).items():
        value = jnp.asarray(values[path], parameter.dtype)
        laid[path] = placed(path, value, parameter.get_metadata()["axes"], placement)
    if embedding == "host":
        laid["embedding.weight"] = jax.device_put(laid["embedding.weight"], jax.memory.Space.Host)
    return with_parameters(model, laid)


def make_trainer(
    model: GptOss, *, adapter: AdapterSpec | None = ADAPTER, optimizer: Any = None, fully: bool = False, **settings: Any
) -> Trainer:
    """Without an optimizer one whose state is the gradient: `gradients`."""
    method = Method(adapter=adapter, fully_sharded=fully)
    optimizer = optax.trace(decay=0.0) if optimizer is None else optimizer
    return Trainer(Trained(model, method), optimizer, StepSettings(**{"chunk": 24, **settings}))


def gradients(state: State) -> dict[str, np.ndarray]:
    """The mean that the last step computed."""
    return {path: np.asarray(value) for path, value in state.optimizer.trace.items()}


def random_leaves(shapes: Mapping[str, Shape], *, size: float = 0.3) -> dict[str, np.ndarray]:
    """Of an adapter whose b is not zero, so that its a has a gradient."""
    rng = np.random.default_rng(2)
    found = {}
    for path, (shape, axes) in shapes.items():
        inputs = math.prod(shape[axes.index("rank") + 1 :]) or 1
        found[path] = (size * inputs**-0.5 * rng.normal(size=shape)).astype(np.float32)
    return found


def state_with(trainer: Trainer, leaves: Mapping[str, np.ndarray]) -> State:
    """What an optimizer keeps begins with zeros."""
    abstract = trainer.abstract_state()
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)
    laid = {path: jax.device_put(leaves[path], leaf.sharding) for path, leaf in abstract.leaves.items()}
    return dataclasses.replace(zeros, leaves=laid)


def on_devices(batch: Batch, mesh: Mesh | None) -> Batch:
    return to_devices(batch, mesh)


def mesh_of(shape: tuple[int, int, int] | None) -> Mesh | None:
    """data, expert, tensor."""
    return None if shape is None else make_mesh(data=shape[0], expert=shape[1], tensor=shape[2])


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    return float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
