"""Every way of dispatch against the oracle, on meshes of simulated devices, and what travels in the compiled form."""

import functools
import math
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.columns import Columns, columns_codes, columns_scales
from gptoss_jax.kernels.moe_matmul import adapted, moe_matmul
from gptoss_jax.kernels.mxfp4 import MXFP4
from gptoss_jax.model import dispatch
from gptoss_jax.model.dispatch import Load, Way, check_way, mix, route
from gptoss_jax.sharding import make_mesh
from tests import oracle

ROWS, TOKENS = 4, 11
E, X, D, F = 8, 3, 96, 192  # 6 blocks of width: two devices hold three each
LIMIT = 7.0
SAME = 1e-5  # of the outputs' largest: float32 sums in another order
WAYS: tuple[Way, ...] = get_args(Way)
MESHES = [  # data, expert, tensor
    (2, 2, 2),
    (2, 3, 1),  # pads the experts to 9
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 4, 2), (1, 8, 1))),
]
every_way = pytest.mark.parametrize("way", WAYS)


class Case:
    """Random experts in MXFP4, activations, and logits that spread the tokens or crowd them at experts 4, 5 and 6."""

    def __init__(self, *, rows: int = ROWS, tokens: int = TOKENS):
        rng = np.random.default_rng(0)
        self.gate_up, self.down = self._packed(rng, (E, F, 2), D), self._packed(rng, (E, D), F)
        self.gate_up_bias = rng.standard_normal((E, F, 2)).astype(np.float32)
        self.down_bias = rng.standard_normal((E, D)).astype(np.float32)
        self.x = rng.standard_normal((rows, tokens, D)).astype(np.float32)
        self.spread = (2 * rng.standard_normal((rows, tokens, E))).astype(np.float32)
        self.crowded = self.spread + 100 * np.isin(np.arange(E), [4, 5, 6]).astype(np.float32)

    def _packed(self, rng: np.random.Generator, outputs: tuple[int, ...], inputs: int) -> MXFP4:
        blocks = rng.integers(256, size=(*outputs, inputs // 32, 16), dtype=np.uint8)
        return MXFP4(blocks, rng.integers(119, 123, size=(*outputs, inputs // 32), dtype=np.uint8))

    def mixed_by_the_oracle(self, logits: np.ndarray) -> np.ndarray:
        return oracle.moe(
            self.x.astype(np.float64),
            *oracle.route(logits.astype(np.float64), X),
            gate_up=oracle.mxfp4_decode(self.gate_up.blocks, self.gate_up.scales).reshape(E, 2 * F, D),
            gate_up_bias=self.gate_up_bias.reshape(E, 2 * F).astype(np.float64),
            down=oracle.mxfp4_decode(self.down.blocks, self.down.scales),
            down_bias=self.down_bias.astype(np.float64),
            limit=LIMIT,
        )

    def experts(self, layout: str = "rows", *, expert_shards: int = 1) -> tuple[Any, ...]:
        """Padded as a model's are: zero codes and zero biases behind."""
        experts = jax.tree.map(jnp.asarray, (self.gate_up, self.gate_up_bias, self.down, self.down_bias))
        gate_up, gate_up_bias, down, down_bias = jax.tree.map(
            lambda leaf: jnp.pad(leaf, ((0, -E % expert_shards), *[(0, 0)] * (leaf.ndim - 1))), experts
        )
        if layout == "plain":
            gate_up, down = gate_up.decode(jnp.float32), down.decode(jnp.float32)
        if layout == "columns":
            apart = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), gate_up)
            gate_up, down = (Columns(columns_codes(m.blocks), columns_scales(m.scales)) for m in (apart, down))
        return gate_up, gate_up_bias, down, down_bias


SPECS = {
    "plain": (P("expert", "tensor"), P("expert", None, "tensor")),
    "rows": (MXFP4(P("expert", "tensor"), P("expert", "tensor")), MXFP4(*[P("expert", None, "tensor")] * 2)),
    "columns": (Columns(*[P("expert", None, None, "tensor")] * 2), Columns(*[P("expert", "tensor")] * 2)),
}


def mixer(mesh: Mesh | None = None, *, way: Way | None = None, layout: str = "rows") -> Any:
    gate_up, down = SPECS[layout]
    specs = (gate_up, P("expert", "tensor"), down, P("expert"))
    settings = {"experts_per_token": X, "limit": LIMIT, "impl": "xla"}
    return functools.partial(mix, **settings, mesh=mesh, way=way, expert_specs=specs)


def make(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(data=shape[0], expert=shape[1], tensor=shape[2])


def assert_same(ours: jax.Array, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(ours) - expected).max() < SAME * np.abs(expected).max()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture
def ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets "ragged" run here, by a transport that gathers everything and picks what its rule says arrives."""

    def gathered(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        here = lax.axis_index(axis_name)
        sent = [lax.all_gather(part, axis_name) for part in (operand, input_offsets, send_sizes, output_offsets)]
        for sender, (rows, starts, sizes, places) in enumerate(zip(*sent, strict=True)):
            number = jnp.arange(len(output)) - places[here]
            arrives = (number >= 0) & (number < sizes[here])
            told = jnp.where(recv_sizes[sender] == sizes[here], 1, jnp.nan)  # sizes that disagree would hang a device
            picked = rows[jnp.clip(starts[here] + number, 0, len(rows) - 1)] * told
            output = jnp.where(arrives[:, None], picked, output)
        return output

    monkeypatch.setattr(lax, "ragged_all_to_all", gathered)
    monkeypatch.setattr(dispatch, "check_way", lambda way, *, mesh: None)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "plain"])
def test_one_device_agrees_with_the_oracle(case: Case, layout: str):
    out = jax.jit(mixer(layout=layout))(case.x, case.spread, case.experts(layout))
    assert_same(out, case.mixed_by_the_oracle(case.spread))


@every_way
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.usefixtures("ragged_on_cpu")
def test_a_mesh_gives_the_numbers_of_the_oracle(case: Case, shape: tuple[int, int, int], way: Way):
    """Spread tokens, and all tokens at three experts, which on most meshes are on two devices."""
    mixed = jax.jit(mixer(make(shape), way=way))
    experts = case.experts(expert_shards=shape[1])
    for logits in (case.spread, case.crowded):
        assert_same(mixed(case.x, logits, experts), case.mixed_by_the_oracle(logits))


@pytest.mark.parametrize(("shape", "way"), [(None, None), ((2, 3, 1), "reduce"), ((2, 3, 1), "exchange")], ids=str)
def test_padding_comes_out_as_zeros_and_has_no_expert_read(
    case: Case, shape: tuple[int, int, int] | None, way: Way | None
):
    """Experts that only padding chooses hold NaN: whoever visits them tells."""
    is_real = np.arange(TOKENS) < np.array([TOKENS, 4, 0, 1])[:, None]
    logits = case.spread - 100 * (is_real[..., None] == np.isin(np.arange(E), [1, 6])).astype(np.float32)
    expected = np.where(is_real[..., None], case.mixed_by_the_oracle(logits), 0)
    gate_up, gate_up_bias, down, down_bias = case.experts(expert_shards=shape[1] if shape else 1)
    poisoned = (gate_up, gate_up_bias, down, down_bias.at[jnp.array([1, 6])].set(jnp.nan))
    mixed = jax.jit(mixer(make(shape) if shape else None, way=way))
    assert_same(mixed(case.x, logits, poisoned, is_real=is_real), expected)


@pytest.mark.parametrize("way", ["exchange", "ragged"])
@pytest.mark.parametrize("shape", [(2, 3, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.usefixtures("ragged_on_cpu")
def test_visits_that_take_many_rounds_all_arrive(
    case: Case, shape: tuple[int, int, int], way: Way, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Load, "room", lambda load, way: 5)
    mixed = jax.jit(mixer(make(shape), way=way))
    experts = case.experts(expert_shards=shape[1])
    for logits in (case.spread, case.crowded):
        assert_same(mixed(case.x, logits, experts), case.mixed_by_the_oracle(logits))


@every_way
@pytest.mark.parametrize("tokens", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("ragged_on_cpu")
def test_one_row_runs_on_a_mesh_that_cuts_rows(way: Way, tokens: int):
    """13 tokens over four devices: three of them padding, where tokens are cut. One token leaves three devices none."""
    case = Case(rows=1, tokens=tokens)
    out = jax.jit(mixer(make((2, 2, 1)), way=way))(case.x, case.crowded, case.experts())
    assert_same(out, case.mixed_by_the_oracle(case.crowded))


@pytest.mark.parametrize("way", ["reduce", "exchange"])
@pytest.mark.parametrize("layout", ["columns", pytest.param("plain", marks=pytest.mark.slow)])
def test_experts_may_lie_in_any_layout(case: Case, layout: str, way: Way):
    out = jax.jit(mixer(make((1, 2, 2)), way=way, layout=layout))(case.x, case.spread, case.experts(layout))
    assert_same(out, case.mixed_by_the_oracle(case.spread))


@pytest.mark.parametrize("way", ["reduce", "exchange"])
def test_bfloat16_is_rounded_as_on_one_device(case: Case, way: Way):
    """exchange sends results in bfloat16, which rounds each once more: 2^-9 of it."""
    x = jnp.asarray(case.x, jnp.bfloat16)
    whole = jax.jit(mixer())(x, case.spread, case.experts()).astype(jnp.float32)
    out = jax.jit(mixer(make((1, 4, 1)), way=way))(x, case.spread, case.experts())
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - np.asarray(whole)).max()
    assert error < 2 * 2**-8 * np.abs(whole).max()


def test_route_takes_the_lower_of_equal_experts_and_weighs_only_the_chosen():
    chosen, weights = route(jnp.asarray([[1.0, 3, 3, 2, 3, 0, 3, 2], [4.0] * 8]), 3)
    assert chosen.tolist() == [[1, 2, 4], [0, 1, 2]]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(mixed: Any, case: Case, logits: np.ndarray, experts: tuple[Any, ...]) -> list[np.ndarray]:
    """Of a sum that weighs every output differently, for x, logits and experts; padded experts are left out."""

    def total(x: jax.Array, logits: jax.Array, experts: tuple[Any, ...]) -> jax.Array:
        return jnp.sum(jnp.sin(mixed(x, logits, experts)))

    wrt = jax.jit(jax.grad(total, argnums=(0, 1, 2), allow_int=True))
    *found, d_experts = wrt(jnp.asarray(case.x), jnp.asarray(logits), experts)
    leaves = [leaf[:E] for leaf in jax.tree.leaves(d_experts) if leaf.dtype == jnp.float32]
    return [np.asarray(leaf) for leaf in (*found, *leaves)]


@every_way
@pytest.mark.parametrize("shape", [(2, 3, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.usefixtures("ragged_on_cpu")
def test_gradients_are_those_of_one_device(
    case: Case, shape: tuple[int, int, int], way: Way, monkeypatch: pytest.MonkeyPatch
):
    """In several rounds, with crowded experts."""
    monkeypatch.setattr(Load, "room", lambda load, way: 20)
    expected = gradients(mixer(layout="plain"), case, case.crowded, case.experts("plain"))
    experts = case.experts("plain", expert_shards=shape[1])
    ours = gradients(mixer(make(shape), way=way, layout="plain"), case, case.crowded, experts)
    assert len(ours) == 6
    for gradient, whole in zip(ours, expected, strict=True):
        assert np.abs(whole).max() > 0
        np.testing.assert_allclose(gradient, whole, atol=SAME * np.abs(whole).max())


def test_packed_experts_have_gradients_of_their_biases_alone(case: Case):
    expected = gradients(mixer(), case, case.spread, case.experts())
    ours = gradients(mixer(make((1, 4, 2)), way="exchange"), case, case.spread, case.experts())
    assert len(ours) == 4  # x, logits and two biases
    for gradient, whole in zip(ours, expected, strict=True):
        np.testing.assert_allclose(gradient, whole, atol=SAME * np.abs(whole).max())


# ---- what travels ----------------------------------------------------------------------------------------------------


def compiled(shape: tuple[int, int, int], way: Way, *, rows: int, tokens: int) -> Any:
    mesh = make(shape)

    def abstract(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    mixed, case = mixer(mesh, way=way), Case(rows=rows, tokens=tokens)
    spec = P("data" if rows % shape[0] == 0 else None)
    experts = jax.tree.map(abstract, case.experts(), mixed.keywords["expert_specs"])
    return jax.jit(mixed).lower(abstract(case.x, spec), abstract(case.spread, spec), experts).compile()


def traffic(program: str) -> list[tuple[str, str, float]]:
    """(kind, dtype, bytes that one device sends round a ring) of each collective."""
    found = []
    kinds = r"all-[\w-]+|collective-[\w-]+|reduce-scatter[\w-]*|ragged-[\w-]+"
    for shapes, kind, rest in re.findall(rf" = (.*?) ({kinds})\((.*)", program):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        assert len({dtype for dtype, _ in arrays}) == 1
        size = 4 * sum(math.prod(map(int, filter(None, dims.split(",")))) for _, dims in arrays)
        devices = group_size(rest)
        found.append((kind, arrays[0][0], size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)))
    return sorted(found)


def group_size(operation: str) -> int:
    """Devices that take part in one collective: listed, or named as axes of a mesh by newer versions of XLA."""
    listed = re.search(r"replica_groups={{([\d,]+)}", operation)
    if listed:
        return len(listed[1].split(","))
    mesh, named = re.search(r"replica_groups=mesh\[(.*?)\] {(.*?)}", operation).groups()
    sizes = dict(axis.split("=") for axis in mesh.split(","))
    return math.prod(int(sizes[axis]) for axis in named.split(","))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 4, 2), 2), ((2, 4, 1), 2), pytest.param((2, 4, 1), 1, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("way", ["reduce", "exchange"])
def test_what_travels_is_what_the_rule_counts(shape: tuple[int, int, int], rows: int, way: Way):
    """Sums and visits, to the byte, and the counts of visits; neither experts nor logits are gathered.

    For N = 96 tokens of a data shard and width D in float32, on 4 expert and 2 tensor shards, that is per token

        reduce      one sum of N D                                                          7 D bytes
        exchange    40 visits to each of three devices and their results back              10 D
                    a sum of N/4 D over tensor                                              1 D
                    a gather of N D                                                         3 D
    """
    tokens = 96 // rows
    data, expert, tensor = shape
    load = Load(
        num_tokens=96 // (data if rows % data == 0 else 1),
        width=D,
        itemsize=4,
        num_experts=E,
        experts_per_token=X,
        expert_shards=expert,
        tensor_shards=tensor,
        token_shards=expert * (1 if rows % data == 0 else data),
    )
    found = traffic(compiled(shape, way, rows=rows, tokens=tokens).as_text())
    counts = [(kind, sent) for kind, dtype, sent in found if dtype == "s32"]
    kinds = [kind for kind, dtype, _ in found if dtype == "f32"]
    assert sum(sent for _, dtype, sent in found if dtype == "f32") == pytest.approx(load.bytes_sent(way))
    if way == "reduce":
        assert (counts, kinds) == ([], ["all-reduce"])
        return
    assert kinds == ["all-gather", *["all-reduce"] * (tensor > 1), "all-to-all", "all-to-all"]
    # Each device's counts of visits to each expert, and the number of rounds where data shards may differ.
    assert counts == [("all-gather", 4 * expert * E * (expert - 1) / expert), *[("all-reduce", 4)] * (data > 1)]


def test_memory_is_bounded_whatever_the_routing():
    """Buffers are of one round, for a balanced load: all together they are a third of two for the worst load."""
    tokens = 2048
    visits = tokens * X  # of all devices, at one
    rows_and_hidden = visits * (D + F) * 4
    exchange = compiled((1, 8, 1), "exchange", rows=1, tokens=tokens).memory_analysis().temp_size_in_bytes
    assert exchange < 0.4 * rows_and_hidden


# ---- the rule --------------------------------------------------------------------------------------------------------


def released(num_tokens: int, *, expert: int, tensor: int = 1, num_experts: int = 128, sums: int = 4) -> Load:
    return Load(num_tokens, 2880, 2, num_experts, 4, expert, tensor, expert, sum_itemsize=sums)


@pytest.mark.parametrize(
    ("expert", "tensor", "sums", "first"),
    [(4, 1, 4, 1482), (4, 2, 4, 1967), (8, 1, 4, 509), (16, 1, 4, 366), (16, 1, 2, 3148)],
)
def test_tokens_are_exchanged_once_they_are_many(expert: int, tensor: int, sums: int, first: int):
    load = functools.partial(released, expert=expert, tensor=tensor, sums=sums)
    assert load(first - 1).choose_way() == "reduce"
    assert load(first).choose_way() == "exchange"
    assert load(1).choose_way() == "reduce"


@pytest.mark.parametrize(("expert", "tensor", "sums"), [(2, 1, 4), (1, 8, 4), (4, 1, 2), (8, 1, 2)])
def test_over_few_shards_sums_are_always_less(expert: int, tensor: int, sums: int):
    load = functools.partial(released, expert=expert, tensor=tensor, sums=sums)
    assert {load(1 << n).choose_way() for n in range(18)} == {"reduce"}


def test_bytes_of_few_tokens_by_hand():
    """Those of the table above."""
    load = Load(96, D, 4, E, X, expert_shards=4, tensor_shards=2, token_shards=4)
    assert load.room("exchange") == 40
    assert load.bytes_sent("reduce") == 7 * 96 * D
    assert load.bytes_sent("exchange") == (10 + 1 + 3) * 96 * D


def test_bytes_of_many_tokens_by_hand():
    """65,536 tokens over 8 expert shards, per token and width."""
    load, unit = released(65_536, expert=8), 65_536 * 2880
    assert load.bytes_sent("reduce") / unit == 8 * 7 / 8
    assert load.bytes_sent("exchange") / unit == pytest.approx(2 * 2 * 4 * 1.25 / 64 * 7 + 2 * 7 / 8, rel=1e-3)
    assert load.bytes_sent("ragged") / unit == 2 * 2 * 4 / 64 * 7 + 2 * 7 / 8


@pytest.mark.parametrize("way", ["exchange", "ragged"])
@pytest.mark.parametrize("num_tokens", [1, 7, 300, 5000])
def test_a_round_holds_a_random_load_and_never_more_than_there_is(num_tokens: int, way: Way):
    load = released(num_tokens, expert=4, num_experts=32)
    per_device = -(-num_tokens // 4)
    senders = 4 if way == "ragged" else 1
    mean = senders * per_device * 4 / 4
    assert mean <= load.room(way) <= senders * per_device * 4


def test_kernels_are_told_how_many_rows_to_expect_and_for_which_devices(monkeypatch: pytest.MonkeyPatch):
    """Of 48 visits a quarter is to the experts of one device. All rows, most of them of nobody, would ask for tiles
    four times as long: 48 of reduce, and of exchange 8 from each device."""
    told: list[tuple[int, int | None, str | None]] = []

    def listen(x: jax.Array, *operands: Any, expected_rows: int | None, device_kind: str | None, **settings: Any):
        told.append((x.shape[0], expected_rows, device_kind))
        return moe_matmul(x, *operands, **settings)

    monkeypatch.setattr(adapted, "moe_matmul", listen)
    case, kind = Case(rows=1, tokens=16), jax.devices()[0].device_kind
    for mesh, way in ((make((1, 4, 1)), "reduce"), (make((1, 4, 1)), "exchange"), (None, None)):
        jax.eval_shape(mixer(mesh, way=way), case.x, case.spread, case.experts())
    assert told == [(48, 12, kind)] * 2 + [(4 * 8, 12, kind)] * 2 + [(48, None, kind)] * 2


def test_no_tokens_are_no_trouble():
    case = Case(rows=2, tokens=0)
    for way in ("reduce", "exchange"):
        assert jax.jit(mixer(make((1, 4, 2)), way=way))(case.x, case.spread, case.experts()).shape == (2, 0, D)
    assert jax.jit(mixer())(case.x, case.spread, case.experts()).shape == (2, 0, D)


def test_without_a_name_the_rule_decides(monkeypatch: pytest.MonkeyPatch):
    case = Case(rows=1, tokens=16)
    for way, kinds in (("reduce", {"all-reduce"}), ("exchange", {"all-to-all", "all-gather"})):
        monkeypatch.setattr(Load, "choose_way", lambda load, way=way: way)
        program = jax.jit(mixer(make((1, 2, 1)))).lower(case.x, case.spread, case.experts()).compile().as_text()
        assert {kind for kind, _, _ in traffic(program)} == kinds


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_ragged_on_a_cpu_is_refused_with_the_reason(case: Case):
    with pytest.raises(Unsupported, match=r"'ragged' needs ragged_all_to_all.*devices are cpu.*choose 'exchange'"):
        mixer(make((1, 2, 1)), way="ragged")(jnp.asarray(case.x), jnp.asarray(case.spread), case.experts())


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match=r"dispatch 'gather' is unknown; expected one of reduce, exchange, ragged"):
        check_way("gather", mesh=None)
