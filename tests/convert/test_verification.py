"""Verify: one flipped bit anywhere is found and named; a whole checkpoint passes."""

import dataclasses
import json
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.numpy

from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.convert.verification import Fault, verify
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.sharding import MeshShape
from tests.tiny import TINY

SMALL = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
DOWN = "params/state/layers.1.moe.down.blocks"
DOWN_HF = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL as hf/, hf_bf16/ and original/, each converted as ours_…, and the experts repacked both ways."""
    root = tmp_path_factory.mktemp("folders")
    write_checkpoint(root / "hf", SMALL)
    write_checkpoint(root / "hf_bf16", SMALL, experts="bf16")
    write_checkpoint(root / "original", SMALL, layout="original")
    convert(root / "hf", root / "ours_hf", mesh=MeshShape(expert=4))
    convert(root / "original", root / "ours_original", mesh=MeshShape(expert=2))
    convert(root / "hf", root / "unpacked", experts="bf16")
    convert(root / "hf_bf16", root / "packed", experts="mxfp4", scale_rule="up")
    return root


@pytest.fixture
def ours(folders: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folders / "ours_hf", tmp_path / "ours")


def files_of(checkpoint: Path) -> Iterator[Path]:
    """All that have content, but the manifest; in an order that no disk changes."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != "manifest.json" and path.stat().st_size:
            yield path


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("name", ["ours_hf", "ours_original", "unpacked", "packed"])
def test_a_whole_checkpoint_passes(folders: Path, name: str) -> None:
    calls: list[tuple[int, int]] = []
    source = {"ours_hf": "hf", "ours_original": "original", "unpacked": "hf", "packed": "hf_bf16"}[name]
    assert verify(folders / name, on_progress=lambda done, total: calls.append((done, total))) == []
    nbytes = sum(path.stat().st_size for path in files_of(folders / name))
    assert calls[-1] == (nbytes, nbytes)
    calls.clear()
    against = folders / source
    assert verify(folders / name, against=against, on_progress=lambda done, total: calls.append((done, total))) == []
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] > nbytes


def test_a_flipped_bit_anywhere_is_found_and_named(ours: Path) -> None:
    """One in every file, and 40 more in files drawn by their size."""
    generator = random.Random(0)
    files = list(files_of(ours))
    assert {path.name for path in files} >= {"zarr.json", "_METADATA", "config.json", "tokenizer.json"}
    drawn = generator.choices(files, [path.stat().st_size for path in files], k=40)
    for path in [*files, *drawn]:
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        (fault,) = verify(ours)
        flip(path, bit)
        name = path.relative_to(ours).as_posix()
        assert fault.file == name
        assert fault.expected.startswith(f"{path.stat().st_size:,} bytes with CRC-32 ")
        assert fault.found.startswith(f"{path.stat().st_size:,} bytes with CRC-32 ")
        assert fault.expected != fault.found
        folder = path.relative_to(ours).parts[2:3]
        is_parameter = len(path.relative_to(ours).parts) > 3 and folder != ("array_metadatas",)
        assert fault.parameter == (folder[0] if is_parameter else None)
        assert len(fault.tensors) == is_parameter
    assert verify(ours) == []


def test_the_release_knows_it_by_its_own_name(folders: Path, tmp_path: Path) -> None:
    for name, parameter, tensors in [
        ("ours_hf", "layers.1.moe.down.blocks", (DOWN_HF,)),
        ("ours_hf", "layers.0.attention.k.bias", ("model.layers.0.self_attn.k_proj.bias",)),
        ("ours_hf", "embedding.weight", ("model.embed_tokens.weight",)),
        ("ours_original", "layers.0.attention.k.weight", ("block.0.attn.qkv.weight",)),
        ("ours_original", "unembedding.weight", ("unembedding.weight",)),
        ("unpacked", "layers.1.moe.down.weight", (DOWN_HF, DOWN_HF.replace("blocks", "scales"))),
        ("unpacked", "layers.1.moe.down.bias", ("model.layers.1.mlp.experts.down_proj_bias",)),
        ("packed", "layers.0.moe.gate_up.scales", ("model.layers.0.mlp.experts.gate_up_proj",)),
    ]:
        checkpoint = tmp_path / name
        if not checkpoint.exists():
            shutil.copytree(folders / name, checkpoint)
        path = checkpoint / "params" / "state" / parameter / "zarr.json"
        flip(path, 77)
        (fault,) = verify(checkpoint)
        flip(path, 77)
        assert (fault.parameter, fault.tensors) == (parameter, tensors)
        assert all(tensor in str(fault) for tensor in (parameter, *tensors))


def test_what_is_missing_cut_or_strange_is_named(ours: Path) -> None:
    down = sorted((ours / DOWN / "c").rglob("0"))[-1].relative_to(ours).as_posix()
    size = (ours / down).stat().st_size
    (ours / down).write_bytes((ours / down).read_bytes()[:-1])
    (ours / "config.json").unlink()
    with (ours / "tokenizer.json").open("ab") as file:
        file.write(b"\n")
    (ours / "params" / "state" / "norm.scale" / "c" / "1").write_bytes(b"\0" * 320)
    (ours / "README.md").write_text("a user's own file is no fault")
    faults = {fault.file: fault for fault in verify(ours)}
    assert faults.keys() == {down, "config.json", "tokenizer.json", "params/state/norm.scale/c/1"}
    assert faults[down].found == f"{size - 1:,} bytes"
    assert faults[down].expected.startswith(f"{size:,} bytes with CRC-32 ")
    assert str(faults[down]).startswith(
        f"{down} (layers.1.moe.down.blocks, {DOWN_HF}): expected {size:,} bytes with CRC"
    )
    assert faults["config.json"].found == "no file"
    assert str(faults["config.json"]).startswith("config.json: expected ")
    assert faults["params/state/norm.scale/c/1"].parameter == "norm.scale"
    assert faults["params/state/norm.scale/c/1"].found == "a file that manifest.json does not name"


def test_files_that_changed_places_are_found(ours: Path) -> None:
    first, second, *_ = sorted(path for path in (ours / DOWN / "c").rglob("*") if path.is_file())
    first.rename(ours / "aside")
    second.rename(first)
    (ours / "aside").rename(second)
    assert {fault.file for fault in verify(ours)} == {path.relative_to(ours).as_posix() for path in (first, second)}


@pytest.mark.parametrize("against", [False, True])
def test_a_checkpoint_without_parameters_is_all_faults(folders: Path, ours: Path, against: bool) -> None:
    shutil.rmtree(ours / "params")
    faults = verify(ours, against=folders / "hf" if against else None)
    assert len(faults) == len([name for name in manifest_of(ours)["files"] if name.startswith("params/")])
    assert {fault.found for fault in faults} == {"no file"}


# --- against the release ------------------------------------------------------------------------------------------


def manifest_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


def forge(checkpoint: Path, name: str) -> None:
    """A flipped bit in a file whose checksum in the manifest was made to fit."""
    path = checkpoint / name
    flip(path, 8 * 1000)
    document = manifest_of(checkpoint)
    document["files"][name]["crc32"] = f"{zlib.crc32(path.read_bytes()):08x}"
    del document["crc32"]
    document["crc32"] = f"{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}"
    (checkpoint / "manifest.json").write_text(json.dumps(document))


def test_a_tensor_of_the_release_that_changed_is_named(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "hf", tmp_path / "hf")
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    tensors[DOWN_HF][7, 159, 6, 15] ^= 1
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (fault,) = verify(folders / "ours_hf", against=tmp_path / "hf")
    assert fault.tensors == (DOWN_HF,)
    assert fault.expected == f"SHA-256 {manifest_of(folders / 'ours_hf')['tensors'][DOWN_HF]['sha256']}"
    assert fault.found.endswith(f" in {tmp_path / 'hf'}")


@pytest.mark.parametrize(
    ("name", "source", "parameter", "tensor"),
    [
        ("ours_hf", "hf", "layers.1.moe.down.blocks", DOWN_HF),
        ("ours_original", "original", "layers.0.attention.k.weight", "block.0.attn.qkv.weight"),
        ("unpacked", "hf", "layers.1.moe.down.weight", DOWN_HF),
        ("packed", "hf_bf16", "layers.1.moe.down.blocks", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_other_values_under_fitting_checksums_are_found(
    folders: Path, tmp_path: Path, name: str, source: str, parameter: str, tensor: str
) -> None:
    checkpoint = shutil.copytree(folders / name, tmp_path / name)
    home = checkpoint / "params" / "state" / parameter / "c"
    file = sorted(path for path in home.rglob("*") if path.is_file())[0]
    forge(checkpoint, file.relative_to(checkpoint).as_posix())
    assert verify(checkpoint) == []
    (fault,) = verify(checkpoint, against=folders / source)
    assert parameter in (fault.parameter or "")
    assert tensor in fault.tensors
    assert fault.found.endswith("in the checkpoint")


def test_a_damaged_parameter_is_reported_once(folders: Path, ours: Path) -> None:
    path = sorted(path for path in (ours / DOWN / "c").rglob("*") if path.is_file())[0]
    path.write_bytes(b"")
    flip(ours / "config.json", 100)
    faults = verify(ours, against=folders / "hf")
    assert [fault.file for fault in faults] == ["config.json", path.relative_to(ours).as_posix()]


def test_another_folder_is_no_yardstick(folders: Path) -> None:
    with pytest.raises(
        UserError, match="has the layout original and mxfp4 experts, the checkpoint was made from the layout hf"
    ):
        verify(folders / "ours_hf", against=folders / "original")
    with pytest.raises(
        UserError, match=r"the layout hf and bf16 experts, .* made from the layout hf and mxfp4 experts: name"
    ):
        verify(folders / "ours_hf", against=folders / "hf_bf16")


def test_layers_more_or_fewer_are_named(folders: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deeper", dataclasses.replace(SMALL, layer_kinds=alternating_layers(3)))
    faults = verify(folders / "ours_hf", against=tmp_path / "deeper")
    assert len(faults) == 19
    assert all(fault.tensors[0].startswith("model.layers.2.") for fault in faults)
    write_checkpoint(tmp_path / "flatter", dataclasses.replace(SMALL, layer_kinds=alternating_layers(1)))
    faults = verify(folders / "ours_hf", against=tmp_path / "flatter")
    assert len(faults) == 19
    assert all(fault.found == f"no such tensor in {tmp_path / 'flatter'}" for fault in faults)


# --- no verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-200], r"manifest\.json: expected JSON, but"),
        (lambda text: b"", r"manifest\.json: expected JSON, but"),
        (lambda text: b"[]", r"manifest\.json: expected a JSON object"),
        (lambda text: text.replace(b'"version": 1', b'"version": 2'), "version 2; expected 'gptoss_jax' version 1"),
        (lambda text: text.replace(b'"files"', b'"filez"'), r"manifest\.json is damaged"),
        (lambda text: text.replace(b'"sha256"', b'"sha257"'), r"manifest\.json is damaged"),
    ],
)
def test_a_damaged_manifest_ends_it(ours: Path, damage, message: str) -> None:
    path = ours / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        verify(ours)


def test_a_flipped_bit_in_the_manifest_ends_it_or_means_nothing(folders: Path, ours: Path) -> None:
    """What is left to mean nothing is white space for white space."""
    path = ours / "manifest.json"
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        bit = generator.randrange(8 * len(whole))
        flip(path, bit)
        text = path.read_bytes()
        path.write_bytes(whole)
        if text.split() == whole.split():
            continue
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            verify(ours)
        path.write_bytes(whole)


def test_a_release_alone_has_nothing_to_be_held_to(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="hf is a released folder, without checksums; expected a checkpoint: convert it"
    ):
        verify(folders / "hf")
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nothing")


def test_a_fault_without_a_file_reads_well() -> None:
    fault = Fault(parameter="norm.scale", tensors=("norm.scale",), expected="this", found="that")
    assert str(fault) == "norm.scale: expected this, found that"
    assert str(dataclasses.replace(fault, tensors=("model.norm.weight",))) == (
        "norm.scale, model.norm.weight: expected this, found that"
    )
