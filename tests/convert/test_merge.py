"""Merging: bytes that nothing changes stay, the others are what NumPy finds, and the model is base and adapter."""

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gptoss_jax
from gptoss_jax.cli import merge as command
from gptoss_jax.convert.adapters import base_digest, save_adapter
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.export import open_base
from gptoss_jax.convert.merge import Merged, Survival, merge
from gptoss_jax.convert.peft import WEIGHTS_NAME, write_peft
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels import mxfp4
from gptoss_jax.kernels.moe_matmul.merged import merged_codes
from gptoss_jax.model.adapter import Adapter, AdapterSpec, Target, adapter_shapes, with_adapters
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import parameter_shapes
from tests.parity import compare
from tests.tiny import TINY

SMALL = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
BFLOAT16 = ml_dtypes.bfloat16
ATTENTION: tuple[Target, ...] = ("q", "k", "v", "o", "router")
EXPERTS: tuple[Target, ...] = ("gate_up", "down")
HF = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "router": "mlp.router.weight",
    "gate_up": "mlp.experts.gate_up_proj",
    "down": "mlp.experts.down_proj",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL as hf/, original/ and hf_bf16/; hf/ converted as checkpoint/."""
    root = tmp_path_factory.mktemp("bases")
    write_checkpoint(root / "hf", SMALL)
    write_checkpoint(root / "original", SMALL, layout="original")
    write_checkpoint(root / "hf_bf16", SMALL, experts="bf16")
    convert(root / "hf", root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def digest(bases: Path) -> str:
    return base_digest(open_base(bases / "hf"))


def make(targets: tuple[Target, ...], *, size: float = 0.3, layers: tuple[int, ...] | None = None) -> Adapter:
    """Random, with an update of about `size` times the weights, none of experts 2 and 5, and none of the last rows."""
    spec = AdapterSpec(rank=3, alpha=6.0, targets=targets, layers=layers)
    rng = np.random.default_rng(1)
    leaves = {}
    for name, (shape, axes) in adapter_shapes(SMALL, spec).items():
        leaf = rng.standard_normal(shape).astype(np.float32) / 6**0.5
        if name.endswith(".a"):
            leaf *= size * 0.02
        elif axes[0] == "experts":
            leaf[[2, 5]] = 0
            leaf[:, -3:] = 0
        leaves[name] = leaf
    return Adapter(spec=spec, leaves=leaves)


def replaced(adapter: Adapter, leaves: dict[str, np.ndarray]) -> Adapter:
    return dataclasses.replace(adapter, leaves={**adapter.leaves, **leaves})


def save(path: Path, adapter: Adapter, digest: str) -> Path:
    save_adapter(path, adapter, config=SMALL, base_digest=digest)
    return path


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def changed(folder: Path, base: Path) -> set[str]:
    """Names of the tensors whose SHA-256 differ."""
    found, expected = (
        {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors_of(path).items()}
        for path in (folder, base)
    )
    assert found.keys() == expected.keys()
    return {name for name in found if found[name] != expected[name]}


def update(adapter: Adapter, path: str, *, rounded: bool = False) -> np.ndarray:
    """scale · b a in float64, [*outputs, *inputs] or with the experts before."""
    a, b = (np.asarray(adapter.leaves[f"{path}.adapter.{side}"], np.float32) for side in "ab")
    b = b * np.float32(adapter.spec.scale)
    if rounded:
        a, b = (side.astype(BFLOAT16) for side in (a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.einsum("e...r,eri->e...i", b, a) if ".moe.g" in path or ".moe.d" in path else np.tensordot(b, a, 1)


def decoded(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    return mxfp4.decode_on_host(blocks, scales).astype(np.float64)


# --- what is not changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "layout", "rule"),
    [("checkpoint", "hf", "even"), ("checkpoint", "original", "reuse"), ("original", "original", "reuse")],
)
def test_an_adapter_of_zeros_changes_no_byte(bases: Path, digest: str, tmp_path: Path, base: str, layout, rule):
    adapter = make((*ATTENTION, *EXPERTS), size=0)
    save(tmp_path / "adapter", adapter, digest)
    report = merge(bases / base, tmp_path / "adapter", tmp_path / "out", layout=layout, experts="mxfp4", rule=rule)
    release = tensors_of(bases / layout)
    assert any((tensor & 0xF == 8).any() for name, tensor in release.items() if "blocks" in name)  # there is a -0
    assert changed(tmp_path / "out", bases / layout) == set()
    assert set(report.matrices.values()) == {Survival(update=0.0, retained=1.0, noise=0.0)}
    for path in (bases / layout).glob("*.json"):
        assert json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(path.read_text())


def test_an_adapter_of_attention_leaves_the_experts_bytes(bases: Path, digest: str, tmp_path: Path):
    adapter = make(ATTENTION, layers=(1,))
    save(tmp_path / "adapter", adapter, digest)
    report = merge(bases / "hf", tmp_path / "adapter", tmp_path / "out")
    assert (report.experts, report.rule) == ("mxfp4", None)
    assert changed(tmp_path / "out", bases / "hf") == {f"model.layers.1.{HF[target]}" for target in ATTENTION}
    before, after = tensors_of(bases / "hf"), tensors_of(tmp_path / "out")
    for target in ATTENTION:
        name, path = f"model.layers.1.{HF[target]}", f"layers.1.{'moe' if target == 'router' else 'attention'}.{target}"
        expected = before[name] + update(adapter, path).reshape(before[name].shape)
        assert after[name].dtype == before[name].dtype
        np.testing.assert_allclose(after[name].astype(np.float64), expected, rtol=2**-8, atol=1e-8)
        assert report.matrices[path].retained == pytest.approx(1, abs=0.01)
    assert (tmp_path / "out" / "config.json").read_bytes() == (bases / "hf" / "config.json").read_bytes()


# --- experts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_experts(bases: Path, digest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Path]:
    adapter = make(EXPERTS)
    return adapter, save(tmp_path_factory.mktemp("adapters") / "experts", adapter, digest)


@pytest.mark.parametrize("rule", ["reuse", "even"])
def test_packed_experts_are_what_numpy_packs(bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path, rule):
    """Blocks to which nothing is added keep their bytes; of the others the codes of W + b a."""
    adapter, path = on_experts
    report = merge(bases / "checkpoint", path, tmp_path / "out", experts="mxfp4", rule=rule)
    before, after = tensors_of(bases / "hf"), tensors_of(tmp_path / "out")
    for target in EXPERTS:
        name = f"model.layers.0.{HF[target]}"
        added = update(adapter, f"layers.0.moe.{target}", rounded=rule == "reuse")
        added = added.reshape(len(added), -1, added.shape[-1])
        values = (decoded(before, name) + added).astype(np.float32)
        kept = {"scales": before[f"{name}_scales"]} if rule == "reuse" else {}
        expected = mxfp4.encode(values, rule=rule, **kept)
        touched = (added.reshape((*expected.blocks.shape[:-1], 32)) != 0).any(-1)
        assert 0 < touched.mean() < 1
        same = after[f"{name}_blocks"] == np.where(touched[..., None], expected.blocks, before[f"{name}_blocks"])
        assert same.mean() > 0.9999  # float64 finds another side of a tie now and then
        scales = after[f"{name}_scales"] == np.where(touched, expected.scales, before[f"{name}_scales"])
        assert scales.mean() > 0.9999
        assert (after[f"{name}_blocks"] != before[f"{name}_blocks"]).mean() > 0.1
        assert same[~touched].all()
        assert scales[~touched].all()
        _check_survival(report.matrices[f"layers.0.moe.{target}"], before, after, name, adapter)


def _check_survival(
    found: Survival, before: dict[str, np.ndarray], after: dict[str, np.ndarray], name: str, adapter: Adapter
) -> None:
    layer, target = name.split(".")[2], "gate_up" if "gate_up" in name else "down"
    wanted = update(adapter, f"layers.{layer}.moe.{target}")
    weight = decoded(before, name)
    stored, wanted = (decoded(after, name) - weight), wanted.reshape(weight.shape)
    size, has_update = np.linalg.norm(wanted), wanted.any(axis=(1, 2))
    assert has_update.sum() == len(has_update) - 2
    assert found.update == pytest.approx(size / np.linalg.norm(weight[has_update]), rel=1e-4)
    assert found.retained == pytest.approx((stored * wanted).sum() / size**2, rel=1e-4)
    assert found.noise == pytest.approx(np.linalg.norm(stored - wanted) / size, rel=1e-4)


def test_experts_are_unpacked_where_nothing_is_said(bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path):
    adapter, path = on_experts
    report = merge(bases / "checkpoint", path, tmp_path / "out")
    assert (report.experts, report.rule) == ("bf16", None)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = tensors_of(bases / "hf_bf16"), tensors_of(tmp_path / "out")
    assert changed(tmp_path / "out", bases / "hf_bf16") == {
        f"model.layers.{layer}.{HF[target]}" for layer in (0, 1) for target in EXPERTS
    }
    name = "model.layers.1.mlp.experts.down_proj"
    expected = before[name] + update(adapter, "layers.1.moe.down").transpose(0, 2, 1)
    np.testing.assert_allclose(after[name].astype(np.float64), expected, rtol=2**-8, atol=1e-8)
    np.testing.assert_array_equal(after[name][[2, 5]], before[name][[2, 5]])
    assert report.matrices["layers.1.moe.down"].retained == pytest.approx(1, abs=0.01)


def test_a_small_update_is_gone_from_packed_experts_and_the_report_says_so(bases: Path, digest: str, tmp_path: Path):
    save(tmp_path / "adapter", make(("down",), size=0.002), digest)
    packed = merge(bases / "hf", tmp_path / "adapter", tmp_path / "packed", experts="mxfp4")
    plain = merge(bases / "hf", tmp_path / "adapter", tmp_path / "plain", experts="bf16")
    (lost, *_), (kept, *_) = (list(report.matrices.values()) for report in (packed, plain))
    assert 0.0005 < kept.update < 0.01
    assert (lost.retained, lost.noise) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.05))
    assert kept.retained > 0.8
    assert json.loads(json.dumps(packed.to_json()))["rule"] == "reuse"


def test_bf16_experts_are_packed_by_a_rule(bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path):
    """Also those without an update; the config says so again."""
    _, path = on_experts
    report = merge(bases / "hf_bf16", path, tmp_path / "out", experts="mxfp4", rule="up", layout="hf")
    assert report.rule == "up"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    name = "model.layers.1.mlp.experts.gate_up_proj"
    ours = decoded(tensors_of(tmp_path / "out"), name)
    np.testing.assert_array_equal(ours[[2, 5]], decoded(tensors_of(bases / "hf"), name)[[2, 5]])


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_float32(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf_bf16/ with every number in float32, so that merging rounds next to nothing."""
    folder = tmp_path_factory.mktemp("bases") / "float32"
    folder.mkdir()
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(bases / "hf_bf16").items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((bases / "hf_bf16" / "config.json").read_bytes())
    return folder


TOKENS = np.random.default_rng(0).integers(SMALL.vocab_size, size=(1, 20), dtype=np.int32)


def test_the_merged_model_computes_what_the_adapter_makes_of_its_base(in_float32: Path, tmp_path: Path):
    adapter = make((*ATTENTION, *EXPERTS))
    save(tmp_path / "adapter", adapter, base_digest(open_base(in_float32)))
    merge(in_float32, tmp_path / "adapter", tmp_path / "out", experts="bf16")
    base = gptoss_jax.load(in_float32, dtype=jnp.float32)
    attached = compare.logits(with_adapters(base, [adapter]), TOKENS)
    merged = compare.logits(gptoss_jax.load(tmp_path / "out", dtype=jnp.float32), TOKENS)
    assert np.abs(attached - compare.logits(base, TOKENS)).max() > 1
    assert np.abs(merged - attached).max() < 1e-4


def test_codes_on_kept_scales_are_those_of_merged_training(
    bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path
):
    """Every byte."""
    adapter, path = on_experts
    merge(bases / "hf", path, tmp_path / "out", experts="mxfp4")
    before, after = (parameters_of(folder) for folder in (bases / "hf", tmp_path / "out"))
    for target in EXPERTS:
        stem = f"layers.1.moe.{target}"
        a, b = (adapter.leaves[f"{stem}.adapter.{side}"] for side in "ab")
        weight = mxfp4.MXFP4(before[f"{stem}.blocks"], before[f"{stem}.scales"])
        trained = merged_codes(weight, jnp.asarray(a), jnp.asarray(b * np.float32(adapter.spec.scale)))
        np.testing.assert_array_equal(trained.blocks, after[f"{stem}.blocks"])
        np.testing.assert_array_equal(trained.scales, after[f"{stem}.scales"])


def parameters_of(folder: Path) -> dict[str, np.ndarray]:
    base = open_base(folder)
    names = (name for name in parameter_shapes(SMALL, base.experts) if ".1.moe." in name)
    return {name: base.read(name, tuple(slice(0, size) for size in base.shape(name))) for name in names}


@pytest.mark.slow  # the bytes have been compared
def test_the_exported_model_computes_what_merged_training_did(
    bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path
):
    adapter, path = on_experts
    merge(bases / "hf", path, tmp_path / "out", experts="mxfp4")
    base = gptoss_jax.load(bases / "hf", dtype=jnp.float32)
    trained = compare.logits(with_adapters(base, [adapter], merged=True), TOKENS)
    exported = compare.logits(gptoss_jax.load(tmp_path / "out", dtype=jnp.float32), TOKENS)
    assert np.abs(trained - compare.logits(base, TOKENS)).max() > 1
    assert np.abs(exported - trained).max() < 1e-4


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged(bases: Path, on_experts: tuple[Adapter, Path], tmp_path: Path):
    adapter, path = on_experts
    out = tmp_path / "out"
    with pytest.raises(UserError, match="'reuse' keeps a base's scales, and this base has bf16 experts"):
        merge(bases / "hf_bf16", path, out, experts="mxfp4", rule="reuse")
    with pytest.raises(Unsupported, match="OpenAI's layout holds MXFP4 experts only"):
        merge(bases / "hf", path, out, layout="original")
    with pytest.raises(UserError, match=r"is the checkpoint itself"):
        merge(bases / "hf", path, bases / "hf")
    with pytest.raises(UserError, match=r"made for a base with digest ababababab.*, this one has"):
        merge(bases / "hf", save(tmp_path / "of_another", adapter, "ab" * 32), out)
    with pytest.raises(UserError, match="nothing: no such folder; expected a checkpoint"):
        merge(bases / "nothing", path, out)
    assert not out.exists()


@pytest.mark.parametrize("target", ["q", "down"])
def test_nan_is_not_written(bases: Path, digest: str, tmp_path: Path, target: Target):
    adapter = make((target,))
    name = next(name for name in adapter.leaves if name.endswith(".b"))
    adapter = replaced(adapter, {name: np.full(adapter.leaves[name].shape, np.nan, np.float32)})
    save(tmp_path / "adapter", adapter, digest)
    for experts in ("mxfp4", "bf16"):
        with pytest.raises(UserError, match=rf"layers\.0\.\w+\.{target}: base and adapter add up to NaN or inf"):
            merge(bases / "hf", tmp_path / "adapter", tmp_path / "out", experts=experts)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("layers.1.attention.q.weight", (0, 2)),
        ("layers.1.attention.o.weight", (0, 1)),
        ("layers.0.moe.router.weight", (0, 1)),
        ("layers.0.moe.gate_up.blocks", (0, 1, 3)),
        ("layers.0.moe.down.scales", (0, 1, 2)),
    ],
)
def test_boxes_are_those_of_the_whole(bases: Path, name: str, cut: tuple[int, ...]):
    """Slabs and shards agree."""
    merged = Merged(open_base(bases / "hf"), make((*ATTENTION, *EXPERTS)), experts="mxfp4", rule="even")
    shape = merged.shape(name)
    whole = merged.read(name, tuple(slice(0, size) for size in shape))
    assert (whole.shape, whole.dtype) == (shape, merged.dtype(name))
    box = tuple(slice(size // 3, size // 3 * 2) if axis in cut else slice(0, size) for axis, size in enumerate(shape))
    np.testing.assert_array_equal(merged.read(name, box), whole[box])


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_left(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command.devices, "simulate", lambda number: None)  # jax has started
    adapter = make(("o", "down"), size=0.002, layers=(1,))
    a = np.asarray(adapter.leaves["layers.1.attention.o.adapter.a"])
    write_peft(tmp_path / "peft", replaced(adapter, {"layers.1.attention.o.adapter.a": 100 * a}), config=SMALL)

    def run(body: Callable[[argparse.Namespace], int], destination: str, **options: Any) -> tuple[str, str]:
        assert body(argparse.Namespace(destination=str(tmp_path / destination), **options)) == 0
        return capsys.readouterr()

    _, err = run(command.convert_adapter, "ours", source=str(tmp_path / "peft"), base=str(bases / "hf"))
    assert "ours: written; rank 3, of o, down" in err

    merging = {"checkpoint": str(bases / "hf"), "adapter": str(tmp_path / "ours"), "format": "hf", "experts": "mxfp4"}
    out, err = run(command.merge, "out", **merging, scale_rule=None, json=False)
    cells = r"\d+\.\d% ± \d+\.\d%"
    assert re.search(rf"; experts mxfp4, scales by reuse:\s+layer +o +down\s+─+\s+1 +{cells} +0\.\d% ± 100\.\d%", out)
    assert "1 of 2 matrices keep less than half of their update, the first is layers.1.moe.down: merge with" in err
    out, _ = run(command.merge, "again", **merging, scale_rule="even", json=True)
    assert json.loads(out)["matrices"].keys() == {"layers.1.attention.o", "layers.1.moe.down"}

    exporting = {"base": None, "dtype": "bfloat16", "base_name": "some/base"}
    run(command.export_adapter, "back", checkpoint=str(tmp_path / "ours"), **exporting)
    theirs, back = (safetensors.numpy.load_file(tmp_path / name / WEIGHTS_NAME) for name in ("peft", "back"))
    assert theirs.keys() == back.keys()
    assert all(theirs[name].tobytes() == back[name].tobytes() for name in theirs)
    with pytest.raises(UserError, match="which does not say the sizes of its base: name it with --base"):
        run(command.export_adapter, "not", checkpoint=str(tmp_path / "peft"), **exporting)
