"""Adapters on disk: ours come back bit for bit or not at all, PEFT's as its formula says, and strange ones not."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding

from gptoss_jax.convert import store
from gptoss_jax.convert.adapters import base_config, base_digest, load_adapter, save_adapter, sniff_adapter
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.export import open_base
from gptoss_jax.convert.peft import write_peft
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import Adapter, AdapterSpec, Target, adapter_shapes
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.sharding import make_mesh, partition
from tests.tiny import TINY

SMALL = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
D, F, E, N = SMALL.width, SMALL.expert_width, SMALL.num_experts, SMALL.num_heads * SMALL.head_dim
ALL: tuple[Target, ...] = ("q", "k", "v", "o", "router", "gate_up", "down")
PREFIX = "base_model.model.model.layers"
DIGEST = "ab" * 32
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(spec: AdapterSpec, *, dtype: Any = np.float32) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in adapter_shapes(SMALL, spec).items()}
    return Adapter(spec=spec, leaves={name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.spec == expected.spec
    assert found.leaves.keys() == expected.leaves.keys()
    for name, leaf in expected.leaves.items():
        assert found.leaves[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found.leaves[name], leaf)


# --- ours ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "ours", make(SPEC), config=SMALL, base_digest=DIGEST)
    return tmp_path / "ours"


SPEC = AdapterSpec(rank=2, alpha=7.0, targets=("o", "down"), layers=(1,))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_ours_come_back(tmp_path: Path, dtype):
    adapter = make(AdapterSpec(rank=3, alpha=0.1, targets=ALL), dtype=dtype)
    save_adapter(tmp_path / "ours", adapter, config=SMALL, base_digest=DIGEST)
    assert sniff_adapter(tmp_path / "ours") == "ours"
    assert base_config(tmp_path / "ours") == SMALL
    assert_same(load_adapter(tmp_path / "ours", SMALL, base_digest=DIGEST), adapter)
    assert_same(load_adapter(tmp_path / "ours", SMALL), adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_ours_from_a_mesh(tmp_path: Path):
    """Each device's part is a file of its own."""
    adapter = make(AdapterSpec(rank=3, alpha=2.0, targets=("q", "gate_up"), layers=(0,)))
    mesh = make_mesh(expert=4, tensor=2)
    axes = {name: axes for name, (_, axes) in adapter_shapes(SMALL, adapter.spec).items()}
    places = {name: NamedSharding(mesh, partition(each)) for name, each in axes.items()}
    leaves = {name: jax.device_put(leaf, places[name]) for name, leaf in adapter.leaves.items()}
    save_adapter(tmp_path / "ours", dataclasses.replace(adapter, leaves=leaves), config=SMALL, base_digest=DIGEST)
    home = tmp_path / "ours" / "params" / "state" / "layers.0.moe.gate_up.adapter.b"
    assert len([path for path in (home / "c").rglob("*") if path.is_file()]) == 8
    assert_same(load_adapter(tmp_path / "ours", SMALL), adapter)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "ours.adapter-unfinished").mkdir()  # of one that was killed
    (tmp_path / "ours.adapter-unfinished" / "params").write_text("half")
    with monkeypatch.context() as patch:
        patch.setattr(store, "finish", full)
        with pytest.raises(UserError, match="ours: cannot be written: No space left on device"):
            save_adapter(tmp_path / "ours", make(SPEC), config=SMALL, base_digest=DIGEST)
    assert list(tmp_path.iterdir()) == []
    save_adapter(tmp_path / "ours", make(SPEC), config=SMALL, base_digest=DIGEST)
    with pytest.raises(UserError, match="ours exists; expected a destination that does not: remove it or name another"):
        save_adapter(tmp_path / "ours", make(SPEC), config=SMALL, base_digest=DIGEST)


def test_every_damaged_file_is_named(saved: Path):
    files = [path for path in sorted(saved.rglob("*")) if path.is_file() and path.stat().st_size]
    assert sum("/c/" in path.as_posix() for path in files) == 4
    for path in files:
        text = path.read_bytes()
        at = len(text) // 2
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        with pytest.raises(UserError, match=rf"{path.name}.*(damaged|expected JSON).*"):
            load_adapter(saved, SMALL)
        path.write_bytes(text)
    files[-1].unlink()
    with pytest.raises(UserError, match=r"is damaged: expected .* bytes with CRC-32 [0-9a-f]{8}, found no file"):
        load_adapter(saved, SMALL)


@pytest.mark.parametrize("change", ["width", "num_heads", "num_experts", "expert_width", "layer_kinds"])
def test_a_base_of_other_sizes_is_named_with_both(saved: Path, change: str):
    value = alternating_layers(3) if change == "layer_kinds" else getattr(SMALL, change) * 2
    size, made, found = ("num_layers", 2, 3) if change == "layer_kinds" else (change, value // 2, value)
    with pytest.raises(UserError, match=f"made for a base with {size}={made}, this one has {size}={found};"):
        load_adapter(saved, dataclasses.replace(SMALL, **{change: value}))


def test_a_base_of_other_weights_is_refused(saved: Path):
    with pytest.raises(
        UserError, match=r"base with digest abababababab…, this one has cdcdcdcdcdcd…: its sizes are right"
    ):
        load_adapter(saved, SMALL, base_digest="cd" * 32)


def test_other_versions_and_no_adapter(saved: Path, tmp_path: Path):
    document = json.loads((saved / "adapter.json").read_text())
    (saved / "adapter.json").write_text(json.dumps(document | {"version": 2}))
    with pytest.raises(UserError, match=r"format 'gptoss_jax adapter' version 2; expected .* version 1"):
        load_adapter(saved, SMALL)
    with pytest.raises(UserError, match=r"has neither; expected an adapter: a folder with adapter\.json \(ours\) or"):
        load_adapter(tmp_path, SMALL)
    with pytest.raises(UserError, match="nothing is no folder; expected an adapter"):
        load_adapter(tmp_path / "nothing", SMALL)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("missing", "has no leaf layers.1.attention.o.adapter.a"),
        ("strange", "has a leaf layers.0.x, which its targets do not name"),
        ("shape", r"this model asks for \(2, 12, 16\)"),
        ("dtype", "is float16; expected bfloat16 or float32"),
    ],
)
def test_leaves_must_be_those_of_the_spec(tmp_path: Path, change: str, wrong: str):
    adapter = make(SPEC)
    leaves = dict(adapter.leaves)
    name, leaf = "layers.1.attention.o.adapter.a", leaves["layers.1.attention.o.adapter.a"]
    if change == "missing":
        del leaves[name]
    leaves |= {
        "strange": {"layers.0.x": leaf},
        "shape": {name: leaf[:1]},
        "dtype": {name: leaf.astype(np.float16)},
    }.get(change, {})
    with pytest.raises(UserError, match=wrong):
        save_adapter(tmp_path / "ours", dataclasses.replace(adapter, leaves=leaves), config=SMALL, base_digest=DIGEST)
    assert not (tmp_path / "ours").exists()


def test_the_digest_is_the_bases_in_every_form(tmp_path: Path):
    write_checkpoint(tmp_path / "hf", SMALL)
    write_checkpoint(tmp_path / "original", SMALL, layout="original")
    write_checkpoint(tmp_path / "other", SMALL, seed=1)
    convert(tmp_path / "original", tmp_path / "checkpoint", experts="bf16")
    same = {base_digest(open_base(tmp_path / name)) for name in ("hf", "original", "checkpoint")}
    assert len(same) == 1
    assert base_digest(open_base(tmp_path / "other")) not in same


# --- PEFT's, written ----------------------------------------------------------------------------------------------


def test_peft_names_shapes_and_orders(tmp_path: Path):
    """Judged by the formula of PEFT's wrapper of parameters, with the safetensors package."""
    adapter = make(AdapterSpec(rank=3, alpha=6.0, targets=ALL))
    write_peft(tmp_path / "peft", adapter, config=SMALL, dtype="float32")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    for module, path in {
        "self_attn.q_proj": "attention.q",
        "self_attn.o_proj": "attention.o",
        "mlp.router": "moe.router",
    }.items():
        update = tensors[f"{PREFIX}.1.{module}.lora_B.weight"] @ tensors[f"{PREFIX}.1.{module}.lora_A.weight"]
        a, b = (adapter.leaves[f"layers.1.{path}.adapter.{side}"] for side in "ab")
        expected = 2 * b.reshape(-1, 3) @ a.reshape(3, -1)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)
    for module, path in {"mlp.experts.base_layer": "moe.gate_up", "mlp.experts": "moe.down"}.items():
        update = peft_experts(*(tensors[f"{PREFIX}.0.{module}.lora_{side}.weight"] for side in "AB"))
        a, b = (adapter.leaves[f"layers.0.{path}.adapter.{side}"] for side in "ab")
        expected = 2 * np.einsum("eor,eri->eio", b.reshape(E, -1, 3), a)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (3, 3, {}, False)
    assert config["target_parameters"] == ["mlp.router.weight", *PARAMETERS]


def peft_experts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a = a.reshape(E, -1, a.shape[-1])
    return np.einsum("ore,eri->eio", b.reshape(b.shape[0], -1, E), a)


@pytest.mark.parametrize(("target", "other"), [("gate_up", "lora_{}"), ("down", "base_layer.lora_{}")])
def test_peft_has_both_projections_in_the_layers_that_have_one(tmp_path: Path, target: Target, other: str):
    adapter = make(AdapterSpec(rank=2, alpha=2.0, targets=("v", target), layers=(1,)))
    write_peft(tmp_path / "peft", adapter, config=SMALL, base_model="openai/gpt-oss-20b")
    with safetensors.safe_open(tmp_path / "peft" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 6
        for side in "AB":
            zeros = file.get_tensor(f"{PREFIX}.1.mlp.experts.{other.format(side)}.weight")
            assert zeros.dtype == ml_dtypes.bfloat16
            assert not zeros.any()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["v_proj"]
    assert config["layers_to_transform"] == [1]
    assert config["target_parameters"] == [f"layers.1.{name}" for name in PARAMETERS]
    assert config["base_model_name_or_path"] == "openai/gpt-oss-20b"
    found = load_adapter(tmp_path / "peft", SMALL)
    assert found.spec == adapter.spec  # the zeros are not read back
    for name, leaf in adapter.leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_peft_does_not_write_over_anything(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"expected a new or empty folder, found 'mine\.txt' in it"):
        write_peft(tmp_path, make(SPEC), config=SMALL)


# --- PEFT's, read -------------------------------------------------------------------------------------------------


def write(
    folder: Path, tensors: Mapping[str, np.ndarray], *, file: str = "adapter_model.safetensors", **settings: Any
) -> Path:
    """A folder as PEFT writes it; of a setting that is None nothing is said."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": []} | settings
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(dict(tensors), folder / file)
    return folder


def pair(module: str, a: tuple[int, int], b: tuple[int, int], *, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(module))
    shapes = {"A": a, "B": b}
    return {
        f"{PREFIX}.{module}.lora_{side}.weight": rng.standard_normal(shape).astype(dtype)
        for side, shape in shapes.items()
    }


def of_q(*, rank: int = 2, layers: tuple[int, ...] = (0, 1), dtype: Any = np.float32) -> dict[str, np.ndarray]:
    found = {}
    for layer in layers:
        found |= pair(f"{layer}.self_attn.q_proj", (rank, D), (N, rank), dtype=dtype)
    return found


def of_down(*, rank: int = 2, turned: bool = False) -> dict[str, np.ndarray]:
    a, b = (D, F) if turned else (F, D)
    return pair("0.mlp.experts", (E * rank, a), (b, E * rank)) | pair("1.mlp.experts", (E * rank, a), (b, E * rank))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_peft_in_every_float(tmp_path: Path, dtype):
    tensors = of_q(dtype=dtype)
    found = load_adapter(write(tmp_path / "peft", tensors, target_modules=["q_proj"]), SMALL)
    assert sniff_adapter(tmp_path / "peft") == "peft"
    assert found.spec == AdapterSpec(rank=2, alpha=4.0, targets=("q",))
    b = tensors[f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"].astype(np.float32)
    np.testing.assert_array_equal(found.leaves["layers.1.attention.q.adapter.b"].reshape(N, 2), b)


def test_ranks_and_scales_become_one(tmp_path: Path):
    """Zeros fill the smaller rank up, and every scale goes into b."""
    tensors = of_q(rank=2, layers=(0,)) | of_q(rank=5, layers=(1,))
    settings = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {r".*\.0\..*q_proj": 9}}
    write(tmp_path / "peft", tensors, target_modules=["q_proj"], use_rslora=True, **settings)
    found = load_adapter(tmp_path / "peft", SMALL)
    assert found.spec == AdapterSpec(rank=5, alpha=5.0, targets=("q",))
    for layer, scale in enumerate((9 / math.sqrt(2), 4 / math.sqrt(5))):
        a, b = (found.leaves[f"layers.{layer}.attention.q.adapter.{side}"] for side in "ab")
        theirs = [tensors[f"{PREFIX}.{layer}.self_attn.q_proj.lora_{side}.weight"] for side in "BA"]
        np.testing.assert_allclose(b.reshape(N, 5) @ a, scale * theirs[0] @ theirs[1], rtol=1e-4, atol=1e-4)
    assert not found.leaves["layers.0.attention.q.adapter.a"][2:].any()


def test_a_layer_without_a_target_of_others_has_zeros(tmp_path: Path):
    tensors = of_q() | pair("1.mlp.experts", (E * 2, F), (D, E * 2))
    settings = {"target_modules": ["q_proj"], "target_parameters": ["1.mlp.experts.down_proj"]}
    found = load_adapter(write(tmp_path / "peft", tensors, **settings), SMALL)
    assert found.spec.targets == ("q", "down")
    assert not found.leaves["layers.0.moe.down.adapter.a"].any()
    assert found.leaves["layers.1.moe.down.adapter.a"].all()


@pytest.mark.parametrize("turned", [False, True])
def test_down_in_either_orientation(tmp_path: Path, turned: bool):
    """Alone it is named as gate and up alone would be; the settings tell, and the sizes say how it lies."""
    tensors = of_down(turned=turned)
    found = load_adapter(write(tmp_path / "peft", tensors, target_parameters=[PARAMETERS[1]]), SMALL)
    a, b = (found.leaves[f"layers.1.moe.down.adapter.{side}"] for side in "ab")
    expected = peft_experts(*(tensors[f"{PREFIX}.1.mlp.experts.lora_{side}.weight"] for side in "AB"))
    ours = np.einsum("eor,eri->eoi" if turned else "eor,eri->eio", b, a)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"use_dora": True}, "use_dora is True, which is not read: DoRA scales"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which is not read: trained biases"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not read: whole modules"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"kasa_config": {"beta": 1}}, r"kasa_config is \{'beta': 1\}, which is not read: no low-rank update"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights of the base"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head; only attention, router and experts"),
        ({"target_modules": ["embed_tokens"]}, r"target_modules names model\.embed_tokens"),
        ({"target_modules": 7}, "target_modules is 7; expected a list of names"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj_bias"]},
            "target_parameters names 'mlp.experts.gate_up_p",
        ),
        ({"target_parameters": ["2.mlp.experts.down_proj"]}, "or take the base that the adapter was made for"),
        ({"r": 0}, "r is 0; expected a rank of 1 or more"),
        ({"r": 3}, r"q_proj\.lora_A\.weight has rank 2; adapter_config\.json says 3: correct it"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 1000.*; expected a number"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"layers_to_transform": ["a"]}, r"layers_to_transform is \['a'\]; expected numbers of layers"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h'; a gpt-oss keeps its layers under 'layers'"),
        ({"alpha_pattern": {"(a+)+": 1}}, r"alpha_pattern has the pattern '\(a\+\)\+'; expected at most"),
        ({"alpha_pattern": {"(a": 1}}, r"alpha_pattern has '\(a', which is no pattern"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\]; expected an object"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"0\.self_attn\.k_proj\.lora_A\.weight is missing, which"),
        (
            {"layers_to_transform": 1},
            r"holds tensor '.*0\.self_attn\.q_proj.*', which adapter_config\.json targets",
        ),
        ({"target_modules": ["input_layernorm"]}, "holds tensor"),
    ],
    ids=str,
)
def test_what_peft_says_and_cannot_be_done(tmp_path: Path, settings: dict[str, Any], message: str):
    write(tmp_path / "peft", of_q(), **({"target_modules": ["q_proj"]} | settings))
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "peft", SMALL)


KEYS = ["peft_type", "r", "lora_alpha", "bias", "target_modules", "target_parameters", "use_rslora", "use_dora"]
KEYS += ["layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights"]
KEYS += ["exclude_modules", "modules_to_save", "fan_in_fan_out"]
NUMBERS, TEXTS = (True, -1, 0, 1.5, 10**400), ("", "q_proj", "(", "\ud800")
STRANGE = (None, *NUMBERS, *TEXTS, [], [None], [[]], ["q_proj", 1], {}, {"a": None}, {"": []}, {"q_proj": 1})


@pytest.mark.parametrize("key", KEYS)
def test_strange_values_are_read_or_refused(tmp_path: Path, key: str):
    write(tmp_path / "peft", of_q(), target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_config.json"
    config, refused = json.loads(file.read_text()), 0
    for value in STRANGE:
        file.write_text(json.dumps(config | {key: value}))
        try:
            load_adapter(tmp_path / "peft", SMALL)
        except UserError as error:
            assert len(str(error)) < 600
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("0.self_attn.q_proj", (2, D + 1), (N, 2)), r"has shape \(2, 161\) .* asks for \(R, 160\) and \(192, R\)"),
        (pair("0.self_attn.q_proj", (2, D), (N, 3)), "the adapter is of another base"),
        (pair("0.self_attn.q_proj", (2, D), (N, 2), dtype=np.float64), "has dtype float64; expected bfloat16, float16"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": np.full((2, D), np.inf, np.float32)}, "holds NaN or inf"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": np.zeros(D, np.float32)}, r"has shape \(160,\)"),
        (
            {"base_model.model.lm_head.lora_A.weight": np.zeros((2, D), np.float32)},
            "holds tensor 'base_model.model",
        ),
        (of_q(layers=(2,)), "targets in no layer of a base of 2"),
    ],
    ids=["width", "ranks", "dtype", "inf", "axes", "lm_head", "layer"],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, np.ndarray], message: str):
    write(tmp_path / "peft", of_q() | tensors, target_modules=["q_proj"])
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "peft", SMALL)


def test_experts_of_another_base(tmp_path: Path):
    write(tmp_path / "peft", of_down(), target_parameters=[PARAMETERS[1]])
    more = dataclasses.replace(SMALL, num_experts=2 * E - 1)
    with pytest.raises(UserError, match=r"has shape \(16, 224\) and its lora_B \(160, 16\); .* asks for \(15 R, 224\)"):
        load_adapter(tmp_path / "peft", more)


def test_nothing_targeted_and_no_weights(tmp_path: Path):
    write(tmp_path / "nothing", {}, target_modules=[])
    with pytest.raises(UserError, match=r"its adapter_config\.json targets no matrix of a gpt-oss with 2 layers"):
        load_adapter(tmp_path / "nothing", SMALL)
    write(tmp_path / "pickled", of_q(), file="adapter_model.bin", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"has adapter_model\.bin but no .*; pickled weights can run code"):
        load_adapter(tmp_path / "pickled", SMALL)
    (tmp_path / "pickled" / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing beside its adapter_config\.json"):
        load_adapter(tmp_path / "pickled", SMALL)
