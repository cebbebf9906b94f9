"""Adapters at work: against a model whose weights hold what they add, several in one batch, and on meshes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.moe_matmul.adapted import Adapted, adapted_matmul
from gptoss_jax.kernels.mxfp4 import MXFP4, encode
from gptoss_jax.model.adapter import Adapter, AdapterSpec, adapter_shapes, attach, placed, with_adapters
from gptoss_jax.model.experts import in_columns
from gptoss_jax.model.placement import place_model
from gptoss_jax.model.transformer import GptOss, abstract_model, parameters, split, with_parameters
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=TINY.layer_kinds[:2])
ALL = AdapterSpec(rank=3, alpha=6.0, targets=("q", "k", "v", "o", "router", "gate_up", "down"))
SOME = AdapterSpec(rank=2, alpha=1.0, targets=("v", "down"), layers=(1,))
TOLERANCE = 2e-5  # logits of order one to ten, sums of float32 in another order

# target: how its a and b make an update of the released weight
UPDATES = {
    **dict.fromkeys(("q", "k", "v"), "rd,nhr->nhd"),
    "o": "rnh,dr->dnh",
    "router": "rd,er->ed",
    "gate_up": "erd,efcr->efcd",
    "down": "erf,edr->edf",
}


def random_adapter(spec: AdapterSpec, *, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(CONFIG, spec)
    return Adapter(
        spec=spec, leaves={name: 0.05 * rng.standard_normal(shape, np.float32) for name, (shape, _) in shapes.items()}
    )


ADAPTERS = (random_adapter(ALL, seed=1), random_adapter(SOME, seed=2))


@functools.cache
def plain_model() -> GptOss:
    """Plain experts, whose weights can hold anything."""
    return GptOss(CONFIG, dtype=jnp.float32, experts="bf16", impl="xla", rngs=nnx.Rngs(0))


def merged(model: GptOss, adapter: Adapter) -> GptOss:
    values = {name: parameter.get_value() for name, parameter in parameters(model).items()}
    for path in adapter.spec.paths(CONFIG):
        a, b = (adapter.leaves[f"{path}.adapter.{kind}"].astype(np.float64) for kind in "ab")
        update = adapter.spec.scale * np.einsum(UPDATES[path.rpartition(".")[2]], a, b)
        values[f"{path}.weight"] = jnp.asarray(values[f"{path}.weight"] + update, jnp.float32)
    return with_parameters(model, values)


TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(4, 12))


def logits(model: GptOss, adapter: Sequence[int] | None = None) -> np.ndarray:
    graph, arrays = split(model)

    def run(arrays: list[jax.Array]) -> jax.Array:
        model = graph.merge(arrays)
        cache = model.empty_cache(rows=4, capacity=12)
        rows = None if adapter is None else jnp.asarray(adapter)
        hidden, _ = model.extend(jnp.asarray(TOKENS), cache, count=jnp.full(4, 12), adapter=rows)
        return model.logits(hidden)[..., : CONFIG.vocab_size]

    return np.asarray(jax.jit(run)(arrays))


@functools.cache
def expected() -> dict[int, np.ndarray]:
    """Logits by adapter, of models whose weights hold it."""
    models = {-1: plain_model()} | {i: merged(plain_model(), adapter) for i, adapter in enumerate(ADAPTERS)}
    return {i: logits(model) for i, model in models.items()}


@pytest.mark.parametrize("number", [0, 1], ids=["every target", "two targets of one layer"])
def test_an_adapter_is_what_merged_weights_are(number: int):
    found = logits(with_adapters(plain_model(), [ADAPTERS[number]]))
    np.testing.assert_allclose(found, expected()[number], atol=TOLERANCE)
    assert np.abs(found - expected()[-1]).max() > 0.05


def test_every_row_takes_its_own():
    rows = [0, 1, -1, 0]
    found = logits(with_adapters(plain_model(), ADAPTERS), rows)
    for row, number in enumerate(rows):
        np.testing.assert_allclose(found[row], expected()[number][row], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "dispatch"),
    [
        ({"data": 2, "expert": 2, "tensor": 2}, "reduce"),
        pytest.param({"data": 2, "expert": 2, "tensor": 2}, "exchange", marks=pytest.mark.slow),
        pytest.param({"tensor": 8}, None, id="padded and repeated heads", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_row_takes_its_own_on_a_mesh(shape: dict[str, int], dispatch):
    mesh = make_mesh(**shape)
    settings = {"dtype": jnp.float32, "experts": "bf16", "impl": "xla", "mesh": mesh, "dispatch": dispatch}
    placement = place_model(CONFIG, mesh)
    values = {
        name: placed(name, parameter.get_value(), parameter.get_metadata()["axes"], placement)
        for name, parameter in parameters(plain_model()).items()
    }
    model = with_adapters(with_parameters(abstract_model(CONFIG, **settings), values), ADAPTERS)
    rows = [0, 1, -1, 0]
    found = logits(model, rows)
    for row, number in enumerate(rows):
        np.testing.assert_allclose(found[row], expected()[number][row], atol=TOLERANCE)


def test_packed_experts_stay_as_they_are():
    model = GptOss(CONFIG, dtype=jnp.float32, impl="xla", rngs=nnx.Rngs(0))
    adapted = with_adapters(model, ADAPTERS)
    before, after = parameters(model), parameters(adapted)
    assert all(after[name].get_value() is before[name].get_value() for name in before)
    assert {name.rpartition(".adapter.")[0] for name in after.keys() - before.keys()} == {*ALL.paths(CONFIG)}


@pytest.mark.parametrize("limit", [None, 7.0], ids=["product", "swiglu"])
@pytest.mark.parametrize("impl", ["xla", "tpu-interpret"])
def test_weights_in_columns(limit: float | None, impl: str):
    rng = np.random.default_rng(0)
    outputs = (128,) if limit is None else (128, 2)
    packed = encode(rng.standard_normal((3, *outputs, 128), np.float32), rule="even")
    rows = MXFP4(jnp.asarray(packed.blocks), jnp.asarray(packed.scales))
    columns = Columns(in_columns("blocks", rows.blocks), in_columns("scales", rows.scales))
    a = jnp.asarray(rng.standard_normal((3, 2, 128), np.float32) / 8)
    b = jnp.asarray(rng.standard_normal((3, *outputs, 2), np.float32) / 8)
    x = jnp.asarray(rng.standard_normal((16, 128), np.float32) / 8)
    bias, sizes = jnp.asarray(rng.standard_normal((3, *outputs), np.float32)), jnp.asarray([5, 0, 9])
    by_row, by_column = (
        adapted_matmul(x, Adapted(weight, a, b, (2,)), bias, sizes, swiglu_limit=limit, impl=name)
        for weight, name in ((rows, "xla"), (columns, impl))
    )
    assert float(jnp.abs(by_row).max()) > 1
    np.testing.assert_allclose(by_row, by_column, atol=1e-4)


def test_what_does_not_fit_is_refused():
    adapter = ADAPTERS[1]
    with pytest.raises(UserError, match="changes layer 7, the model has 2, 0 to 1"):
        attach(plain_model(), [dataclasses.replace(SOME, layers=(7,))])
    with pytest.raises(UserError, match="has adapters already"):
        attach(attach(plain_model(), [SOME]), [ALL])
    name = "layers.1.attention.v.adapter.a"
    short = dict(adapter.leaves) | {name: adapter.leaves[name][:, :100]}
    with pytest.raises(UserError, match=r"leaf layers.1.attention.v.adapter.a is \(2, 100\), this model asks for"):
        with_adapters(plain_model(), [Adapter(spec=SOME, leaves=short)])
    with pytest.raises(UserError, match=f"has no leaf {name}"):
        with_adapters(plain_model(), [Adapter(spec=SOME, leaves={})])
    with pytest.raises(UserError, match="has a leaf stray"):
        with_adapters(plain_model(), [Adapter(spec=SOME, leaves={**adapter.leaves, "stray": np.zeros(1)})])
    with pytest.raises(UserError, match=r"2 adapters of bf16 experts cannot be merged: expected 1, of mxfp4"):
        with_adapters(plain_model(), ADAPTERS, merged=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank is 0; expected 1 to 1024"),
        ({"alpha": -1.0}, "alpha is -1.0; expected a positive number"),
        ({"targets": ()}, "targets are none; expected some of q, k"),
        ({"targets": ("q", "q")}, "targets are q, q; expected some of q, k, v, o, router, gate_up, down, once"),
    ],
    ids=str,
)
def test_a_spec_that_says_nothing_right_is_refused(wrong: dict, message: str):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ALL, **wrong)
