"""A base and an adapter as one model: its parameters, read in part, and its export. Knows the sum, not the formats.

    W + scale · b a ─► rounded once, to what W is stored in ─► a released folder

Experts packed on the scales that they have come out with the very codes that merged training computed (moe_matmul's
merged.py). What is not changed leaves with the bytes with which it came, down to single blocks.

A small update may not outlive the rounding: one of 1 % of a weight is gone from MXFP4, where neighbours lie 17 to 50 %
apart. So every merge measures how much of the update is left, matrix by matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.convert.adapters import base_digest, load_adapter
from gptoss_jax.convert.boxes import aligned_empty
from gptoss_jax.convert.export import MAX_SHARD_BYTES, check_destination, open_base, write_release
from gptoss_jax.convert.names import Index, Layout
from gptoss_jax.convert.source import Parameters, Repacked
from gptoss_jax.errors import UserError
from gptoss_jax.kernels.moe_matmul.merged import merged_codes
from gptoss_jax.kernels.mxfp4 import BLOCK, MXFP4, ScaleRule, encode_on_device
from gptoss_jax.model.adapter import EXPERTS, Adapter
from gptoss_jax.model.transformer import Experts, parameter_shapes

_EXPERT_PATHS = tuple(f".moe.{target}" for target in EXPERTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survival:
    """What is left of the update of one matrix, or of those of all experts that have one.

    Attributes:
        update: its size as a share of the weight's, both as the root of the sum of squares.
        retained: of it in the stored weights: 1 is all, 0 nothing, measured along the update.
        noise: what was added beside it, as a share of its size: rounding; 1 where all of it is lost.
    """

    update: float
    retained: float
    noise: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How much of an adapter a merge has kept.

    Attributes:
        experts: how the merged model stores them.
        rule: of the scales of packed experts that were changed; None if none was.
        matrices: by path, such as "layers.3.moe.down", in the order of the layers.
    """

    experts: Experts
    rule: ScaleRule | None
    matrices: Mapping[str, Survival]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def merge(
    checkpoint: Path,
    adapter: Path,
    destination: Path,
    *,
    layout: Layout = "hf",
    experts: Experts | None = None,
    rule: ScaleRule | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Writes base and adapter as one folder of a released layout, and says how much of the adapter is left.

    Args:
        checkpoint: a converted checkpoint, or a released folder.
        adapter: ours or PEFT's.
        destination: a new or empty folder.
        layout: "hf" for transformers, "original" for OpenAI's loader.
        experts: how to store them. None keeps them as they are unless the adapter changes them; then it is bf16, in
            which small updates outlive.
        rule: of MXFP4 scales, see `Merged`.
        max_shard_bytes: more bytes of tensors go into another file.
        on_progress: called with bytes of tensors written so far and in all.

    Raises:
        UserError: no checkpoint or a damaged one, no adapter or one of another base, a destination in use, no room, or
            weights that come out as NaN or inf.
        Unsupported: OpenAI's layout with bf16 experts.
    """
    base = open_base(checkpoint)
    check_destination(checkpoint, destination)
    found = load_adapter(adapter, base.config, base_digest=base_digest(base))
    if experts is None:
        experts = "bf16" if set(found.spec.targets) & set(EXPERTS) else base.experts
    tally = _Tally(found.spec.paths(base.config))
    merged = Merged(base, found, experts=experts, rule=rule, on_piece=tally.add)
    write_release(base, merged, destination, layout=layout, max_shard_bytes=max_shard_bytes, on_progress=on_progress)
    is_packed = merged.experts == "mxfp4" and set(found.spec.targets) & set(EXPERTS)
    return Report(experts=merged.experts, rule=merged.rule if is_packed else None, matrices=tally.survivals())


class Merged:
    """The parameters of a base with an adapter added, each readable in part.

    Args:
        inner: the base.
        adapter: for its sizes.
        experts: how they are stored.
        rule: of the scales of blocks that the adapter changes, see `mxfp4.encode`: "reuse" keeps those of the base, so
            that the model is what merged training computed; None is "reuse" where the base has scales, else "even".
        on_piece: called with a matrix's path and the squares (see `_squares`) of each piece of it that is merged, an
            expert or a slab of rows.

    Raises:
        UserError: "reuse" without scales to keep.
    """

    def __init__(
        self,
        inner: Parameters,
        adapter: Adapter,
        *,
        experts: Experts,
        rule: ScaleRule | None = None,
        on_piece: Callable[[str, Float[np.ndarray, "4"]], None] = lambda path, squares: None,
    ):
        if rule == "reuse" and inner.experts == "bf16" and experts == "mxfp4":
            raise UserError("scale rule 'reuse' keeps a base's scales, and this base has bf16 experts: choose another")
        self.config = inner.config
        self.experts: Experts = experts
        self.rule: ScaleRule = rule or ("reuse" if inner.experts == "mxfp4" else "even")
        self._inner = inner
        self._adapter = adapter
        self._paths = frozenset(adapter.spec.paths(inner.config))
        self._on_piece = on_piece
        self._untouched: Parameters = inner
        if experts != inner.experts:
            # Experts without an update are packed by a rule of their own: there are no scales to reuse.
            own = "even" if self.rule == "reuse" else self.rule
            self._untouched = Repacked(inner, experts, scale_rule=own)
        self._shapes = parameter_shapes(inner.config, experts)

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self._shapes[parameter]

    def dtype(self, parameter: str) -> np.dtype:
        return self._untouched.dtype(parameter)

    def read(self, parameter: str, index: Index) -> np.ndarray:
        path, _, kind = parameter.rpartition(".")
        if path not in self._paths or kind == "bias":
            return self._untouched.read(parameter, index)
        if not path.endswith(_EXPERT_PATHS):
            return self._dense(path, parameter, index)
        if kind == "scales" and self.rule == "reuse":
            return self._inner.read(parameter, index)
        box = [range(*cut.indices(size)) for cut, size in zip(index, self._shapes[parameter], strict=True)]
        found = aligned_empty(tuple(map(len, box)), self.dtype(parameter))
        for row, expert in enumerate(box[0]):  # one at a time: in float32 one is eight times as large as its codes
            found[row] = self._expert(path, expert, kind)[index[1:]]
        return found

    def _dense(self, path: str, parameter: str, index: Index) -> np.ndarray:
        weight = self._inner.read(parameter, index)
        a, b = self._adapter.leaves[f"{path}.adapter.a"], self._adapter.leaves[f"{path}.adapter.b"]
        split = b.ndim - 1  # the outputs lie before the inputs
        rows = self._scaled(b[index[:split]]).reshape(-1, b.shape[-1])
        if not rows.any():
            return weight
        columns = np.asarray(a[(slice(None), *index[split:])], np.float32).reshape(len(a), -1)
        found, squares = _plain(weight.reshape(len(rows), -1), columns, rows)
        self._report(path, squares)
        return np.asarray(found).reshape(weight.shape)

    def _expert(self, path: str, expert: int, kind: str) -> np.ndarray:
        a = np.asarray(self._adapter.leaves[f"{path}.adapter.a"][expert], np.float32)
        b = self._scaled(self._adapter.leaves[f"{path}.adapter.b"][expert])
        if not b.any():
            return self._one(self._untouched, f"{path}.{kind}", expert)
        weight = self._weight(path, expert)
        if self.experts == "bf16":
            plain = jnp.asarray(weight.decode(jnp.bfloat16) if isinstance(weight, MXFP4) else weight)
            found, squares = _plain(plain, a, b)
        elif self.rule == "reuse":
            assert isinstance(weight, MXFP4)
            packed, squares = _packed_on_own_scales(weight, a, b)
            found = packed.blocks
        else:
            packed, squares = _packed(weight, a, b, rule=self.rule)
            found = packed.scales if kind == "scales" else packed.blocks
        if kind != "scales":  # which come beside blocks that have been counted
            self._report(path, squares)
        return np.asarray(found)

    def _weight(self, path: str, expert: int) -> MXFP4 | np.ndarray:
        """Of the base, as it is stored."""
        if self._inner.experts == "bf16":
            return self._one(self._inner, f"{path}.weight", expert)
        return MXFP4(*(self._one(self._inner, f"{path}.{kind}", expert) for kind in ("blocks", "scales")))

    @staticmethod
    def _one(source: Parameters, parameter: str, expert: int) -> np.ndarray:
        whole = (slice(0, size) for size in source.shape(parameter)[1:])
        return source.read(parameter, (slice(expert, expert + 1), *whole))[0]

    def _scaled(self, b: np.ndarray | Array) -> Float[np.ndarray, "*outputs R"]:
        return np.asarray(b, np.float32) * np.float32(self._adapter.spec.scale)

    def _report(self, path: str, squares: Array) -> None:
        found = np.asarray(squares)
        if not np.isfinite(found).all():
            raise UserError(f"{path}: base and adapter add up to NaN or inf; one of the two is damaged or diverged")
        self._on_piece(path, found)


class _Tally:
    """Adds up the squares of each matrix's pieces."""

    def __init__(self, paths: Sequence[str]):
        self._sums = {path: np.zeros(4) for path in paths}

    def add(self, path: str, squares: Float[np.ndarray, "4"]) -> None:
        self._sums[path] += squares

    def survivals(self) -> dict[str, Survival]:
        return {path: _survival(*map(float, sums)) for path, sums in self._sums.items()}


def _survival(weight: float, update: float, along: float, noise: float) -> Survival:
    if not update:
        return Survival(update=0.0, retained=1.0, noise=0.0)
    size = math.sqrt(update / weight) if weight else math.inf
    return Survival(update=size, retained=along / update, noise=math.sqrt(noise / update))


# --- one matrix ---------------------------------------------------------------------------------------------------


@jax.jit
def _plain(
    weight: Float[Array, "*outputs I"], a: Float[Array, "R I"], b: Float[Array, "*outputs R"]
) -> tuple[Float[Array, "*outputs I"], Float[Array, "4"]]:
    """In the weight's dtype; where nothing is added its bits stay, though arithmetic flushes denormals."""
    update = _update(a, b)
    values = weight.astype(jnp.float32) + update
    if weight.dtype == jnp.bfloat16:  # XLA may leave out a conversion there and back, but not this
        values = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    merged = jnp.where(update == 0, weight, values.astype(weight.dtype))
    return merged, _squares(weight.astype(jnp.float32), update, values)


@jax.jit
def _packed_on_own_scales(
    weight: MXFP4, a: Float[Array, "R I"], b: Float[Array, "*outputs R"]
) -> tuple[MXFP4, Float[Array, "4"]]:
    (packed,) = jax.tree.map(lambda leaf: leaf[None], (weight,))
    merged = jax.tree.map(lambda leaf: leaf[0], merged_codes(packed, a[None], b[None]))
    return merged, _squares(weight.decode(jnp.float32), _update(a, b), merged.decode(jnp.float32))


@functools.partial(jax.jit, static_argnames="rule")
def _packed(
    weight: MXFP4 | Float[Array, "*outputs I"],
    a: Float[Array, "R I"],
    b: Float[Array, "*outputs R"],
    *,
    rule: ScaleRule,
) -> tuple[MXFP4, Float[Array, "4"]]:
    """With new scales for the blocks to which something is added."""
    update = _update(a, b)
    values = weight.decode(jnp.float32) if isinstance(weight, MXFP4) else weight.astype(jnp.float32)
    merged = encode_on_device(values + update, rule=rule)
    if isinstance(weight, MXFP4):
        stays = (update == 0).reshape(*merged.scales.shape, BLOCK).all(axis=-1)
        blocks = jnp.where(stays[..., None], weight.blocks, merged.blocks)
        merged = MXFP4(blocks, jnp.where(stays, weight.scales, merged.scales))
    return merged, _squares(values, update, merged.decode(jnp.float32))


def _update(a: Float[Array, "R I"], b: Float[Array, "*outputs R"]) -> Float[Array, "*outputs I"]:
    return jnp.einsum("...r,ri->...i", b, a, precision=lax.Precision.HIGHEST)


def _squares(
    weight: Float[Array, "*outputs I"], update: Float[Array, "*outputs I"], merged: Float[Array, "*outputs I"]
) -> Float[Array, "4"]:
    """Sums over all elements: of the weight's squares, of the update's, of the update times what is stored of it, and
    of the squares of what is stored but for the update."""
    stored = merged - weight
    terms = (weight * weight, update * update, stored * update, (stored - update) ** 2)
    return jnp.stack([term.sum(axis=-1).sum() for term in terms])  # row by row, which loses less in float32
