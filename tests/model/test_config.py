"""Every form of config.json that is read, every value that is refused, and whatever else a file may hold."""

import copy
import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig, RopeConfig
from tests.tiny import TINY

RELEASED = json.loads((Path(__file__).resolve().parents[2] / "configs/models/gpt-oss-20b.json").read_text())

# As it stands in the release's original/ folder.
OPENAI = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}

MISSING = object()


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with keys set or, where the value is MISSING, removed; "rope_scaling.factor" reaches inside."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *outer, last = key.split(".")
        target = config
        for name in outer:
            target = target[name]
        if value is MISSING:
            target.pop(last)
        else:
            target[last] = value
    return config


def as_transformers_5_saves(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` have moved into `rope_parameters`; OpenAI's spellings are gone."""
    moved = copy.deepcopy(config)
    moved["rope_parameters"] = moved.pop("rope_scaling") | {"rope_theta": moved.pop("rope_theta")}
    del moved["experts_per_token"], moved["initial_context_length"]
    return moved | {"swiglu_alpha": 1.702, "transformers_version": "5.23.0"}


def test_the_released_form() -> None:
    config = ModelConfig.from_json(RELEASED)
    assert config == ModelConfig(
        vocab_size=201088,
        width=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        expert_width=2880,
        sliding_window=128,
        layer_kinds=("sliding", "full") * 12,
        rope=RopeConfig(theta=150000, factor=32, original_context=4096, beta_fast=32, beta_slow=1),
        max_context=131072,
        norm_eps=1e-5,
        swiglu_limit=7.0,
    )
    assert config.num_layers == 24


def test_transformers_5_and_openai_say_the_same_model() -> None:
    released = ModelConfig.from_json(RELEASED)
    assert ModelConfig.from_json(as_transformers_5_saves(RELEASED)) == released
    assert ModelConfig.from_json(OPENAI) == released


def test_transformers_reads_what_we_write() -> None:
    transformers = pytest.importorskip("transformers")
    read = transformers.GptOssConfig.from_dict(TINY.to_hf(mxfp4=False))
    assert ModelConfig.from_json(json.loads(read.to_json_string(use_diff=False))) == TINY


def test_openais_form_is_written_as_released() -> None:
    assert ModelConfig.from_json(RELEASED).to_openai() == OPENAI


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"layer_types": MISSING}, "layer_kinds", ("sliding", "full") * 12),
        ({"layer_types": ["full_attention"] * 24}, "layer_kinds", ("full",) * 24),
        ({"rms_norm_eps": MISSING}, "norm_eps", 1e-5),
        ({"rms_norm_eps": 3e-6}, "norm_eps", 3e-6),
        ({"swiglu_limit": MISSING}, "swiglu_limit", 7.0),
        ({"num_experts_per_tok": MISSING}, "experts_per_token", 4),
        ({"quantization_config": MISSING}, "num_experts", 32),
        ({"model_type": MISSING}, "num_experts", 32),
    ],
)
def test_what_may_be_left_out_or_differ(changes: dict[str, Any], field: str, value: Any) -> None:
    config = ModelConfig.from_json(changed(RELEASED, changes))
    assert getattr(config, field) == value
    assert dataclasses.replace(config, **{field: getattr(ModelConfig.from_json(RELEASED), field)}) == (
        ModelConfig.from_json(RELEASED)
    )


def test_plain_rope_is_taken_where_the_file_says_so() -> None:
    config = changed(RELEASED, {"rope_scaling": MISSING, "rope_parameters": {"rope_type": "default"}})
    assert ModelConfig.from_json(config).rope == RopeConfig(
        theta=150000, factor=1, original_context=131072, beta_fast=32, beta_slow=1
    )


def test_the_older_name_of_rope_type() -> None:
    config = changed(RELEASED, {"rope_scaling.rope_type": MISSING, "rope_scaling.type": "yarn"})
    assert ModelConfig.from_json(config) == ModelConfig.from_json(RELEASED)


REFUSED_HF = [
    ({"model_type": "llama"}, "config.json: model_type is 'llama'; implemented is 'gpt_oss'"),
    ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; implemented is 'silu'"),
    ({"attention_bias": False}, "config.json: attention_bias is False; implemented is True"),
    ({"tie_word_embeddings": True}, "config.json: tie_word_embeddings is True; implemented is False"),
    ({"swiglu_alpha": 1.0}, "config.json: swiglu_alpha is 1.0; implemented is 1.702"),
    ({"quantization_config.quant_method": "gptq"}, "config.json: quant_method is 'gptq'; implemented is 'mxfp4'"),
    ({"quantization_config": "mxfp4"}, "config.json: quantization_config is 'mxfp4'; expected an object"),
    ({"vocab_size": MISSING}, "config.json: vocab_size is missing; expected an integer from 1 to 2147483647"),
    ({"hidden_size": 0}, "config.json: hidden_size is 0; expected an integer from 1 to 2147483647"),
    ({"hidden_size": 2**31}, "config.json: hidden_size is 2147483648; expected an integer from 1 to 2147483647"),
    ({"head_dim": 64.0}, "config.json: head_dim is 64.0; expected an integer from 1 to 2147483647"),
    ({"head_dim": 63}, "head_dim=63 is odd"),
    ({"sliding_window": None}, "config.json: sliding_window is None; expected an integer"),
    ({"intermediate_size": "2880"}, "config.json: intermediate_size is '2880'; expected an integer"),
    ({"num_key_value_heads": True}, "config.json: num_key_value_heads is True; expected an integer"),
    ({"num_key_value_heads": 7}, "num_heads=64 is not a multiple of num_kv_heads=7"),
    ({"num_experts_per_tok": 33}, "experts_per_token=33 exceeds num_experts=32"),
    ({"num_hidden_layers": 25}, "config.json: layer_types has 24 entries, num_hidden_layers says 25"),
    ({"num_hidden_layers": 2000}, "config.json: num_hidden_layers is 2000; expected an integer from 1 to 1000"),
    ({"layer_types": "full_attention"}, "config.json: layer_types has 'full_attention', num_hidden_layers says 24"),
    ({"layer_types": ["chunked_attention"] * 24}, "config.json: layer_types holds 'chunked_attention'; implemented"),
    ({"layer_types": [["full_attention"]] * 24}, "config.json: layer_types holds ['full_attention']; implemented are"),
    ({"rms_norm_eps": 0}, "config.json: rms_norm_eps is 0; expected a positive number"),
    ({"rms_norm_eps": "1e-5"}, "config.json: rms_norm_eps is '1e-5'; expected a positive number"),
    ({"swiglu_limit": float("nan")}, "config.json: swiglu_limit is nan; expected a positive number"),
    ({"swiglu_limit": None}, "config.json: swiglu_limit is None; expected a positive number"),
    ({"rope_theta": MISSING}, "config.json: rope_theta is missing; expected a positive number"),
    ({"rope_theta": float("inf")}, "config.json: rope_theta is inf; expected a positive number"),
    ({"rope_theta": 10**400}, "expected a positive number"),
    ({"rope_theta": 0.5}, "rope theta is 0.5; expected more than 1"),
    ({"rope_scaling": MISSING}, "config.json has neither rope_scaling nor rope_parameters; expected one of them"),
    ({"rope_scaling": None}, "config.json has neither rope_scaling nor rope_parameters; expected one of them"),
    ({"rope_scaling": ["yarn"]}, "config.json: rope_scaling is ['yarn']; expected an object"),
    ({"rope_parameters": 32}, "config.json: rope_parameters is 32; expected an object"),
    ({"rope_parameters": {"factor": 8.0}}, "config.json: factor is 32.0 in one place and 8.0 in rope_parameters"),
    ({"rope_parameters": {"rope_theta": 1e6}}, "config.json: rope_theta is 150000 in one place and 1000000.0 in rope"),
    ({"rope_scaling.rope_type": MISSING}, "config.json: rope_type is None; implemented are 'yarn' and 'default'"),
    ({"rope_scaling.rope_type": "llama3"}, "config.json: rope_type is 'llama3'; implemented are 'yarn' and 'default'"),
    ({"rope_scaling.truncate": True}, "config.json: rope scaling has truncate=true (or none)"),
    ({"rope_scaling.truncate": MISSING}, "config.json: rope scaling has truncate=true (or none)"),
    ({"rope_scaling.factor": MISSING}, "config.json: factor is missing; expected a positive number"),
    ({"rope_scaling.factor": 0.5}, "rope factor is 0.5; expected 1 (plain) or more"),
    ({"rope_scaling.beta_fast": 1.0}, "rope beta_fast=1.0 does not exceed beta_slow=1.0"),
    ({"rope_scaling.attention_factor": 1.2}, "config.json: rope scaling has attention_factor=1.2, which is not impl"),
    ({"rope_scaling.mscale": 1.0}, "config.json: rope scaling has mscale=1.0, which is not implemented; remove it"),
    ({"rope_scaling.partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor is 0.5; implemented is 1.0"),
    ({"rope_scaling.original_max_position_embeddings": -1}, "original_max_position_embeddings is -1; expected an int"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_HF, ids=[next(iter(row[0])) for row in REFUSED_HF])
def test_hugging_faces_form_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig.from_json(changed(RELEASED, changes))
    assert message in str(error.value)


REFUSED_OPENAI = [
    ({"num_experts": MISSING}, "config.json has neither num_local_experts (Hugging Face's name) nor num_experts"),
    ({"rope_scaling_factor": MISSING}, "config.json: rope_scaling_factor is missing; expected a positive number"),
    ({"rope_scaling_factor": 1e300}, "initial_context_length × rope_scaling_factor is 4096 × 1e+300; expected at most"),
    ({"num_hidden_layers": 2**31 - 1}, "config.json: num_hidden_layers is 2147483647; expected an integer from 1 to"),
    ({"num_experts": 3}, "experts_per_token=4 exceeds num_experts=3"),
    ({"rope_ntk_beta": None}, "config.json: rope_ntk_beta is None; expected a positive number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_OPENAI, ids=[next(iter(row[0])) for row in REFUSED_OPENAI])
def test_openais_form_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig.from_json(changed(OPENAI, changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kinds": ()}, "the number of layers is 0; expected an integer from 1 to 1000"),
        ({"layer_kinds": ("sliding",) * 1001}, "the number of layers is 1001; expected an integer from 1 to 1000"),
        ({"width": 0}, "width is 0; expected an integer"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; expected a positive number"),
    ],
)
def test_a_config_made_by_hand_is_checked_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(TINY, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kinds": ("sliding", "sliding", "full")}, "layer 1 is sliding where alternating layers are full"),
        ({"max_context": 4096}, "max_context=4096 is not original_context × factor = 131072"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 is not 1e-05"),
    ],
)
def test_what_openais_form_cannot_say_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(TINY, **changes).to_openai()
    assert f"{message}: OpenAI's config.json cannot say so; export with --format hf" == str(error.value)


@pytest.mark.parametrize(
    ("vocab_size", "pad", "eos"), [(199999, None, None), (200000, 199999, None), (201088, 199999, 200002)]
)
def test_special_ids_lie_in_the_vocabulary(vocab_size: int, pad: int | None, eos: int | None) -> None:
    written = dataclasses.replace(TINY, vocab_size=vocab_size).to_hf(mxfp4=True)
    assert (written["pad_token_id"], written["eos_token_id"]) == (pad, eos)


def test_a_config_is_a_value() -> None:
    assert hash(TINY) == hash(dataclasses.replace(TINY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert eval(repr(TINY)) == TINY


sizes = st.integers(1, 5000)
numbers = st.floats(1e-6, 1e6)


@st.composite
def model_configs(draw: st.DrawFn, *, openai: bool = False) -> ModelConfig:
    """Any model that a config.json can say, or one that OpenAI's can."""
    kv_heads, experts, layers = draw(st.integers(1, 9)), draw(sizes), draw(st.integers(1, 40))
    beta_slow, context, factor = draw(numbers), draw(sizes), draw(st.floats(1, 1000))
    kinds = st.lists(st.sampled_from(["sliding", "full"]), min_size=layers, max_size=layers).map(tuple)
    return ModelConfig(
        vocab_size=draw(sizes),
        width=draw(sizes),
        num_heads=kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(sizes),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        expert_width=draw(sizes),
        sliding_window=draw(sizes),
        layer_kinds=(("sliding", "full") * layers)[:layers] if openai else draw(kinds),
        rope=RopeConfig(
            theta=draw(st.floats(1.5, 1e7)),
            factor=factor,
            original_context=context,
            beta_fast=beta_slow + draw(numbers),
            beta_slow=beta_slow,
        ),
        max_context=int(context * factor) if openai else draw(sizes),
        norm_eps=1e-5 if openai else draw(numbers),
        swiglu_limit=draw(numbers),
    )


@given(model_configs(), st.booleans())
def test_hugging_faces_form_round_trips(config: ModelConfig, mxfp4: bool) -> None:
    written = json.loads(json.dumps(config.to_hf(mxfp4=mxfp4)))
    assert ModelConfig.from_json(written) == config
    assert ModelConfig.from_json(as_transformers_5_saves(written)) == config


@given(model_configs(openai=True))
def test_openais_form_round_trips(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_openai()))) == config


# What json.loads can give: NaN, infinities and endless integers too.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400)
scalars |= st.sampled_from([0, 1, 2**31 - 1, 2**63, -1, 1e308, 5e-324, "yarn", "default", "mxfp4", "full_attention"])
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
known_keys = st.sampled_from(sorted({*RELEASED, *OPENAI, *RELEASED["rope_scaling"], "rope_parameters", "type"}))


@given(st.dictionaries(known_keys | st.text(max_size=9), anything, max_size=12))
@example({})
def test_any_object_is_a_config_or_a_users_mistake(config: dict[str, Any]) -> None:
    reads_or_refuses(config)


@pytest.mark.parametrize("form", [RELEASED, as_transformers_5_saves(RELEASED), OPENAI], ids=["hf", "hf5", "openai"])
@given(data=st.data())
def test_any_change_to_a_real_config_is_read_or_refused(form: dict[str, Any], data: st.DataObject) -> None:
    config = copy.deepcopy(form)
    for key in data.draw(st.lists(known_keys, min_size=1, max_size=3)):
        inside = [value for value in config.values() if isinstance(value, dict) and key in value]
        (data.draw(st.sampled_from(inside)) if inside else config)[key] = data.draw(anything)
    reads_or_refuses(config)


def reads_or_refuses(config: dict[str, Any]) -> None:
    """Nothing but a ModelConfig or a UserError of one short sentence, at no great cost in memory."""
    tracemalloc.start()
    try:
        read = ModelConfig.from_json(config)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400
    else:
        assert ModelConfig.from_json(read.to_hf(mxfp4=True)) == read
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20, "a few numbers in a file cost megabytes"
