"""A trainer of one vector in place of a model, so that the loop around it is tried in moments. Also run as a script:

    toy.py RUN --steps 40 [--kill-at 17.02]      trains, and prints what came of it as JSON
    toy.py RUN --flip                            damages a save in every file, and prints what was said of it

Its data is drawn from its position alone, as the real one's is.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import LoopSettings
from gptoss_jax.train.log import Log
from gptoss_jax.train.loop import Fed, Loop, Measures, Result
from gptoss_jax.train.saves import Notes, Saves

IDS, ROWS, LENGTH, ACCUMULATE = 48, 4, 6, 2
LAYERS, EXPERTS = 3, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    trained: Any
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    loss: Any
    accuracy: Any
    gradient_norm: Any
    aux_loss: Any
    load: Any
    finite: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    loss: Any
    weight: Any


class ToyTrainer:
    """Learns a number for each id: that of the target, by squares."""

    def __init__(self, *, mesh: Mesh | None = None, width: int = IDS):
        self.optimizer = optax.adam(0.05)
        self.width = width
        self.mesh = mesh
        self._step = jax.jit(self._take, donate_argnums=0)

    def start(self, seed: int) -> State:
        value = jax.random.normal(jax.random.key(seed), (self.width, 3))
        state = self._fresh(value)
        return state if self.mesh is None else jax.tree.map(jax.device_put, state, self._shardings())

    def abstract_state(self) -> State:
        shapes = jax.eval_shape(self._fresh, jax.ShapeDtypeStruct((self.width, 3), jnp.float32))
        if self.mesh is None:
            return shapes
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._shardings())

    def step(self, state: State, batches: Batch) -> tuple[State, Metrics]:
        return self._step(state, batches)

    def evaluate(self, state: State, batch: Batch) -> Sums:
        return Sums(*_loss(state.trained["table"], batch))

    def _fresh(self, value: jax.Array) -> State:
        trained = {"table": value}
        return State(jnp.int32(0), trained, self.optimizer.init(trained))

    def _shardings(self) -> State:
        """The table and what Adam keeps of it are cut, the counters are not."""
        shapes = jax.eval_shape(self._fresh, jax.ShapeDtypeStruct((self.width, 3), jnp.float32))
        return jax.tree.map(lambda x: NamedSharding(self.mesh, P("data") if x.ndim else P()), shapes)

    def _take(self, state: State, batches: Batch) -> tuple[State, Metrics]:
        def mean(trained: Any) -> jax.Array:
            loss, weight = _loss(trained["table"], batches)
            return loss / weight

        loss, gradient = jax.value_and_grad(mean)(state.trained)
        norm = optax.tree.norm(gradient)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer)
        grown = State(state.step + 1, optax.apply_updates(state.trained, updates), optimizer)
        load = jnp.full((LAYERS, EXPERTS), 1 / EXPERTS).at[1].set(jnp.eye(EXPERTS)[0])
        return grown, Metrics(loss, jnp.float32(0), norm, jnp.float32(0), load, jnp.isfinite(norm))


def _loss(table: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    errors = (table[batch.tokens].sum(-1) - batch.targets) ** 2
    return jnp.sum(errors * batch.weights), jnp.sum(batch.weights)


@dataclasses.dataclass
class ToyFeed:
    """Batches drawn by their number; `poisoned` is the number of one whose weights are not finite."""

    poisoned: int | None = None
    batches_in_all: int = 10**9
    given: list[int] = dataclasses.field(default_factory=list)

    def start(self) -> Mapping[str, Any]:
        return {"number": 0}

    def batches(self, position: Mapping[str, Any]) -> Iterator[Fed]:
        for number in range(position["number"], self.batches_in_all):
            self.given.append(number)
            batch = draw(number, (ACCUMULATE, ROWS))
            if number == self.poisoned:
                batch = dataclasses.replace(batch, weights=np.full_like(batch.weights, np.inf))
            sources = [f"toy.jsonl:{number * ROWS + row + 1}" for row in range(ROWS * ACCUMULATE)]
            yield Fed(batch=batch, sources=sources, position={"number": number + 1}, epoch=(number + 1) / 100)

    def evaluation(self) -> Iterator[Batch]:
        return (draw(-1 - number, (ROWS,)) for number in range(2))


def draw(number: int, rows: tuple[int, ...]) -> Batch:
    """Rows of two segments of three tokens, the last of which is padding in every other row."""
    random = np.random.default_rng(number % 2**32)
    tokens = random.integers(0, IDS, (*rows, LENGTH)).astype(np.int32)
    is_real = np.ones((*rows, LENGTH), bool)
    is_real[..., ::2, -1] = False
    starts = np.broadcast_to(np.array([0, 0, 0, 3, 3, 3], np.int32), tokens.shape).copy()
    starts[~is_real] = LENGTH - 1
    weights = np.where(is_real, random.uniform(0, 1, tokens.shape) > 0.3, 0).astype(np.float32)
    return Batch(tokens=tokens, targets=tokens % 7, weights=weights, starts=starts, is_real=is_real)


def run_toy(
    folder: Path, *, steps: int, trainer: ToyTrainer | None = None, feed: ToyFeed | None = None, **settings: Any
) -> Result:
    """A run of the loop in `folder`, from its newest save; without a configuration and without a lock."""
    folder.mkdir(exist_ok=True)
    trainer = trainer or ToyTrainer()
    beside = {name: settings.pop(name) for name in ("sample", "should_stop", "on_entry") if name in settings}
    chosen = LoopSettings(**{"steps": steps, "evaluate_every": 4, "save_every": 3} | settings)
    on_entry = beside.pop("on_entry", lambda entry: None)
    measures = Measures(learning_rate=lambda step: 0.05, flops=lambda counts: 1e6, peak_flops=1e12, window=2)
    with contextlib.ExitStack() as stack:
        saves = stack.enter_context(Saves(folder / "saves", keep_last=chosen.keep_last, keep_best=chosen.keep_best))
        log = stack.enter_context(Log(folder, step=saves.newest() or 0, on_entry=on_entry))
        return Loop(
            trainer=trainer,
            feed=feed or ToyFeed(),
            saves=saves,
            settings=chosen,
            steps=steps,
            log=log,
            mesh=trainer.mesh,
            measures=measures,
            **beside,
        ).run()


def contents(state: Any) -> dict[str, str]:
    """SHA-256 of each leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--width", type=int, default=IDS)
    parser.add_argument("--kill-at", type=float, help="17.02 is 0.02 seconds after the line of step 17")
    parser.add_argument("--largest-file", type=int, help="bytes: a disk that is full")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.flip:
        print(json.dumps(flip(options.folder / "saves")))
        return
    begun = threading.Event()
    if options.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest_file, resource.RLIM_INFINITY))
    step, seconds = divmod(options.kill_at or 0, 1)
    if options.kill_at is not None:
        threading.Thread(target=kill, args=(begun, seconds), daemon=True).start()
    feed = ToyFeed()
    trainer = ToyTrainer(width=options.width)

    def on_entry(entry: Mapping[str, Any]) -> None:
        if entry["step"] >= step:
            begun.set()

    result = run_toy(options.folder, steps=options.steps, trainer=trainer, feed=feed, on_entry=on_entry)
    print(json.dumps({"state": contents(result.state), "given": feed.given, "step": result.step}))


def flip(folder: Path) -> dict[str, str]:
    """Of each file of a save with one bit flipped: "equal" where nothing came of it, or what was said."""
    trainer, found = ToyTrainer(), {}
    with Saves(folder) as saves:
        saves.save(1, trainer.start(1), Notes(position={"number": 1}))
        saves.save(2, trainer.start(2), Notes(position={"number": 2}))
    for path in sorted(path for path in (folder / "2").rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        at = len(content) * 2 // 3
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        with Saves(folder) as saves:
            try:
                state, notes = saves.restore(2, trainer.abstract_state())
            except UserError as error:
                found[str(path)] = str(error)
            else:
                is_equal = contents(state) == contents(trainer.start(2)) and notes.position == {"number": 2}
                found[str(path)] = "equal" if is_equal else "silently wrong"
        path.write_bytes(content)
    return found


def kill(begun: threading.Event, seconds: float) -> None:
    begun.wait()
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
