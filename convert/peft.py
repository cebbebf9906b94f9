"""Adapters in PEFT's folders, read and written. Knows PEFT's names, orientations and settings; merges nothing.

adapter_model.safetensors holds a pair for each adapted matrix, with prefix base_model.model.model.layers.N:

    self_attn.q_proj.lora_{A,B}.weight            A [R, D]      B [(N H), R]          k, v and o likewise
    mlp.router.lora_{A,B}.weight                  A [R, D]      B [E, R]
    mlp.experts.base_layer.lora_{A,B}.weight      A [(E R), D]  B [(F 2), (R E)]      gate and up
    mlp.experts.lora_{A,B}.weight                 A [(E R), F]  B [D, (R E)]          down

No name says which of the experts' parameters it is: where one alone is adapted it is mlp.experts.lora_* in either case,
and `target_parameters` of adapter_config.json tells. The rows of A go expert by expert, the columns of B rank by rank.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gptoss_jax.convert.companions import as_json
from gptoss_jax.convert.files import TensorFolder, spell
from gptoss_jax.convert.names import BFLOAT16
from gptoss_jax.convert.peft_config import CONFIG_NAME, Settings
from gptoss_jax.convert.writer import write_folder
from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import Adapter, AdapterSpec, Target, adapter_shapes
from gptoss_jax.model.config import ModelConfig

WEIGHTS_NAME = "adapter_model.safetensors"
FloatName = Literal["bfloat16", "float32"]

_PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_DTYPES: Mapping[str, np.dtype] = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}
_READ = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))
_VERSION = "0.21.2"  # of PEFT whose reading of these folders is tried


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a target stands: our module and theirs, and of theirs the parameter where PEFT wraps not the module."""

    target: Target
    ours: str
    module: str
    parameter: str | None = None

    @property
    def is_expert(self) -> bool:
        return self.module == _EXPERTS

    def key(self, layer: int) -> str:
        """What PEFT matches targets and patterns with."""
        module = f"model.layers.{layer}.{self.module}"
        return module if self.parameter is None else f"{module}.{self.parameter}"

    def leaf(self, layer: int, side: Literal["a", "b"]) -> str:
        return f"layers.{layer}.{self.ours}.adapter.{side}"


_EXPERTS = "mlp.experts"
_PLACES = (  # in the order of their parameters: PEFT wraps the first of the experts' innermost
    _Place("q", "attention.q", "self_attn.q_proj"),
    _Place("k", "attention.k", "self_attn.k_proj"),
    _Place("v", "attention.v", "self_attn.v_proj"),
    _Place("o", "attention.o", "self_attn.o_proj"),
    _Place("router", "moe.router", "mlp.router", "weight"),
    _Place("gate_up", "moe.gate_up", _EXPERTS, "gate_up_proj"),
    _Place("down", "moe.down", _EXPERTS, "down_proj"),
)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A place in a layer, with the names of its two tensors."""

    layer: int
    place: _Place
    nested: bool  # under base_layer: the other of the experts' parameters is wrapped around it

    @property
    def a(self) -> str:
        return f"{self._stem}.lora_A.weight"

    @property
    def b(self) -> str:
        return f"{self._stem}.lora_B.weight"

    @property
    def _stem(self) -> str:
        return f"{_PREFIX}model.layers.{self.layer}.{self.place.module}" + (".base_layer" if self.nested else "")


def _pairs(targeted: Mapping[int, set[Target]]) -> Iterator[_Pair]:
    """The pairs that a file has in which each layer's targets are adapted."""
    for layer, targets in targeted.items():
        for place in _PLACES:
            if place.target in targets:
                yield _Pair(layer, place, nested=place.target == "gate_up" and "down" in targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Of one matrix: those of a file's pair follow, and the axes of ours."""

    inputs: int
    outputs: int
    experts: int | None  # None for a matrix that is no expert's

    @classmethod
    def of(cls, place: _Place, config: ModelConfig) -> "_Sizes":
        spec = AdapterSpec(rank=1, alpha=1.0, targets=(place.target,), layers=(0,))
        (a, _), (b, _) = adapter_shapes(config, spec).values()
        return cls(
            inputs=_file_shape(a, place, "a")[1],
            outputs=_file_shape(b, place, "b")[0],
            experts=config.num_experts if place.is_expert else None,
        )

    def turned(self) -> "_Sizes":
        return dataclasses.replace(self, inputs=self.outputs, outputs=self.inputs)

    @property
    def copies(self) -> int:
        return 1 if self.experts is None else self.experts


# --- reading ------------------------------------------------------------------------------------------------------


def read_peft(path: Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder that PEFT (or `write_peft`) made for a base of these sizes.

    Where ranks or scales differ between modules, all get the largest rank, filled up with zeros, and their scale is
    multiplied into b. Where only some layers have a target, the others get zeros; a target that all b of are zero is
    left out.

    Raises:
        UserError: its settings are none that a low-rank update can express, or do not fit its tensors or the base.
    """
    settings = Settings.read(path)
    folder = TensorFolder.open(_weights(path))
    targeted = {layer: _targets_of(settings, layer) for layer in range(config.num_layers)}
    settings.refuse_other_parameters({place.key(layer) for layer in targeted for place in _PLACES if place.parameter})
    pairs = list(_pairs(targeted))
    _check_names(folder, pairs, config)
    if not pairs:
        raise UserError(f"{path}: its {CONFIG_NAME} targets no matrix of a gpt-oss with {config.num_layers} layers")
    turned = _is_turned(folder, pairs, config)
    ranks = {pair: _rank(folder, pair, settings, config, turned=turned) for pair in pairs}
    scales = {pair: settings.scale(pair.place.key(pair.layer), rank=ranks[pair]) for pair in pairs}
    spec = _spec(pairs, ranks, scales, num_layers=config.num_layers)
    leaves = {path: np.zeros(shape, np.float32) for path, (shape, _) in adapter_shapes(config, spec).items()}
    for pair in pairs:
        a, b = _read_pair(folder, pair, config, rank=ranks[pair], turned=turned)
        b *= np.float32(scales[pair] / spec.scale)
        _put(leaves[pair.place.leaf(pair.layer, "a")], a, axis=1 if pair.place.is_expert else 0)
        _put(leaves[pair.place.leaf(pair.layer, "b")], b, axis=-1)
    return _without_zeros(Adapter(spec=spec, leaves=leaves), config)


def _weights(path: Path) -> Path:
    weights = path / WEIGHTS_NAME
    if not weights.is_file() and (path / _PICKLE_NAME).exists():
        raise UserError(
            f"{path}: has {_PICKLE_NAME} but no {WEIGHTS_NAME}; pickled weights can run code and are never read: "
            "save the adapter again as safetensors"
        )
    if not weights.is_file():
        raise UserError(f"{path}: {WEIGHTS_NAME} is missing beside its {CONFIG_NAME}; copy or download it again")
    return weights


def _targets_of(settings: Settings, layer: int) -> set[Target]:
    return {
        place.target
        for place in _PLACES
        if (settings.targets_parameter(place.key(layer)) if place.parameter else settings.targets(place.key(layer)))
    }


def _check_names(folder: TensorFolder, pairs: list[_Pair], config: ModelConfig) -> None:
    expected = {name for pair in pairs for name in (pair.a, pair.b)}
    found = folder.tensors.keys()
    for name in sorted(expected - found):
        raise UserError(
            f"{folder.path}: tensor {name} is missing, which {CONFIG_NAME} targets in a base of {config.num_layers} "
            "layers; the adapter is not whole, or one of another base"
        )
    for name in sorted(found - expected):
        raise UserError(
            f"{folder.path}: holds tensor {spell(name)}, which {CONFIG_NAME} targets in no layer of a base of "
            f"{config.num_layers}, or which is no low-rank update of a gpt-oss matrix; correct {CONFIG_NAME}, or take "
            "the base that the adapter was made for"
        )


def _is_turned(folder: TensorFolder, pairs: list[_Pair], config: ModelConfig) -> bool:
    """Whether A and B of the experts have changed places.

    PEFT 0.19 and later asks the module which axis of its matrices is which. Where the module does not say, as with
    transformers 4, it takes inputs for outputs. The sizes tell, but for a release's down: there they are equal, and the
    gate and up beside it decide.
    """
    for pair in pairs:
        sizes = _Sizes.of(pair.place, config)
        found = (folder.tensors[pair.a].shape[-1:], folder.tensors[pair.b].shape[:1])
        if pair.place.is_expert and sizes.inputs != sizes.outputs:
            return found == ((sizes.outputs,), (sizes.inputs,))
    return False


def _rank(folder: TensorFolder, pair: _Pair, settings: Settings, config: ModelConfig, *, turned: bool) -> int:
    """What the tensors have, after holding their shapes to the base's sizes and the rank to the settings."""
    sizes = _Sizes.of(pair.place, config)
    sizes = sizes.turned() if turned and pair.place.is_expert else sizes
    a, b = (folder.tensors[name].shape for name in (pair.a, pair.b))
    rows = a[0] if len(a) == 2 else 0
    rank = rows // sizes.copies
    if not rank or rows % sizes.copies or a != (rows, sizes.inputs) or b != (sizes.outputs, rows):
        number = f"{sizes.experts} R" if sizes.experts else "R"
        raise UserError(
            f"{folder.path}: {pair.a} has shape {a} and its lora_B {b}; for rank R the base asks for "
            f"({number}, {sizes.inputs}) and ({sizes.outputs}, {number}): the adapter is of another base"
        )
    if rank not in settings.ranks:
        known = " or ".join(map(str, sorted(settings.ranks)))
        raise UserError(f"{folder.path}: {pair.a} has rank {rank}; {CONFIG_NAME} says {known}: correct it")
    return rank


def _spec(
    pairs: list[_Pair], ranks: Mapping[_Pair, int], scales: Mapping[_Pair, float], *, num_layers: int
) -> AdapterSpec:
    """Where all agree, their own scale; else each one's goes into b."""
    rank, (scale, *others) = max(ranks.values()), set(scales.values())
    layers, targets = {pair.layer for pair in pairs}, {pair.place.target for pair in pairs}
    return AdapterSpec(
        rank=rank,
        alpha=float(rank) if others or scale <= 0 else scale * rank,
        targets=tuple(place.target for place in _PLACES if place.target in targets),
        layers=None if len(layers) == num_layers else tuple(sorted(layers)),
    )


def _read_pair(
    folder: TensorFolder, pair: _Pair, config: ModelConfig, *, rank: int, turned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """a and b with the axes of ours, at the pair's own rank."""
    sizes = _Sizes.of(pair.place, config)
    a, b = _read(folder, pair.a), _read(folder, pair.b)
    if sizes.experts is not None and turned:
        a, b = (
            b.reshape(sizes.inputs, rank, sizes.experts).transpose(2, 1, 0),
            a.reshape(sizes.experts, rank, sizes.outputs).transpose(0, 2, 1),
        )
    elif sizes.experts is not None:
        a = a.reshape(sizes.experts, rank, sizes.inputs)
        b = b.reshape(sizes.outputs, rank, sizes.experts).transpose(2, 0, 1)
    return a, np.array(b)  # b is scaled in place


def _read(folder: TensorFolder, name: str) -> Float[np.ndarray, "rows columns"]:
    info = folder.tensors[name]
    if info.dtype not in _READ:
        raise UserError(
            f"{folder.path}: tensor {name} has dtype {info.dtype}; expected {', '.join(map(str, _READ))}: save it again"
        )
    found = folder.read(name).astype(np.float32)
    if not np.isfinite(found).all():
        raise UserError(f"{folder.path}: tensor {name} holds NaN or inf; train it again from a checkpoint before that")
    return found


def _put(leaf: np.ndarray, found: np.ndarray, *, axis: int) -> None:
    """Fills the first ranks of the leaf, whose other axes may be split finer than those found."""
    rank = found.shape[axis]
    cut = [slice(None)] * leaf.ndim
    cut[axis] = slice(rank)
    leaf[tuple(cut)] = found.reshape([rank if i == axis % leaf.ndim else size for i, size in enumerate(leaf.shape)])


def _without_zeros(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Without the targets to which nothing is added, such as the twin of the one expert matrix that was trained."""
    used = {name.split(".")[3] for name, leaf in adapter.leaves.items() if name.endswith(".b") and np.any(leaf)}
    if not used:
        return adapter
    spec = dataclasses.replace(adapter.spec, targets=tuple(target for target in adapter.spec.targets if target in used))
    return Adapter(spec=spec, leaves={name: adapter.leaves[name] for name in adapter_shapes(config, spec)})


# --- writing ------------------------------------------------------------------------------------------------------


def write_peft(
    path: Path,
    adapter: Adapter,
    *,
    config: ModelConfig,
    dtype: FloatName = "bfloat16",
    base_model: str | None = None,
) -> None:
    """Writes a folder that peft, transformers and vLLM load.

    vLLM applies one scale to all, so it is multiplied into B and alpha is the rank; and it wants both of the experts'
    matrices where it finds one, so the other is written as zeros.

    Args:
        path: a new or empty folder.
        adapter: what is written; its arrays must lie on devices of this process.
        config: the sizes of its base.
        dtype: of the tensors; bfloat16 rounds.
        base_model: what to name as the base, such as "openai/gpt-oss-20b".

    Raises:
        UserError: the folder is in use, or the disk refuses.
    """
    spec = _with_both_projections(adapter.spec)
    shapes = {name: shape for name, (shape, _) in adapter_shapes(config, spec).items()}
    layers = range(config.num_layers) if spec.layers is None else spec.layers
    made: dict[str, tuple[_Pair, Literal["a", "b"]]] = {}
    for pair in _pairs({layer: set(spec.targets) for layer in layers}):
        made |= {pair.a: (pair, "a"), pair.b: (pair, "b")}

    def tensor(name: str) -> np.ndarray:
        pair, side = made[name]
        leaf = pair.place.leaf(pair.layer, side)
        if pair.place.target not in adapter.spec.targets:
            return np.zeros(_file_shape(shapes[leaf], pair.place, side), _DTYPES[dtype])
        value = np.asarray(adapter.leaves[leaf], np.float32)
        value = value * np.float32(adapter.spec.scale) if side == "b" else value
        return _to_file(value, pair.place, side).astype(_DTYPES[dtype])

    write_folder(
        path,
        [
            _Tensor(name, _DTYPES[dtype], _file_shape(shapes[pair.place.leaf(pair.layer, side)], pair.place, side))
            for name, (pair, side) in made.items()
        ],
        lambda name: [tensor(name).reshape(-1).view(np.uint8)],
        single_name=WEIGHTS_NAME,
        beside={CONFIG_NAME: as_json(_config(spec, config, base_model))},
    )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def _with_both_projections(spec: AdapterSpec) -> AdapterSpec:
    found = set(spec.targets)
    if found & {"gate_up", "down"}:
        found |= {"gate_up", "down"}
    return dataclasses.replace(spec, targets=tuple(place.target for place in _PLACES if place.target in found))


def _to_file(leaf: np.ndarray, place: _Place, side: Literal["a", "b"]) -> np.ndarray:
    shape = _file_shape(leaf.shape, place, side)
    if place.is_expert and side == "b":
        leaf = np.moveaxis(leaf, 0, -1)
    return np.ascontiguousarray(leaf).reshape(shape)


def _file_shape(shape: tuple[int, ...], place: _Place, side: Literal["a", "b"]) -> tuple[int, int]:
    """Of a leaf (R, *inputs) or (*outputs, R), with the experts before if there are several."""
    if place.is_expert:
        experts, *rest = shape
        return (experts * rest[0], rest[1]) if side == "a" else (math.prod(rest[:-1]), rest[-1] * experts)
    return (shape[0], math.prod(shape[1:])) if side == "a" else (math.prod(shape[:-1]), shape[-1])


def _config(spec: AdapterSpec, config: ModelConfig, base_model: str | None) -> dict[str, Any]:
    """The settings that PEFT and vLLM read; all that is not said has PEFT's default."""
    layers = None if spec.layers is None or set(spec.layers) >= set(range(config.num_layers)) else list(spec.layers)
    wrapped = [place for place in _PLACES if place.target in spec.targets and place.parameter is not None]
    modules = [place for place in _PLACES if place.target in spec.targets and place.parameter is None]
    prefixes = [""] if layers is None else [f"layers.{layer}." for layer in layers]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": [place.module.rpartition(".")[2] for place in modules],
        "target_parameters": [f"{prefix}{place.module}.{place.parameter}" for prefix in prefixes for place in wrapped],
        "layers_to_transform": layers,
        "rank_pattern": {},
        "alpha_pattern": {},
        "peft_version": _VERSION,
    }
