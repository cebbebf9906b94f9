"""What a training run is asked to do: every setting, its type, its range and its default. Knows no arrays, no files.

A configuration is data: a TOML file of these sections, with `key=value` in place of what it says. The one that a run
was started with lies in its folder, complete, and the run goes on only with the same (see `changes`).
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from gptoss_jax import nano
from gptoss_jax.errors import UserError
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.layers import Memory
from gptoss_jax.sharding import MeshShape
from gptoss_jax.train import toml
from gptoss_jax.train.toml import Range, Section

Count = Annotated[int, Range(least=1)]
Number = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, most=0.999999)]

# A run may go on with other values of these: they do not touch what the steps that are left compute, or, where they
# do (the number of steps, which a schedule ends with; the cut, which orders sums), that is what was asked for.
CHANGEABLE = frozenset(
    {
        "model.impl",
        "model.dispatch",
        "loop.steps",
        "loop.epochs",
        "loop.evaluate_every",
        "loop.save_every",
        "loop.keep_last",
        "loop.keep_best",
        "loop.sample_every",
        "loop.sample_tokens",
        "loop.sample_prompts",
        "loop.tensorboard",
        "data.evaluation",
        "mesh.data",
        "mesh.expert",
        "mesh.tensor",
        "mesh.fully_sharded",
        "compute.remat",
        "compute.loss_chunk",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section, name="model"):
    """The model that is trained.

    Attributes:
        checkpoint: a converted checkpoint, or a released folder of either layout; or "nano".
        scratch: in its place, the name of a model whose sizes are taken, with random weights from loop.seed.
        embedding_scale: of the random weights the embedding's standard deviation; others go by their inputs' number.
        tokenizer: a folder that has one; without it the checkpoint's own.
        dtype: of computation, and of what is not trained outside packed experts.
        impl: which kernels run; see the model.
        dispatch: how tokens reach their experts on a mesh; see the model.
        embedding: the memory its table lies in; "host" leaves a device 1.16 GB more in the release, where it is frozen.
    """

    checkpoint: str | None = None
    scratch: str | None = None
    embedding_scale: Positive = 1.0
    tokenizer: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    impl: str | None = None
    dispatch: Way | None = None
    embedding: Memory = "device"

    @property
    def folder(self) -> Path | None:
        """Where the checkpoint is."""
        return None if self.checkpoint is None else nano.find(self.checkpoint)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (self.scratch is None):
            raise UserError(
                f"model.checkpoint is {self.checkpoint!r} and model.scratch is {self.scratch!r}; expected one of them: "
                "a folder to go on from, or the name of the sizes for random weights"
            )
        if self.checkpoint is not None and self.embedding_scale != 1:
            raise UserError(
                f"model.embedding_scale is {self.embedding_scale} and model.checkpoint is {self.checkpoint!r}, which "
                "has an embedding; expected it with model.scratch: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Section, name="method"):
    """Which parameters are trained.

    Attributes:
        kind: "lora" trains low-rank updates of frozen weights, packed or not; "full" trains all parameters.
        rank: of each update, and of each expert's.
        alpha: the update is alpha / rank * b a.
        targets: which matrices have one.
        layers: of which layers; without it of all.
        frozen: with "full" what is not trained nevertheless, as patterns of paths: "*.router.*".
        quantise: the experts compute as the MXFP4 of an export will: with "full" the trained ones, with "lora" packed
            ones merged with their updates on the scales that they have. What is exported is then what was trained.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "router", "gate_up", "down"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate_up",
        "down",
    )
    layers: tuple[Number, ...] | None = None
    frozen: tuple[str, ...] = ()
    quantise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("targets", self.targets), ("layers", self.layers)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise UserError(f"method.{name} is {list(values)}; expected at least one, and each once")


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section, name="data.loss"):
    """How much a trained token counts, by the part of the answer it stands in; 0 is not at all. See masks.py.

    Attributes:
        analysis: reasoning.
        commentary: what is said to the user before a call.
        final: the answer.
        call: whom the model calls, and with what.
        text: plain text.
        header: role and channel, which a released model knows how to write and a new one must learn.
        stop: the token that ends a message.
    """

    analysis: Weight = 1.0
    commentary: Weight = 1.0
    final: Weight = 1.0
    call: Weight = 1.0
    text: Weight = 1.0
    header: Weight = 0.0
    stop: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section, name="data"):
    """What it is trained on. Paths are relative to where the command runs.

    Attributes:
        files: JSONL of conversations, texts, prompts with completions, or preferences.
        evaluation: the same, never trained on; its loss is taken at intervals.
        row_length: tokens in a row; several examples share one, and none sees another.
        too_long: what happens to an example that is longer: an error, or it is dropped and counted.
        window: examples that are packed together; more waste less.
        shuffle: examples come in another order each epoch, by loop.seed; otherwise in that of the files.
        date: what system messages say it is, as YYYY-MM-DD; without it they say none. Lines may say otherwise.
        effort: how long they ask the model to reason. Lines may say otherwise.
        ignored: keys of lines and messages that are passed over.
    """

    files: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    row_length: Annotated[int, Range(least=2)] = 2048
    too_long: Literal["error", "drop"] = "error"
    window: Count = 1024
    shuffle: bool = True
    date: str | None = None
    effort: Literal["low", "medium", "high"] = "medium"
    ignored: tuple[str, ...] = ()
    loss: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise UserError("data.files is []; expected at least one file of examples")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise UserError(f"data.date is {self.date!r}; expected YYYY-MM-DD, as in 2025-08-05") from error


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section, name="optimizer"):
    """How gradients become updates.

    Attributes:
        name: which optimizer.
        learning_rate: at its highest.
        side_rate: with "muon" the same of what it is not for, and adamw is: embeddings, routers, biases, norms and
            sinks; without it they have learning_rate too.
        schedule: what becomes of it after the warm-up: nothing, or it falls to `final` of itself by the last step, as a
            cosine or as a line.
        warmup: steps in which it rises from 0.
        final: the part of it that is left at the end.
        weight_decay: of matrices; norms, biases and sinks have none.
        clip: the largest norm of a gradient, all leaves together; a larger one is scaled down.
        beta1: how long the mean of gradients remembers.
        beta2: how long the mean of their squares remembers.
        epsilon: is added to its root.
    """

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: Positive = 2e-4
    side_rate: Positive | None = None
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Number = 0
    final: Share = 0.0
    weight_decay: Weight = 0.0
    clip: Positive = 1.0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Section, name="loop"):
    """How long, and what happens beside it.

    Attributes:
        steps: updates in all.
        epochs: in its place, how often every example is seen.
        rows: in a batch, on all devices together.
        accumulate: batches whose gradients make one update.
        evaluate_every: steps between losses on data.evaluation; it comes before a save of the same step.
        save_every: steps between saves; the last step is saved too.
        keep_last: newest saves that are kept.
        keep_best: further saves that are kept, those of the lowest evaluation loss.
        sample_every: steps between answers to `sample_prompts`; 0 for none.
        sample_prompts: what is asked then, each a user's message.
        sample_tokens: of an answer at most.
        seed: of the order of examples and of every random number.
        tensorboard: writes its events too, beside the log.
    """

    steps: Count | None = None
    epochs: Count | None = None
    rows: Count = 8
    accumulate: Count = 1
    evaluate_every: Count = 100
    save_every: Count = 100
    keep_last: Count = 2
    keep_best: Number = 1
    sample_every: Number = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Count = 128
    seed: Number = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"loop.steps is {self.steps} and loop.epochs is {self.epochs}; expected one of them")
        if self.sample_every and not self.sample_prompts:
            raise UserError(f"loop.sample_every is {self.sample_every} and loop.sample_prompts is empty; give both")


@dataclass(frozen=True, kw_only=True)
class MeshSettings(Section, name="mesh"):
    """How the model lies over devices.

    Attributes:
        data: devices among which rows are dealt.
        expert: among which experts are.
        tensor: among which heads, widths and vocabulary are cut.
        fully_sharded: trained parameters and optimizer state are cut over `data` as well, and gathered for use.
    """

    data: Count = 1
    expert: Count = 1
    tensor: Count = 1
    fully_sharded: bool = False

    @property
    def shape(self) -> MeshShape:
        return MeshShape(self.data, self.expert, self.tensor)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Section, name="compute"):
    """What memory is bought with time.

    Attributes:
        remat: what the backward pass computes anew: a whole layer, all but its products, or nothing.
        loss_chunk: tokens whose scores exist at once: 2048 of them are 1.6 GB in float32 with the released vocabulary.
        router_loss: how much the loss that evens out experts counts; 0 leaves a tuned router alone.
    """

    remat: Literal["layer", "dots", "none"] = "layer"
    loss_chunk: Count = 512
    router_loss: Weight = 0.0


@dataclass(frozen=True, kw_only=True)
class DpoSettings(Section, name="dpo"):
    """Where objective is "dpo".

    Attributes:
        beta: how strongly answers are held to those of the model that training began with.
    """

    beta: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """All of a run."""

    objective: Literal["sft", "dpo"] = "sft"
    model: ModelSettings
    method: MethodSettings = field(default_factory=MethodSettings)
    data: DataSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings
    mesh: MeshSettings = field(default_factory=MeshSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.scratch is not None and self.method.kind == "lora":
            raise UserError(
                "model.scratch has random weights, which method.kind 'lora' would leave as they are; "
                "expected method.kind = 'full', or model.checkpoint"
            )
        if self.model.embedding == "host" and self.method.kind == "full":
            raise UserError(
                "model.embedding is 'host', and method.kind 'full' trains it on the device; "
                "expected model.embedding = 'device', or method.kind = 'lora'"
            )
        if self.loop.rows % self.mesh.data:
            raise UserError(
                f"loop.rows is {self.loop.rows}, which mesh.data={self.mesh.data} does not divide: "
                "every data shard has as many rows; change one of them"
            )
        if self.objective == "dpo" and self.loop.rows % (2 * self.mesh.data):
            raise UserError(
                f"loop.rows is {self.loop.rows}; expected a multiple of {2 * self.mesh.data}: with objective 'dpo' the "
                "two answers of a pair are neighbouring rows of one data shard"
            )

    @property
    def rows_per_step(self) -> int:
        return self.loop.rows * self.loop.accumulate


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a TOML file; `overrides` are "section.key=value".

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; it names the file, the key, and near names.
    """
    return toml.read(TrainConfig, path, overrides)


def changes(before: TrainConfig, now: TrainConfig) -> Mapping[str, tuple[Any, Any]]:
    """What a run cannot go on with: (before, now) by dotted key. See CHANGEABLE."""
    old, new = toml.flat(before), toml.flat(now)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key] and key not in CHANGEABLE}
