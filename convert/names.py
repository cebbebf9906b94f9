"""One table of names: our parameters, Hugging Face's tensors, OpenAI's tensors, used in both directions. Knows no bytes.

A view such as "N H D -> (N H) D" says how the axes of our parameter (left) lie in the tensor of a file (right).
Parameters that share one file tensor are stacked on its first axis in table order: OpenAI keeps q, k and v together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
    """One line of the table; `{n}` is the layer. A None says that this layout has no such tensor."""

    ours: str
    view: str
    hf: str
    original: str | None


TABLE = (
    Row("embedding.weight", "V D -> V D", "model.embed_tokens.weight", "embedding.weight"),
    Row(
        "layers.{n}.attention_norm.scale",
        "D -> D",
        "model.layers.{n}.input_layernorm.weight",
        "block.{n}.attn.norm.scale",
    ),
    Row(
        "layers.{n}.attention.q.weight",
        "N H D -> (N H) D",
        "model.layers.{n}.self_attn.q_proj.weight",
        "block.{n}.attn.qkv.weight",
    ),
    Row(
        "layers.{n}.attention.k.weight",
        "K H D -> (K H) D",
        "model.layers.{n}.self_attn.k_proj.weight",
        "block.{n}.attn.qkv.weight",
    ),
    Row(
        "layers.{n}.attention.v.weight",
        "K H D -> (K H) D",
        "model.layers.{n}.self_attn.v_proj.weight",
        "block.{n}.attn.qkv.weight",
    ),
    Row(
        "layers.{n}.attention.q.bias",
        "N H -> (N H)",
        "model.layers.{n}.self_attn.q_proj.bias",
        "block.{n}.attn.qkv.bias",
    ),
    Row(
        "layers.{n}.attention.k.bias",
        "K H -> (K H)",
        "model.layers.{n}.self_attn.k_proj.bias",
        "block.{n}.attn.qkv.bias",
    ),
    Row(
        "layers.{n}.attention.v.bias",
        "K H -> (K H)",
        "model.layers.{n}.self_attn.v_proj.bias",
        "block.{n}.attn.qkv.bias",
    ),
    Row("layers.{n}.attention.sinks", "N -> N", "model.layers.{n}.self_attn.sinks", "block.{n}.attn.sinks"),
    Row(
        "layers.{n}.attention.o.weight",
        "D N H -> D (N H)",
        "model.layers.{n}.self_attn.o_proj.weight",
        "block.{n}.attn.out.weight",
    ),
    Row("layers.{n}.attention.o.bias", "D -> D", "model.layers.{n}.self_attn.o_proj.bias", "block.{n}.attn.out.bias"),
    Row(
        "layers.{n}.moe_norm.scale",
        "D -> D",
        "model.layers.{n}.post_attention_layernorm.weight",
        "block.{n}.mlp.norm.scale",
    ),
    Row("layers.{n}.moe.router.weight", "E D -> E D", "model.layers.{n}.mlp.router.weight", "block.{n}.mlp.gate.weight"),
    Row("layers.{n}.moe.router.bias", "E -> E", "model.layers.{n}.mlp.router.bias", "block.{n}.mlp.gate.bias"),
    # Gate and up alternate in the release: axis g is gate, up. C counts MXFP4 blocks of 32, b their 16 bytes.
    Row(
        "layers.{n}.moe.gate_up.blocks",
        "E F g C b -> E (F g) C b",
        "model.layers.{n}.mlp.experts.gate_up_proj_blocks",
        "block.{n}.mlp.mlp1_weight.blocks",
    ),
    Row(
        "layers.{n}.moe.gate_up.scales",
        "E F g C -> E (F g) C",
        "model.layers.{n}.mlp.experts.gate_up_proj_scales",
        "block.{n}.mlp.mlp1_weight.scales",
    ),
    # What transformers saves after dequantising lies [in, out].
    Row("layers.{n}.moe.gate_up.weight", "E F g D -> E D (F g)", "model.layers.{n}.mlp.experts.gate_up_proj", None),
    Row(
        "layers.{n}.moe.gate_up.bias",
        "E F g -> E (F g)",
        "model.layers.{n}.mlp.experts.gate_up_proj_bias",
        "block.{n}.mlp.mlp1_bias",
    ),
    Row(
        "layers.{n}.moe.down.blocks",
        "E D C b -> E D C b",
        "model.layers.{n}.mlp.experts.down_proj_blocks",
        "block.{n}.mlp.mlp2_weight.blocks",
    ),
    Row(
        "layers.{n}.moe.down.scales",
        "E D C -> E D C",
        "model.layers.{n}.mlp.experts.down_proj_scales",
        "block.{n}.mlp.mlp2_weight.scales",
    ),
    Row("layers.{n}.moe.down.weight", "E D F -> E F D", "model.layers.{n}.mlp.experts.down_proj", None),
    Row(
        "layers.{n}.moe.down.bias",
        "E D -> E D",
        "model.layers.{n}.mlp.experts.down_proj_bias",
        "block.{n}.mlp.mlp2_bias",
    ),
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
        """Where the part `index` of our parameter lies in the file. Only the first axis of a merged group may be cut."""
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
    for row, parameter, names in _rows(config):
        name = names[layout]
        if parameter not in shapes or name is None:
            continue
        view = View.parse(row.view, shapes[parameter])
        parts = found.setdefault(name, [])
        offset = sum(part.view.file_shape[0] for part in parts)
        parts.append(Part(parameter, view, offset))
    missing = shapes.keys() - {part.parameter for parts in found.values() for part in parts}
    assert not missing, f"parameters without a name in the {layout} layout: {sorted(missing)}"
    return tuple(_file_tensor(name, tuple(parts)) for name, parts in found.items())


def parameter_places(tensors: Sequence[FileTensor]) -> Mapping[str, tuple[FileTensor, Part]]:
    """For each parameter of ours the file tensor that holds it, and where."""
    return {part.parameter: (tensor, part) for tensor in tensors for part in tensor.parts}


def _rows(config: ModelConfig):
    """Table rows with the layer filled in; layers in order, so that a conversion reads its source front to back."""
    per_layer = [row for row in TABLE if "{n}" in row.ours]
    first, last = TABLE[: TABLE.index(per_layer[0])], TABLE[TABLE.index(per_layer[-1]) + 1 :]
    for row in first:
        yield row, row.ours, {"hf": row.hf, "original": row.original}
    for n in range(config.num_layers):
        for row in per_layer:
            original = row.original and row.original.format(n=n)
            yield row, row.ours.format(n=n), {"hf": row.hf.format(n=n), "original": original}
    for row in last:
        yield row, row.ours, {"hf": row.hf, "original": row.original}


def _file_tensor(name: str, parts: tuple[Part, ...]) -> FileTensor:
    rows = sum(part.view.file_shape[0] for part in parts)
    packed = parts[0].parameter.endswith((".blocks", ".scales"))
    shape = (rows, *parts[0].view.file_shape[1:])
    return FileTensor(name, UINT8 if packed else BFLOAT16, shape, parts)
