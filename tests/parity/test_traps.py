"""One test for each mistake that other ports of gpt-oss made, where it shows in the logits of one device.

A test of this file holds three models side by side: ours, the oracle, and an oracle that steps into the trap. Ours
must agree with the oracle at inputs where the trapped one demonstrably does not; else the test would prove nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import gptoss_jax
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.config import ModelConfig, RopeConfig
from gptoss_jax.model.rope import rotate
from tests import oracle
from tests.parity.cases import CASES, read_config, read_tensors
from tests.parity.compare import logits, relative_error
from tests.tiny import TINY

FLOAT32_ERROR = 2e-4  # of the logits' spread; a few 1e-6 are float32's own
SHOWS = 100 * FLOAT32_ERROR  # a trapped model must be further off than this for its test to mean something

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]


# ---- what is compared ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["whole", "token by token"])
def feeding(request: pytest.FixtureRequest) -> str:
    """Prefill and decode run different code: a trap may be in either."""
    return request.param


@pytest.fixture(scope="module")
def tiny_model(tiny_hf: Path) -> gptoss_jax.GptOss:
    return gptoss_jax.load(tiny_hf, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tiny_oracle(tiny_hf: Path) -> tuple[Config, Tensors]:
    return read_config(tiny_hf), read_tensors(tiny_hf)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(TINY.vocab_size, size=(2, 23), dtype=np.int32)


@pytest.fixture(scope="module")
def right(tiny_oracle: tuple[Config, Tensors], tokens: np.ndarray) -> np.ndarray:
    return oracle.forward(tiny_oracle[0], tiny_oracle[1], tokens)


@pytest.fixture(scope="module")
def ours(tiny_model: gptoss_jax.GptOss, tokens: np.ndarray, feeding: str) -> np.ndarray:
    return fed(tiny_model, tokens, feeding)


def test_nothing_is_wrong_to_begin_with(ours: np.ndarray, right: np.ndarray):
    assert relative_error(ours, right) < FLOAT32_ERROR


# ---- attention -----------------------------------------------------------------------------------------------------


def test_window_is_neither_a_key_longer_nor_shorter(tiny_oracle, tokens, ours, right):
    config, tensors = tiny_oracle
    for window in (TINY.sliding_window - 1, TINY.sliding_window + 1):
        must_differ(ours, right, oracle.forward(config | {"sliding_window": window}, tensors, tokens))


def test_window_slides_on_even_layers(tiny_oracle, tokens, ours, right):
    config, tensors = tiny_oracle
    swapped = [*config["layer_types"][1:], config["layer_types"][0]]
    must_differ(ours, right, oracle.forward(config | {"layer_types": swapped}, tensors, tokens))
    for kind in ("sliding_attention", "full_attention"):
        everywhere = [kind] * TINY.num_layers
        must_differ(ours, right, oracle.forward(config | {"layer_types": everywhere}, tensors, tokens))


def test_window_of_the_release_is_128_keys(tmp_path: Path):
    """A window of 129 is invisible until token 129."""
    case = next(case for case in CASES if case.name == "short_context")
    assert case.config.sliding_window == 128
    case.write(tmp_path / "hf")
    config, tensors = read_config(tmp_path / "hf"), read_tensors(tmp_path / "hf")
    tokens = case.prompts[:1, :140]
    right = oracle.forward(config, tensors, tokens)
    wrong = oracle.forward(config | {"sliding_window": 129}, tensors, tokens)
    np.testing.assert_allclose(wrong[:, :128], right[:, :128], rtol=0, atol=1e-12)  # float64, sums in another order
    must_differ(logits(gptoss_jax.load(tmp_path / "hf", dtype=jnp.float32), tokens), right, wrong)


def test_sinks_are_in_the_softmax(tiny_oracle, tokens, ours, right):
    config, tensors = tiny_oracle
    no_sinks = {name: np.full_like(t, -np.inf) if name.endswith("sinks") else t for name, t in tensors.items()}
    must_differ(ours, right, oracle.forward(config, no_sinks, tokens))
    one_more_key = {name: np.zeros_like(t) if name.endswith("sinks") else t for name, t in tensors.items()}
    must_differ(ours, right, oracle.forward(config, one_more_key, tokens))


# ---- rotary embedding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "tolerance"), [(1, 1e-6), (4095, 1e-3), (5000, 1e-3), (131071, 2e-2)])
def test_yarn_range_is_not_rounded(position: int, tolerance: float):
    """At the release's head_dim the range is 8.0928 to 17.398. The tolerance is float32's for an angle of that size."""
    rope = RopeConfig(theta=150000.0, factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0)
    config = TINY.to_hf(mxfp4=True) | {"head_dim": 64}
    x = np.random.default_rng(0).standard_normal((1, 1, 3, 64))
    ours = rotate(jnp.asarray(x, jnp.float32), jnp.full((1, 1), position), rope)
    right = oracle.rotate(x, *oracle.rope_tables(config, np.array([position])))
    wrong = oracle.rotate(x, *oracle.rope_tables(with_rounded_range(config), np.array([position])))
    np.testing.assert_allclose(ours, right, atol=4 * tolerance)  # elements reach 3, times the concentration 1.35
    assert position < 100 or np.abs(wrong - right).max() > 20 * tolerance


def test_yarn_range_is_not_rounded_past_the_original_context(tmp_path: Path):
    case = next(case for case in CASES if case.name == "short_context")
    case.write(tmp_path / "hf")
    config, tensors = read_config(tmp_path / "hf"), read_tensors(tmp_path / "hf")
    tokens = case.prompts[:1, :400]
    assert tokens.shape[1] > case.config.rope.original_context
    right = oracle.forward(config, tensors, tokens)
    wrong = oracle.forward(with_rounded_range(config), tensors, tokens)
    must_differ(logits(gptoss_jax.load(tmp_path / "hf", dtype=jnp.float32), tokens), right, wrong)


def test_yarn_is_read_from_rope_parameters_alone(tiny_hf: Path, tiny_oracle, tokens, right, tmp_path: Path):
    config, tensors = tiny_oracle
    resaved = {
        key: config[key] for key in config if key not in ("rope_theta", "rope_scaling", "initial_context_length")
    }
    resaved["rope_parameters"] = {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    save_checkpoint(tmp_path, resaved, tensors)
    yarn_lost = resaved | {"rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"}}
    ours = logits(gptoss_jax.load(tmp_path, dtype=jnp.float32), tokens)
    must_differ(ours, right, oracle.forward(yarn_lost, tensors, tokens))


def test_rotary_embedding_turns_halves_not_neighbours(tiny_oracle, tokens, ours, right, monkeypatch):
    halves = oracle.rotate

    def neighbours(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        turned = halves(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), cos, sin)
        return np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(x.shape)

    monkeypatch.setattr(oracle, "rotate", neighbours)
    must_differ(ours, right, oracle.forward(tiny_oracle[0], tiny_oracle[1], tokens))


# ---- experts -------------------------------------------------------------------------------------------------------


def softmax_before_choice(logits: np.ndarray, num_active: int) -> tuple[np.ndarray, np.ndarray]:
    experts = np.argsort(-logits, axis=-1)[..., :num_active]
    return experts, np.take_along_axis(oracle.softmax(logits), experts, axis=-1)


def softmax_twice(logits: np.ndarray, num_active: int) -> tuple[np.ndarray, np.ndarray]:
    experts, weights = softmax_before_choice(logits, num_active)
    return experts, oracle.softmax(weights)


@pytest.mark.parametrize("trap", [softmax_before_choice, softmax_twice])
def test_softmax_is_over_the_chosen_experts_once(tiny_oracle, tokens, ours, right, monkeypatch, trap: Callable):
    monkeypatch.setattr(oracle, "route", trap)
    must_differ(ours, right, oracle.forward(tiny_oracle[0], tiny_oracle[1], tokens))


def test_gate_and_up_alternate(tiny_oracle, tokens, ours, right):
    """Splitting the rows into halves is the right model on rows put together in the other order."""
    config, tensors = tiny_oracle
    wrong = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts.gate_up_proj" in name:
            gate, up = np.split(tensor, 2, axis=1)
            wrong[name] = np.stack([gate, up], axis=2).reshape(tensor.shape)
    must_differ(ours, right, oracle.forward(config, wrong, tokens))


def test_the_clamp_spares_the_gates_lower_side(tiny_oracle, tokens, right, tmp_path: Path):
    """With the limit at 0.5 the clamps decide nearly every logit: of the gate from above only, of up on both sides."""
    config, tensors = tiny_oracle
    tight = config | {"swiglu_limit": 0.5}
    save_checkpoint(tmp_path, tight, tensors)
    ours = logits(gptoss_jax.load(tmp_path, dtype=jnp.float32), tokens)
    must_differ(ours, oracle.forward(tight, tensors, tokens), right)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_expert_biases_count_once(tiny_oracle, tokens, ours, right, name: str):
    config, tensors = tiny_oracle
    for times in (0, TINY.experts_per_token):
        wrong = {key: t * t.dtype.type(times) if key.endswith(name) else t for key, t in tensors.items()}
        must_differ(ours, right, oracle.forward(config, wrong, tokens))


def test_no_token_is_dropped_when_all_want_the_same_experts(tiny_oracle, tokens, monkeypatch, feeding, tmp_path: Path):
    config, tensors = tiny_oracle
    crowded = dict(tensors)
    for name in tensors:
        if name.endswith("mlp.router.weight"):
            crowded[name] = tensors[name] * tensors[name].dtype.type(0)
        if name.endswith("mlp.router.bias"):
            crowded[name] = (np.arange(TINY.num_experts) % 5).astype(tensors[name].dtype)  # 4 and 3 win everywhere
    save_checkpoint(tmp_path, config, crowded)
    right = oracle.forward(config, crowded, tokens)
    ours = fed(gptoss_jax.load(tmp_path, dtype=jnp.float32), tokens, feeding)

    whole_moe = oracle.moe

    def with_capacity(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, **matrices: Any) -> np.ndarray:
        """Twice an even share of the visits fits into an expert; later tokens find it full."""
        capacity = 2 * experts.size // TINY.num_experts
        weights = weights.copy()
        for expert in range(TINY.num_experts):
            visits = np.argwhere(experts == expert)
            weights[tuple(visits[capacity:].T)] = 0
        return whole_moe(x, experts, weights, **matrices)

    monkeypatch.setattr(oracle, "moe", with_capacity)
    must_differ(ours, right, oracle.forward(config, crowded, tokens))


# ---- precision -----------------------------------------------------------------------------------------------------


def test_residual_stream_passes_the_range_of_float16(tiny_oracle, tokens, tmp_path: Path):
    """The release's residual stream reaches 9e4. Here all of it does: whatever is added to it is multiplied by 2^17,
    which is exact in bf16 and in MXFP4's scales, and which every norm takes out again."""
    config, tensors = tiny_oracle
    large = {name: enlarged(name, tensor, 17) for name, tensor in tensors.items()}
    save_checkpoint(tmp_path, config, large)
    right = oracle.forward(config, large, tokens)
    assert np.abs(large["model.embed_tokens.weight"].astype(np.float32)).max() > np.finfo(np.float16).max
    assert relative_error(logits(gptoss_jax.load(tmp_path, dtype=jnp.float32), tokens), right) < FLOAT32_ERROR
    # bf16 keeps the range and loses digits, so it is as good here as on the model of ordinary size: compare just that.
    half = logits(gptoss_jax.load(tmp_path, dtype=jnp.bfloat16), tokens)
    assert np.isfinite(half).all()
    assert np.median(np.abs(half - right)) < 0.1 * right.std()


def test_float16_is_refused(tiny_hf: Path):
    with pytest.raises(ValueError, match="float16"):
        gptoss_jax.load(tiny_hf, dtype=jnp.float16)


def enlarged(name: str, tensor: np.ndarray, exponent: int) -> np.ndarray:
    """The tensor, times 2^exponent if its output is added to the residual stream."""
    if name.endswith("experts.down_proj_scales"):
        return tensor + np.uint8(exponent)
    adds = ("embed_tokens.weight", "o_proj.weight", "o_proj.bias", "experts.down_proj_bias")
    return tensor * tensor.dtype.type(2**exponent) if name.endswith(adds) else tensor


# ---- coincidences of the release -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [case.config for case in CASES], ids=[case.name for case in CASES])
def test_no_two_axes_of_a_test_model_are_alike(config: ModelConfig):
    """In the release heads = head_dim, groups = kv heads and width = expert width, which hides a swapped axis."""
    axes = {
        "heads": config.num_heads,
        "kv heads": config.num_kv_heads,
        "heads per kv head": config.num_heads // config.num_kv_heads,
        "head dim": config.head_dim,
        "experts": config.num_experts,
        "width": config.width,
        "expert width": config.expert_width,
        "two expert widths": 2 * config.expert_width,
        "heads x head dim": config.num_heads * config.head_dim,
        "kv heads x head dim": config.num_kv_heads * config.head_dim,
        "vocabulary": config.vocab_size,
    }
    if config.num_kv_heads == 1:  # one key/value head is its own trap: then a group is all the heads
        del axes["heads per kv head"], axes["kv heads x head dim"]
    assert len(set(axes.values())) == len(axes), axes


def test_prompts_pass_the_window_and_the_original_context():
    release = RopeConfig(theta=150000.0, factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0)
    assert any(case.config.rope == release and case.positions[-1] > release.original_context for case in CASES)
    assert all(case.prompt_length > case.config.sliding_window for case in CASES)
    assert any(case.config.sliding_window == 128 for case in CASES)


# ---- tools ---------------------------------------------------------------------------------------------------------


def must_differ(ours: np.ndarray, right: np.ndarray, trapped: np.ndarray) -> None:
    """Ours is the right one, and the comparison could have told it from the trapped one."""
    assert relative_error(trapped, right) > SHOWS, "the trap does not show at this input"
    assert relative_error(ours, right) < FLOAT32_ERROR


def fed(model: gptoss_jax.GptOss, tokens: np.ndarray, feeding: str) -> np.ndarray:
    """Logits of every token, fed to the model at once or one by one through its cache."""
    if feeding == "whole":
        return logits(model, tokens)
    rows, num_tokens = tokens.shape
    graph, parameters = nnx.split(model)

    @jax.jit
    def step(parameters: nnx.State, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graph, parameters)
        hidden, cache = model.extend(token, cache, count=jnp.ones(rows, jnp.int32))
        return model.logits(hidden), cache

    cache, pieces = model.empty_cache(rows=rows, capacity=num_tokens), []
    for t in range(num_tokens):
        piece, cache = step(parameters, jnp.asarray(tokens[:, t : t + 1]), cache)
        pieces.append(np.asarray(piece))
    return np.concatenate(pieces, axis=1)


def with_rounded_range(config: Config) -> Config:
    """The config whose unrounded YaRN range is the rounded one of `config`: `truncate: true` in other words."""
    rope, pairs = config["rope_scaling"], config["head_dim"] // 2
    context, theta = rope["original_max_position_embeddings"], config["rope_theta"]

    def pair_that_turns(times: float) -> float:
        return pairs * np.log(context / (times * 2 * np.pi)) / np.log(theta)

    def times_that_turn(pair: float) -> float:
        return context / (2 * np.pi * theta ** (pair / pairs))

    low, high = np.floor(pair_that_turns(rope["beta_fast"])), np.ceil(pair_that_turns(rope["beta_slow"]))
    rounded = {"beta_fast": times_that_turn(low), "beta_slow": times_that_turn(high)}
    return config | {"rope_scaling": rope | rounded}


def save_checkpoint(folder: Path, config: Config, tensors: Tensors) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors")
