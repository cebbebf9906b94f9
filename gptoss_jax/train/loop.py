"""Steps, and what happens between them: losses, answers, saves, a log. Knows when; knows no model and no files' form.

    next batch ─► step on the devices ─┬─► finite? ─► log ─► every so often: evaluate, sample, save ─► next
                                       └─ meanwhile the host reads the batch after it

A save holds the state after a step and the position of the data behind it, and the log has a line for each step up to
it: whatever ends a run, it goes on from its newest save as if nothing had happened.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import UserError
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import LoopSettings
from gptoss_jax.train.hosts import anywhere, to_devices
from gptoss_jax.train.log import Log
from gptoss_jax.train.saves import Notes, Saves

_SOURCES_SHOWN = 8


@runtime_checkable
class Trainer(Protocol):
    """What takes a step: see step.py. States are pytrees with an attribute `step`; they are consumed."""

    def start(self, seed: int) -> Any: ...
    def abstract_state(self) -> Any: ...
    def step(self, state: Any, batches: Batch) -> tuple[Any, Any]: ...
    def evaluate(self, state: Any, batch: Batch) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fed:
    """What one step is given.

    Attributes:
        batch: this process's rows, [A B T]; NumPy.
        sources: where they come from, as "file.jsonl:12", in any order.
        position: of what follows, as JSON.
        epoch: how often every example has been seen by then.
    """

    batch: Batch
    sources: Sequence[str]
    position: Mapping[str, Any]
    epoch: float


@runtime_checkable
class Feed(Protocol):
    """What is read. All of it is a function of the position: the same one gives the same batches, on every machine."""

    def start(self) -> Mapping[str, Any]: ...
    def batches(self, position: Mapping[str, Any]) -> Iterator[Fed]: ...
    def evaluation(self) -> Iterable[Batch]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """What the log says beside a step's own figures; both are asked with a step's number or its counts.

    Attributes:
        learning_rate: of the step that begins behind so many.
        flops: that the counts of a step ask for, of all devices; None leaves `mfu` out.
        peak_flops: that all devices can do in a second; None, where nobody knows it, does so too.
        window: keys that a token sees in a sliding layer.
    """

    learning_rate: Callable[[int], float]
    flops: Callable[["Counts"], float] | None = None
    peak_flops: float | None = None
    window: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a step, over all processes: tokens, those with a loss, and the keys that they see in either kind of layer."""

    tokens: int
    trained_tokens: int
    full_keys: int
    sliding_keys: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
        state: the trainer's.
        step: updates that were made in all.
        stopped: before the last step, because it was asked to.
        loss: of the last evaluation; None where there was none.
    """

    state: Any
    step: int
    stopped: bool
    loss: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One run, ready to go.

    Attributes:
        trainer: takes the steps.
        feed: what they are given.
        saves: what it begins from, where there is one, and leaves behind.
        settings: how often what happens.
        steps: in all.
        log: in the one process that writes it.
        mesh: where batches lie.
        measures: for the log.
        prepare: what a batch needs besides before a step or an evaluation takes it; it lies on the devices by then.
        sample: answers to the settings' prompts by the state; asked of all processes.
        should_stop: asked after every step; True saves and ends the run.
    """

    trainer: Trainer
    feed: Feed
    saves: Saves
    settings: LoopSettings
    steps: int
    log: Log | None
    mesh: Mesh | None = None
    measures: Measures
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    sample: Callable[[Any], Sequence[str]] | None = None
    should_stop: Callable[[], bool] = lambda: False

    def run(self) -> Result:
        """From the newest save, or from the beginning, to the last step.

        Raises:
            UserError: a loss or gradient is not finite, a save cannot be read or written, or the data is at its end.
        """
        state, position, loss = self._begin()
        step = int(state.step)
        stopped = False
        feed = self.feed.batches(position)
        fed = self._next(feed, step) if step < self.steps else None
        while fed is not None and not stopped:
            begin = time.perf_counter()
            batch = to_devices(fed.batch, self.mesh)
            counts = _count(batch, self.measures.window)
            state, metrics = self.trainer.step(state, self.prepare(batch))
            step += 1
            upcoming = self._next(feed, step) if step < self.steps else None
            found = jax.device_get(metrics)  # waits for the devices
            self._check_finite(step, found, fed)
            self._log_step(step, found, _counted(counts), fed, seconds=time.perf_counter() - begin)
            stopped = step < self.steps and anywhere(self.should_stop())
            saves = stopped or step == self.steps or step % self.settings.save_every == 0
            loss = self._beside(step, state, fed, loss, saves=saves)
            fed = upcoming
        self.saves.wait()
        return Result(state=state, step=step, stopped=stopped, loss=loss)

    def _begin(self) -> tuple[Any, Mapping[str, Any], float | None]:
        newest = self.saves.newest()
        if newest is None:
            return self.trainer.start(self.settings.seed), self.feed.start(), None
        state, notes = self.saves.restore(newest, self.trainer.abstract_state())
        return state, notes.position, notes.loss

    def _next(self, feed: Iterator[Fed], step: int) -> Fed:
        fed = next(feed, None)
        if fed is None:
            raise UserError(
                f"the data is at its end before step {step + 1} of {self.steps}: there are too few examples for a batch"
            )
        return fed

    def _beside(self, step: int, state: Any, fed: Fed, loss: float | None, *, saves: bool) -> float | None:
        """What is due after this step; the loss of the last evaluation."""
        settings, evaluated = self.settings, None
        if step % settings.evaluate_every == 0 or step == self.steps:
            evaluated = self._evaluate(step, state)
        if self.sample and settings.sample_every and (step % settings.sample_every == 0 or step == self.steps):
            self._sample(step, state)
        if saves:
            self.saves.save(step, state, Notes(position=fed.position, loss=evaluated))
        else:
            self.saves.check()
        return loss if evaluated is None else evaluated

    def _check_finite(self, step: int, metrics: Any, fed: Fed) -> None:
        if bool(metrics.finite) and np.isfinite(metrics.loss):
            return
        newest = self.saves.newest()
        shown = ", ".join(list(dict.fromkeys(fed.sources))[:_SOURCES_SHOWN])
        shown += f" and {len(fed.sources) - _SOURCES_SHOWN} more" if len(fed.sources) > _SOURCES_SHOWN else ""
        kept = "there is no save" if newest is None else f"the last good save is {self.saves.folder / str(newest)}"
        raise UserError(
            f"step {step}: the loss is {float(metrics.loss):g} and the gradient's norm "
            f"{float(metrics.gradient_norm):g}, expected finite numbers; its batch is {shown or 'unnamed'}; {kept}: "
            "lower optimizer.learning_rate, or remove what is wrong with these examples"
        )

    def _log_step(self, step: int, metrics: Any, counts: Counts, fed: Fed, *, seconds: float) -> None:
        if self.log is None:
            return
        measures = self.measures
        values: dict[str, Any] = {
            "loss": float(metrics.loss),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(measures.learning_rate(step - 1)),
            "accuracy": float(metrics.accuracy),
            "router_loss": float(metrics.aux_loss),
            "tokens": counts.tokens,
            "trained_tokens": counts.trained_tokens,
            "epoch": round(fed.epoch, 6),
            "seconds": round(seconds, 6),
            "tokens_per_second": round(counts.tokens / seconds, 1),
        }
        if measures.flops is not None and measures.peak_flops is not None:
            values["mfu"] = round(measures.flops(counts) / seconds / measures.peak_flops, 6)
        self.log.add("step", step, **values, **_load(np.asarray(metrics.load)))

    def _evaluate(self, step: int, state: Any) -> float | None:
        """The loss of a token, over all of the evaluation's; None where there is none."""
        begin, loss, weight, trained = time.perf_counter(), 0.0, 0.0, 0
        for rows in self.feed.evaluation():
            batch = to_devices(rows, self.mesh)
            sums = jax.device_get(self.trainer.evaluate(state, self.prepare(batch)))
            loss, weight = loss + float(sums.loss), weight + float(sums.weight)
            trained += _counted(_count(batch, self.measures.window)).trained_tokens
        if weight == 0:
            return None
        if self.log is not None:
            seconds = round(time.perf_counter() - begin, 6)
            self.log.add("evaluation", step, loss=loss / weight, trained_tokens=trained, seconds=seconds)
        return loss / weight

    def _sample(self, step: int, state: Any) -> None:
        assert self.sample is not None
        answers = self.sample(state)
        for prompt, answer in zip(self.settings.sample_prompts, answers, strict=True):
            if self.log is not None:
                self.log.add("sample", step, prompt=prompt, answer=answer)


def _load(load: Float[np.ndarray, "L E"]) -> dict[str, Any]:
    """How evenly the experts of each layer are visited: the busiest one's share against an even one, and idle ones."""
    busiest = load.max(axis=-1, initial=0) * load.shape[-1]
    return {"busiest": [round(float(share), 3) for share in busiest], "idle": (load == 0).sum(axis=-1).tolist()}


def _count(batch: Batch, window: int) -> tuple[Int[Array, "2"], Float[Array, "2"]]:
    """On its way while the step is: `_counted` waits for it."""
    return _sums(batch, jnp.int32(window))


@jax.jit
def _sums(batch: Batch, window: Int[Array, ""]) -> tuple[Int[Array, "2"], Float[Array, "2"]]:
    """Tokens, exactly; and keys, of which a long step has more than 2^31."""
    real = batch.is_real
    seen = jnp.where(real, jnp.arange(real.shape[-1]) - batch.starts + 1, 0)
    tokens = jnp.stack([jnp.sum(real), jnp.sum((batch.weights > 0) & real)])
    return tokens, jnp.stack([jnp.sum(keys, dtype=jnp.float32) for keys in (seen, jnp.minimum(seen, window))])


def _counted(sums: tuple[Int[Array, "2"], Float[Array, "2"]]) -> Counts:
    (tokens, trained), (full, sliding) = jax.device_get(sums)
    return Counts(tokens=int(tokens), trained_tokens=int(trained), full_keys=int(full), sliding_keys=int(sliding))
