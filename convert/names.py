"""One table of names: our parameters, Hugging Face's and OpenAI's tensors, used in both directions. Knows no bytes.

A view such as "N H D -> (N H) D" says how the axes of our parameter (left) lie in the tensor of a file (right).
Parameters that share one file tensor are stacked on its first axis in table order: OpenAI keeps q, k and v together.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from gptoss_jax.errors import Unsupported
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import Experts, parameter_shapes

Layout = Literal["hf", "original"]
Index = tuple[slice, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. A None says that this layout has no such tensor."""

    ours: str
    view: str
    hf: str
    original: str | None

    def of_layer(self, n: int) -> "Row":
        original = None if self.original is None else f"block.{n}.{self.original}"
        return Row(f"layers.{n}.{self.ours}", self.view, f"model.layers.{n}.{self.hf}", original)


FIRST = (Row("embedding.weight", "V D -> V D", "model.embed_tokens.weight", "embedding.weight"),)

# Under layers.N, model.layers.N and block.N. Gate and up alternate in the release: of axis g, 0 is gate and 1 is up.
# C counts MXFP4 blocks of 32, b is their 16 bytes. The bf16 experts that transformers saves lie [in, out].
LAYER = (
    Row("attention_norm.scale", "D -> D", "input_layernorm.weight", "attn.norm.scale"),
    Row("attention.q.weight", "N H D -> (N H) D", "self_attn.q_proj.weight", "attn.qkv.weight"),
    Row("attention.k.weight", "K H D -> (K H) D", "self_attn.k_proj.weight", "attn.qkv.weight"),
    Row("attention.v.weight", "K H D -> (K H) D", "self_attn.v_proj.weight", "attn.qkv.weight"),
    Row("attention.q.bias", "N H -> (N H)", "self_attn.q_proj.bias", "attn.qkv.bias"),
    Row("attention.k.bias", "K H -> (K H)", "self_attn.k_proj.bias", "attn.qkv.bias"),
    Row("attention.v.bias", "K H -> (K H)", "self_attn.v_proj.bias", "attn.qkv.bias"),
    Row("attention.sinks", "N -> N", "self_attn.sinks", "attn.sinks"),
    Row("attention.o.weight", "D N H -> D (N H)", "self_attn.o_proj.weight", "attn.out.weight"),
    Row("attention.o.bias", "D -> D", "self_attn.o_proj.bias", "attn.out.bias"),
    Row("moe_norm.scale", "D -> D", "post_attention_layernorm.weight", "mlp.norm.scale"),
    Row("moe.router.weight", "E D -> E D", "mlp.router.weight", "mlp.gate.weight"),
    Row("moe.router.bias", "E -> E", "mlp.router.bias", "mlp.gate.bias"),
    Row("moe.gate_up.blocks", "E F g C b -> E (F g) C b", "mlp.experts.gate_up_proj_blocks", "mlp.mlp1_weight.blocks"),
    Row("moe.gate_up.scales", "E F g C -> E (F g) C", "mlp.experts.gate_up_proj_scales", "mlp.mlp1_weight.scales"),
    Row("moe.gate_up.weight", "E F g D -> E D (F g)", "mlp.experts.gate_up_proj", None),
    Row("moe.gate_up.bias", "E F g -> E (F g)", "mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    Row("moe.down.blocks", "E D C b -> E D C b", "mlp.experts.down_proj_blocks", "mlp.mlp2_weight.blocks"),
    Row("moe.down.scales", "E D C -> E D C", "mlp.experts.down_proj_scales", "mlp.mlp2_weight.scales"),
    Row("moe.down.weight", "E D F -> E F D", "mlp.experts.down_proj", None),
    Row("moe.down.bias", "E D -> E D", "mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
)

LAST = (
    Row("norm.scale", "D -> D", "model.norm.weight", "norm.scale"),
    Row("unembedding.weight", "V D -> V D", "lm_head.weight", "unembedding.weight"),
)


@dataclasses.dataclass(frozen=True)
class View:
    """How one parameter of ours lies in a file's tensor: a permutation of axes, then merging of neighbours."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]  # axes of ours that merge into each axis of the file

    @classmethod
    def parse(cls, text: str, shape: Sequence[int]) -> "View":
        left, right = (side.split() for side in text.split("->"))
        groups: list[tuple[int, ...]] = []
        merging: list[int] | None = None
        for word in right:
            axis = left.index(word.strip("()"))
            if word.startswith("("):
                merging = []
            if merging is None:
                groups.append((axis,))
                continue
            merging.append(axis)
            if word.endswith(")"):
                groups.append(tuple(merging))
                merging = None
        assert len(left) == len(shape), (text, shape)
        return cls(tuple(shape), tuple(axis for group in groups for axis in group), tuple(groups))

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def file_index(self, index: Index) -> Index:
        """Where the part `index` of our parameter lies in the file. Of merged axes only the first may be cut."""
        found = []
        for group in self.groups:
            inner = math.prod(self.shape[axis] for axis in group[1:])
            start, stop, _ = index[group[0]].indices(self.shape[group[0]])
            assert all(index[axis].indices(self.shape[axis])[:2] == (0, self.shape[axis]) for axis in group[1:])
            found.append(slice(start * inner, stop * inner))
        return tuple(found)

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Our axes, from the file's; a view of `array` unless axes swap places."""
        sizes: list[int] = []
        for length, group in zip(array.shape, self.groups, strict=True):
            inner = [self.shape[axis] for axis in group[1:]]
            sizes += [length // math.prod(inner), *inner]
        return np.ascontiguousarray(array.reshape(sizes).transpose(np.argsort(self.order)))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The file's axes, from ours; the inverse of `from_file`."""
        moved = np.ascontiguousarray(array.transpose(self.order))
        shape = iter(moved.shape)
        return moved.reshape([math.prod(next(shape) for _ in group) for group in self.groups])


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter of ours inside a file's tensor, `offset` rows down its first axis."""

    parameter: str
    view: View
    offset: int

    def file_index(self, index: Index) -> Index:
        first, *rest = self.view.file_index(index)
        return (slice(first.start + self.offset, first.stop + self.offset), *rest)


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a released layout: its name, shape and dtype there, and the parameters of ours that it holds."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_tensors(config: ModelConfig, *, layout: Layout, experts: Experts) -> tuple[FileTensor, ...]:
    """Every tensor of `layout`, in the order of the table, layer by layer.

    Dtypes are the release's: uint8 for packed experts, bfloat16 for the rest.

    Raises:
        Unsupported: OpenAI's layout with bf16 experts, which its loader cannot read.
    """
    if layout == "original" and experts == "bf16":
        raise Unsupported("OpenAI's layout holds MXFP4 experts only: export bf16 experts with --format hf")
    shapes = parameter_shapes(config, experts)
    found: dict[str, list[Part]] = {}
    for row in _rows(config):
        name = row.hf if layout == "hf" else row.original
        if row.ours not in shapes or name is None:
            continue
        parts = found.setdefault(name, [])
        offset = sum(part.view.file_shape[0] for part in parts)
        parts.append(Part(row.ours, View.parse(row.view, shapes[row.ours]), offset))
    missing = shapes.keys() - {part.parameter for parts in found.values() for part in parts}
    assert not missing, f"parameters without a name in the {layout} layout: {sorted(missing)}"
    return tuple(_file_tensor(name, tuple(parts)) for name, parts in found.items())


def parameter_places(tensors: Sequence[FileTensor]) -> Mapping[str, tuple[FileTensor, Part]]:
    """For each parameter of ours the file tensor that holds it, and where."""
    return {part.parameter: (tensor, part) for tensor in tensors for part in tensor.parts}


def _rows(config: ModelConfig) -> Iterator[Row]:
    """The table with its layers written out, in an order in which a conversion reads its source front to back."""
    yield from FIRST
    for n in range(config.num_layers):
        yield from (row.of_layer(n) for row in LAYER)
    yield from LAST


def _file_tensor(name: str, parts: tuple[Part, ...]) -> FileTensor:
    rows = sum(part.view.file_shape[0] for part in parts)
    packed = parts[0].parameter.endswith((".blocks", ".scales"))
    shape = (rows, *parts[0].view.file_shape[1:])
    return FileTensor(name, UINT8 if packed else BFLOAT16, shape, parts)
