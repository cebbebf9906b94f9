"""Adapters to PEFT and from it: peft on transformers computes what our model computes with the same adapter."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.convert.adapters import load_adapter
from gptoss_jax.convert.peft import write_peft
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.model.adapter import Adapter, AdapterSpec, adapter_shapes, with_adapters
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from tests.parity import compare
from tests.tiny import TINY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))  # width 160, expert width 224
RANK = 3
SAME = 1e-4  # of logits, of which the largest is about 10: float32 sums in another order
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERYTHING = AdapterSpec(rank=RANK, alpha=RANK, targets=("q", "k", "v", "o", "router", "gate_up", "down"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # the base has no name on a hub
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),  # they do
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    write_checkpoint(folder, SMALL, seed=3, experts="bf16")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> GptOss:
    return gptoss_jax.load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(SMALL.vocab_size, size=(2, 24), dtype=np.int32)


@pytest.fixture
def theirs(folder: Path) -> Any:
    """transformers' model in float32; peft changes it in place."""
    return transformers.GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        pad_token_id=None,
        eos_token_id=None,
    ).eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def our_logits(model: GptOss, adapter: Adapter, tokens: np.ndarray) -> np.ndarray:
    return compare.logits(with_adapters(model, [adapter]), tokens)


def random_adapter(spec: AdapterSpec, *, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _) in adapter_shapes(SMALL, spec).items()}
    leaves = {name: 0.05 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return Adapter(spec=spec, leaves=leaves)


def made_by_peft(model: Any, folder: Path, **settings: Any) -> Any:
    """A random adapter of peft's own, saved."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**({"r": RANK, "lora_alpha": 2 * RANK} | settings)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def updates(wrapped: Any) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """What peft adds to each weight, module by module: its name, the parameter's if it wraps one, and the update."""
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            home = name.removeprefix("base_model.model.model.").replace(".base_layer", "")
            yield home, parameter, module.get_delta_weight("default").detach().numpy()


def our_update(adapter: Adapter, home: str, parameter: str | None) -> np.ndarray:
    """Of the same matrix, with the axes of theirs."""
    layer, _, module = home.partition("layers.")[2].partition(".")
    path = f"layers.{layer}." + {"mlp.router": "moe.router", "mlp.experts": "moe"}.get(
        module, f"attention.{module[10:11]}"
    )
    if module == "mlp.experts":
        path = f"{path}.{'gate_up' if parameter == 'gate_up_proj' else 'down'}"
    a, b = (np.asarray(adapter.leaves[f"{path}.adapter.{side}"], np.float64) for side in "ab")
    b = b * adapter.spec.scale
    if module == "mlp.experts":
        return np.einsum("eor,eri->eio", b.reshape(len(b), -1, b.shape[-1]), a)
    return b.reshape(-1, b.shape[-1]) @ a.reshape(len(a), -1)


def test_our_adapter_in_peft(folder: Path, model: GptOss, theirs: Any, tokens: np.ndarray, tmp_path: Path):
    adapter = random_adapter(EVERYTHING)
    write_peft(tmp_path / "adapter", adapter, config=SMALL, dtype="float32")
    base = their_logits(theirs, tokens)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = their_logits(wrapped, tokens)
    assert np.abs(expected - base).max() > 1  # an adapter that matches nothing would change nothing
    assert np.abs(our_logits(model, adapter, tokens) - expected).max() < SAME


def test_an_adapter_of_peft_in_ours(model: GptOss, theirs: Any, tokens: np.ndarray, tmp_path: Path):
    base = their_logits(theirs, tokens)
    wrapped = made_by_peft(
        theirs, tmp_path / "adapter", target_modules=MODULES, target_parameters=[*EXPERTS, "mlp.router.weight"]
    )
    adapter = load_adapter(tmp_path / "adapter", SMALL)
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.layers) == (RANK, 2 * RANK, None)
    expected = their_logits(wrapped, tokens)
    assert np.abs(expected - base).max() > 1
    assert np.abs(our_logits(model, adapter, tokens) - expected).max() < SAME


def test_transformers_loads_our_adapter_itself(theirs: Any, tokens: np.ndarray, tmp_path: Path):
    """In bfloat16, and with layers of its own: compared with peft's reading of the same folder."""
    spec = AdapterSpec(rank=2, alpha=5.0, targets=("k", "down"), layers=(1,))
    adapter = random_adapter(spec)
    write_peft(tmp_path / "adapter", adapter, config=SMALL, base_model="openai/gpt-oss-20b")
    base = their_logits(theirs, tokens)
    theirs.load_adapter(str(tmp_path / "adapter"))
    found = {(home, parameter): update for home, parameter, update in updates(theirs)}
    assert set(found) == {
        ("model.layers.1.self_attn.k_proj", None),
        ("model.layers.1.mlp.experts", "gate_up_proj"),
        ("model.layers.1.mlp.experts", "down_proj"),
    }
    assert np.abs(their_logits(theirs, tokens) - base).max() > 0.1
    assert not found.pop(("model.layers.1.mlp.experts", "gate_up_proj")).any()
    again = load_adapter(tmp_path / "adapter", SMALL)
    for (home, parameter), update in found.items():
        np.testing.assert_allclose(update, our_update(again, home, parameter), atol=1e-6)
    exact = our_update(adapter, "layers.1.mlp.experts", "down_proj")
    np.testing.assert_allclose(found["model.layers.1.mlp.experts", "down_proj"], exact, atol=0.01 * np.abs(exact).max())


CASES: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "one layer": {"target_modules": MODULES, "layers_to_transform": [1]},
    "down alone": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "gate_up alone": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "some in each layer": {
        "target_modules": [],
        "target_parameters": ["1.mlp.experts.down_proj", EXPERTS[0], "0.mlp.router.weight"],
    },
    "pattern": {"target_modules": r".*\.1\.self_attn\.(k|o)_proj"},
    "rank-stabilised": {"target_modules": MODULES, "use_rslora": True},
    "patterns of rank and alpha": {
        "target_modules": MODULES,
        "target_parameters": EXPERTS,
        "rank_pattern": {"k_proj": 5, "model.layers.1.mlp.experts.down_proj": 2},
        "alpha_pattern": {r"layers\.0\..*": 7, "o_proj": 1.5},
    },
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_every_update_of_peft_is_ours(theirs: Any, tmp_path: Path, settings: dict[str, Any]):
    wrapped = made_by_peft(theirs, tmp_path / "adapter", **settings)
    adapter = load_adapter(tmp_path / "adapter", SMALL)
    touched = 0
    for home, parameter, update in updates(wrapped):
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(our_update(adapter, home, parameter), update, atol=1e-6)
        touched += np.count_nonzero(update)
    ours = (our_update(adapter, *place) for place in every_place(adapter.spec))
    assert sum(np.count_nonzero(np.abs(update) > 1e-12) for update in ours) == pytest.approx(touched, rel=1e-3)


def every_place(spec: AdapterSpec) -> Iterator[tuple[str, str | None]]:
    for path in spec.paths(SMALL):
        home, _, target = path.rpartition(".")
        layer = home.rpartition(".")[0]
        if target in ("gate_up", "down"):
            yield f"{layer}.mlp.experts", f"{target}_proj"
        else:
            yield (
                (f"{layer}.mlp.router", "weight") if target == "router" else (f"{layer}.self_attn.{target}_proj", None)
            )


def test_turned_orientation_is_read(theirs: Any, tmp_path: Path):
    """peft on experts that do not say how they lie, as transformers 4 has them, takes inputs for outputs."""
    for layer in theirs.model.layers:
        assert layer.mlp.experts.is_transposed
        layer.mlp.experts.is_transposed = False
    wrapped = made_by_peft(theirs, tmp_path / "adapter", target_modules=[], target_parameters=EXPERTS)
    adapter = load_adapter(tmp_path / "adapter", SMALL)
    for home, parameter, update in updates(wrapped):
        np.testing.assert_allclose(our_update(adapter, home, parameter), update, atol=1e-6)
