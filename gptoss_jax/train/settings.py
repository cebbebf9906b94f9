"""Settings of a run as the parts that carry them out take them. Knows names alone."""

import dataclasses
import datetime

from gptoss_jax.harmony.messages import System
from gptoss_jax.model.adapter import AdapterSpec
from gptoss_jax.train.config import DataSettings, TrainConfig
from gptoss_jax.train.data import Settings
from gptoss_jax.train.leaves import Method
from gptoss_jax.train.masks import LossWeights
from gptoss_jax.train.step import StepSettings


def method(config: TrainConfig) -> Method:
    """What trains."""
    chosen = config.method
    adapter = None
    if chosen.kind == "lora":
        adapter = AdapterSpec(rank=chosen.rank, alpha=chosen.alpha, targets=chosen.targets, layers=chosen.layers)
    return Method(
        adapter=adapter,
        quantise=chosen.quantise,
        frozen=chosen.frozen,
        fully_sharded=config.mesh.fully_sharded,
    )


def step_settings(config: TrainConfig) -> StepSettings:
    """How a step is computed."""
    compute = config.compute
    return StepSettings(
        remat=compute.remat,
        chunk=compute.loss_chunk,
        router_loss=compute.router_loss,
        beta=config.dpo.beta if config.objective == "dpo" else None,
    )


def data_settings(settings: DataSettings, *, seed: int) -> Settings:
    """How lines become rows."""
    return Settings(
        row_length=settings.row_length,
        loss=LossWeights(**dataclasses.asdict(settings.loss)),
        too_long=settings.too_long,
        system=system(settings),
        ignored=frozenset(settings.ignored),
        shuffle=settings.shuffle,
        seed=seed,
        window=settings.window,
    )


def system(settings: DataSettings) -> System:
    """The first message of conversations that have none."""
    date = None if settings.date is None else datetime.date.fromisoformat(settings.date)
    return System(date=date, effort=settings.effort)
