"""Loading: every kind of folder gives the same model, wherever it is placed, and a bad one gives a sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.checkpoint import load, sniff
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.manifest import Manifest
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, parameters
from gptoss_jax.sharding import MeshShape, make_mesh
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, expert_width=192, layer_kinds=alternating_layers(2))  # 6 blocks divide by 2
KINDS = ["hf", "bf16", "original", "checkpoint", "bf16_checkpoint"]
TOKENS = jnp.array([[1, 2, 340, 7, 7, 5, 100, 3, 9, 351, 0, 12]], jnp.int32)  # longer than the window of 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every kind of folder."""
    root = tmp_path_factory.mktemp("load")
    write_checkpoint(root / "hf", CONFIG)
    write_checkpoint(root / "bf16", CONFIG, experts="bf16")
    write_checkpoint(root / "original", CONFIG, layout="original")
    convert(root / "original", root / "checkpoint", mesh=MeshShape(expert=4, tensor=2))
    convert(root / "hf", root / "bf16_checkpoint", experts="bf16")
    return {kind: root / kind for kind in KINDS}


def bytes_of(model: GptOss) -> dict[str, bytes]:
    return {name: np.asarray(value[...]).tobytes() for name, value in parameters(model).items()}


@pytest.fixture
def checkpoint(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders["checkpoint"], tmp_path / "checkpoint"))


# --- good folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_is_the_same_model(kind, folders: dict[str, Path]):
    assert sniff(folders[kind]) == {"bf16": "hf", "bf16_checkpoint": "checkpoint"}.get(kind, kind)
    model = load(folders[kind])
    assert model.config == CONFIG
    assert model.experts == ("bf16" if kind.startswith("bf16") else "mxfp4")
    assert bytes_of(model) == bytes_of(load(folders["bf16" if kind.startswith("bf16") else "hf"]))


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=8", "tensor=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_model_on_any_mesh(kind, mesh, folders: dict[str, Path]):
    devices = make_mesh(**dataclasses.asdict(MeshShape.parse(mesh)))
    model = load(folders[kind], mesh=devices)
    assert bytes_of(model) == bytes_of(load(folders[kind]))
    for value in parameters(model).values():
        assert value[...].sharding.mesh == devices
    down = parameters(model)["layers.1.moe.down.bias"][...]
    assert down.addressable_shards[0].data.shape == (8 // devices.shape["expert"], 160)


def test_a_path_may_be_a_string_and_lie_on_one_device(folders: dict[str, Path]):
    model = load(str(folders["checkpoint"]))
    assert {device for value in parameters(model).values() for device in value[...].devices()} == {jax.devices()[0]}


@pytest.mark.parametrize("kind", ["hf", "bf16", "checkpoint"])
def test_float32_is_asked_for_by_dtype(kind, folders: dict[str, Path]):
    plain, wide = load(folders[kind]), load(folders[kind], dtype=jnp.float32)
    assert plain.dtype == jnp.bfloat16
    assert wide.dtype == jnp.float32
    for name, value in parameters(wide).items():
        packed = name.endswith((".blocks", ".scales"))
        assert value[...].dtype == (jnp.uint8 if packed else jnp.float32)
        np.testing.assert_array_equal(np.asarray(value[...]), np.asarray(parameters(plain)[name][...], value.dtype))


def test_what_is_loaded_runs(folders: dict[str, Path]):
    forward = nnx.jit(lambda model, tokens: model(tokens))
    logits, plain = (forward(load(folders[kind], dtype=jnp.float32), TOKENS) for kind in ("checkpoint", "bf16"))
    assert logits.shape == (1, TOKENS.shape[1], 352)
    # The same weights; sums of packed and of plain experts may run in another order.
    np.testing.assert_allclose(np.asarray(logits), np.asarray(plain), atol=1e-4 * float(jnp.std(logits)))


def test_nothing_is_logged(folders: dict[str, Path], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"):
        load(folders["checkpoint"])
    assert not caplog.records


# --- bad folders --------------------------------------------------------------------------------------------------


def refused(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    return str(caught.value)


def test_a_path_without_a_model_is_named(folders: dict[str, Path], tmp_path: Path):
    expected = "expected a converted checkpoint, or a released folder (Hugging Face's, or OpenAI's original/)"
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        assert refused(path) == f"{path} is no folder; {expected}"
    assert refused(tmp_path) == f"{tmp_path} has no config.json; {expected}"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refused(tmp_path) == "config.json: model_type is 'llama'; implemented is 'gpt_oss'"


def test_an_unfinished_destination_is_no_checkpoint(folders: dict[str, Path], tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert(folders["hf"], tmp_path / "checkpoint", on_progress=stop)
    for path in (tmp_path / "checkpoint", tmp_path / "checkpoint.unfinished"):
        message = f"{path}: its conversion has not finished; run the same convert command again to go on with it"
        assert refused(path) == message


def test_a_file_that_is_missing_or_cut_is_named(checkpoint: Path):
    name = next(name for name in Manifest.read(checkpoint).files if "/layers.1.moe.down.blocks/c/" in name)
    path = checkpoint / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert refused(checkpoint) == (
        f"{path} has {len(content) - 1:,} bytes; expected {len(content):,} bytes: copy or convert the checkpoint again"
    )
    path.unlink()
    assert refused(checkpoint) == (
        f"{path} is missing; expected {len(content):,} bytes: copy or convert the checkpoint again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, but"),
        ("{}", "format None version None; expected 'gptoss_jax' version 1: convert the release again"),
        ('{"format": "gptoss_jax", "version": 2}', "version 2; expected 'gptoss_jax' version 1"),
        ('{"format": "gptoss_jax", "version": 1}', "is damaged (its own CRC-32 does not fit): copy the checkpoint or"),
        ({"experts": "bf16"}, "is damaged (its own CRC-32 does not fit)"),
        ({"files": {}}, "is damaged (its own CRC-32 does not fit)"),
    ],
)
def test_a_damaged_manifest_is_named(text, message, checkpoint: Path):
    path = checkpoint / "manifest.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    found = refused(checkpoint)
    assert found.startswith(str(path))
    assert message in found


def test_a_config_of_another_model_is_named(folders: dict[str, Path], checkpoint: Path):
    config = checkpoint / "config.json"
    other = json.loads(config.read_text()) | {"intermediate_size": 224}  # "192" and "224" are equally long
    config.write_text(config.read_text().replace('"intermediate_size": 192', '"intermediate_size": 224'))
    assert json.loads(config.read_text()) == other
    assert refused(checkpoint) == (
        f"{checkpoint}: parameter layers.0.moe.down.blocks has shape (8, 160, 6, 16), its config.json asks for "
        "(8, 160, 7, 16): convert the release again"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_that_divides_nothing_gets_the_values_and_zeros_behind(kind, folders: dict[str, Path]):
    """8 experts on 3 parts, 6 blocks on 2: each device's shard is what the released array has there, then padding."""
    sharded = parameters(load(folders[kind], mesh=make_mesh(expert=3, tensor=2)))
    for name, whole in parameters(load(folders[kind])).items():
        found, expected = np.array(sharded[name][...]), np.asarray(whole[...])
        inside = tuple(slice(size) for size in expected.shape)
        np.testing.assert_array_equal(found[inside], expected, err_msg=name)
        found[inside] = 0
        assert not found.any(), name


@pytest.mark.parametrize("impl", ["tpu-interpret", "gpu-interpret"])
def test_the_layout_of_a_kernel_keeps_every_value(impl: str, folders: dict[str, Path]):
    """On a mesh, where bytes change places only on their own device."""
    plain, other = (
        load(folders["checkpoint"], mesh=make_mesh(expert=3, tensor=2), impl=name) for name in ("xla", impl)
    )
    for layers in zip(plain.layers, other.layers, strict=True):
        for linears in zip(*((layer.moe.gate_up, layer.moe.down) for layer in layers), strict=True):
            expected, found = (linear.arrays()[0].decode(jnp.float32) for linear in linears)
            if impl.startswith("tpu"):
                found = jnp.swapaxes(found, -1, -2)
                found = jnp.swapaxes(found, 1, 2) if found.ndim == 4 else found
            np.testing.assert_array_equal(found, expected)


def test_float16_is_refused(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="expected bfloat16 or float32: float16 overflows"):
        load(folders["checkpoint"], dtype=jnp.float16)


@pytest.mark.parametrize("mesh", [None, {"expert": 2}], ids=["one", "mesh"])
def test_an_embedding_on_the_host_gives_the_same_numbers(mesh, folders: dict[str, Path]):
    mesh = mesh and make_mesh(**mesh)
    tokens = jnp.array([[5, 300, 17], [1, 2, 351]], jnp.int32)
    model = load(folders["checkpoint"], mesh=mesh, dtype=jnp.float32, embedding="host")
    assert parameters(model)["embedding.weight"][...].sharding.memory_kind == "pinned_host"
    plain = load(folders["checkpoint"], mesh=mesh, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(model)(tokens), jax.jit(plain)(tokens))


def test_an_embedding_on_the_host_is_not_cut(folders: dict[str, Path]):
    message = refused(folders["checkpoint"], mesh=make_mesh(tensor=2), embedding="host")
    assert "mesh axis tensor=2 cuts it already: leave it on the devices, or choose tensor=1" in message
