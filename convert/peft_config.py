"""What adapter_config.json of a PEFT folder asks for, and what is refused. Knows PEFT's rules; reads no tensors."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.convert.files import spell
from gptoss_jax.convert.json_file import read_object
from gptoss_jax.errors import UserError

CONFIG_NAME = "adapter_config.json"

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")  # what "all-linear" is in a gpt-oss: its experts are parameters
_VOCABULARY = ("model.embed_tokens", "lm_head")
_LARGEST_RANK, _LARGEST_NUMBER = 2**20, 1e30
# What must be as PEFT leaves it by default, and what it is otherwise.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False,), "DoRA scales the columns of the base's weights, which is no low-rank update"),
    "bias": (("none",), "trained biases are no low-rank update"),
    "lora_bias": ((False,), "trained biases are no low-rank update"),
    "modules_to_save": (([],), "whole modules beside the adapter would have to replace those of the base"),
    "trainable_token_indices": (([], {}), "trained tokens would have to replace those of the base"),
    "layer_replication": (([],), "a gpt-oss has its layers once"),
    "fan_in_fan_out": ((False,), "the weights of a gpt-oss lie [out, in]"),
    "alora_invocation_tokens": (([],), "an adapter is applied to all tokens or none"),
    "use_qalora": ((False,), "QALoRA pools the inputs, which is no low-rank update"),
    "use_bdlora": ((False,), "its factors are block-diagonal"),
    "exclude_modules": (([], ""), "list in target_modules what is adapted instead"),
}
# How an adapter was trained or how it started, which is over when it is saved.
_HARMLESS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "runtime_config")
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that leave the base's weights alone
# A pattern from a stranger must not keep the machine busy: trying all the ways that so few of these leave is quick.
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_CHOICES = 200, 3, 8
_REPEAT = re.compile(r"(?<!\()[*+?{]\??")
_REFUSED_SYNTAX = re.compile(r"\)[*+?{]|\(\?[^:]|\\[1-9]")  # repeated groups, looking around, and back


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one folder, checked.

    Attributes:
        path: the folder.
        ranks: those that a module may have.
        modules: names that PEFT compares with the ends of modules' names.
        pattern: or one that it matches whole names with.
        parameters: names that it compares with the ends of parameters' names.
        layers: to which `modules` is held; None for all.
        alpha: of the modules that no pattern of `alphas` matches, the first of which decides.
        rank_stabilised: whether the scale is alpha / √rank.
    """

    path: Path
    ranks: frozenset[int]
    modules: tuple[str, ...]
    pattern: re.Pattern[str] | None
    parameters: tuple[str, ...]
    layers: frozenset[int] | None
    alpha: float
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    rank_stabilised: bool

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """
        Raises:
            UserError: there is no such file, or it says what cannot be done here.
        """
        found = _Document(path / CONFIG_NAME, read_object(path / CONFIG_NAME))
        found.refuse_other_methods()
        targets = found.values.get("target_modules")
        targets = list(_LINEAR) if targets == "all-linear" else targets
        settings = cls(
            path=path,
            ranks=frozenset({found.rank("r", found.values.get("r")), *found.rank_pattern()}),
            modules=() if isinstance(targets, str) else found.names("target_modules", targets),
            pattern=found.pattern("target_modules", targets) if isinstance(targets, str) else None,
            parameters=found.names("target_parameters", found.values.get("target_parameters")),
            layers=found.layers(),
            alpha=found.number("lora_alpha", found.values.get("lora_alpha")),
            alphas=found.alpha_pattern(),
            rank_stabilised=found.flag("use_rslora"),
        )
        for name in _VOCABULARY:
            if settings.targets(name):
                raise UserError(
                    f"{found.file}: target_modules names {name}; only attention, router and experts can be adapted: "
                    "train without it"
                )
        return settings

    def targets(self, module: str) -> bool:
        """Whether the module of this name, such as "model.layers.3.self_attn.q_proj", is adapted."""
        if self.pattern is not None:
            return self.pattern.fullmatch(module) is not None
        if module in self.modules:
            return True
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        is_in_layers = self.layers is None or (layer is not None and int(layer[1]) in self.layers)
        return is_in_layers and any(module.endswith(f".{name}") for name in self.modules)

    def targets_parameter(self, parameter: str) -> bool:
        """Whether this parameter is, such as "model.layers.3.mlp.experts.down_proj"; in whichever layers."""
        return any(_is_end(name, parameter) for name in self.parameters)

    def refuse_other_parameters(self, known: Iterable[str]) -> None:
        """
        Raises:
            UserError: `target_parameters` names one that is none of the `known`: a bias, or one of a layer too many.
        """
        known = tuple(known)
        for name in self.parameters:
            if not any(_is_end(name, parameter) for parameter in known):
                raise UserError(
                    f"{self.path / CONFIG_NAME}: target_parameters names {spell(name)}; of a base of these sizes only "
                    "mlp.router.weight, mlp.experts.gate_up_proj and mlp.experts.down_proj can be adapted so: train "
                    "without it, or take the base that the adapter was made for"
                )

    def scale(self, key: str, *, rank: int) -> float:
        """By which the update of this module or parameter is multiplied."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(key)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _is_end(name: str, parameter: str) -> bool:
    return parameter == name or parameter.endswith(f".{name}")


class _Document:
    """The values of the file, each held to what it may be."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file = file
        self.values = values

    def refuse_other_methods(self) -> None:
        if self.values.get("peft_type") != "LORA":
            raise UserError(
                f"{self.file}: peft_type is {spell(self.values.get('peft_type'))}; only LORA is read: other methods "
                "change the base in other ways"
            )
        for key, (allowed, reason) in _REFUSED.items():
            value = self.values.get(key)
            if value is not None and value not in allowed:
                raise UserError(f"{self.file}: {key} is {spell(value)}, which is not read: {reason}")
        for key, value in self.values.items():
            if key.endswith("_config") and value and key not in _HARMLESS:
                raise UserError(f"{self.file}: {key} is {spell(value)}, which is not read: no low-rank update needs it")
        start = self.values.get("init_lora_weights")
        if start is not None and start not in _KEEPS_BASE:
            raise UserError(
                f"{self.file}: init_lora_weights is {spell(start)}, which changes the weights of the base; expected "
                "true: save the adapter converted for the base as released (path_initial_model_for_weight_conversion)"
            )

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            raise UserError(f"{self.file}: {key} is {spell(value)}; expected a rank of 1 or more")
        return value

    def number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or abs(value) > _LARGEST_NUMBER:
            raise UserError(f"{self.file}: {key} is {spell(value)}; expected a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise UserError(f"{self.file}: {key} is {spell(value)}; expected true or false")
        return bool(value)

    def names(self, key: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise UserError(f"{self.file}: {key} is {spell(value)}; expected a list of names")
        return tuple(value)

    def layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        if self.values.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
            raise UserError(
                f"{self.file}: layers_pattern is {spell(self.values['layers_pattern'])}; a gpt-oss keeps its layers "
                "under 'layers'"
            )
        layers = [value] if type(value) is int else [] if value is None else value
        if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise UserError(f"{self.file}: layers_to_transform is {spell(value)}; expected numbers of layers")
        return frozenset(layers) if layers else None

    def rank_pattern(self) -> list[int]:
        """The ranks alone: which module has which, the tensors say."""
        found = self._object("rank_pattern")
        return [self.rank(f"rank_pattern of {spell(name)}", rank) for name, rank in found.items()]

    def alpha_pattern(self) -> tuple[tuple[re.Pattern[str], float], ...]:
        return tuple(
            (self.pattern("alpha_pattern", name, form=r"(.*\.)?({})$"), self.number(f"alpha of {spell(name)}", alpha))
            for name, alpha in self._object("alpha_pattern").items()
        )

    def pattern(self, key: str, text: str, *, form: str = "{}") -> re.Pattern[str]:
        is_small = len(_REPEAT.findall(text)) <= _MOST_REPEATS and text.count("|") <= _MOST_CHOICES
        if len(text) > _LONGEST_PATTERN or not is_small or _REFUSED_SYNTAX.search(text):
            raise UserError(
                f"{self.file}: {key} has the pattern {spell(text)}; expected at most {_LONGEST_PATTERN} characters, "
                f"{_MOST_REPEATS} repetitions, {_MOST_CHOICES} alternatives and no repeated group: name the modules"
            )
        try:
            return re.compile(form.format(text))
        except (re.error, OverflowError) as error:
            raise UserError(f"{self.file}: {key} has {spell(text)}, which is no pattern: {error}") from error

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.file}: {key} is {spell(value)}; expected an object")
        return value or {}
