"""A released folder seen as our parameters: the same bytes from either layout, and a sentence for whatever is wrong."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.names import FileTensor
from gptoss_jax.convert.source import Repacked, Source, read_sharded
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.convert.writer import write_folder
from gptoss_jax.errors import UserError
from gptoss_jax.kernels import mxfp4
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import abstract_model, parameter_shapes, parameters
from gptoss_jax.sharding import make_mesh, place
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, expert_width=192, layer_kinds=alternating_layers(2))  # 6 blocks divide by 2
LAYER = "model.layers.1."
EXPERTS = f"{LAYER}mlp.experts."

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model three times."""
    root = tmp_path_factory.mktemp("source")
    write_checkpoint(root / "hf", CONFIG, layout="hf", max_shard_bytes=400_000)
    write_checkpoint(root / "bf16", CONFIG, layout="hf", experts="bf16")
    write_checkpoint(root / "original", CONFIG, layout="original")
    return {path.name: path for path in root.iterdir()}


def rewritten(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the folder with other tensors."""
    folder = TensorFolder.open(source)
    tensors = {name: folder.read(name) for name in folder.tensors}
    change(tensors)
    specs = [FileTensor(name, array.dtype, array.shape, ()) for name, array in tensors.items()]
    small = {path.name: path.read_bytes() for path in source.iterdir() if "safetensors" not in path.name}
    write_folder(target, specs, lambda name: [tensors[name].tobytes()], beside=small)
    return target


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None),) * len(shape)


# --- good folders -------------------------------------------------------------------------------------------------


def test_both_layouts_hold_the_same_parameters(folders: dict[str, Path]):
    hf, original = Source.open(folders["hf"]), Source.open(folders["original"])
    assert (hf.layout, original.layout) == ("hf", "original")
    assert hf.config == original.config == CONFIG
    assert hf.experts == original.experts == "mxfp4"
    for name, shape in parameter_shapes(CONFIG, "mxfp4").items():
        ours = hf.read(name, whole(shape))
        assert ours.shape == hf.shape(name) == original.shape(name) == shape
        assert ours.dtype == hf.dtype(name) == original.dtype(name)
        assert ours.tobytes() == original.read(name, whole(shape)).tobytes()


def test_parameters_lie_as_the_reference_reads_them(folders: dict[str, Path]):
    """The first layer's experts as OpenAI's model takes them apart: gate is every other row, from 0, up from 1."""
    source, folder = Source.open(folders["hf"]), TensorFolder.open(folders["hf"])
    rows = folder.read(f"{EXPERTS}gate_up_proj_blocks")
    blocks = source.read("layers.1.moe.gate_up.blocks", whole((8, 192, 2, 5, 16)))
    np.testing.assert_array_equal(blocks[:, :, 0], rows[:, ::2])
    np.testing.assert_array_equal(blocks[:, :, 1], rows[:, 1::2])
    heads = source.read("layers.1.attention.q.weight", (slice(5, 6), slice(None), slice(None)))
    np.testing.assert_array_equal(heads[0], folder.read(f"{LAYER}self_attn.q_proj.weight")[5 * 16 : 6 * 16])


@pytest.mark.parametrize("kind", ["hf", "bf16", "original"])
def test_shards_are_the_boxes_of_the_whole(kind, folders: dict[str, Path]):
    source = Source.open(folders[kind])
    mesh = make_mesh(data=1, expert=4, tensor=2)
    for name, parameter in parameters(abstract_model(CONFIG, experts=source.experts)).items():
        sharded = read_sharded(source, name, place(name, parameter.shape, parameter.axes, mesh))
        expected = source.read(name, whole(parameter.shape))
        for shard in sharded.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected[shard.index]).tobytes()


def test_unpacked_experts_are_those_of_the_bf16_release(folders: dict[str, Path]):
    packed, plain = Source.open(folders["hf"]), Source.open(folders["bf16"])
    unpacked = Repacked(packed, "bf16")
    for name, shape in parameter_shapes(CONFIG, "bf16").items():
        assert unpacked.shape(name) == shape
        assert unpacked.dtype(name) == plain.dtype(name)
        assert unpacked.read(name, whole(shape)).tobytes() == plain.read(name, whole(shape)).tobytes()
    # A box that begins and ends inside blocks of 32.
    box = (slice(2, 5), slice(7, 30), slice(33, 130))
    expected = plain.read("layers.0.moe.down.weight", whole((8, 160, 192)))[box]
    assert unpacked.read("layers.0.moe.down.weight", box).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("rule", ["even", "floor", "up"])
def test_packing_decoded_experts_again_keeps_every_value(rule, folders: dict[str, Path]):
    plain = Source.open(folders["bf16"])
    packed = Repacked(plain, "mxfp4", scale_rule=rule)
    for stem, shape in (("layers.1.moe.gate_up", (8, 192, 2, 160)), ("layers.1.moe.down", (8, 160, 192))):
        blocks = packed.read(f"{stem}.blocks", whole((*shape[:-1], shape[-1] // 32, 16)))
        scales = packed.read(f"{stem}.scales", whole((*shape[:-1], shape[-1] // 32)))
        values = plain.read(f"{stem}.weight", whole(shape))
        # Codes are 1 or 1.5 times a power of two: by every rule the largest of a block becomes 4 or 6, unrounded.
        np.testing.assert_array_equal(mxfp4.decode_on_host(blocks, scales).astype(float), values.astype(float))
        box = (slice(3, 5), *whole(shape[1:-1]), slice(1, 4))
        assert packed.read(f"{stem}.scales", box).tobytes() == np.ascontiguousarray(scales[box]).tobytes()
        box = (*box, slice(None))
        assert packed.read(f"{stem}.blocks", box).tobytes() == np.ascontiguousarray(blocks[box]).tobytes()


def test_norms_and_whole_models_in_float32_keep_their_dtype(folders: dict[str, Path], tmp_path: Path):
    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("norm.weight")]:
            tensors[name] = tensors[name].astype(np.float32)

    source = Source.open(rewritten(folders["hf"], tmp_path / "float32", widen))
    assert source.dtype("norm.scale") == np.float32
    assert source.dtype("embedding.weight") == ml_dtypes.bfloat16
    expected = Source.open(folders["hf"]).read("norm.scale", whole((160,)))
    np.testing.assert_array_equal(source.read("norm.scale", whole((160,))), expected.astype(np.float32))


# --- bad folders --------------------------------------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def cast(name: str, dtype: type) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{LAYER}self_attn.sinks"),
            f"tensor {LAYER}self_attn.sinks is missing; its config.json asks for it: "
            "get the folder again, or its right config.json",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": tensors["model.norm.weight"]}),
            " holds tensor model.layers.2.input_layernorm.weight, which no gpt-oss of its config.json has; "
            "did you mean model.layers.1.input_layernorm.weight?",
        ),
        (lambda tensors: tensors.update({"x": np.zeros(3, np.uint8)}), " holds tensor x, which no gpt-oss"),
        (
            cast(f"{LAYER}mlp.router.weight", np.float16),
            f"tensor {LAYER}mlp.router.weight has dtype float16; expected bfloat16 or float32: "
            "float16 overflows in gpt-oss",
        ),
        (
            cast("model.embed_tokens.weight", np.int32),
            "tensor model.embed_tokens.weight has dtype int32; expected bfloat16 or float32",
        ),
        (
            cast(f"{EXPERTS}down_proj_scales", np.int8),
            f"tensor {EXPERTS}down_proj_scales has dtype int8; expected uint8",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].T}),
            "tensor lm_head.weight has shape (160, 352); its config.json asks for (352, 160)",
        ),
        (
            lambda tensors: tensors.pop(f"{EXPERTS}down_proj_scales"),
            f" has tensor {EXPERTS}down_proj_blocks but not {EXPERTS}down_proj_scales; "
            "MXFP4 experts need both: get the folder again",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("blocks")],
            " has tensor model.layers.0.mlp.experts.gate_up_proj_scales but not "
            "model.layers.0.mlp.experts.gate_up_proj_blocks; MXFP4 experts need both: get the folder again",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(("blocks", "scales"))],
            "tensor model.layers.0.mlp.experts.gate_up_proj is missing; its config.json asks for it",
        ),
        (
            rename(f"{LAYER}self_attn.sinks", f"{LAYER}self_attn.sink"),
            f"tensor {LAYER}self_attn.sinks is missing, {LAYER}self_attn.sink is there instead; its config.json asks",
        ),
    ],
    ids=lambda value: "change" if callable(value) else re.sub(r"\W+", "_", value)[:60],
)
def test_wrong_tensors_are_named(change, message, folders: dict[str, Path], tmp_path: Path):
    folder = rewritten(folders["hf"], tmp_path / "bad", change)
    with pytest.raises(UserError) as caught:
        Source.open(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)


def test_an_original_folder_without_blocks_is_told_apart_from_a_bf16_one(folders: dict[str, Path], tmp_path: Path):
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("blocks", "scales"))]:
            del tensors[name]

    folder = rewritten(folders["original"], tmp_path / "original", drop)
    with pytest.raises(UserError, match=r"tensor block\.0\.mlp\.mlp1_weight\.blocks is missing"):
        Source.open(folder)


@pytest.mark.parametrize(("kind", "name"), [("hf", "down_proj_scales"), ("original", "mlp2_weight.scales")])
def test_a_nan_scale_is_named_with_its_place_in_the_file(kind, name, folders: dict[str, Path], tmp_path: Path):
    def damage(tensors: Tensors) -> None:
        (found,) = [array for key, array in tensors.items() if key.endswith(name) and ".1." in key]
        found[6, 150, 4] = 255

    source = Source.open(rewritten(folders[kind], tmp_path / "nan", damage))
    shard = (slice(4, 8), slice(None), slice(3, 6))  # as a mesh with expert=2,tensor=2 cuts it
    with pytest.raises(UserError) as caught:
        source.read("layers.1.moe.down.scales", shard)
    assert re.search(rf"{name} holds scale byte 255 \(NaN\) at \(6, 150, 4\); expected 0 to 254", str(caught.value))
    source.read("layers.1.moe.down.scales", (slice(0, 4), slice(None), slice(None)))  # the other shards are good


def test_a_gate_up_nan_scale_is_counted_in_the_files_rows(folders: dict[str, Path], tmp_path: Path):
    def damage(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}gate_up_proj_scales"][7, 2 * 100 + 1, 3] = 255  # up, of expert 7's row 100

    source = Source.open(rewritten(folders["hf"], tmp_path / "nan", damage))
    with pytest.raises(UserError, match=r"gate_up_proj_scales holds scale byte 255 \(NaN\) at \(7, 201, 3\)"):
        source.read("layers.1.moe.gate_up.scales", (slice(6, 8), slice(96, 192), slice(None), slice(None)))


def test_a_nan_weight_that_is_to_be_packed_is_named(folders: dict[str, Path], tmp_path: Path):
    def damage(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}down_proj"][6, 3, 5] = np.nan

    source = Repacked(Source.open(rewritten(folders["bf16"], tmp_path / "nan", damage)), "mxfp4")
    with pytest.raises(UserError, match=r"layers\.1\.moe\.down\.weight, expert 6: .*MXFP4 holds neither NaN nor inf"):
        source.read("layers.1.moe.down.blocks", whole((8, 160, 6, 16)))


def test_a_missing_shard_is_named(folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in folders["hf"].iterdir():
        if not path.name.startswith("model-00002"):
            (folder / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"model-00002-of-0000\d.safetensors', which is missing; copy or download"):
        Source.open(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"belongs to \d shards, \d of them are there; copy or download"):
        Source.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, " has no config.json; expected a released folder, Hugging Face's or OpenAI's original/"),
        ('{"model_type": "gpt_oss", "num_', "expected JSON, but"),
        ("{}", "config.json has neither num_local_experts"),
        ({"model_type": "gpt2"}, "config.json: model_type is 'gpt2'; implemented is 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; implemented is 'silu'"),
        ({"attention_bias": False}, "config.json: attention_bias is False; implemented is True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; implemented is 'mxfp4'"),
        ({"num_local_experts": 9}, "has shape (8,"),
        ({"num_hidden_layers": 3, "layer_types": None}, "model.layers.2.input_layernorm.weight is missing"),
    ],
    ids=str,
)
def test_a_bad_config_is_named(text, message, folders: dict[str, Path], tmp_path: Path):
    folder = rewritten(folders["hf"], tmp_path / "bad", lambda tensors: None)
    path = folder / "config.json"
    if text is None:
        path.unlink()
    elif isinstance(text, str):
        path.write_text(text)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(UserError) as caught:
        Source.open(folder)
    assert message in str(caught.value)


def test_a_path_that_is_no_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{path} is no folder; expected a released folder"):
            Source.open(path)
