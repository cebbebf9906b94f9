"""A released folder into a checkpoint: every byte of it, a manifest that says so, and nothing left where it fails."""

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest

from gptoss_jax.convert import conversion, store
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.manifest import Manifest
from gptoss_jax.convert.names import file_tensors
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import parameter_shapes
from gptoss_jax.sharding import MeshShape
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, expert_width=192, layer_kinds=alternating_layers(2))  # 6 blocks divide by 2
WORKER = Path(__file__).with_name("worker.py")
KINDS = {"hf": ("hf", "mxfp4"), "bf16": ("hf", "bf16"), "original": ("original", "mxfp4")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every layout."""
    root = tmp_path_factory.mktemp("conversion")
    for name, (layout, experts) in KINDS.items():
        write_checkpoint(root / name, CONFIG, layout=layout, experts=experts)
    return {name: root / name for name in KINDS}


def restored(checkpoint: Path) -> dict[str, np.ndarray]:
    """The stored parameters, on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for name, leaf in store.stored(checkpoint).items()
    }
    return {name: np.asarray(array) for name, array in store.restore(checkpoint, wanted)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data=1", "data=2,expert=2,tensor=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_parameters_are_the_bytes_of_the_source(kind, mesh, folders: dict[str, Path], tmp_path: Path):
    layout, experts = KINDS[kind]
    convert(folders[kind], tmp_path / "checkpoint", mesh=MeshShape.parse(mesh))
    parameters, source = restored(tmp_path / "checkpoint"), TensorFolder.open(folders[kind])
    assert {name: array.shape for name, array in parameters.items()} == parameter_shapes(CONFIG, experts)
    for tensor in file_tensors(CONFIG, layout=layout, experts=experts):
        parts = [part.view.to_file(parameters[part.parameter]).tobytes() for part in tensor.parts]
        assert b"".join(parts) == source.read(tensor.name).tobytes()
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_the_manifest_says_what_hashlib_and_zlib_say(folders: dict[str, Path], tmp_path: Path):
    returned = convert(folders["hf"], tmp_path / "checkpoint", mesh=MeshShape(expert=4))
    manifest = Manifest.read(tmp_path / "checkpoint")
    assert manifest == returned
    assert (manifest.layout, manifest.experts, manifest.source_experts) == ("hf", "mxfp4", "mxfp4")
    assert manifest.mesh == "data=1,expert=4,tensor=1"
    raw = (folders["hf"] / "model.safetensors").read_bytes()  # taken apart without our reader
    (length,) = struct.unpack("<Q", raw[:8])
    entries = {name: entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    assert manifest.tensors.keys() == entries.keys()
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        assert manifest.tensors[name].sha256 == hashlib.sha256(raw[8 + length + start : 8 + length + stop]).hexdigest()
        assert manifest.tensors[name].shape == tuple(entry["shape"])
        assert manifest.tensors[name].dtype == {"BF16": "bfloat16", "U8": "uint8"}[entry["dtype"]]
    found = tree(tmp_path / "checkpoint")
    del found["manifest.json"]
    assert {name: (file.nbytes, file.crc32) for name, file in manifest.files.items()} == {
        name: (len(content), f"{zlib.crc32(content):08x}") for name, content in found.items()
    }


def test_every_shard_of_the_mesh_has_a_file_of_its_own(folders: dict[str, Path], tmp_path: Path):
    convert(folders["hf"], tmp_path / "checkpoint", mesh=MeshShape(data=2, expert=4))
    names = Manifest.read(tmp_path / "checkpoint").files
    stem = "params/state/layers.1.moe.down.blocks/c/"
    assert sorted(name.removeprefix(stem) for name in names if name.startswith(stem)) == [
        f"{expert}/0/0/0"
        for expert in range(4)  # one of both copies that data=2 has
    ]


def test_a_conversion_is_the_same_bytes_wherever_and_whenever(folders: dict[str, Path], tmp_path: Path):
    trees = []
    for name in ("one", "another"):
        convert(folders["original"], tmp_path / name, mesh=MeshShape(tensor=2))
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert not [name for name, content in trees[0].items() if str(tmp_path).encode() in content]


def test_batches_change_nothing(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(folders["hf"], tmp_path / "one")
    monkeypatch.setattr(conversion, "BATCH_BYTES", 50_000)
    convert(folders["hf"], tmp_path / "many")
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_experts_are_unpacked_exactly(folders: dict[str, Path], tmp_path: Path):
    manifest = convert(folders["original"], tmp_path / "unpacked", experts="bf16", mesh=MeshShape(tensor=2))
    assert (manifest.experts, manifest.source_experts) == ("bf16", "mxfp4")
    convert(folders["bf16"], tmp_path / "plain")
    unpacked, plain = restored(tmp_path / "unpacked"), restored(tmp_path / "plain")
    assert {name: array.tobytes() for name, array in unpacked.items()} == {
        name: array.tobytes() for name, array in plain.items()
    }


def test_experts_are_packed_without_a_change_of_value(folders: dict[str, Path], tmp_path: Path):
    manifest = convert(folders["bf16"], tmp_path / "packed", experts="mxfp4", mesh=MeshShape(expert=2, tensor=2))
    assert (manifest.experts, manifest.source_experts) == ("mxfp4", "bf16")
    packed, plain = restored(tmp_path / "packed"), TensorFolder.open(folders["bf16"])
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for n in (0, 1):
        blocks, scales = (packed[f"layers.{n}.moe.down.{kind}"] for kind in ("blocks", "scales"))
        pairs = np.stack([codes[blocks & 15], codes[blocks >> 4]], axis=-1).reshape(8, 160, 6, 32)
        values = (pairs * 2.0 ** (scales.astype(float) - 127)[..., None]).reshape(8, 160, 192)
        expected = plain.read(f"model.layers.{n}.mlp.experts.down_proj").astype(float).transpose(0, 2, 1)
        np.testing.assert_array_equal(values, expected)


def test_progress_begins_at_nothing_and_ends_at_all(folders: dict[str, Path], tmp_path: Path):
    seen: list[tuple[int, int]] = []
    convert(folders["hf"], tmp_path / "checkpoint", on_progress=lambda done, total: seen.append((done, total)))
    nbytes = sum(tensor.nbytes for tensor in file_tensors(CONFIG, layout="hf", experts="mxfp4"))
    assert seen[0] == (0, nbytes)
    assert seen[-1] == (nbytes, nbytes)
    assert seen == sorted(seen)


# --- small files --------------------------------------------------------------------------------------------------


def test_config_tokenizer_and_licence_come_along_and_nothing_else(folders: dict[str, Path], tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(folders["hf"], source)
    for name in ("LICENSE", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    for name in (".gitattributes", "pytorch_model.bin", "extra.gguf"):
        (source / name).write_text(name)
    (source / "metal").mkdir()
    convert(source, tmp_path / "checkpoint")
    assert sorted(os.listdir(tmp_path / "checkpoint")) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "params",
        "tokenizer.json",
    ]
    for name in ("LICENSE", "config.json", "tokenizer.json"):
        assert (tmp_path / "checkpoint" / name).read_bytes() == (source / name).read_bytes()


def test_an_original_folder_takes_the_tokenizer_from_above(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["original"], tmp_path / "release" / "original")
    (tmp_path / "release" / "original" / "tokenizer.json").rename(tmp_path / "release" / "tokenizer.json")
    convert(tmp_path / "release" / "original", tmp_path / "checkpoint")
    expected = (folders["original"] / "tokenizer.json").read_bytes()
    assert (tmp_path / "checkpoint" / "tokenizer.json").read_bytes() == expected
    assert "tokenizer.json" in Manifest.read(tmp_path / "checkpoint").files


# --- what goes wrong ----------------------------------------------------------------------------------------------


def refused(source: Path, destination: Path, **options) -> str:
    """The message; whatever lies beside the destination must be as it was."""
    parent = destination.absolute().parent
    before = tree(parent) if parent.is_dir() else {}
    with pytest.raises(UserError) as caught:
        convert(source, destination, **options)
    assert (tree(parent) if parent.is_dir() else {}) == before
    assert not destination.with_name(f"{destination.name}.unfinished").exists()
    return str(caught.value)


def test_a_destination_that_exists_is_left_alone(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "dangling"):
        message = refused(folders["hf"], tmp_path / name)
        assert message == (f"{tmp_path / name} exists; expected a destination that does not: remove it or name another")


def test_a_source_is_not_written_into(folders: dict[str, Path], tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(folders["hf"], source)
    (tmp_path / "link").symlink_to(source)
    assert refused(source, tmp_path / "link") == f"{tmp_path / 'link'} is the source itself; name another destination"
    for inside in (source / "checkpoint", tmp_path / "link" / "checkpoint"):
        message = refused(source, inside)
        assert message == f"{inside} lies inside the source {source}; name a destination outside of it"


def test_a_destination_needs_a_folder_to_be_made_in(folders: dict[str, Path], tmp_path: Path):
    message = refused(folders["hf"], tmp_path / "none" / "checkpoint")
    assert message == f"{tmp_path / 'none'} is no folder; expected the one that checkpoint is to be made in: create it"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "fixed").mkdir(mode=0o555)
    message = refused(folders["hf"], tmp_path / "fixed" / "checkpoint")
    assert "checkpoint.unfinished cannot be made: Permission denied; name a destination in a folder where" in message


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_folder_where_not_even_root_may_write_is_named(folders: dict[str, Path]):
    with pytest.raises(UserError) as caught:
        convert(folders["hf"], Path("/proc/checkpoint"))
    assert str(caught.value).startswith("/proc/checkpoint.unfinished cannot be made: ")
    assert str(caught.value).endswith("; name a destination in a folder where you may write")


def test_a_full_disk_is_found_before_the_first_byte(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    nbytes = sum(tensor.nbytes for tensor in file_tensors(CONFIG, layout="hf", experts="mxfp4"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * nbytes, nbytes + 1, nbytes - 1))
    message = refused(folders["hf"], tmp_path / "checkpoint")
    assert message == (
        f"{tmp_path} has {nbytes - 1:,} bytes free, the checkpoint needs {nbytes:,}: "
        "make room or name a destination on another disk"
    )


def test_a_mesh_that_does_not_divide_is_named_with_what_does(folders: dict[str, Path], tmp_path: Path):
    message = refused(folders["hf"], tmp_path / "checkpoint", mesh=MeshShape(expert=3))
    assert "experts=8, which mesh axis expert=3 does not divide: choose expert among 1, 2" in message
    message = refused(folders["hf"], tmp_path / "checkpoint", mesh=MeshShape(expert=8, tensor=2))
    assert "mesh data=1,expert=8,tensor=2 needs 16 devices, there are 8" in message


def test_a_bad_scale_in_the_middle_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    shutil.copytree(folders["hf"], source)
    info = TensorFolder.open(source).tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with info.file.open("r+b") as file:
        file.seek(info.offset + (5 * 160 + 17) * 6 + 2)
        file.write(b"\xff")
    monkeypatch.setattr(conversion, "BATCH_BYTES", 50_000)  # so that much is stored by then
    message = refused(source, tmp_path / "checkpoint", mesh=MeshShape(expert=4))
    assert "down_proj_scales holds scale byte 255 (NaN) at (5, 17, 2)" in message


def test_a_source_that_shrinks_leaves_nothing(folders: dict[str, Path], tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(folders["hf"], source)

    def shrink(done: int, total: int) -> None:
        if done == 0:
            os.truncate(source / "model.safetensors", 100_000)

    message = refused_while(source, tmp_path / "checkpoint", shrink)
    assert "it shrank while being read" in message


def refused_while(source: Path, destination: Path, on_progress) -> str:
    with pytest.raises(UserError) as caught:
        convert(source, destination, on_progress=on_progress)
    assert sorted(os.listdir(destination.parent)) == ["source"]
    return str(caught.value)


def test_a_folder_that_is_no_conversions_is_left_alone(folders: dict[str, Path], tmp_path: Path):
    mine = tmp_path / "checkpoint.unfinished"
    mine.mkdir()
    (mine / "novel.txt").write_text("Chapter 1")
    with pytest.raises(UserError, match=r"holds novel.txt but no plan.json, so no conversion made it; move it out"):
        convert(folders["hf"], tmp_path / "checkpoint")
    assert (mine / "novel.txt").read_text() == "Chapter 1"


def test_a_destination_that_appears_meanwhile_is_left_alone(folders: dict[str, Path], tmp_path: Path):
    destination = tmp_path / "checkpoint"

    def appear(done: int, total: int) -> None:
        destination.mkdir(exist_ok=True)
        (destination / "mine").write_text("")

    with pytest.raises(UserError, match="cannot be made: Directory not empty; if it is there by now, move it out"):
        convert(folders["hf"], destination, on_progress=appear)
    assert os.listdir(destination) == ["mine"]
    shutil.rmtree(destination)
    convert(folders["hf"], destination)  # everything is done but the name
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_nothing_is_logged_in_a_good_conversion(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    with caplog.at_level("WARNING"):
        convert(folders["hf"], tmp_path / "checkpoint")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path):
    """45 MB more of weights, the same peak. The margin is a batch: when its buffers are free is a matter of luck."""
    wide = dataclasses.replace(TINY, width=512, expert_width=768, num_experts=16, vocab_size=8192)
    margin = 24 << 20
    peaks = []
    for num_layers in (2, 6):
        config = dataclasses.replace(wide, layer_kinds=alternating_layers(num_layers))
        write_checkpoint(tmp_path / "source", config)
        command = [sys.executable, WORKER, "convert", tmp_path / "source", tmp_path / "checkpoint"]
        printed = subprocess.run(
            [*map(str, command), "--batch-bytes", str(margin)],
            env={**os.environ, "PYTHONPATH": str(WORKER.parents[2])},
            stdout=subprocess.PIPE,
            timeout=120,
            check=True,
        ).stdout
        peaks.append(json.loads(printed)["peak_bytes"])
        shutil.rmtree(tmp_path / "source")
        shutil.rmtree(tmp_path / "checkpoint")
    assert peaks[1] - peaks[0] < margin
