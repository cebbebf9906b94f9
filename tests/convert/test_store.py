"""Parameters on disk: what is saved in batches is restored on any mesh, and half a batch is never kept."""

import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.convert import store
from gptoss_jax.convert.store import parameter_of, restore, saved_files, stored
from gptoss_jax.sharding import make_mesh

NAMES = ["embedding.weight", "layers.0.moe.down.blocks", "layers.10.norm.scale"]


def values() -> dict[str, np.ndarray]:
    """Sizes all different, every dtype that a checkpoint has."""
    numbers = np.random.RandomState(0)
    return {
        "embedding.weight": numbers.randn(36, 10).astype(ml_dtypes.bfloat16),
        "layers.0.moe.down.blocks": numbers.randint(0, 256, (8, 5, 6, 16), np.uint8),
        "layers.10.norm.scale": numbers.randn(20).astype(np.float32),
    }


def placed(spec: dict[str, P]) -> dict[str, jax.Array]:
    mesh = make_mesh(expert=4, tensor=2)
    return {name: jax.device_put(array, NamedSharding(mesh, spec.get(name, P()))) for name, array in values().items()}


SPEC = {"embedding.weight": P("tensor", None), "layers.0.moe.down.blocks": P("expert", None, "tensor", None)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two batches, not finished."""
    arrays = placed(SPEC)
    store.save(tmp_path, {name: arrays[name] for name in NAMES[:2]})
    store.save(tmp_path, {name: arrays[name] for name in NAMES[2:]})
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_is_restored_onto_any_mesh(folder: Path):
    store.finish(folder)
    assert os.listdir(folder) == ["params"]
    found = stored(folder)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (array.shape, array.dtype) for name, array in values().items()
    }
    mesh = make_mesh(data=2, expert=2, tensor=2)
    others = {"embedding.weight": P(None, "expert"), "layers.0.moe.down.blocks": P(("expert", "tensor"))}
    for spec in (SPEC, others, {}):
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec.get(name, P())))
            for name, leaf in found.items()
        }
        arrays = dict(restore(folder, wanted))
        for name, array in values().items():
            assert arrays[name].sharding == wanted[name].sharding
            assert np.asarray(arrays[name]).tobytes() == array.tobytes()


def test_a_part_of_the_parameters_can_be_restored(folder: Path):
    store.finish(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    wanted = {"layers.10.norm.scale": jax.ShapeDtypeStruct((20,), np.float32, sharding=one)}
    ((name, array),) = restore(folder, wanted)
    assert name == "layers.10.norm.scale"
    assert np.asarray(array).tobytes() == values()[name].tobytes()


def test_a_file_holds_one_shard_and_nothing_else(folder: Path):
    """Raw bytes in C order, not compressed."""
    found = {name: path.read_bytes() for name, path in saved_files(folder, "layers.0.moe.down.blocks")}
    blocks = values()["layers.0.moe.down.blocks"]
    expected = {
        f"params/state/layers.0.moe.down.blocks/c/{expert}/0/{half}/0": np.ascontiguousarray(
            blocks[2 * expert : 2 * expert + 2, :, 3 * half : 3 * half + 3]
        ).tobytes()
        for expert in range(4)
        for half in range(2)
    }
    metadata = json.loads(found.pop("params/state/layers.0.moe.down.blocks/zarr.json"))
    assert metadata["shape"] == [8, 5, 6, 16]
    index = 8 + 8 + 4  # Zarr's offset, length and their checksum follow the bytes
    assert {name: content[:-index] for name, content in found.items()} == expected
    store.finish(folder)
    for name, content in found.items():
        assert (folder / name).read_bytes() == content


def test_the_parameter_of_a_file_is_in_its_name(folder: Path):
    for name in NAMES:
        assert {parameter_of(file) for file, _ in saved_files(folder, name)} == {name}
    assert parameter_of("params/state/_METADATA") is None
    assert parameter_of("params/_CHECKPOINT_METADATA") is None
    assert parameter_of("config.json") is None


def test_the_order_and_size_of_batches_leave_no_trace(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    store.finish(folder)
    arrays = placed(SPEC)
    other = tmp_path_factory.mktemp("other")
    for name in reversed(NAMES):
        store.save(other, {name: arrays[name]})
    store.finish(other)
    assert files(other) == files(folder)


def test_large_experts_have_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "_CHUNK_BYTES", 2 * 5 * 6 * 16)  # two of the eight experts
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    store.save(tmp_path, {name: jax.device_put(array, one) for name, array in values().items()})
    found = [name for name, _ in saved_files(tmp_path, "layers.0.moe.down.blocks") if "/c/" in name]
    assert found == [f"params/state/layers.0.moe.down.blocks/c/{n}/0/0/0" for n in range(8)]


# --- after a kill -------------------------------------------------------------------------------------------------


def batches(folder: Path) -> list[set[str]]:
    """What each saved batch holds."""
    return sorted(
        ({path.parent.name for path in batch.glob("state/*/zarr.json")} for batch in batch_folders(folder)), key=sorted
    )


def batch_folders(folder: Path) -> list[Path]:
    return list((folder / "params.partial_save").iterdir())


def test_only_batches_of_which_all_is_done_are_kept(folder: Path):
    store.forget_other_batches(folder, {NAMES[0], NAMES[2]})  # NAMES[1], of the first batch, is not
    assert batches(folder) == [{NAMES[2]}]
    arrays = placed(SPEC)
    store.save(folder, {name: arrays[name] for name in NAMES[:2]})  # again: Orbax has forgotten it too
    assert batches(folder) == [set(NAMES[:2]), {NAMES[2]}]


def test_what_a_killed_save_leaves_is_dropped(folder: Path):
    (torn,) = [batch for batch in batch_folders(folder) if (batch / "state" / NAMES[2]).exists()]
    (torn / "state" / NAMES[2] / "zarr.json").unlink()
    (folder / "params.partial_save.orbax-checkpoint-tmp").mkdir()
    store.forget_other_batches(folder, set(NAMES[:2]))
    assert os.listdir(folder) == ["params.partial_save"]
    assert batches(folder) == [set(NAMES[:2])]


def test_a_merge_that_was_killed_is_begun_anew(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    (folder / "merging" / "params.partial_save" / "state").mkdir(parents=True)
    (folder / "merging" / "params.partial_save" / "state" / "junk").write_text("junk")
    store.finish(folder)
    assert os.listdir(folder) == ["params"]
    before = files(folder)
    store.finish(folder)  # nothing is left to do
    assert files(folder) == before
    assert not [name for name in before if "junk" in name]


def test_a_disk_without_links_gets_copies(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    expected = {name: path.read_bytes() for name in NAMES for name, path in saved_files(folder, name)}
    monkeypatch.setattr(os, "link", refuse)
    store.finish(folder)
    found = files(folder)
    assert {name: found[name] for name in expected} == expected
