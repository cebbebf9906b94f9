"""One update of what trains, jitted: losses, gradients over several batches, the optimizer. Knows no files, no text.

A batches ─► each: forward ─► loss ─► gradient of the sum ─┐
                                                           + ─► / all targets' weight ─► optimizer ─► state
                                                                (not finite: the state as it was)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import Adapter
from gptoss_jax.model.formats import in_memory
from gptoss_jax.model.transformer import GptOss, parameters, with_parameters
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.dpo import PreferenceBatch, dpo_loss, row_sums
from gptoss_jax.train.forward import Remat, RouterStats, forward, unembedding
from gptoss_jax.train.leaves import Leaves, Trained
from gptoss_jax.train.locations import own_lines_only
from gptoss_jax.train.loss import Sums, log_probabilities, router_loss, summed
from gptoss_jax.train.optimizer import state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        remat: what the way back computes anew, see forward.py.
        chunk: tokens of a device whose scores exist at once.
        router_loss: how much the unevenness of the experts' load counts beside the mean loss.
        beta: makes preferences the objective, see dpo.py; None is the likelihood of targets.
    """

    remat: Remat = "layer"
    chunk: int = 512
    router_loss: float = 0.0
    beta: float | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a step changes, and all that a save needs of it. Also a tree of shapes or shardings in their places.

    Attributes:
        step: updates that were made.
        leaves: the masters, by path.
        optimizer: what it keeps for them.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    step: Any
    leaves: Any
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Of one step, before its update; the same on every device.

    Attributes:
        loss: the mean over the targets by weight, or over pairs of preferences.
        weight: of all targets, or the number of pairs.
        accuracy: the part of the weight whose target has the highest score, or of the pairs that have a margin.
        gradient_norm: of all leaves together, before it is cut.
        aux_loss: the unevenness of the experts' load, 1 at best; it is not in `loss`.
        load: each expert's share of the visits of its layer.
        finite: loss and gradient are; else nothing was changed.
    """

    __no_type_check__ = True

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    accuracy: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    aux_loss: Float[Array, ""]
    load: Float[Array, "L E"]
    finite: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Figures:
    """Of one batch, to be added up: the router's unevenness is multiplied by the batch's weight."""

    __no_type_check__ = True

    sums: Sums
    aux_loss: Float[Array, ""]
    visits: Float[Array, "L E"]


class Trainer:
    """Takes the steps of one run. All arrays that come in lie on the model's mesh, rows over `data`.

    Args:
        trained: which leaves train.
        optimizer: of their gradients.
        settings: see there.
    """

    def __init__(self, trained: Trained, optimizer: optax.GradientTransformation, settings: StepSettings):
        self.trained = trained
        self.settings = settings
        self._optimizer = optimizer
        self._frozen = trained.frozen
        shardings = self._shardings()
        everywhere = None if shardings is None else NamedSharding(self._mesh, P())
        # Frozen arrays are arguments: as constants they would be copied into the program.
        self._step = jax.jit(self._updated, donate_argnums=0, out_shardings=(shardings, everywhere))
        self._init = jax.jit(optimizer.init, out_shardings=None if shardings is None else shardings.optimizer)
        self._evaluate = jax.jit(self._evaluated, out_shardings=everywhere)
        self._row_sums = jax.jit(self._policy)
        self._lay = jax.jit(lambda leaves: {name: trained.laid(name, leaf) for name, leaf in leaves.items()})

    # ---- states ------------------------------------------------------------------------------------------------------

    def start(self, seed: int) -> State:
        """The state before the first step."""
        leaves = self.trained.start(seed)
        step = jnp.zeros((), jnp.int32)
        if self._mesh is not None:
            step = jax.jit(jnp.zeros_like, out_shardings=NamedSharding(self._mesh, P()))(step)
        state = State(step=step, leaves=leaves, optimizer=self._init(leaves))
        # Bound to its devices, as a step gives it back: otherwise the second step would be compiled anew.
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))

    def abstract_state(self) -> State:
        """Its shapes and where they lie: what a save is read into."""
        leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in self.trained.shapes.items()}
        optimizer = jax.eval_shape(self._optimizer.init, leaves)
        state = State(step=jax.ShapeDtypeStruct((), jnp.int32), leaves=leaves, optimizer=optimizer)
        shardings = self._shardings()
        if shardings is None:
            return state
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def adapter(self, state: State) -> Adapter:
        """What was trained, in released shapes. The state's own arrays: the next step consumes them.

        Raises:
            UserError: the model's own weights train.
        """
        spec = self.trained.method.adapter
        if spec is None:
            raise UserError("all of the model is trained, there is no adapter: export the model")
        return Adapter(spec=spec, leaves=dict(state.leaves))

    def model(self, state: State) -> GptOss:
        """The model as it is now, to generate with; what is frozen is shared, not copied."""
        return with_parameters(self.trained.model, self._frozen | self._lay(state.leaves))

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, state: State, batches: Batch) -> tuple[State, Metrics]:
        """One update by the gradients of A batches, [A B T]; the state is consumed.

        Every target counts alike, by its weight, in whichever batch it is. Where loss or gradient is not finite the
        state comes back unchanged.
        """
        self._check(batches)
        self.trained.forget_weights()
        with own_lines_only():
            return self._step(state, self._frozen, batches)

    def evaluate(self, state: State, batch: Batch) -> Sums:
        """The loss of one batch, [B T], that nothing is learnt from."""
        self._check(batch)
        with own_lines_only():
            return self._evaluate(state.leaves, self._frozen, batch)

    def row_log_probabilities(self, state: State, batch: Batch) -> Float[Array, "B 1"]:
        """Of each row's targets together: of the state before the first step, a PreferenceBatch's reference."""
        with own_lines_only():
            return self._row_sums(state.leaves, self._frozen, batch)[:, None]

    def lower(self, batches: Batch) -> jax.stages.Lowered:
        """The step for the compiler, of batches that may be shapes only, as may be the model: nothing is allocated."""
        found = parameters(self.trained.model)
        frozen = {name: self._abstract(name, found[name]) for name in self._frozen}
        with own_lines_only():
            return self._step.lower(self.abstract_state(), frozen, batches)

    # ---- traced ------------------------------------------------------------------------------------------------------

    def _updated(self, state: State, frozen: Leaves, batches: Batch) -> tuple[State, Metrics]:
        gradients, figures = self._gradients(state.leaves, frozen, batches)
        weight = jnp.maximum(figures.sums.weight, jnp.finfo(jnp.float32).tiny)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        loss, norm = figures.sums.loss / weight, optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.leaves)
        changed = State(step=state.step + 1, leaves=optax.apply_updates(state.leaves, updates), optimizer=optimizer)
        state = jax.tree.map(functools.partial(jnp.where, finite), changed, state)
        return state, Metrics(
            loss=loss,
            weight=figures.sums.weight,
            accuracy=figures.sums.correct / weight,
            gradient_norm=norm,
            aux_loss=figures.aux_loss / weight,
            load=RouterStats(figures.visits, figures.visits).load,
            finite=finite,
        )

    def _gradients(self, leaves: Leaves, frozen: Leaves, batches: Batch) -> tuple[Leaves, _Figures]:
        """Of the sums over all batches."""

        def one(batch: Batch) -> tuple[Leaves, _Figures]:
            gradients, figures = jax.grad(self._objective, has_aux=True)(leaves, frozen, batch)
            return self._as_leaves_lie(gradients), figures

        if len(batches.tokens) == 1:
            return one(jax.tree.map(lambda rows: rows[0], batches))
        first = jax.tree.map(lambda rows: rows[0], batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
        zeros = (self._as_leaves_lie(zeros[0]), zeros[1])
        sums, _ = jax.lax.scan(lambda sums, batch: (jax.tree.map(jnp.add, sums, one(batch)), None), zeros, batches)
        return sums

    def _objective(self, leaves: Leaves, frozen: Leaves, batch: Batch) -> tuple[Float[Array, ""], _Figures]:
        """What is differentiated: a sum over targets, which may be added to those of other batches."""
        sums, stats = self._sums(leaves, frozen, batch)
        aux_loss = router_loss(stats) * sums.weight
        figures = _Figures(sums=sums, aux_loss=aux_loss, visits=stats.visits)
        return sums.loss + self.settings.router_loss * aux_loss, figures

    def _evaluated(self, leaves: Leaves, frozen: Leaves, batch: Batch) -> Sums:
        sums, _ = self._sums(leaves, frozen, batch)
        return sums

    def _sums(self, leaves: Leaves, frozen: Leaves, batch: Batch) -> tuple[Sums, RouterStats]:
        found, is_best, stats = self._targets(leaves, frozen, batch)
        if self.settings.beta is None:
            return summed(found, is_best, batch.weights), stats
        policy = row_sums(found, batch.weights)
        if isinstance(batch, PreferenceBatch):
            reference = batch.reference[:, 0]
        else:
            reference = jax.lax.stop_gradient(self._policy(_without_effect(leaves), frozen, batch))
        return dpo_loss(policy, reference, batch.weights, beta=self.settings.beta), stats

    def _policy(self, leaves: Leaves, frozen: Leaves, batch: Batch) -> Float[Array, " B"]:
        return row_sums(self._targets(leaves, frozen, batch)[0], batch.weights)

    def _targets(
        self, leaves: Leaves, frozen: Leaves, batch: Batch
    ) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], RouterStats]:
        hidden, stats = forward(leaves, frozen, batch, plan=self.trained, remat=self.settings.remat)
        weight = unembedding(leaves, frozen, plan=self.trained).weight[...]
        settings = {
            "vocab_size": self.trained.model.config.vocab_size,
            "chunk": self.settings.chunk,
            "mesh": self._mesh,
        }
        return *log_probabilities(hidden, weight, batch.targets, **settings), stats

    # ---- where things lie --------------------------------------------------------------------------------------------

    @property
    def _mesh(self) -> Any:
        return self.trained.model.mesh

    def _shardings(self) -> State | None:
        if self._mesh is None:
            return None
        leaves = {name: self.trained.sharding(name) for name in self.trained.shapes}
        optimizer = state_shardings(self._optimizer, self.trained)
        return State(step=NamedSharding(self._mesh, P()), leaves=leaves, optimizer=optimizer)

    def _as_leaves_lie(self, gradients: Leaves) -> Leaves:
        """Fully sharded leaves have fully sharded gradients: each device receives only the sum of its own part."""
        shardings = {name: self.trained.sharding(name) for name in gradients}
        return {
            name: gradient if shardings[name] is None else jax.lax.with_sharding_constraint(gradient, shardings[name])
            for name, gradient in gradients.items()
        }

    def _abstract(self, name: str, parameter: nnx.Param) -> jax.ShapeDtypeStruct:
        axes = parameter.get_metadata()["axes"]
        sharding = self.trained.placement.sharding(name, parameter.shape, axes)
        if sharding is not None:
            model = self.trained.model
            settings: dict[str, Any] = {"impl": model.impl.moe_matmul, "embedding": model.embedding.memory}
            sharding = in_memory(name, rank=len(parameter.shape), sharding=sharding, **settings)
        return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=sharding)

    def _check(self, batch: Batch) -> None:
        if self.settings.beta is None or isinstance(batch, PreferenceBatch) or self.trained.method.adapter is not None:
            return
        raise UserError(
            "preferences need what the model said before training began, which full training overwrites: "
            "give a PreferenceBatch, or train an adapter"
        )


def _without_effect(leaves: Leaves) -> Leaves:
    """An adapter whose b is zero adds exactly nothing: what is left is the base."""
    return {name: jnp.zeros_like(leaf) if name.endswith(".b") else leaf for name, leaf in leaves.items()}
