"""Judges the judge: the NumPy oracle against OpenAI's PyTorch model and against transformers, both in float32.

The weights are drawn here, so this file needs nothing of gptoss_jax.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import oracle

# Every size and every product of sizes differs, so that a swapped axis cannot go unnoticed.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 112,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096 * 32,
    "initial_context_length": 4096,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "attention_bias": True,
}

# A float32 angle of 60 radians is known to 4e-6, and both references keep their angles in float32: 8e-6 is measured.
FLOAT32_ERROR = 3e-5


def test_mxfp4_codes_low_nibble_first_and_keep_the_sign_of_zero():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :3] = [0x2F, 0x80, 0x7]
    decoded = oracle.mxfp4_decode(blocks, np.array([128], np.uint8))
    assert decoded[:6].tolist() == [-12.0, 2.0, 0.0, -0.0, 12.0, 0.0]
    assert np.signbit(decoded[:6]).tolist() == [True, False, False, True, False, False]


def test_yarn_blends_between_the_corrections_of_the_release():
    """The specification's own numbers for head_dim 64: range 8.0928 to 17.398 unrounded, concentration 1.3466."""
    cos, sin = oracle.rope_tables(CONFIG | {"head_dim": 64}, np.arange(2))
    np.testing.assert_allclose(cos[0], 1.3465736, rtol=1e-7)
    plain = 150000.0 ** (-np.arange(32) / 32)
    slowed = np.clip((np.arange(32) - 8.0928) / (17.398 - 8.0928), 0, 1)
    frequency = np.arctan2(sin[1], cos[1])
    np.testing.assert_allclose(frequency, plain * (1 - slowed * 31 / 32), rtol=1e-4)  # the range above has 5 digits


def test_a_sink_takes_its_share_of_attention_and_the_window_counts_the_query_itself():
    q, k = np.zeros((1, 4, 2, 2)), np.zeros((1, 4, 1, 2))  # equal scores: each key and a sink of 0 get equal shares
    v = np.array([1.0, 10.0, 100.0, 1000.0]).repeat(2).reshape(1, 4, 1, 2)
    windowed = oracle.attention(q, k, v, np.array([0.0, -np.inf]), window=2)
    np.testing.assert_allclose(windowed[0, :, 0, 0], [1 / 2, 11 / 3, 110 / 3, 1100 / 3])
    np.testing.assert_allclose(windowed[0, :, 1, 0], [1, 11 / 2, 110 / 2, 1100 / 2])


def test_attention_takes_queries_in_pieces_without_changing_them(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 11, heads, 6)) for heads in (3, 1, 1))
    sinks = rng.standard_normal(3)
    whole = oracle.attention(q, k, v, sinks, window=5)
    monkeypatch.setattr(oracle, "QUERIES_AT_ONCE", 4)
    np.testing.assert_allclose(oracle.attention(q, k, v, sinks, window=5), whole, atol=1e-14)
    np.testing.assert_allclose(oracle.attention(q[:, -3:], k, v, sinks, window=5), whole[:, -3:], atol=1e-14)


def test_of_equal_router_logits_the_first_expert_wins():
    experts, weights = oracle.route(np.array([[1.0, 3.0, 1.0, 1.0]]), 2)
    assert experts.tolist() == [[1, 0]]
    np.testing.assert_allclose(weights.sum(), 1)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return draw_tensors(CONFIG, seed=0)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(CONFIG["vocab_size"], size=(2, 60))


@pytest.fixture(scope="module")
def logits(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    return oracle.forward(CONFIG, tensors, tokens)


@pytest.mark.parametrize("mxfp4", [True, False])
def test_agrees_with_transformers(tensors, tokens, logits, tmp_path: Path, mxfp4: bool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    stored = tensors if mxfp4 else dequantised(CONFIG, tensors)
    np.testing.assert_allclose(oracle.forward(CONFIG, stored, tokens[:, :9]), logits[:, :9], atol=1e-12)
    write_hf_folder(tmp_path, CONFIG, stored, mxfp4=mxfp4)
    model = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens), use_cache=False).logits.double().numpy()
    assert relative_error(theirs, logits) < FLOAT32_ERROR


def test_agrees_with_openai(tensors, tokens, logits, tmp_path: Path):
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("gpt_oss.torch.model")
    write_original_folder(tmp_path, CONFIG, tensors)
    # Its parameters are bf16, as the checkpoint's, so widening them after loading loses nothing.
    theirs = model.Transformer.from_checkpoint(str(tmp_path), device="cpu").float()
    with torch.inference_mode():
        for row, expected in zip(tokens, logits, strict=True):
            assert relative_error(theirs(torch.from_numpy(row)).double().numpy(), expected) < FLOAT32_ERROR


def test_agrees_with_transformers_past_the_original_context(tensors):
    """YaRN's unrounded range shows in the angles at once, in the logits only far out: compare both there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(**CONFIG)
    rotary = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(config)
    positions = np.array([0, 1, 4095, 4096, 5000, 131071])
    theirs = rotary(torch.zeros(1, dtype=torch.float32), torch.from_numpy(positions)[None])
    # A float32 angle of 131,071 radians is known to 0.008.
    for position, tolerance in ((1, 1e-6), (4095, 5e-4), (131071, 2e-2)):
        at = positions.tolist().index(position)
        for table, expected in zip(theirs, oracle.rope_tables(CONFIG, positions), strict=True):
            np.testing.assert_allclose(table[0, at].numpy(), expected[at], atol=tolerance)


def relative_error(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference as a share of the logits' spread."""
    return float(np.abs(theirs - ours).max() / ours.std())


def draw_tensors(config: dict[str, Any], *, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under Hugging Face's names, experts in MXFP4, with activations of order one."""
    rng = np.random.default_rng(seed)
    width, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float, around: float = 0) -> None:
        tensors[name] = (around + scale * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    def linear(name: str, rows: int, columns: int) -> None:
        normal(name + ".weight", rows, columns, scale=columns**-0.5)
        normal(name + ".bias", rows, scale=0.3)

    def mxfp4(name: str, rows: int, columns: int) -> None:
        tensors[name + "_blocks"] = rng.integers(256, size=(experts, rows, columns // 32, 16), dtype=np.uint8)
        # Random codes have a root mean square of 2.9: scales of 2^-6 to 2^-3 make sums that sometimes pass the limit.
        tensors[name + "_scales"] = rng.integers(121, 125, size=(experts, rows, columns // 32), dtype=np.uint8)
        normal(name + "_bias", experts, rows, scale=0.3)

    normal("model.embed_tokens.weight", config["vocab_size"], width, scale=1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normal(at + "input_layernorm.weight", width, scale=0.2, around=1)
        linear(at + "self_attn.q_proj", heads * head_dim, width)
        linear(at + "self_attn.k_proj", kv_heads * head_dim, width)
        linear(at + "self_attn.v_proj", kv_heads * head_dim, width)
        linear(at + "self_attn.o_proj", width, heads * head_dim)
        normal(at + "self_attn.sinks", heads, scale=1)
        normal(at + "post_attention_layernorm.weight", width, scale=0.2, around=1)
        linear(at + "mlp.router", experts, width)
        mxfp4(at + "mlp.experts.gate_up_proj", 2 * inner, width)
        mxfp4(at + "mlp.experts.down_proj", width, inner)
    normal("model.norm.weight", width, scale=0.2, around=1)
    normal("lm_head.weight", config["vocab_size"], width, scale=width**-0.5)
    return tensors


def dequantised(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same checkpoint with its experts in bf16, which holds every one of these products exactly."""
    stored = {name: value for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for layer in range(config["num_hidden_layers"]):
        for kind in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            stored[name] = oracle.expert_weights(tensors, name).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
    return stored


def write_hf_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, mxfp4: bool) -> None:
    extra = {"quantization_config": {"quant_method": "mxfp4"}} if mxfp4 else {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | extra))
    _save(folder, tensors)


def write_original_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    same = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim")
    same += ("num_attention_heads", "num_key_value_heads", "sliding_window", "initial_context_length", "rope_theta")
    renamed = {"num_experts": config["num_local_experts"], "experts_per_token": config["num_experts_per_tok"]}
    rope = config["rope_scaling"]
    renamed |= {"rope_scaling_factor": rope["factor"], "rope_ntk_alpha": rope["beta_slow"]}
    renamed |= {"rope_ntk_beta": rope["beta_fast"]}
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in same} | renamed))
    _save(folder, original_names(config, tensors))


def original_names(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        hf, block = f"model.layers.{layer}.", f"block.{layer}."
        renamed[block + "attn.norm.scale"] = tensors[hf + "input_layernorm.weight"]
        renamed[block + "attn.sinks"] = tensors[hf + "self_attn.sinks"]
        renamed[block + "mlp.norm.scale"] = tensors[hf + "post_attention_layernorm.weight"]
        for part in ("weight", "bias"):
            qkv = [tensors[f"{hf}self_attn.{name}_proj.{part}"] for name in "qkv"]
            renamed[block + "attn.qkv." + part] = np.concatenate(qkv)
            renamed[block + "attn.out." + part] = tensors[f"{hf}self_attn.o_proj.{part}"]
            renamed[block + "mlp.gate." + part] = tensors[f"{hf}mlp.router.{part}"]
        for theirs, name in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            renamed[f"{block}mlp.{theirs}_weight.blocks"] = tensors[f"{hf}mlp.experts.{name}_blocks"]
            renamed[f"{block}mlp.{theirs}_weight.scales"] = tensors[f"{hf}mlp.experts.{name}_scales"]
            renamed[f"{block}mlp.{theirs}_bias"] = tensors[f"{hf}mlp.experts.{name}_bias"]
    return renamed


def _save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # The library writes an array's memory as it lies, whatever its strides.
    in_order = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(in_order, folder / "model.safetensors", metadata={"format": "pt"})
