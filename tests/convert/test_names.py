"""The table of names: every parameter has its place in both layouts, and a box of it is the same box of the file."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.configs import model_config
from gptoss_jax.convert.names import (
    BFLOAT16,
    FIRST,
    LAST,
    LAYER,
    UINT8,
    Index,
    View,
    file_tensors,
    parameter_places,
)
from gptoss_jax.errors import Unsupported
from gptoss_jax.model.config import ModelConfig, alternating_layers
from gptoss_jax.model.transformer import parameter_shapes
from tests.tiny import TINY

ONE_LAYER = dataclasses.replace(TINY, layer_kinds=alternating_layers(1))
TABLE = (*FIRST, *(row.of_layer(0) for row in LAYER), *LAST)
KINDS = [("hf", "mxfp4"), ("hf", "bf16"), ("original", "mxfp4")]
SIZES = {"D": 160, "V": 352, "N": 12, "K": 4, "H": 16, "E": 8, "F": 224, "g": 2, "b": 16}


def shape_of(row) -> tuple[int, ...]:
    """The shape of the row's parameter in TINY, from the letters alone; blocks C lie along the input axis."""
    blocks = (SIZES["F"] if ".down." in row.ours else SIZES["D"]) // 32
    return tuple(SIZES.get(letter, blocks) for letter in row.view.split(" -> ")[0].split())


def rearranged(view: str, array: np.ndarray) -> np.ndarray:
    """The array as the file holds it, by einsum."""
    left, right = view.split(" -> ")
    moved = np.einsum(f"{left.replace(' ', '')}->{''.join(c for c in right if c.isalpha())}", array)
    sizes = dict(zip(left.split(), array.shape, strict=True))
    groups = right.replace("(F g)", "F*g").replace("(N H)", "N*H").replace("(K H)", "K*H").split()
    return moved.reshape([math.prod(sizes[axis] for axis in group.split("*")) for group in groups])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.ours)
def test_letters_mean_the_models_shapes(row):
    experts = "bf16" if row.ours.endswith(("gate_up.weight", "down.weight")) else "mxfp4"
    assert parameter_shapes(ONE_LAYER, experts)[row.ours] == shape_of(row)


@given(row=st.sampled_from(TABLE), data=st.data())
def test_a_box_of_a_parameter_is_a_box_of_the_file(row, data: st.DataObject):
    shape = shape_of(row)
    ours = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    view, file = View.parse(row.view, shape), rearranged(row.view, ours)
    assert view.file_shape == file.shape
    inner = {axis for group in view.groups for axis in group[1:]}
    index: Index = tuple(slice(None) if axis in inner else data.draw(cuts(size)) for axis, size in enumerate(shape))
    np.testing.assert_array_equal(view.from_file(file[view.file_index(index)]), ours[index])
    np.testing.assert_array_equal(view.to_file(ours), file)


def cuts(size: int) -> st.SearchStrategy[slice]:
    """Slices as jax gives them for a shard: whole, or from here to there."""
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    return st.just(slice(None)) | ends.map(lambda pair: slice(*pair))


@pytest.mark.parametrize(("layout", "experts"), KINDS)
def test_every_parameter_has_one_place(layout, experts):
    tensors = file_tensors(TINY, layout=layout, experts=experts)
    shapes = parameter_shapes(TINY, experts)
    assert sorted(part.parameter for tensor in tensors for part in tensor.parts) == sorted(shapes)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        ends = [part.offset + part.view.file_shape[0] for part in tensor.parts]
        assert [part.offset for part in tensor.parts] == [0, *ends[:-1]]
        assert tensor.shape[0] == ends[-1]
        assert tensor.dtype == (UINT8 if tensor.name.endswith(("blocks", "scales")) else BFLOAT16)
    assert parameter_places(tensors).keys() == shapes.keys()


def test_openai_keeps_queries_then_keys_then_values_in_one_tensor():
    tensors = file_tensors(TINY, layout="original", experts="mxfp4")
    places = parameter_places(tensors)
    tensor, part = places["layers.3.attention.v.weight"]
    assert (tensor.name, tensor.shape) == ("block.3.attn.qkv.weight", ((12 + 4 + 4) * 16, 160))
    assert part.offset == (12 + 4) * 16
    # Heads 1 and 2 of v: rows after all of q and k and after head 0.
    assert part.file_index((slice(1, 3), slice(None), slice(None))) == (slice(272, 304), slice(0, 160))


def test_openai_has_no_place_for_bf16_experts():
    with pytest.raises(Unsupported, match="export bf16 experts with --format hf"):
        file_tensors(TINY, layout="original", experts="bf16")


@pytest.mark.parametrize(
    ("name", "billions", "gigabytes"), [("gpt-oss-20b", 20.91, 13.76), ("gpt-oss-120b", 116.83, 65.25)]
)
def test_the_released_sizes_come_out(name, billions, gigabytes):
    """Parameters as OpenAI's model card counts them (arXiv:2508.10925, table 1), bytes as its shards have them."""
    config = model_config(name)
    one, two = (sizes(dataclasses.replace(config, layer_kinds=alternating_layers(n))) for n in (1, 2))
    parameters, nbytes = one + (config.num_layers - 1) * (two - one)
    assert (round(parameters / 1e9, 2), round(nbytes / 1e9, 2)) == (billions, gigabytes)


def sizes(config: ModelConfig) -> np.ndarray:
    """(parameters, bytes), the same in both layouts."""
    found = []
    for layout in ("hf", "original"):
        tensors = file_tensors(config, layout=layout, experts="mxfp4")
        packed = sum(tensor.nbytes * 2 for tensor in tensors if tensor.name.endswith("blocks"))  # two values a byte
        plain = sum(tensor.nbytes // 2 for tensor in tensors if tensor.dtype == BFLOAT16)
        found.append((packed + plain, sum(tensor.nbytes for tensor in tensors)))
    assert found[0] == found[1]
    return np.array(found[0])


def test_transformers_has_the_same_tensors():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(**ONE_LAYER.to_hf(mxfp4=False))
    with torch.device("meta"):
        theirs = transformers.GptOssForCausalLM(config).state_dict()
    ours = file_tensors(ONE_LAYER, layout="hf", experts="bf16")
    assert {tensor.name: tensor.shape for tensor in ours} == {name: tuple(x.shape) for name, x in theirs.items()}


def test_openais_model_has_the_same_tensors():
    torch = pytest.importorskip("torch")
    openai = pytest.importorskip("gpt_oss.torch.model")
    weights = pytest.importorskip("gpt_oss.torch.weights")
    sizes = ONE_LAYER.to_openai()
    fields = {field.name for field in dataclasses.fields(openai.ModelConfig)}
    config = openai.ModelConfig(**{key: value for key, value in sizes.items() if key in fields})
    theirs = openai.Transformer(config, device=torch.device("meta")).state_dict()
    ours = {tensor.name: tensor.shape for tensor in file_tensors(ONE_LAYER, layout="original", experts="mxfp4")}
    expected = {}
    for name, value in theirs.items():
        stored = weights.PARAM_NAME_MAP.get(name, name)
        if isinstance(stored, str):
            expected[stored] = tuple(value.shape)
        else:  # (blocks, scales) of an MXFP4 tensor
            *rows, width = value.shape
            expected |= {stored[0]: (*rows, width // 32, 16), stored[1]: (*rows, width // 32)}
    assert ours == expected
