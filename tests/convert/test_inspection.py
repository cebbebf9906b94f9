"""Inspect: the numbers add up to what is on disk, for every kind of folder."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest
import safetensors.numpy

from gptoss_jax.checkpoint import load
from gptoss_jax.configs import model_config
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.inspection import Inspection, inspect_folder
from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import parameters
from gptoss_jax.sharding import MeshShape, make_mesh
from tests.convert.hollow import write_hollow
from tests.tiny import TINY

# TINY by hand: q, k, v, o and sinks; 8 experts; 6 layers of these, a router and two norms.
ATTENTION = (192 * 160 + 192) + 2 * (64 * 160 + 64) + (160 * 192 + 160) + 12
EXPERTS = 8 * (448 * 160 + 448 + 160 * 224 + 160)
VALUES = {
    "embedding": 352 * 160,
    "attention": 6 * ATTENTION,
    "norm": (2 * 6 + 1) * 160,
    "router": 6 * (8 * 160 + 8),
    "experts": 6 * EXPERTS,
    "unembedding": 352 * 160,
}


@pytest.fixture(scope="module")
def checkpoint(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspection") / "ours"
    convert(tiny_hf, path, mesh=MeshShape(expert=4))
    return path


@pytest.mark.parametrize("fixture", ["tiny_hf", "tiny_hf_bf16", "tiny_original", "checkpoint"])
def test_the_values_of_every_layout_are_counted_alike(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    found = inspect_folder(path)
    assert found.path == path
    assert found.format == {"tiny_original": "original", "checkpoint": "checkpoint"}.get(fixture, "hf")
    assert found.experts == ("bf16" if fixture == "tiny_hf_bf16" else "mxfp4")
    assert found.config == TINY
    assert {kind: total.num_values for kind, total in found.totals.items()} == VALUES
    assert found.total.num_values == sum(VALUES.values())
    assert found.total.device_nbytes is None
    assert found.unfinished is None


@pytest.mark.parametrize("fixture", ["tiny_hf", "tiny_hf_bf16", "tiny_original"])
def test_a_release_adds_up_to_its_file(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    found = inspect_folder(path)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    assert {entry.name: (entry.dtype, entry.shape, entry.nbytes) for entry in found.tensors} == {
        name: (str(tensor.dtype), tensor.shape, tensor.nbytes) for name, tensor in tensors.items()
    }
    with (path / "model.safetensors").open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    assert 8 + header + found.total.stored_nbytes == (path / "model.safetensors").stat().st_size
    assert found.total.nbytes == found.total.stored_nbytes
    assert {entry.file for entry in found.tensors} == {"model.safetensors"}
    assert found.origin is None


def test_a_checkpoint_adds_up_to_its_files(checkpoint: Path) -> None:
    found = inspect_folder(checkpoint)
    assert found.origin is not None
    assert dataclasses.asdict(found.origin) == {
        "layout": "hf",
        "experts": "mxfp4",
        "mesh": "data=1,expert=4,tensor=1",
    }
    for entry in found.tensors:
        files = [path for path in (checkpoint / entry.file).rglob("*") if path.is_file()]
        assert entry.stored_nbytes == sum(path.stat().st_size for path in files)
        assert entry.chunk is not None
        assert len(files) - 1 == math.prod(-(-a // b) for a, b in zip(entry.shape, entry.chunk, strict=True))
        assert entry.nbytes == math.prod(entry.shape) * (1 if entry.dtype == "uint8" else 2)
        assert entry.chunk[0] == (2 if ".moe." in entry.name and "router" not in entry.name else entry.shape[0])
    assert len(found.tensors) == len({entry.file for entry in found.tensors}) == 117


def test_json_is_complete_and_always_has_the_same_keys(checkpoint: Path, tiny_original: Path, tmp_path: Path) -> None:
    (tmp_path / "ours.unfinished").mkdir()
    documents = [
        inspect_folder(checkpoint, mesh=MeshShape(expert=2)).to_json(),
        inspect_folder(tiny_original).to_json(),
        inspect_folder(tmp_path / "ours").to_json(),
    ]
    documents = [json.loads(json.dumps(document, allow_nan=False)) for document in documents]
    assert documents[0].keys() == documents[1].keys() == documents[2].keys()
    ours, original, unfinished = documents
    assert ours["path"] == str(checkpoint)
    assert ours["format"] == "checkpoint"
    assert ours["config"]["rope"]["theta"] == 150000.0
    assert ours["mesh"] == {"data": 1, "expert": 2, "tensor": 1}
    assert ours["total"]["num_values"] == sum(VALUES.values())
    assert len(ours["tensors"]) == 117
    (blocks,) = [entry for entry in ours["tensors"] if entry["name"] == "layers.5.moe.gate_up.blocks"]
    assert blocks == {
        "name": "layers.5.moe.gate_up.blocks",
        "kind": "experts",
        "dtype": "uint8",
        "shape": [8, 224, 2, 5, 16],
        "num_values": 8 * 448 * 160,
        "nbytes": 8 * 448 * 80,
        "stored_nbytes": blocks["stored_nbytes"],
        "file": "params/state/layers.5.moe.gate_up.blocks",
        "chunk": [2, 224, 2, 5, 16],
        "sharding": ["expert", None, None, None, None],
        "fitted_shape": [8, 224, 2, 5, 16],
        "device_nbytes": 4 * 448 * 80,
    }
    assert original["origin"] is None
    assert original["tensors"][0].keys() == blocks.keys()
    assert unfinished["format"] == "unfinished"
    assert unfinished["config"] is None
    assert unfinished["tensors"] == []


def test_alike_layers_make_one_row(checkpoint: Path, tiny_original: Path) -> None:
    found = inspect_folder(checkpoint)
    groups = {group.name: group for group in found.grouped()}
    assert len(groups) == 3 + 19
    assert len(groups["layers.*.moe.down.blocks"].tensors) == 6
    assert groups["layers.*.moe.down.blocks"].total.nbytes == 6 * 8 * 160 * 112
    assert sum(group.total.nbytes for group in groups.values()) == found.total.nbytes
    names = [group.name for group in inspect_folder(tiny_original).grouped()]
    assert names[:2] == ["embedding.weight", "block.*.attn.norm.scale"]
    assert len(names) == 3 + 15


# --- on a mesh ----------------------------------------------------------------------------------------------------


def by_name(found: Inspection) -> dict[str, tuple[tuple[str | None, ...] | None, int | None]]:
    return {entry.name: (entry.sharding, entry.device_nbytes) for entry in found.tensors}


def test_a_mesh_cuts_what_its_axes_name(tiny_hf_bf16: Path, tiny_original: Path) -> None:
    mesh = MeshShape(data=2, expert=4, tensor=2)
    hf = by_name(inspect_folder(tiny_hf_bf16, mesh=mesh))
    assert hf["model.embed_tokens.weight"] == (("tensor", None), 352 * 160 * 2 // 2)
    assert hf["model.layers.0.self_attn.q_proj.weight"] == (("tensor", None), 192 * 160 * 2 // 2)
    assert hf["model.layers.0.self_attn.o_proj.weight"] == ((None, "tensor"), 160 * 192 * 2 // 2)
    assert hf["model.layers.0.input_layernorm.weight"] == ((None,), 320)
    # A width of 224 is 7 blocks of MXFP4, 8 of which two devices share, packed or not.
    assert hf["model.layers.0.mlp.experts.gate_up_proj"] == (("expert", None, "tensor"), 8 * 160 * 512 * 2 // 8)
    assert hf["model.layers.0.mlp.experts.down_proj"] == (("expert", "tensor", None), 8 * 256 * 160 * 2 // 8)
    # Eight experts on eight devices; and all of it on one, however often `data` repeats it.
    original = by_name(inspect_folder(tiny_original, mesh=MeshShape(expert=8)))
    assert original["block.0.attn.qkv.weight"] == ((None, None), 320 * 160 * 2)
    assert original["block.0.mlp.mlp1_weight.blocks"] == (("expert", None, None, None), 448 * 80)
    whole = inspect_folder(tiny_original, mesh=MeshShape(data=3))
    assert whole.total.device_nbytes == whole.total.nbytes


def test_what_a_mesh_does_not_divide_is_padded(tiny_hf: Path, tiny_original: Path) -> None:
    mesh = MeshShape(expert=3, tensor=8)  # 8 experts are 9, 7 blocks 8, 12 query heads 16 with a key head each
    hf = {entry.name: (entry.fitted_shape, entry.device_nbytes) for entry in inspect_folder(tiny_hf, mesh=mesh).tensors}
    layer = "model.layers.0"
    assert hf[f"{layer}.self_attn.q_proj.weight"] == ((16 * 16, 160), 2 * 16 * 160 * 2)
    assert hf[f"{layer}.self_attn.k_proj.weight"] == ((16 * 16, 160), 2 * 16 * 160 * 2)
    assert hf[f"{layer}.mlp.experts.gate_up_proj_blocks"] == ((9, 2 * 256, 5, 16), 3 * 2 * 32 * 5 * 16)
    assert hf[f"{layer}.mlp.experts.down_proj_blocks"] == ((9, 160, 8, 16), 3 * 160 * 16)
    assert hf[f"{layer}.mlp.router.weight"] == ((8, 160), 8 * 160 * 2)
    (qkv,) = [entry for entry in inspect_folder(tiny_original, mesh=mesh).tensors if "0.attn.qkv.weight" in entry.name]
    assert (qkv.shape, qkv.fitted_shape, qkv.device_nbytes) == ((320, 160), (3 * 16 * 16, 160), 3 * 2 * 16 * 160 * 2)
    with pytest.raises(UserError, match="tensor=13 exceeds the model's 12 query heads: choose tensor up to 12"):
        inspect_folder(tiny_hf, mesh=MeshShape(tensor=13))


@pytest.mark.parametrize("mesh", [MeshShape(expert=2, tensor=4), MeshShape(expert=3, tensor=2)], ids=str)
@pytest.mark.parametrize("fixture", ["tiny_hf", "tiny_original", "checkpoint"])
def test_devices_hold_what_is_said(fixture: str, mesh: MeshShape, request: pytest.FixtureRequest) -> None:
    """Against what lies on the simulated devices after loading; norms and sinks become float32 there."""
    path = request.getfixturevalue(fixture)
    model = load(path, mesh=make_mesh(**dataclasses.asdict(mesh)))
    held = 0
    for parameter in parameters(model).values():
        itemsize = min(parameter.dtype.itemsize, 2)
        held += parameter[...].addressable_shards[0].data.size * itemsize
    assert inspect_folder(path, mesh=mesh).total.device_nbytes == held


# --- the released sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "gigabytes"),
    [
        ("gpt-oss-20b", 20.9, 13.8),
        pytest.param("gpt-oss-120b", 116.8, 65.2, marks=pytest.mark.slow),
    ],
)
def test_a_full_size_release_is_inspected_without_reading_it(
    tmp_path: Path, name: str, billions: float, gigabytes: float
) -> None:
    config = model_config(name)
    write_hollow(tmp_path, config)
    found = inspect_folder(tmp_path, mesh=MeshShape(expert=8))
    assert found.config == config
    assert round(found.total.num_values / 1e9, 1) == billions
    assert round(found.total.nbytes / 1e9, 1) == gigabytes
    experts = found.totals["experts"]
    assert experts.device_nbytes == experts.nbytes // 8
    (blocks, *_) = [
        entry
        for entry in inspect_folder(tmp_path, mesh=MeshShape(tensor=8)).tensors
        if "down_proj_blocks" in entry.name
    ]
    assert blocks.fitted_shape == (config.num_experts, 2880, 96, 16)
    assert blocks.device_nbytes == config.num_experts * 2880 * 12 * 16


# --- what is not whole --------------------------------------------------------------------------------------------


def test_an_unfinished_conversion_says_how_far_it_came(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_jax.convert import conversion

    def power_cut(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.store, "finish", power_cut)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_hf, tmp_path / "ours", mesh=MeshShape(expert=2))
    for name in ("ours", "ours.unfinished"):
        found = inspect_folder(tmp_path / name)
        assert found.format == "unfinished"
        assert found.unfinished is not None
        assert found.unfinished.plan["mesh"] == "data=1,expert=2,tensor=1"
        assert found.unfinished.num_tensors_hashed == 117
        assert found.unfinished.num_parameters_stored == 117
        assert found.unfinished.stored_nbytes > inspect_folder(tiny_hf).total.nbytes


def test_what_is_none_of_these_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing has no config\.json; expected a checkpoint, a Hugging Face or"):
        inspect_folder(tmp_path / "nothing")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_bytes((checkpoint / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"config\.json is missing; expected [\d,]+ bytes"):
        inspect_folder(tmp_path / "torn")
