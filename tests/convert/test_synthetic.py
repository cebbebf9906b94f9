"""Made-up checkpoints: exactly the released layouts, the same model in each of them, and one that behaves."""

import dataclasses
import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.names import file_tensors
from gptoss_jax.convert.synthetic import scale_table, write_checkpoint
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.kernels import mxfp4
from gptoss_jax.model.config import ModelConfig, alternating_layers
from tests import oracle
from tests.tiny import TINY

ONE_LAYER = dataclasses.replace(TINY, layer_kinds=alternating_layers(1))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    opened = TensorFolder.open(folder)
    return {name: opened.read(name) for name in opened.tensors}


def float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


# --- the layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "layout", "experts"),
    [("tiny_hf", "hf", "mxfp4"), ("tiny_hf_bf16", "hf", "bf16"), ("tiny_original", "original", "mxfp4")],
)
def test_a_checkpoint_has_the_tensors_of_its_layout(fixture, layout, experts, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(fixture)
    found = TensorFolder.open(folder).tensors
    expected = file_tensors(TINY, layout=layout, experts=experts)
    assert {(i.name, i.dtype, i.shape) for i in found.values()} == {(t.name, t.dtype, t.shape) for t in expected}
    assert ModelConfig.from_json(json.loads((folder / "config.json").read_text())) == TINY
    beside = {"hf": {"generation_config.json"}, "original": {"dtypes.json"}}[layout]
    assert set(os.listdir(folder)) == {"config.json", "tokenizer.json", "model.safetensors"} | beside


def test_both_layouts_hold_the_same_model(tiny_hf: Path, tiny_original: Path):
    hf, original = tensors_of(tiny_hf), tensors_of(tiny_original)
    at, block = "model.layers.3.", "block.3."
    for kind in ("weight", "bias"):
        qkv = np.concatenate([hf[f"{at}self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
        np.testing.assert_array_equal(original[f"{block}attn.qkv.{kind}"], qkv)
    pairs = {
        "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
        "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
        "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
        "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
        "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
        "mlp.router.weight": "mlp.gate.weight",
        "self_attn.o_proj.weight": "attn.out.weight",
        "self_attn.sinks": "attn.sinks",
        "post_attention_layernorm.weight": "mlp.norm.scale",
    }
    for name, twin in pairs.items():
        np.testing.assert_array_equal(original[block + twin], hf[at + name])
    np.testing.assert_array_equal(original["unembedding.weight"], hf["lm_head.weight"])


def test_bf16_experts_are_the_packed_ones_decoded(tiny_hf: Path, tiny_hf_bf16: Path):
    packed, decoded = tensors_of(tiny_hf), tensors_of(tiny_hf_bf16)
    for name in ("gate_up_proj", "down_proj"):
        at = f"model.layers.2.mlp.experts.{name}"
        expected = oracle.mxfp4_decode(packed[f"{at}_blocks"], packed[f"{at}_scales"])
        found = decoded[at].astype(np.float64)
        np.testing.assert_array_equal(found, np.swapaxes(expected, 1, 2))
        ours = mxfp4.decode(packed[f"{at}_blocks"], packed[f"{at}_scales"], jnp.bfloat16)
        assert np.swapaxes(np.asarray(ours), 1, 2).tobytes() == decoded[at].tobytes()  # the sign of zero too
    same = decoded.keys() & packed.keys()
    assert len(same) == len(decoded) - 2 * TINY.num_layers
    assert all(packed[name].tobytes() == decoded[name].tobytes() for name in same)


def test_openais_dtypes(tiny_original: Path):
    dtypes = json.loads((tiny_original / "dtypes.json").read_text())
    assert dtypes.keys() == TensorFolder.open(tiny_original).tensors.keys()
    assert dtypes["block.0.mlp.mlp1_weight.blocks"] == "FP4"
    assert dtypes["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert dtypes["block.0.mlp.mlp1_bias"] == "BF16"


@pytest.mark.parametrize(
    ("layout", "pattern"), [("hf", "model-0000{}-of-0000{}"), ("original", "model--0000{}-of-0000{}")]
)
def test_shards_have_the_releases_names(tmp_path: Path, layout, pattern: str):
    write_checkpoint(tmp_path / "new", ONE_LAYER, layout=layout, max_shard_bytes=300_000)
    found = sorted(name for name in os.listdir(tmp_path / "new") if name.endswith(".safetensors"))
    assert len(found) > 2
    assert found == [f"{pattern.format(i + 1, len(found))}.safetensors" for i in range(len(found))]
    write_checkpoint(tmp_path / "whole", ONE_LAYER, layout=layout)
    sharded, whole = tensors_of(tmp_path / "new"), tensors_of(tmp_path / "whole")
    assert sharded.keys() == whole.keys()
    assert all(sharded[name].tobytes() == whole[name].tobytes() for name in whole)


def test_the_tokenizer_speaks_within_the_vocabulary(tiny_hf: Path):
    tokenizer = load_tokenizer(tiny_hf)
    ids = tokenizer.encode("Grüße, 世界")
    assert max(ids) < TINY.vocab_size
    assert tokenizer.decode(ids) == "Grüße, 世界"
    config = json.loads((tiny_hf / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.special("<|return|>") < TINY.vocab_size


# --- the weights --------------------------------------------------------------------------------------------------

# Made with NumPy 2.4 on x86-64. A change voids every golden that was made from a synthetic checkpoint.
PINNED = {
    "model.layers.0.self_attn.q_proj.weight": "5045d75a73353215",
    "model.layers.5.mlp.experts.down_proj_blocks": "72ff89ffe5bb9d5c",
    "model.layers.5.mlp.experts.down_proj_scales": "81a0b814a3a97187",
    "model.layers.5.mlp.experts.down_proj_bias": "ef1fa7df559a9871",
}


@pytest.mark.parametrize("name", PINNED)
def test_weights_are_the_same_for_ever(tiny_hf: Path, name: str):
    assert TensorFolder.open(tiny_hf).sha256(name)[:16] == PINNED[name]


def test_weights_depend_on_the_seed_and_the_name_alone(tiny_hf: Path, tmp_path: Path):
    deep = tensors_of(tiny_hf)
    write_checkpoint(tmp_path / "shallow", ONE_LAYER)
    shallow = tensors_of(tmp_path / "shallow")
    assert all(array.tobytes() == deep[name].tobytes() for name, array in shallow.items())
    write_checkpoint(tmp_path / "other", ONE_LAYER, seed=1)
    other = tensors_of(tmp_path / "other")
    assert all(array.tobytes() != deep[name].tobytes() for name, array in other.items())
    experts = deep["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    hashes = {hashlib.sha256(expert.tobytes()).digest() for expert in experts}
    assert len(hashes) == TINY.num_experts


def test_every_spread_is_what_it_should_be(tiny_hf_bf16: Path):
    """Within five standard errors of an estimated standard deviation, 5 / sqrt(2 n), and the 8 bits of bf16."""
    width, heads = TINY.width, TINY.num_heads * TINY.head_dim
    expected = {
        "embed_tokens.weight": 2.0,
        "q_proj.weight": 1.2 / width**0.5,
        "v_proj.weight": 1 / width**0.5,
        "o_proj.weight": 0.4 / heads**0.5,
        "router.weight": 1.5 / width**0.5,
        "experts.gate_up_proj": 2.0 / width**0.5,
        "experts.down_proj": 0.15 / TINY.expert_width**0.5,
        "lm_head.weight": 3.0 / width**0.5,
    }
    tensors = tensors_of(tiny_hf_bf16)
    for ending, std in expected.items():
        values = np.concatenate([float32(array).ravel() for name, array in tensors.items() if name.endswith(ending)])
        assert values.std() == pytest.approx(std, rel=5 / (2 * values.size) ** 0.5 + 0.004)
    for name, array in tensors.items():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            mean, std = (0.0, 0.1) if name.endswith("bias") else (1.0, 0.2)
            error = std / array.size**0.5
            assert float32(array).mean() == pytest.approx(mean, abs=5 * error)
            assert float32(array).std() == pytest.approx(std, abs=5 * error)


@pytest.mark.parametrize("std", [1e-6, 0.0099, 0.01, 0.0104, 0.02, 0.04, 1.0, 3.7])
def test_scales_reach_any_spread(std: float):
    scales = scale_table(std)
    assert 3 <= len(np.unique(scales)) <= 4
    assert scales.max() < mxfp4.NAN_SCALE
    mean_square = np.mean(np.square(mxfp4.CODE_VALUES)) * np.mean(4.0 ** (scales.astype(float) - 127))
    assert mean_square**0.5 == pytest.approx(std, rel=0.01)  # a fraction in 256 steps


def test_packed_experts_use_every_code_and_few_scales(tiny_hf: Path):
    tensors = tensors_of(tiny_hf)
    blocks = tensors["model.layers.4.mlp.experts.down_proj_blocks"]
    counts = np.bincount(np.concatenate([blocks.ravel() & 0xF, blocks.ravel() >> 4]), minlength=16)
    assert counts.min() > 0.9 * counts.mean()
    for name in ("gate_up", "down"):
        assert 3 <= len(np.unique(tensors[f"model.layers.4.mlp.experts.{name}_proj_scales"])) <= 4


# --- the model ----------------------------------------------------------------------------------------------------


def test_logits_differ_by_several_units(tiny_hf: Path):
    config = json.loads((tiny_hf / "config.json").read_text())
    tokens = np.random.RandomState(0).randint(0, TINY.vocab_size, (2, 40))
    logits = oracle.forward(config, tensors_of(tiny_hf), tokens)
    assert 2.5 < logits.std() < 3.5
    assert len(np.unique(logits.argmax(-1))) > 40  # of 80 positions: no token wins everywhere


DEEP = dataclasses.replace(
    TINY, width=192, expert_width=96, layer_kinds=alternating_layers(24), num_experts=32, experts_per_token=4
)


@pytest.mark.parametrize(
    "config", [pytest.param(TINY, id="tiny"), pytest.param(DEEP, id="deep", marks=pytest.mark.slow)]
)
def test_the_model_stays_of_order_one_and_visits_every_expert(config: ModelConfig, tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path / "new", config, experts="bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    sizes: list[float] = []
    visits: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: sizes.append(out.square().mean().sqrt().item()))
        layer.mlp.router.register_forward_hook(lambda module, args, out: visits.append(out[-1].numpy().ravel()))
    with torch.no_grad():
        model(torch.from_numpy(np.random.RandomState(0).randint(0, config.vocab_size, (2, 300))))
    assert len(sizes) == len(visits) == config.num_layers
    assert all(1 < size < 4 for size in sizes)
    for layer in visits:
        share = np.bincount(layer, minlength=config.num_experts) / layer.size * config.num_experts
        assert share.min() > 0.05
        assert share.max() < 6


# --- other people's readers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tiny_hf", "tiny_hf_bf16"])
def test_transformers_loads_it(fixture: str, request: pytest.FixtureRequest):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(fixture)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.RandomState(0).randint(0, TINY.vocab_size, (1, 20))
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    expected = oracle.forward(json.loads((folder / "config.json").read_text()), tensors_of(folder), tokens)
    # float32 against float64 through six layers; the logits' standard deviation is about 3.
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_openais_loader_reads_it(tiny_original: Path, tiny_hf_bf16: Path):
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("gpt_oss.torch.weights")
    checkpoint = weights.Checkpoint(str(tiny_original), torch.device("cpu"))
    expected = tensors_of(tiny_hf_bf16)

    def bits(tensor) -> np.ndarray:
        assert tensor.dtype == torch.bfloat16
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)

    for name, twin in {"mlp1_weight": "gate_up_proj", "mlp2_weight": "down_proj"}.items():
        found = bits(checkpoint.get(f"block.1.mlp.{name}"))
        np.testing.assert_array_equal(found, np.swapaxes(expected[f"model.layers.1.mlp.experts.{twin}"], 1, 2))
    np.testing.assert_array_equal(bits(checkpoint.get("norm.scale")), expected["model.norm.weight"])


# --- limits -------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_a_piece(tmp_path: Path):
    large = dataclasses.replace(ONE_LAYER, vocab_size=90_000, num_experts=512)  # 29 MB twice, 30 MB of experts
    write_checkpoint(tmp_path / "warm", ONE_LAYER)
    seen = []
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path / "new", large, on_bytes=seen.append)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = sum(tensor.nbytes for tensor in file_tensors(large, layout="hf", experts="mxfp4"))
    assert sum(seen) == total > 85e6
    assert peak < 10e6  # pieces of 1 MiB, their indices as 64-bit integers, and jax's abstract model


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path):
    with pytest.raises(Unsupported, match="MXFP4 experts only"):
        write_checkpoint(tmp_path / "new", TINY, layout="original", experts="bf16")
    with pytest.raises(UserError, match="vocab_size=100"):
        write_checkpoint(tmp_path / "new", dataclasses.replace(TINY, vocab_size=100))
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="expected a new or empty folder, found 'mine'"):
        write_checkpoint(tmp_path, TINY)
