"""Export: what comes back is what came in, byte for byte, and the two reference loaders take it."""

import dataclasses
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.convert import stored as stored_module
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.export import export
from gptoss_jax.convert.stored import slabs
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.sharding import MeshShape
from tests.tiny import TINY

# 192 is six MXFP4 blocks: two tensor shards have three each.
SMALL = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), expert_width=192)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL as hf/, original/ and hf_bf16/; hf/ converted as checkpoint/, and as unpacked/ with bf16 experts."""
    root = tmp_path_factory.mktemp("releases")
    write_checkpoint(root / "hf", SMALL, layout="hf")
    write_checkpoint(root / "original", SMALL, layout="original")
    write_checkpoint(root / "hf_bf16", SMALL, experts="bf16")
    convert(root / "hf", root / "checkpoint", mesh=MeshShape(expert=4))
    convert(root / "hf", root / "unpacked", mesh=MeshShape(data=2, tensor=2), experts="bf16")
    return root


def hashes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """dtype, shape and SHA-256 of every tensor, read by the safetensors library."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.shape, hashlib.sha256(tensor.tobytes()).hexdigest())
    return found


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_hashes_see_a_bit(releases: Path, tmp_path: Path) -> None:
    """The judge of this file is judged first."""
    shutil.copytree(releases / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    text = bytearray(path.read_bytes())
    text[-1] ^= 1
    path.write_bytes(text)
    assert len(hashes(releases / "hf")) == 3 + 2 * 19
    assert len(set(hashes(releases / "hf").items()) ^ set(hashes(tmp_path / "hf").items())) == 2


@pytest.mark.parametrize(("layout", "mesh"), [("hf", MeshShape(expert=8)), ("original", MeshShape())])
def test_there_and_back(releases: Path, tmp_path: Path, layout, mesh: MeshShape) -> None:
    convert(releases / layout, tmp_path / "ours", mesh=mesh)
    export(tmp_path / "ours", tmp_path / "back", layout=layout)
    assert hashes(tmp_path / "back") == hashes(releases / layout)
    for path in (releases / layout).iterdir():
        if path.suffix == ".json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_round_trip_through_the_other_layout(releases: Path, tmp_path: Path) -> None:
    convert(releases / "hf", tmp_path / "ours1", mesh=MeshShape(data=2, expert=2, tensor=2))
    export(tmp_path / "ours1", tmp_path / "original", layout="original")
    assert hashes(tmp_path / "original") == hashes(releases / "original")
    convert(tmp_path / "original", tmp_path / "ours2", mesh=MeshShape(data=3, tensor=2))
    export(tmp_path / "ours2", tmp_path / "hf", layout="hf")
    assert hashes(tmp_path / "hf") == hashes(releases / "hf")
    for layout in ("original", "hf"):
        for path in (releases / layout).glob("*.json"):
            assert read_json(tmp_path / layout / path.name) == read_json(path), path


def test_many_slabs_and_many_shards(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "_SLAB_BYTES", 7_000)  # an expert's blocks have 30,720
    calls: list[tuple[int, int]] = []
    export(
        releases / "checkpoint",
        tmp_path / "hf",
        layout="hf",
        max_shard_bytes=200_000,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert hashes(tmp_path / "hf") == hashes(releases / "hf")
    weight_map = read_json(tmp_path / "hf" / "model.safetensors.index.json")["weight_map"]
    assert weight_map.keys() == hashes(releases / "hf").keys()
    assert len(set(weight_map.values())) == len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) > len(weight_map)
    assert calls[-1][0] == calls[-1][1]
    assert {total for _, total in calls} == {
        read_json(tmp_path / "hf" / "model.safetensors.index.json")["metadata"]["total_size"]
    }


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    step=st.integers(1, 50),
)
def test_slabs_cover_every_row_once_on_whole_chunks(shape: tuple[int, ...], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_module, "_SLAB_BYTES", 300)
        found = list(slabs(shape, np.dtype(np.uint8), step=step))
    assert [row for first, *_ in found for row in range(first.start, first.stop)] == list(range(shape[0]))
    assert all(first.start % step == 0 for first, *_ in found)
    row = int(np.prod(shape[1:]))
    assert all((first.stop - first.start) * row <= max(300, step * row) for first, *_ in found)


# --- experts another way ------------------------------------------------------------------------------------------


def test_mxfp4_experts_unpack_to_what_transformers_saves(releases: Path, tmp_path: Path) -> None:
    export(releases / "checkpoint", tmp_path / "bf16", layout="hf", experts="bf16")
    assert hashes(tmp_path / "bf16") == hashes(releases / "hf_bf16")
    assert read_json(tmp_path / "bf16" / "config.json") == read_json(releases / "hf_bf16" / "config.json")


def test_a_checkpoint_of_unpacked_experts_packs_them_again(releases: Path, tmp_path: Path) -> None:
    """From MXFP4, unpacked at conversion, packed at export: every value is one that MXFP4 holds, so none changes."""
    for rule in ("even", "up"):
        export(releases / "unpacked", tmp_path / rule, layout="original", experts="mxfp4", scale_rule=rule)
        ours, release = safetensors_of(tmp_path / rule), safetensors_of(releases / "original")
        assert ours.keys() == release.keys()
        for name in release:
            if name.endswith(".blocks"):
                scales = name.replace("blocks", "scales")
                found, expected = (decoded(file[name], file[scales]) for file in (ours, release))
                np.testing.assert_array_equal(found, expected)
            elif not name.endswith(".scales"):
                assert ours[name].tobytes() == release[name].tobytes()
    export(releases / "unpacked", tmp_path / "bf16", layout="hf")
    assert hashes(tmp_path / "bf16") == hashes(releases / "hf_bf16")
    assert "quantization_config" not in read_json(tmp_path / "bf16" / "config.json")


def test_scale_rules_differ(releases: Path, tmp_path: Path) -> None:
    """6.9 saturates under `floor` and doubles the scale under `up`: the rule does arrive."""
    release = safetensors_of(releases / "hf_bf16")
    experts = release["model.layers.0.mlp.experts.down_proj"]
    experts[...] = 0
    experts[0, 0, 0] = 6.9
    shutil.copytree(releases / "hf_bf16", tmp_path / "release")
    safetensors.numpy.save_file(release, tmp_path / "release" / "model.safetensors")
    convert(tmp_path / "release", tmp_path / "ours")
    scales = {}
    for rule in ("floor", "up"):
        export(tmp_path / "ours", tmp_path / rule, layout="hf", experts="mxfp4", scale_rule=rule)
        found = safetensors_of(tmp_path / rule)
        scales[rule] = int(found["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0])
        assert read_json(tmp_path / rule / "config.json")["quantization_config"]["quant_method"] == "mxfp4"
    assert scales == {"floor": 127, "up": 128}


def test_original_holds_no_bf16_experts(releases: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="OpenAI's layout holds MXFP4 experts only: export bf16 experts with"):
        export(releases / "checkpoint", tmp_path / "out", layout="original", experts="bf16")
    assert not (tmp_path / "out").exists()


def safetensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 by the book, in float64."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = np.stack([values[blocks & 15], values[blocks >> 4]], axis=-1)
    return pairs.reshape(*blocks.shape[:-1], 32) * 2.0 ** (scales[..., None].astype(np.int64) - 127)


# --- dtypes and small files ---------------------------------------------------------------------------------------


def test_stored_dtypes_are_kept(releases: Path, tmp_path: Path) -> None:
    """Norms in float32, as some releases have them, come back in float32 in either layout."""
    release = safetensors_of(releases / "hf")
    norms = {name: tensor.astype(np.float32) + 2**-20 for name, tensor in release.items() if "norm" in name}
    shutil.copytree(releases / "hf", tmp_path / "release")
    safetensors.numpy.save_file(release | norms, tmp_path / "release" / "model.safetensors")
    convert(tmp_path / "release", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf", layout="hf")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "release")
    export(tmp_path / "ours", tmp_path / "original", layout="original")
    found = safetensors_of(tmp_path / "original")["block.1.attn.norm.scale"]
    np.testing.assert_array_equal(found, norms["model.layers.1.input_layernorm.weight"], strict=True)
    dtypes = read_json(tmp_path / "original" / "dtypes.json")
    assert dtypes["block.1.attn.norm.scale"] == "FP32"
    assert dtypes == read_json(releases / "original" / "dtypes.json") | {
        name: "FP32" for name in dtypes if "norm" in name
    }


def test_parts_of_one_tensor_in_two_dtypes_are_widened(releases: Path, tmp_path: Path) -> None:
    release = safetensors_of(releases / "hf")
    prefix = "model.layers.0.self_attn."
    release[f"{prefix}q_proj.bias"] = release[f"{prefix}q_proj.bias"].astype(np.float32) + 2**-20
    shutil.copytree(releases / "hf", tmp_path / "release")
    safetensors.numpy.save_file(release, tmp_path / "release" / "model.safetensors")
    convert(tmp_path / "release", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "original", layout="original")
    found = safetensors_of(tmp_path / "original")
    expected = np.concatenate([release[f"{prefix}{x}_proj.bias"].astype(np.float32) for x in "qkv"])
    np.testing.assert_array_equal(found["block.0.attn.qkv.bias"], expected, strict=True)
    assert found["block.1.attn.qkv.bias"].dtype == ml_dtypes.bfloat16


def test_small_files_travel_along(releases: Path, tmp_path: Path) -> None:
    shutil.copytree(releases / "hf", tmp_path / "release")
    (tmp_path / "release" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "release" / "LICENSE").write_text("Apache")
    generation = tmp_path / "release" / "generation_config.json"
    generation.write_text(json.dumps(read_json(generation) | {"temperature": 0.5}))
    convert(tmp_path / "release", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf", layout="hf")
    export(tmp_path / "ours", tmp_path / "original", layout="original")
    for folder in ("hf", "original"):
        for name in ("chat_template.jinja", "LICENSE", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "release" / name).read_bytes()
    assert not (tmp_path / "hf" / "dtypes.json").exists()


def test_a_release_without_a_tokenizer(releases: Path, tmp_path: Path) -> None:
    shutil.copytree(releases / "original", tmp_path / "release")
    (tmp_path / "release" / "tokenizer.json").unlink()
    convert(tmp_path / "release", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf", layout="hf")
    assert hashes(tmp_path / "hf") == hashes(releases / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}


# --- the reference loaders ----------------------------------------------------------------------------------------

PROMPT = np.arange(1, 60, dtype=np.int32)[None] * 5 % SMALL.vocab_size


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_transformers_runs_an_export_like_the_release(releases: Path, tmp_path: Path, experts) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.parity.references import TransformersModel

    export(releases / "checkpoint", tmp_path / "out", layout="hf", experts=experts, max_shard_bytes=300_000)
    ours = TransformersModel(tmp_path / "out", dtype="float32").logits(PROMPT)
    release = TransformersModel(releases / "hf", dtype="float32").logits(PROMPT)
    assert ours.std() > 1  # of something worth comparing
    np.testing.assert_array_equal(ours, release)


def test_openai_runs_an_export_like_the_release(releases: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gpt_oss.torch.model")
    pytest.importorskip("transformers")  # the references share a file
    from tests.parity.references import openai_logits

    export(releases / "checkpoint", tmp_path / "out", layout="original", max_shard_bytes=300_000)
    ours, release = (openai_logits(folder, PROMPT) for folder in (tmp_path / "out", releases / "original"))
    assert ours.std() > 1
    np.testing.assert_array_equal(ours, release)


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_the_destination_must_be_empty_and_elsewhere(releases: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"used: expected a new or empty folder, found 'mine\.txt'"):
        export(releases / "checkpoint", tmp_path / "used", layout="hf")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is the checkpoint itself; name another destination"):
        export(releases / "checkpoint", releases / "hf" / ".." / "checkpoint", layout="hf")
    with pytest.raises(UserError, match=r"lies inside the checkpoint .*; name a destination outside"):
        export(releases / "checkpoint", releases / "checkpoint" / "params" / "out", layout="hf")
    assert not (releases / "checkpoint" / "params" / "out").exists()


def test_no_room_is_seen_before_the_first_byte(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"out: needs [\d,]+ bytes, its disk has 1,000 free"):
        export(releases / "checkpoint", tmp_path / "out", layout="hf")
    assert not (tmp_path / "out").exists()


def test_only_finished_checkpoints_are_exported(releases: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf is a released folder, without checksums; expected a checkpoint: convert"):
        export(releases / "hf", tmp_path / "out", layout="original")
    with pytest.raises(UserError, match="nothing: no such folder; expected a checkpoint"):
        export(tmp_path / "nothing", tmp_path / "out", layout="hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no manifest\.json; expected a checkpoint"):
        export(tmp_path / "empty", tmp_path / "out", layout="hf")
    (tmp_path / "ours.unfinished").mkdir()
    for name in ("ours", "ours.unfinished"):
        with pytest.raises(UserError, match="its conversion has not finished; run the same convert command again"):
            export(tmp_path / name, tmp_path / "out", layout="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["c/0/0", "zarr.json"])
def test_damage_is_not_passed_on(releases: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(releases / "checkpoint", tmp_path / "ours")
    path = tmp_path / "ours" / "params" / "state" / "unembedding.weight" / file
    text = bytearray(path.read_bytes())
    text[40] ^= 4
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"unembedding\.weight.*(damaged|cannot be read).*convert the checkpoint again"):
        export(tmp_path / "ours", tmp_path / "out", layout="hf")
    assert not (tmp_path / "out").exists()


def test_damaged_small_files_are_not_passed_on(releases: Path, tmp_path: Path) -> None:
    shutil.copytree(releases / "checkpoint", tmp_path / "ours")
    path = tmp_path / "ours" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: expected [\d,]+ bytes with CRC-32 [0-9a-f]{8}"):
        export(tmp_path / "ours", tmp_path / "out", layout="hf")


def test_what_openai_cannot_say_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, norm_eps=1e-3)
    write_checkpoint(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "ours")
    with pytest.raises(UserError, match=r"norm_eps=0\.001 is not 1e-05: OpenAI's config\.json cannot say so"):
        export(tmp_path / "ours", tmp_path / "out", layout="original")
    assert not (tmp_path / "out").exists()
