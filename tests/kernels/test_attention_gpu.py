"""The attention kernels for GPUs, run by Pallas' interpreter, against the oracle; and lowered for CUDA.

Slots that no query may see hold NaN in every test: a kernel that reads one and multiplies it by 0 is found out.
"""

import dataclasses
import json
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels.attention import gpu, xla
from tests import oracle

# float32: values are of order one and their weights sum to one; a softmax over them errs by a few 1e-7.
# bfloat16: weights and the result are rounded to 8 bits, 2^-9 of values up to 4 each.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-9 * 4 * 2}

# Small enough for the splits, the whole blocks and the compared ones to occur with a few dozen keys.
SMALL = gpu.Blocks(rows=16, keys=16, keys_per_split=16, programs=96, warps=4, stages=2)


@dataclasses.dataclass
class Case:
    """Random queries of rows that begin at different positions, each row with keys and values up to its last query."""

    first_query: list[int]
    num_queries: int
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 16
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows, end = len(self.first_query), max(self.first_query) + self.num_queries

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(self.dtype)

        self.q = draw(rows, self.num_queries, self.heads, self.head_dim)
        self.k = draw(rows, end, self.kv_heads, self.head_dim)
        self.v = draw(rows, end, self.kv_heads, self.head_dim)
        self.sinks = rng.standard_normal(self.heads).astype(np.float32)

    def check(self, *, window: int | None = None, slots: int | None = None, blocks: Any = None) -> None:
        done = np.asarray(self.run(window=window, slots=slots, blocks=blocks)).astype(np.float64)
        np.testing.assert_allclose(done, self.expected(window), rtol=0, atol=TOLERANCE[self.dtype])

    def run(self, *, window: int | None = None, slots: int | None = None, blocks: Any = None) -> jax.Array:
        """`full` over `slots` slots, or `sliding`."""
        q, k, v, sinks, first_query = self.arrays(window=window, slots=slots)
        if window is None:
            return gpu.full(q, k, v, sinks, first_query=first_query, blocks=blocks, interpret=True)
        return gpu.sliding(q, k, v, sinks, first_query=first_query, window=window, blocks=blocks, interpret=True)

    def arrays(self, *, window: int | None, slots: int | None) -> tuple[jax.Array, ...]:
        k, v = (self._laid_out(x, window=window, slots=slots) for x in (self.k, self.v))
        return tuple(map(jnp.asarray, (self.q, k, v, self.sinks, np.array(self.first_query, np.int32))))

    def expected(self, window: int | None) -> np.ndarray:
        out = np.empty(self.q.shape)
        for row, first in enumerate(self.first_query):
            seen = slice(0, first + self.num_queries)
            q, k, v = (x.astype(np.float64)[None] for x in (self.q[row], self.k[row, seen], self.v[row, seen]))
            out[row] = oracle.attention(q, k, v, self.sinks.astype(np.float64), window=window)[0]
        return out

    def _laid_out(self, x: np.ndarray, *, window: int | None, slots: int | None) -> np.ndarray:
        """Full: slot = position. Sliding: the window before the first query, then the queries' own."""
        num_slots = (slots or x.shape[1]) if window is None else window + self.num_queries
        laid_out = np.full((len(x), num_slots, *x.shape[2:]), np.nan, x.dtype)
        for row, first in enumerate(self.first_query):
            start = 0 if window is None else first - window
            kept = x[row, max(start, 0) : first + self.num_queries]
            laid_out[row, max(-start, 0) :][: len(kept)] = kept
        return laid_out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [None, SMALL], ids=["usual blocks", "small blocks"])
def test_a_chunk_over_a_cache_agrees_with_the_oracle(blocks: gpu.Blocks | None, dtype: str):
    """Rows at the start, in the middle of a block and at a block's edge; slots beyond them."""
    Case([0, 37, 64], 13, dtype=dtype).check(slots=99, blocks=blocks)


@pytest.mark.parametrize("blocks", [None, SMALL], ids=["usual blocks", "small blocks"])
def test_decode_agrees_with_the_oracle(blocks: gpu.Blocks | None):
    """With small blocks the 83 keys of the longest row are four splits, of which the shortest row fills one."""
    Case([0, 15, 16, 82], 1).check(slots=128, blocks=blocks)


def test_the_last_slot_may_hold_the_last_query():
    Case([0, 70], 5).check(slots=75, blocks=SMALL)


@pytest.mark.parametrize(
    ("window", "first_query", "num_queries"),
    [
        (9, [0, 4, 100], 13),  # begins within the first window, and beyond it
        (9, [8, 9, 10], 1),  # decode around the first key that falls out of sight
        (1, [0, 6], 5),  # each query sees itself only
        (40, [0, 39, 41], 3),  # the window is longer than the chunk
        (48, [0, 17], 50),  # a window of several blocks
    ],
    ids=str,
)
def test_a_window_agrees_with_the_oracle(window: int, first_query: list[int], num_queries: int):
    Case(first_query, num_queries).check(window=window, blocks=SMALL)


def test_a_window_with_usual_blocks_agrees_with_the_oracle():
    """The release's window, and one token more than it."""
    Case([0, 200], 129).check(window=128)


def test_queries_past_the_last_slot_see_every_slot():
    """Of a padded chunk that does not fit any more: what comes out is dropped, but is that of the reference."""
    case = Case([0, 17], 5)
    q, k, v, sinks, first_query = (x[-1:] for x in case.arrays(window=None, slots=None))
    k, v, sinks = k[:, :20], v[:, :20], jnp.asarray(case.sinks)
    expected = xla.full(q, k, v, sinks, first_query=first_query)
    done = gpu.full(q, k, v, sinks, first_query=first_query, blocks=SMALL, interpret=True)
    np.testing.assert_allclose(done, expected, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("num_queries", [1, 3])
def test_fewer_keys_than_a_block(num_queries: int):
    case = Case([0], num_queries)
    case.check()
    case.check(window=2)


def test_blocks_may_be_those_of_each_form():
    """As a tuned table has them: those of the form that is asked for are taken."""
    unfit = dataclasses.replace(SMALL, rows=24)  # no power of two, which would be an error
    Case([0, 37], 1).check(slots=64, blocks={**dict.fromkeys(gpu.DEFAULTS, unfit), "decode_float32": SMALL})


def test_split_windows_agree_with_the_oracle():
    blocks = dataclasses.replace(SMALL, programs=1024)
    Case([0, 70, 300], 1).check(window=64, blocks=blocks)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(16, 2, 64), (5, 1, 32), (4, 4, 16)],
    ids=["the release's group", "odd group", "every head its own keys"],
)
def test_groups_of_any_size(heads: int, kv_heads: int, head_dim: int):
    case = Case([3, 21], 7, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    case.check(slots=40, blocks=SMALL)
    case.check(window=11, blocks=SMALL)


@pytest.mark.parametrize("sink", [-40.0, 40.0])
@pytest.mark.parametrize("num_queries", [1, 6])
def test_a_sink_may_win_or_lose(sink: float, num_queries: int):
    """A sink of 40 takes all but e^-36 of the weight; split sums of very different size are combined."""
    case = Case([60, 5], num_queries)
    case.sinks[::2] = sink
    case.check(blocks=SMALL)


def test_large_scores_do_not_overflow():
    case = Case([50], 3)
    case.q *= 60  # scores up to about 900: exp of one alone is infinite; they err by 900 * 2^-23, their weights too
    done = np.asarray(case.run(blocks=SMALL))
    np.testing.assert_allclose(done, case.expected(None), rtol=0, atol=2e-3)


def test_rows_and_heads_may_be_spread_over_devices():
    """Within shard_map the kernel sees one device's rows and heads."""
    case = Case([3, 21, 0, 40], 5, heads=12, kv_heads=4)
    arrays = case.arrays(window=None, slots=64)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    heads, rows = P("data", None, "tensor"), P("data")

    def attend(q, k, v, sinks, first_query):
        return gpu.full(q, k, v, sinks, first_query=first_query, blocks=SMALL, interpret=True)

    specs = (heads, heads, heads, P("tensor"), rows)
    spread = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    np.testing.assert_allclose(spread(*arrays), case.expected(None), rtol=0, atol=TOLERANCE["float32"])


def test_what_triton_cannot_multiply_is_said():
    with pytest.raises(Unsupported, match=r"power of two, at least 16; it is 24.*\"xla\""):
        Case([0], 2, head_dim=24).run()
    case = Case([0], 2)
    case.k = case.k.astype("bfloat16")
    with pytest.raises(Unsupported, match="they are float32, bfloat16, float32"):
        case.run()


def test_tuned_sizes_are_sizes():
    """The default of the file is that of the code, and every entry is complete."""
    tuned = json.loads(resources.files("gptoss_jax.kernels").joinpath("tuned/attention.gpu.json").read_text())
    assert {form: gpu.Blocks(**sizes) for form, sizes in tuned["default"].items()} == gpu.DEFAULTS
    for device in tuned.values():
        assert {form: sizes.keys() for form, sizes in device.items()} == {
            form: sizes.keys() for form, sizes in tuned["default"].items()
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_queries", [1, 600])
def test_the_kernels_lower_for_cuda(num_queries: int, dtype: str):
    shapes = [(2, num_queries, 64, 64), (2, 4096, 8, 64), (2, 4096, 8, 64)]
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    near = jax.ShapeDtypeStruct((2, 128 + num_queries, 8, 64), dtype)
    sinks, first_query = jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((2,), "int32")

    def both(q, k, v, near, sinks, first_query):
        a = gpu.full(q, k, v, sinks, first_query=first_query)
        return a + gpu.sliding(q, near, near, sinks, first_query=first_query, window=128)

    # jax 0.12 wants to know for which GPU.
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(both).trace(q, k, v, near, sinks, first_query)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = lowered.count("@__gpu$xla.gpu.triton(")
    assert kernels == (3 if num_queries == 1 else 2)  # decode over the cache has a second one, which combines


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_sizes_agree_with_the_oracle_and_the_reference(seed: int):
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 10))
    case = Case(
        first_query=rng.integers(0, 150, size=rng.integers(1, 4)).tolist(),
        num_queries=int(rng.integers(1, 70)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=int(rng.choice([16, 32, 64])),
        seed=seed,
    )
    blocks = dataclasses.replace(SMALL, keys=int(rng.choice([16, 32])), rows=int(rng.choice([16, 32, 64])))
    window = int(rng.integers(1, 80))
    for either in (blocks, None):
        case.check(slots=256, blocks=either)
        case.check(window=window, blocks=either)
    q, k, v, sinks, first_query = case.arrays(window=None, slots=256)
    reference = xla.full(q, jnp.nan_to_num(k), jnp.nan_to_num(v), sinks, first_query=first_query)
    np.testing.assert_allclose(reference, case.run(slots=256, blocks=blocks), rtol=0, atol=TOLERANCE["float32"])
