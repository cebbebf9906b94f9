"""The grouped matmul with an adapter merged into packed weights, and quantised again. Knows arrays; knows no routing.

To train with: what is exported at the end, `merged_codes`, is then bit for bit what was trained. The weights' scales
are kept, so that an expert that nobody changed comes back byte for byte.

    W + Σr b[:, r] a[r, :]

The sum is made in the order of r, in float32, of a and b in bfloat16. A product of two bfloat16 is exact, so that a
fused multiply-add changes nothing: NumPy and XLA find the same codes, in whichever program and however they are cut.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.moe_matmul.xla import Tile, Weight, expert_output, for_each_tile, one_expert, tile_rows
from gptoss_jax.kernels.mxfp4 import MXFP4, decode_planes, nearest_codes, pack, scales_for, values_of
from gptoss_jax.kernels.zeros import zeros

# Of x, a, b and the bias.
Gradients = tuple[Float[Array, "M I"], Float[Array, "E R I"], Float[Array, "E *outputs R"], Float[Array, "E *outputs"]]

_PLANES = (slice(0, None, 2), slice(1, None, 2))  # the inputs of the low nibbles, and of the high ones
_RANKS_AT_ONCE = 16  # in one sweep over the matrix


def merged_matmul(
    x: Float[Array, "M I"],
    weight: Weight,
    a: Float[Array, "E R I"],
    b: Float[Array, "E *outputs R"],
    bias: Float[Array, "E *outputs"],
    group_sizes: Int[Array, " E"],
    *,
    swiglu_limit: float | None = None,
    expected_rows: int | None = None,
) -> Float[Array, "M O"]:
    """`moe_matmul` with the weights of `merged_codes`, unpacked one expert at a time on the way there and back.

    Differentiable by x, a, b and bias; the gradients of a and b pass through the rounding as fake_quantise.py says, and
    add up in float32. Saved are the operands alone.

    Args as there, and:
        weight: MXFP4, in rows.
        a: of the adapter, as b; both are taken in bfloat16.
        b: with the adapter's scale in it.

    Raises:
        Unsupported: another kind of weights.
    """
    if not isinstance(weight, MXFP4):
        found = "in columns" if isinstance(weight, Columns) else "plain"
        raise Unsupported(
            f"adapters are merged with weights packed in rows, these are {found}: build the model with packed experts "
            "and an implementation that reads rows, as 'xla' does, or train without quantise"
        )
    if not x.shape[0]:
        return jnp.zeros((0, bias.shape[1]), jnp.float32 if swiglu_limit is None else x.dtype)
    return _merged_matmul(x, weight, a, b, bias, group_sizes, swiglu_limit, expected_rows)


def merged_codes(weight: MXFP4, a: Float[Array, "E R I"], b: Float[Array, "E *outputs R"]) -> MXFP4:
    """W + b a of every expert, on W's own scales. A block that holds NaN or inf gets the NaN scale.

    Args as for `merged_matmul`.
    """

    def one(operands: tuple[MXFP4, Array, Array]) -> MXFP4:
        matrix, a, b = operands
        planes, scales = _merged(matrix, a, b), jnp.asarray(matrix.scales)
        for plane in planes:
            scales = scales_for(plane, rule="reuse", scales=scales)
        even, odd = (nearest_codes(plane, scales)[0] for plane in planes)
        return pack(even, odd, scales)

    return lax.map(one, (weight, a, b))  # one at a time: a float32 matrix is eight times as large as its codes


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _merged_matmul(
    x: Array,
    weight: MXFP4,
    a: Array,
    b: Array,
    bias: Array,
    group_sizes: Array,
    swiglu_limit: float | None,
    expected_rows: int | None,
) -> Array:
    def one_tile(tile: Tile, out: Array) -> Array:
        values, _ = _quantised(_one_expert(weight, tile.expert), a[tile.expert], b[tile.expert], dtype=x.dtype)
        planes = list(zip(_PLANES, values, strict=True))
        return tile.put(out, expert_output(tile.of(x), planes, bias[tile.expert], limit=swiglu_limit))

    out = zeros((x.shape[0], bias.shape[1]), jnp.float32 if swiglu_limit is None else x.dtype, after=x)
    size = tile_rows(x.shape[0], group_sizes.shape[0], expected_rows=expected_rows)
    return for_each_tile(one_tile, out, group_sizes, num_rows=x.shape[0], size=size)


def _forward(*operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return _merged_matmul(*operands), operands[:6]


def _backward(
    swiglu_limit: float | None, expected_rows: int | None, saved: tuple[Any, ...], d_out: Array
) -> tuple[Any, ...]:
    x, weight, a, b, bias, group_sizes = saved
    d_a, d_b, d_bias = (zeros(each.shape, jnp.float32, after=d_out) for each in (a, b, bias))
    start: Gradients = (zeros(x.shape, x.dtype, after=d_out), d_a, d_b, d_bias)

    def one_tile(tile: Tile, sums: Gradients) -> Gradients:
        d_x, d_a, d_b, d_bias = sums
        adapter = a[tile.expert], b[tile.expert]
        values, is_inside = _quantised(_one_expert(weight, tile.expert), *adapter, dtype=x.dtype)

        def output(rows: Array, values: list[Array], bias: Array) -> Array:
            planes = list(zip(_PLANES, values, strict=True))
            return expert_output(rows, planes, bias, limit=swiglu_limit)

        _, back = jax.vjp(output, tile.of(x), values, bias[tile.expert].astype(jnp.float32))
        d_rows, d_values, d_expert_bias = back(tile.of(d_out))
        d_updates = [jnp.where(i, d.astype(jnp.float32), 0) for i, d in zip(is_inside, d_values, strict=True)]
        d_expert_a, d_expert_b = _updates_back(d_updates, *adapter)
        d_a, d_b = d_a.at[tile.expert].add(d_expert_a), d_b.at[tile.expert].add(d_expert_b)
        return tile.put(d_x, d_rows), d_a, d_b, d_bias.at[tile.expert].add(d_expert_bias)

    size = tile_rows(x.shape[0], group_sizes.shape[0], expected_rows=expected_rows)
    d_x, d_a, d_b, d_bias = for_each_tile(one_tile, start, group_sizes, num_rows=x.shape[0], size=size)
    return d_x, None, d_a.astype(a.dtype), d_b.astype(b.dtype), d_bias.astype(bias.dtype), None


_merged_matmul.defvjp(_forward, _backward)


# ---- one expert ------------------------------------------------------------------------------------------------------


def _one_expert(weight: MXFP4, expert: Int[Array, ""]) -> MXFP4:
    matrix = one_expert(weight, expert)
    assert isinstance(matrix, MXFP4)
    return matrix


def _quantised(
    matrix: MXFP4, a: Float[Array, "R I"], b: Float[Array, "*outputs R"], *, dtype: DTypeLike
) -> tuple[list[Float[Array, "*outputs i"]], list[Bool[Array, "*outputs i"]]]:
    """Of both planes the values of `merged_codes`, and which of them have a gradient, as fake_quantise.py says.

    NaN is a value's here, and not its block's: to look for it block by block takes a CPU as long as all the rest.
    """
    values, is_inside, scales = [], [], jnp.asarray(matrix.scales)
    for plane in _merged(matrix, a, b):
        codes, inside = nearest_codes(plane, scales)
        found = jnp.where(jnp.isfinite(plane), values_of(codes, scales, dtype), jnp.nan)
        values.append(found.reshape(*b.shape[:-1], -1))
        is_inside.append(inside.reshape(*b.shape[:-1], -1))
    return values, is_inside


def _merged(
    matrix: MXFP4, a: Float[Array, "R I"], b: Float[Array, "*outputs R"]
) -> list[Float[Array, "*outputs C 16"]]:
    """Both planes in float32. Where nothing is added also a zero keeps its sign."""
    merged = []
    for inputs, values in zip(_PLANES, decode_planes(matrix.blocks, matrix.scales, jnp.float32), strict=True):
        update = _update(a[:, inputs], b)
        merged.append(jnp.where(update == 0, values, values + update).reshape(*matrix.scales.shape, -1))
    return merged


def _update(a: Float[Array, "R i"], b: Float[Array, "*outputs R"]) -> Float[Array, "*outputs i"]:
    """b a, rank by rank."""
    a, columns = _rounded(a), _rounded(jnp.moveaxis(b, -1, 0))

    def add(r: Int[Array, ""], sums: Array) -> Array:
        return sums + columns[r][..., None] * a[r]

    nothing = jnp.zeros((*b.shape[:-1], a.shape[-1]), jnp.float32)
    return lax.fori_loop(0, len(a), add, nothing, unroll=min(_RANKS_AT_ONCE, len(a)))


def _updates_back(
    d_updates: list[Float[Array, "*outputs i"]], a: Float[Array, "R I"], b: Float[Array, "*outputs R"]
) -> tuple[Float[Array, "R I"], Float[Array, "*outputs R"]]:
    """The gradients of a and b from those of both planes; to round them has the gradient 1."""
    rows = [d_update.reshape(-1, d_update.shape[-1]) for d_update in d_updates]
    a, b_rows = _rounded(a), _rounded(b).reshape(-1, len(a))
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    d_a = jnp.stack([product(b_rows.T, d_rows) for d_rows in rows], axis=-1)
    d_b = [product(d_rows, a[:, inputs].T) for inputs, d_rows in zip(_PLANES, rows, strict=True)]
    return d_a.reshape(a.shape), (d_b[0] + d_b[1]).reshape(b.shape)


def _rounded(values: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """To bfloat16's 8 bits, in float32: XLA may leave out a conversion there and back, but not this."""
    return lax.reduce_precision(values.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
