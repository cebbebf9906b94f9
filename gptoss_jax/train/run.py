"""A run from its configuration: model, data, optimizer, step, saves, log, put together. Computes nothing itself.

config ─► mesh ─► model ─► what trains ─► trainer ─┐
          data ─► feed ────────────────────────────┼─► loop ─► RUN/adapter
          RUN/ ─► saves, log ──────────────────────┘
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gptoss_jax import checkpoint
from gptoss_jax.configs import model_config
from gptoss_jax.convert.adapters import base_digest
from gptoss_jax.convert.export import open_base
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Conversation, User
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.hosts import is_first
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.dpo import PreferenceBatch
from gptoss_jax.train.feed import DataFeed
from gptoss_jax.train.flops import step_flops
from gptoss_jax.train.folder import RunFolder
from gptoss_jax.train.hosts import share_of
from gptoss_jax.train.leaves import Trained
from gptoss_jax.train.log import Listener, Log
from gptoss_jax.train.loop import Counts, Loop, Measures, Result
from gptoss_jax.train.optimizer import learning_rate, make_optimizer
from gptoss_jax.train.outcome import write_outcome
from gptoss_jax.train.saves import Saves
from gptoss_jax.train.settings import method, step_settings, system
from gptoss_jax.train.step import State, Trainer

_IMPL = "attention=xla"  # the others take rows of one text each, and packed rows hold several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """All that a run needs, before its first step."""

    config: TrainConfig
    tokenizer: Tokenizer
    feed: DataFeed
    trainer: Trainer
    mesh: Mesh | None
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run ended.

    Attributes:
        result: of its loop.
        outcome: the folder with what came of it, RUN/adapter or RUN/model; None where it was stopped before its end.
    """

    result: Result
    outcome: Path | None


def train(
    path: Path,
    config: TrainConfig,
    *,
    peak_flops: float | None = None,
    on_opened: Callable[[Opened], None] = lambda opened: None,
    on_entry: Listener = lambda entry: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Finished:
    """Trains, or goes on where an earlier call with the same configuration was interrupted: bit for bit.

    Args:
        path: the run's folder, which is made if need be (see folder.py). Several processes share it.
        config: what is asked for.
        peak_flops: that all devices can do in a second; the log has no MFU without it.
        on_opened: called when everything is loaded, before the first step.
        on_entry: told of each entry of the log, in the process that writes it.
        should_stop: asked after every step; True saves and ends the run, which can go on later.

    Raises:
        UserError: something in the configuration, the data or the model does not go together, the run's folder cannot
            be used, or a loss or gradient is not finite.
    """
    folder = RunFolder(path)
    base = config.model.folder
    with folder.claimed(config):
        opened = open_run(config)
        if base is not None:
            folder.check_base(base_digest(open_base(base)))
        on_opened(opened)
        with contextlib.ExitStack() as stack:
            loop = config.loop
            saves = stack.enter_context(Saves(folder.saves, keep_last=loop.keep_last, keep_best=loop.keep_best))
            log = None
            if is_first():
                settings: dict[str, Any] = {"tensorboard": loop.tensorboard, "on_entry": on_entry}
                log = stack.enter_context(Log(path, step=saves.newest() or 0, **settings))
            result = Loop(
                trainer=opened.trainer,
                feed=opened.feed,
                saves=saves,
                settings=loop,
                steps=opened.steps,
                log=log,
                mesh=opened.mesh,
                measures=_measures(opened, peak_flops),
                prepare=_prepare(opened),
                sample=_Sampler(opened) if loop.sample_every else None,
                should_stop=should_stop,
            ).run()
        if result.stopped:
            return Finished(result=result, outcome=None)
        outcome = write_outcome(
            path, opened.trainer.trained, result.state.leaves, base=base, tokenizer=tokenizer_folder(config)
        )
        return Finished(result=result, outcome=outcome)


def open_run(config: TrainConfig) -> Opened:
    """Reads data and model; takes no step and writes nothing.

    Raises:
        UserError: as `train`.
    """
    mesh = _mesh(config)
    sizes = _sizes(config)
    tokenizer = _tokenizer(config, sizes)
    feed = DataFeed.open(config, tokenizer, share=share_of(mesh, config.loop.rows))
    steps = config.loop.steps if config.loop.steps is not None else feed.num_steps()
    trained = Trained(load_model(config, mesh), method(config))
    trainer = Trainer(trained, make_optimizer(config.optimizer, steps=steps), step_settings(config))
    return Opened(config=config, tokenizer=tokenizer, feed=feed, trainer=trainer, mesh=mesh, steps=steps)


def load_model(config: TrainConfig, mesh: Mesh | None) -> GptOss:
    """The model that training begins with: loaded, or random from the run's seed with experts that can be trained."""
    settings: dict[str, Any] = {"dtype": jnp.dtype(config.model.dtype), "mesh": mesh}
    settings |= {"impl": config.model.impl or _IMPL, "dispatch": config.model.dispatch}
    settings |= {"embedding": config.model.embedding}
    if config.model.folder is not None:
        return checkpoint.load(config.model.folder, **settings)
    assert config.model.scratch is not None
    rngs = nnx.Rngs(config.loop.seed)
    model = GptOss(model_config(config.model.scratch), experts="bf16", rngs=rngs, **settings)
    embedding = parameters(model)["embedding.weight"]
    embedding.set_value(embedding.get_value() * config.model.embedding_scale)
    return model


def _mesh(config: TrainConfig) -> Mesh | None:
    """None is one device; all devices of several processes have to take part."""
    shape = config.mesh.shape
    if jax.process_count() > 1 and shape.num_devices != jax.device_count():
        raise UserError(
            f"mesh {shape} has {shape.num_devices} devices, the {jax.process_count()} processes have "
            f"{jax.device_count()}; all of them have to take part: choose mesh sizes with that product"
        )
    return make_mesh(**dataclasses.asdict(shape)) if shape.num_devices > 1 else None


def _sizes(config: TrainConfig) -> ModelConfig:
    if config.model.folder is not None:
        return checkpoint.sizes(config.model.folder)[0]
    assert config.model.scratch is not None
    return model_config(config.model.scratch)


def tokenizer_folder(config: TrainConfig) -> Path:
    """Where the tokenizer is.

    Raises:
        UserError: the configuration does not say.
    """
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer)
    if config.model.folder is None:
        raise UserError(
            "model.scratch has no tokenizer of its own; expected model.tokenizer, a folder with a tokenizer.json"
        )
    return config.model.folder


def _tokenizer(config: TrainConfig, sizes: ModelConfig) -> Tokenizer:
    folder = tokenizer_folder(config)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} ids and the model {sizes.vocab_size}; "
            "expected as many: name the tokenizer that belongs to the model"
        )
    return tokenizer


def _measures(opened: Opened, peak_flops: float | None) -> Measures:
    config = opened.trainer.trained.model.config
    trains_all = opened.config.method.kind == "full"

    def flops(counts: Counts) -> float:
        keys = {"full_keys": counts.full_keys, "sliding_keys": counts.sliding_keys}
        return step_flops(config, tokens=counts.tokens, trains_all=trains_all, **keys)

    rate = learning_rate(opened.config.optimizer, steps=opened.steps)
    return Measures(
        learning_rate=lambda step: float(np.asarray(rate(step))),
        flops=flops,
        peak_flops=peak_flops,
        window=config.sliding_window,
    )


def _prepare(opened: Opened) -> Callable[[Batch], Batch]:
    """Preferences are measured from where training began. An adapter finds that in its base; where all is trained, the
    first masters are kept beside those that change."""
    config = opened.config
    if config.objective == "sft" or config.method.kind == "lora":
        return lambda batch: batch
    return _References(opened.trainer, opened.trainer.start(config.loop.seed))


@dataclasses.dataclass(frozen=True)
class _References:
    """Batches with what the model that training began with says of each row."""

    trainer: Trainer
    beginning: State

    def __call__(self, batch: Batch) -> Batch:
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return PreferenceBatch(**arrays, reference=self._of(batch))

    def _of(self, batch: Batch) -> Float[Array, "*A B 1"]:
        """Of the batches of a step one after the other."""
        if batch.tokens.ndim == 2:
            return self.trainer.row_log_probabilities(self.beginning, batch)
        return jnp.stack([self._of(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(len(batch.tokens))])


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Answers the settings' prompts as the model would now, always with its likeliest ids."""

    opened: Opened

    def __call__(self, state: Any) -> Sequence[str]:
        opened, settings = self.opened, self.opened.config.loop
        model = opened.trainer.model(state)
        answers = []
        for prompt in settings.sample_prompts:
            conversation: Conversation = [system(opened.config.data), User(text=prompt)]
            ids = render_prompt(conversation, opened.tokenizer)
            greedy, stop_ids = SamplingParams(temperature=0), opened.tokenizer.end_ids
            found = generate(model, ids, max_new_tokens=settings.sample_tokens, sampling=greedy, stop_ids=stop_ids)
            answers.append(opened.tokenizer.decode(list(found)))
        return answers
