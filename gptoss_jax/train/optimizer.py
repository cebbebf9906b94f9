"""The optimizer that settings name, and where its state lies. Knows optax and the names of leaves; knows no loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import EXPERTS
from gptoss_jax.train.config import OptimizerSettings
from gptoss_jax.train.leaves import Leaves, Trained

Schedule: TypeAlias = Callable[[ArrayLike], Float[Array, ""]]

# The last word of the paths of leaves that weight decay leaves alone.
_NO_MATRICES = ("bias", "scale", "sinks")

# Modules whose weights muon is for: how many axes are outputs, behind the experts' and before the inputs'.
_NUM_OUTPUTS: Mapping[str, int] = {"q": 2, "k": 2, "v": 2, "o": 1, "gate_up": 2, "down": 1}
_MUON_BETA = 0.95  # its author's, which all else at its defaults goes with


def make_optimizer(settings: OptimizerSettings, *, steps: int) -> optax.GradientTransformation:
    """From gradients, their norm cut, to what is added to the leaves of the same paths. Its state counts the steps.

    Args:
        settings: see there.
        steps: of the whole run, at whose end the schedule ends.

    Raises:
        UserError: the warm-up is as long as the run, or longer.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        _direction(settings),
        optax.add_decayed_weights(settings.weight_decay, mask=is_matrix),
        _side_rate(settings),
        optax.scale_by_learning_rate(learning_rate(settings, steps=steps)),
    )


def _direction(settings: OptimizerSettings) -> optax.GradientTransformation:
    match settings.name:
        case "adamw":
            return optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.epsilon)
        case "lion":
            return optax.scale_by_lion(b1=settings.beta1, b2=settings.beta2)
        case "adafactor":
            # Without the parameters' own scale: the b of an adapter begins at zero and would stay there.
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        case "muon":
            adam = optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.epsilon)
            matrices = optax.chain(
                optax.contrib.scale_by_muon(beta=_MUON_BETA, weight_dimension_numbers=_matrices), _by_shape()
            )
            return optax.partition({"muon": matrices, "adamw": adam}, _named)
        case "sgd":
            return optax.trace(decay=settings.beta1)


def _side_rate(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Updates of leaves that muon is not for, as far as their rate differs from the others'."""
    if settings.name != "muon" or settings.side_rate is None:
        return optax.identity()
    part = settings.side_rate / settings.learning_rate
    return optax.masked(
        optax.scale(part), lambda leaves: {name: not is_for for name, is_for in is_for_muon(leaves).items()}
    )


# ---- matrices for muon -----------------------------------------------------------------------------------------------


def is_for_muon(leaves: Any) -> dict[str, bool]:
    """By path, whether a leaf is a matrix between hidden states: of attention or of experts, an adapter's too."""
    return {name: _matrix(name, leaf.ndim) is not None for name, leaf in leaves.items()}


def _named(leaves: Any) -> dict[str, str]:
    return {name: "muon" if is_for else "adamw" for name, is_for in is_for_muon(leaves).items()}


def _matrix(name: str, num_axes: int) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a leaf are a matrix's inputs and outputs: heads and their dimensions are one, experts are many."""
    parts = name.split(".")
    leaf, of_adapter = parts[-1], "adapter" in parts
    module = parts[-3 if of_adapter else -2] if len(parts) > 3 else ""
    if module not in _NUM_OUTPUTS or leaf not in ("weight", "a", "b"):
        return None
    first = 1 if module in EXPERTS else 0
    outputs = {"weight": first + _NUM_OUTPUTS[module], "a": first + 1, "b": num_axes - 1}[leaf]
    axes = tuple(range(num_axes))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[outputs:], output_axis=axes[first:outputs])


def _matrices(leaves: Any) -> dict[str, Any]:
    """Of leaves where those that muon is not for are masked."""
    return {name: _matrix(name, leaf.ndim) if hasattr(leaf, "ndim") else leaf for name, leaf in leaves.items()}


def _by_shape() -> optax.GradientTransformation:
    """More for matrices with more outputs than inputs, as muon's author has it."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda update, axes: update * _shape_scale(update.shape, axes), updates, _matrices(updates))

    return optax.stateless(scaled)


def _shape_scale(shape: tuple[int, ...], axes: optax.contrib.MuonDimensionNumbers) -> float:
    inputs, outputs = (_size(shape, axis) for axis in axes)
    return max(1.0, outputs / inputs) ** 0.5


def _size(shape: tuple[int, ...], axes: Sequence[int] | int) -> int:
    return shape[axes] if isinstance(axes, int) else math.prod(shape[axis] for axis in axes)


def learning_rate(settings: OptimizerSettings, *, steps: int) -> Schedule:
    """By the number of updates made before: it rises in a line over the warm-up, then falls as the settings say.

    The first update of a warm-up has a rate, 1 / warmup of the highest, and the last of the run the final one.

    Raises:
        UserError: the warm-up is as long as the run, or longer.
    """
    warmup, final = settings.warmup, settings.final
    if warmup >= steps:
        raise UserError(
            f"optimizer.warmup is {warmup} and the run has {steps} steps; expected fewer: leave some to train"
        )

    def rate(count: ArrayLike) -> Float[Array, ""]:
        made = jnp.asarray(count, jnp.float32)
        done = jnp.clip((made - warmup) / max(steps - 1 - warmup, 1), 0, 1)
        left = {"constant": jnp.ones_like(done), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
        part = left[settings.schedule] * (1 - final) + final
        return settings.learning_rate * jnp.where(made < warmup, (made + 1) / max(warmup, 1), part)

    return rate


def is_matrix(leaves: Leaves) -> dict[str, bool]:
    """By path, whether weight decay is for it: adapters too are matrices, norms, biases and sinks are not."""
    return {name: name.rpartition(".")[2] not in _NO_MATRICES for name in leaves}


def state_shardings(optimizer: optax.GradientTransformation, trained: Trained) -> Any:
    """Where the optimizer's state for these leaves lies, a tree like it: with the leaf what has its shape, else whole.

    None without a mesh.
    """
    mesh = trained.model.mesh
    if mesh is None:
        return None
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in trained.shapes.items()}
    whole = NamedSharding(mesh, P())

    return map_state(optimizer, leaves, lambda _, name: whole if name is None else trained.sharding(name))


def map_state(
    optimizer: optax.GradientTransformation, leaves: Mapping[str, Any], make: Callable[[Any, str | None], Any]
) -> Any:
    """A tree like the optimizer's state: what `make` says of each array's shape, and of the leaf that it lies with.

    That is the one it is kept for, if it has its shape; None otherwise.
    """

    def own(path: tuple[Any, ...], kept: Any) -> Any:
        """What is kept for a leaf has its name on the way to it."""
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in leaves]
        return make(kept, next((name for name in names if kept.shape == leaves[name].shape), None))

    return jax.tree_util.tree_map_with_path(own, jax.eval_shape(optimizer.init, leaves))
