"""What a benchmark's cases claim to need, counted by hand for TINY; that they run; and that tuning finds and files."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.bench import kernels, steps
from gptoss_jax.bench.ceilings import Ceilings, measure_ceilings
from gptoss_jax.bench.tune import Trial, tune
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels import choose, tuned
from gptoss_jax.model.config import alternating_layers
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))


def moe(num_tokens: int, *, swiglu: bool, layout: choose.Layout = "rows", packed: bool = True) -> kernels.Case:
    return kernels.moe_case(CONFIG, num_tokens, swiglu=swiglu, layout=layout, dtype="bfloat16", packed=packed)


def test_bytes_and_flops_of_a_grouped_product():
    """One token visits 2 of 8 experts: a row of 160 for each, and 17 bytes for 32 weights."""
    gate_up, down = moe(1, swiglu=True), moe(1, swiglu=False)
    assert gate_up.nbytes == 2 * (448 * 160 * 17 / 32) + 2 * (160 * 2 + 224 * 2)
    assert gate_up.flops == 2 * 2 * 448 * 160
    assert down.nbytes == 2 * (160 * 224 * 17 / 32) + 2 * (224 * 2 + 160 * 4)  # float32 comes out
    assert moe(1, swiglu=False, packed=False).nbytes == 2 * (160 * 224 * 2) + 2 * (224 * 2 + 160 * 4)
    everybody = moe(40, swiglu=False)
    assert everybody.nbytes == 8 * (160 * 224 * 17 / 32) + 80 * (224 * 2 + 160 * 4)
    assert (gate_up.form, everybody.form, moe(200, swiglu=True).form) == ("few", "many", "many")


def test_bytes_and_flops_of_attention():
    """12 query and 4 key heads of 16, bfloat16."""
    decode = kernels.attention_case(CONFIG, 3, 1, first_query=20, window=None, dtype="bfloat16")
    assert decode.nbytes == 2 * (2 * 3 * 12 * 16 + 2 * 3 * 21 * 4 * 16)
    assert decode.flops == 3 * 12 * 16 * 4 * 21
    prefill = kernels.attention_case(CONFIG, 1, 5, first_query=0, window=None, dtype="bfloat16")
    assert prefill.flops == 12 * 16 * 4 * (1 + 2 + 3 + 4 + 5)
    window = kernels.attention_case(CONFIG, 1, 12, first_query=0, window=9, dtype="bfloat16")
    assert window.flops == 12 * 16 * 4 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 9 + 9 + 9)
    decoded = kernels.attention_case(CONFIG, 1, 1, first_query=100, window=9, dtype="bfloat16")
    assert decoded.nbytes == 2 * (2 * 12 * 16 + 2 * 9 * 4 * 16)
    assert (decode.form, prefill.form) == ("decode", "prefill")


def test_flops_of_a_step():
    """Of two layers, one sliding and one full; three rows feed 2 tokens behind 20, and 3 more of their own."""
    projections = 160 * 16 * (12 + 4 + 4) + 12 * 16 * 160
    experts = 2 * 3 * 160 * 224 + 160 * 8
    mixing = 2 * 12 * 16 * ((9 + 9) + (21 + 22))
    expected = 2 * 3 * (2 * 2 * (projections + experts) + mixing + 160 * 352)
    assert steps.step_flops(CONFIG, rows=3, tokens=2, context=20) == expected


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "plain"])
def test_weights_have_the_layout_and_the_spread_of_a_model(layout: choose.Layout, packed: bool):
    x, (weight, bias, sizes) = moe(3, swiglu=True, layout=layout, packed=packed).make()
    assert (x.shape, bias.shape) == ((6, 160), (8, 224, 2))
    assert int(sizes.sum()) == 6
    decoded = weight if isinstance(weight, jax.Array) else weight.decode(jnp.float32)
    assert decoded.shape == ((8, 224, 2, 160) if layout == "rows" else (8, 2, 160, 224))
    assert 0.5 < float(jnp.std(decoded.astype(jnp.float32))) * 160**0.5 < 2  # a power of two is as near as scales come


@pytest.mark.parametrize("op", ["moe_matmul", "attention"])
def test_a_turn_depends_on_the_one_before_and_changes_no_value(op: str):
    """Were it not so, the compiler could make the product once, before the loop that is timed, or never."""
    case = moe(3, swiglu=True)
    if op == "attention":
        case = kernels.attention_case(CONFIG, 2, 1, first_query=5, window=None, dtype="bfloat16")
    first, others = case.make()
    turn = case.step(kernels.door(case, "xla", "cpu"))
    np.testing.assert_array_equal(turn(first, others, jnp.int32(1)), first)

    def broken(first: jax.Array, *_: object, **__: object) -> jax.Array:
        return jnp.full(first.shape, jnp.nan)

    assert np.isnan(case.step(broken)(first, others, jnp.int32(1))).any()


def test_ceilings_bound_what_takes_both():
    ceilings = Ceilings(copied=10.0, read=20.0, flops=100.0)
    assert ceilings.bandwidth == 20.0
    assert ceilings.seconds(nbytes=40, flops=100) == 2.0
    assert ceilings.seconds(nbytes=40, flops=300) == 3.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ceilings_are_measured(dtype: str):
    found = measure_ceilings(buffer_bytes=1 << 16, matrix_size=64, dtype=dtype, budget=0.01)
    assert min(found.copied, found.read, found.flops) > 0


# ---- tuning ----------------------------------------------------------------------------------------------------------


def test_tuning_keeps_what_is_faster(monkeypatch: pytest.MonkeyPatch):
    """A kernel whose time is known: it is fastest at 64 rows, and cannot have more than 128 outputs."""

    def seconds(self: kernels.Case, run: object, *, budget: float) -> float:
        sizes = run.keywords["blocks"]["few"]
        if sizes.outputs > 128:
            raise ValueError("does not fit")
        return 1 + abs(sizes.rows - 64) + 1 / sizes.outputs * 100

    monkeypatch.setattr(kernels.Case, "seconds", seconds)
    trials: list[Trial] = []
    best = tune(
        [moe(1, swiglu=True)],
        "gpu-interpret",
        device_kind="none",
        dtype="bfloat16",
        budget=1.0,
        most_trials=100,
        on_trial=trials.append,
    )
    start = tuned.default("moe_matmul", "gpu")["few"]
    assert best == {"few": {**start, "rows": 64, "outputs": 128}}
    assert trials[0].sizes == start
    assert len({tuple(trial.sizes.values()) for trial in trials}) == len(trials)  # nothing is measured twice
    assert any(trial.seconds is None for trial in trials)


def test_the_reference_has_nothing_to_tune():
    with pytest.raises(Unsupported, match="'xla' has no block sizes"):
        tune(
            [moe(1, swiglu=True)],
            "xla",
            device_kind="cpu",
            dtype="bfloat16",
            budget=1.0,
            most_trials=1,
            on_trial=lambda _: None,
        )


@pytest.mark.parametrize("name", ["attention.gpu", "attention.tpu", "moe_matmul.gpu", "moe_matmul.tpu"])
def test_every_table_holds_sizes_that_its_kernel_has(name: str):
    op, impl = name.split(".")
    module, defaults = choose.kernel_module(op, impl), tuned.default(op, impl)
    assert defaults
    for device_kind in json.loads(Path(tuned.__file__).with_name(f"{name}.json").read_text(encoding="utf-8")):
        found = tuned.find(op, impl, device_kind=device_kind) or defaults
        assert found.keys() == defaults.keys()
        assert choose.blocks(module, found)  # its fields, and no others


def test_sizes_are_filed_beside_others(tmp_path: Path):
    few, many = {"rows": 1, "warps": 2}, {"rows": 3, "warps": 4}
    path = tuned.save("moe_matmul", "gpu", {"few": few}, device_kind="A", folder=tmp_path)
    tuned.save("moe_matmul", "gpu", {"many": many}, device_kind="A", folder=tmp_path)
    tuned.save("moe_matmul", "gpu", few, device_kind="B", folder=tmp_path)
    tuned.save("moe_matmul", "gpu", many, device_kind="B", folder=tmp_path)
    assert path == tmp_path / "moe_matmul.gpu.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"A": {"few": few, "many": many}, "B": many}
    with pytest.raises(UserError, match=r"moe_matmul.gpu.json cannot be written .*--tuned-folder"):
        tuned.save("moe_matmul", "gpu", few, device_kind="B", folder=tmp_path / "none")


def test_a_kind_that_nobody_tuned_takes_the_kernels_own():
    assert tuned.find("moe_matmul", "gpu", device_kind="nothing like it") is None
    assert tuned.find("moe_matmul", "gpu", device_kind=None) is None
    assert tuned.find("moe_matmul", "no such kernel", device_kind="cpu") is None
    own = choose.function("moe_matmul", "moe_matmul", "gpu", device_kind="nothing like it")
    assert own is choose.kernel_module("moe_matmul", "gpu").moe_matmul


def test_tuned_sizes_reach_the_kernel():
    table = tuned.find("moe_matmul", "gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert table is not None
    module = choose.kernel_module("moe_matmul", "gpu")
    found = choose.function("moe_matmul", "moe_matmul", "gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert found.func is module.moe_matmul
    assert found.keywords == {"blocks": {form: module.Blocks(**sizes) for form, sizes in table.items()}}
