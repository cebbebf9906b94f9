"""The sizes of a gpt-oss model, from and to both released forms of config.json. Knows no arrays and no files."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal

from gptoss_jax.errors import UserError

LayerKind = Literal["sliding", "full"]

_HF_LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}
_HF_LAYER_NAMES = {kind: name for name, kind in _HF_LAYER_KINDS.items()}
_LARGEST_SIZE = 2**31 - 1  # sizes index arrays with int32
_MOST_LAYERS = 1000  # a number in a file must not make this code build a list of two billion
_OPENAI_NORM_EPS = 1e-5  # written in OpenAI's code, in no file
_SWIGLU_ALPHA = 1.702  # the sigmoid's gain in the experts; only transformers 5 writes it down


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding with YaRN scaling (arXiv:2309.00071); factor 1 is plain RoPE.

    The correction range is never rounded: the releases carry `truncate: false`.
    """

    theta: float
    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float

    def __post_init__(self) -> None:
        _check_size("original_context", self.original_context)
        for name in ("theta", "factor", "beta_fast", "beta_slow"):
            _check_positive(name, getattr(self, name))
        if self.theta <= 1:
            raise UserError(f"rope theta is {self.theta}; expected more than 1, since frequencies fall as its powers")
        if self.factor < 1:
            raise UserError(f"rope factor is {self.factor}; expected 1 (plain) or more, since YaRN only lengthens")
        if self.beta_fast <= self.beta_slow:
            raise UserError(
                f"rope beta_fast={self.beta_fast} does not exceed beta_slow={self.beta_slow}: "
                "fast pairs must turn more often than slow ones"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one gpt-oss model; no mesh, dtype, path or sampling setting.

    Letters as in docs/shapes.md: width D, num_heads N, num_kv_heads K, head_dim H, num_experts E,
    experts_per_token X, expert_width F, vocab_size V. `sliding_window` counts the query's own position.
    """

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    rope: RopeConfig
    max_context: int
    norm_eps: float = _OPENAI_NORM_EPS
    swiglu_limit: float = 7.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in (int, "int"):
                _check_size(field.name, getattr(self, field.name))
        _check_positive("norm_eps", self.norm_eps)
        _check_positive("swiglu_limit", self.swiglu_limit)
        _check_size("the number of layers", self.num_layers, most=_MOST_LAYERS)
        for kind in self.layer_kinds:
            if kind not in _HF_LAYER_NAMES:
                raise UserError(f"a layer is {kind!r}; implemented are {' and '.join(map(repr, _HF_LAYER_NAMES))}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary embedding turns pairs, so it must be even")
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}: "
                "a token cannot visit more experts than there are"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads Hugging Face's or OpenAI's config.json, told apart by their names for the number of experts.

        Raises:
            UserError: a key is missing, or holds a value this code does not implement.
        """
        if "num_local_experts" in config or "model_type" in config:
            return cls.from_hf(config)
        if "num_experts" in config:
            return cls.from_openai(config)
        raise UserError(
            "config.json has neither num_local_experts (Hugging Face's name) nor num_experts (OpenAI's): "
            "it is no gpt-oss config"
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads Hugging Face's config.json, with `rope_scaling` (as released) or `rope_parameters` (transformers 5)."""
        _refuse_other(config, "model_type", ("gpt_oss",))
        _refuse_other(config, "hidden_act", ("silu",))
        _refuse_other(config, "attention_bias", (True,))
        _refuse_other(config, "tie_word_embeddings", (False,))
        _refuse_other(config, "swiglu_alpha", (_SWIGLU_ALPHA,))
        quantization = config.get("quantization_config") or {}
        _refuse_other(_mapping(quantization, "quantization_config"), "quant_method", ("mxfp4",))
        num_layers = _size(config, "num_hidden_layers", most=_MOST_LAYERS)
        return cls(
            vocab_size=_size(config, "vocab_size"),
            width=_size(config, "hidden_size"),
            num_heads=_size(config, "num_attention_heads"),
            num_kv_heads=_size(config, "num_key_value_heads"),
            head_dim=_size(config, "head_dim"),
            num_experts=_size(config, "num_local_experts"),
            experts_per_token=_size(config, _first_key(config, "num_experts_per_tok", "experts_per_token")),
            expert_width=_size(config, "intermediate_size"),
            sliding_window=_size(config, "sliding_window"),
            layer_kinds=_hf_layer_kinds(config, num_layers),
            rope=_hf_rope(config),
            max_context=_size(config, "max_position_embeddings"),
            norm_eps=_positive(config, "rms_norm_eps", default=_OPENAI_NORM_EPS),
            swiglu_limit=_positive(config, "swiglu_limit", default=7.0),
        )

    @classmethod
    def from_openai(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads the config.json of OpenAI's `original/` folder. Layers alternate, beginning with a sliding one."""
        original_context = _size(config, "initial_context_length")
        factor = _positive(config, "rope_scaling_factor")
        if original_context * factor > _LARGEST_SIZE:
            raise UserError(
                f"config.json: initial_context_length × rope_scaling_factor is {original_context} × {factor}; "
                f"expected at most {_LARGEST_SIZE}"
            )
        return cls(
            vocab_size=_size(config, "vocab_size"),
            width=_size(config, "hidden_size"),
            num_heads=_size(config, "num_attention_heads"),
            num_kv_heads=_size(config, "num_key_value_heads"),
            head_dim=_size(config, "head_dim"),
            num_experts=_size(config, "num_experts"),
            experts_per_token=_size(config, "experts_per_token"),
            expert_width=_size(config, "intermediate_size"),
            sliding_window=_size(config, "sliding_window"),
            layer_kinds=alternating_layers(_size(config, "num_hidden_layers", most=_MOST_LAYERS)),
            rope=RopeConfig(
                theta=_positive(config, "rope_theta"),
                factor=factor,
                original_context=original_context,
                beta_fast=_positive(config, "rope_ntk_beta"),
                beta_slow=_positive(config, "rope_ntk_alpha"),
            ),
            max_context=int(original_context * factor),
            swiglu_limit=_positive(config, "swiglu_limit", default=7.0),
        )

    def to_hf(self, *, mxfp4: bool) -> dict[str, Any]:
        """The config.json that `transformers` reads, in the released form; `mxfp4` says how the experts are stored.

        A vocabulary that ends before the release's special ids has none: `transformers` cannot embed a padding id
        that lies outside.
        """
        config: dict[str, Any] = {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002 if self.vocab_size > 200002 else None,
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initial_context_length": self.rope.original_context,
            "initializer_range": 0.02,
            "intermediate_size": self.expert_width,
            "layer_types": [_HF_LAYER_NAMES[kind] for kind in self.layer_kinds],
            "max_position_embeddings": self.max_context,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "pad_token_id": 199999 if self.vocab_size > 199999 else None,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": {
                "beta_fast": self.rope.beta_fast,
                "beta_slow": self.rope.beta_slow,
                "factor": self.rope.factor,
                "original_max_position_embeddings": self.rope.original_context,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope.theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        if mxfp4:
            config["quantization_config"] = {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            }
        else:
            config["dtype"] = "bfloat16"
        return config

    def to_openai(self) -> dict[str, Any]:
        """The config.json of OpenAI's `original/` folder.

        Raises:
            UserError: the model has something that form cannot say (other layers, another context, another epsilon).
        """
        self._check_openai_can_say_it()
        return {
            "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.expert_width,
            "swiglu_limit": self.swiglu_limit,
            "head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "sliding_window": self.sliding_window,
            "initial_context_length": self.rope.original_context,
            "rope_theta": self.rope.theta,
            "rope_scaling_factor": self.rope.factor,
            "rope_ntk_alpha": self.rope.beta_slow,
            "rope_ntk_beta": self.rope.beta_fast,
        }

    def _check_openai_can_say_it(self) -> None:
        way_out = "OpenAI's config.json cannot say so; export with --format hf"
        for layer, (found, expected) in enumerate(
            zip(self.layer_kinds, alternating_layers(self.num_layers), strict=True)
        ):
            if found != expected:
                raise UserError(f"layer {layer} is {found} where alternating layers are {expected}: {way_out}")
        context = int(self.rope.original_context * self.rope.factor)
        if self.max_context != context:
            raise UserError(f"max_context={self.max_context} is not original_context × factor = {context}: {way_out}")
        if self.norm_eps != _OPENAI_NORM_EPS:
            raise UserError(f"norm_eps={self.norm_eps} is not {_OPENAI_NORM_EPS}: {way_out}")


def alternating_layers(num_layers: int) -> tuple[LayerKind, ...]:
    """Even layers slide, odd layers see everything, as in every released gpt-oss."""
    return tuple("full" if i % 2 else "sliding" for i in range(num_layers))


def _hf_layer_kinds(config: Mapping[str, Any], num_layers: int) -> tuple[LayerKind, ...]:
    names = config.get("layer_types")
    if names is None:
        return alternating_layers(num_layers)
    if not isinstance(names, list) or len(names) != num_layers:
        found = f"{len(names)} entries" if isinstance(names, list) else _shown(names)
        raise UserError(f"config.json: layer_types has {found}, num_hidden_layers says {num_layers}: they must agree")
    for name in names:
        if not isinstance(name, str) or name not in _HF_LAYER_KINDS:
            known = " and ".join(map(repr, _HF_LAYER_KINDS))
            raise UserError(f"config.json: layer_types holds {_shown(name)}; implemented are {known}")
    return tuple(_HF_LAYER_KINDS[name] for name in names)


def _hf_rope(config: Mapping[str, Any]) -> RopeConfig:
    rope = _hf_rope_settings(config)
    theta = _positive(rope, "rope_theta")
    if rope.get("partial_rotary_factor") is not None:
        _refuse_other(rope, "partial_rotary_factor", (1.0,))
    kind = rope.get("rope_type")
    if kind == "default":
        context = _size(config, "max_position_embeddings")
        return RopeConfig(theta=theta, factor=1.0, original_context=context, beta_fast=32.0, beta_slow=1.0)
    if kind != "yarn":
        raise UserError(f"config.json: rope_type is {_shown(kind)}; implemented are 'yarn' and 'default'")
    # transformers' default is to round the correction range; every gpt-oss says false, and so must the file.
    if rope.get("truncate", True) is not False:
        raise UserError("config.json: rope scaling has truncate=true (or none); gpt-oss is trained with truncate=false")
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            found = _shown(rope[key])
            raise UserError(f"config.json: rope scaling has {key}={found}, which is not implemented; remove it")
    return RopeConfig(
        theta=theta,
        factor=_positive(rope, "factor"),
        original_context=_size(rope, "original_max_position_embeddings"),
        beta_fast=_positive(rope, "beta_fast", default=32.0),
        beta_slow=_positive(rope, "beta_slow", default=1.0),
    )


def _hf_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings from wherever they stand; what stands twice must agree.

    transformers 5 moves `rope_theta` and `rope_scaling` into `rope_parameters`: reading only one place loses YaRN.
    """
    released = dict(_mapping(config.get("rope_scaling") or {}, "rope_scaling"))
    moved = dict(_mapping(config.get("rope_parameters") or {}, "rope_parameters"))
    if not released and not moved:
        # transformers puts the release's YaRN here, other readers none: a guess would be silent and wrong for one.
        raise UserError(
            "config.json has neither rope_scaling nor rope_parameters; expected one of them, "
            "with rope_type 'yarn' as every gpt-oss has it, or 'default' for a model without"
        )
    if "rope_theta" in config:
        released.setdefault("rope_theta", config["rope_theta"])
    for settings in (released, moved):
        if "type" in settings:
            settings.setdefault("rope_type", settings["type"])
    for key in sorted(released.keys() & moved.keys()):
        if released[key] != moved[key]:
            raise UserError(
                f"config.json: {key} is {_shown(released[key])} in one place and {_shown(moved[key])} in "
                "rope_parameters; remove the wrong one"
            )
    return {**released, **moved}


def _refuse_other(config: Mapping[str, Any], key: str, implemented: tuple[Any, ...]) -> None:
    if key in config and config[key] not in implemented:
        known = " or ".join(map(repr, implemented))
        raise UserError(f"config.json: {key} is {_shown(config[key])}; implemented is {known}")


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} is {_shown(value)}; expected an object")
    return value


def _first_key(config: Mapping[str, Any], *keys: str) -> str:
    return next((key for key in keys if key in config), keys[0])


def _size(config: Mapping[str, Any], key: str, *, most: int = _LARGEST_SIZE) -> int:
    if key not in config:
        raise UserError(f"config.json: {key} is missing; expected an integer from 1 to {most}")
    return _check_size(f"config.json: {key}", config[key], most=most)


def _check_size(name: str, value: Any, *, most: int = _LARGEST_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{name} is {_shown(value)}; expected an integer from 1 to {most}")
    return value


def _positive(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    if key not in config and default is None:
        raise UserError(f"config.json: {key} is missing; expected a positive number")
    return _check_positive(f"config.json: {key}", config.get(key, default))


def _shown(value: Any) -> str:
    """The value as Python writes it, cut where it would bury the sentence around it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # NaN, infinity and JSON's endless integers fail here
        raise UserError(f"{name} is {_shown(value)}; expected a positive number")
    return float(value)
