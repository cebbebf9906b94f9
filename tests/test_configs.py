"""The named models: their parameters add up to the published totals, and a wrong name says which ones there are."""

import json
from pathlib import Path

import pytest

from gptoss_jax.configs import model_config, model_names
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from tests.tiny import TINY

FOLDER = Path(__file__).resolve().parents[1] / "configs/models"


def parameters(config: ModelConfig, *, experts: int) -> dict[str, int]:
    """Counted from the sizes alone, with `experts` of the experts of each layer."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = (
        config.width * (queries + 2 * keys)
        + (queries + 2 * keys)  # biases of q, k, v
        + queries * config.width
        + config.width  # bias of the output
        + config.num_heads  # sinks
        + config.width  # norm
    )
    expert = (config.width + 1) * 2 * config.expert_width + (config.expert_width + 1) * config.width
    router = (config.width + 1) * config.num_experts
    return {
        "attention": config.num_layers * attention,
        "mlp": config.num_layers * (experts * expert + router + config.width),
        "embedding": 2 * config.vocab_size * config.width + config.width,
    }


# Table 1 of the gpt-oss model card (arXiv:2508.10925), in billions. Its count of active parameters leaves out the
# embedding, of which a token reads one row.
@pytest.mark.parametrize(
    ("size", "total", "mlp", "attention", "active"),
    [("20b", 20.91, 19.12, 0.64, 3.61), ("120b", 116.83, 114.71, 0.96, 5.13)],
)
@pytest.mark.parametrize("family", ["gpt-oss", "gpt-oss-safeguard"])
def test_parameters_add_up_to_the_published_totals(
    family: str, size: str, total: float, mlp: float, attention: float, active: float
) -> None:
    config = model_config(f"{family}-{size}")
    counted = parameters(config, experts=config.num_experts)
    assert round(sum(counted.values()) / 1e9, 2) == total
    assert round(counted["mlp"] / 1e9, 2) == mlp
    assert round(counted["attention"] / 1e9, 2) == attention
    assert round(counted["embedding"] / 1e9, 2) == 1.16
    used = sum(parameters(config, experts=config.experts_per_token).values())
    assert round((used - config.vocab_size * config.width) / 1e9, 2) == active


def test_the_release_differs_in_two_sizes_only() -> None:
    small, large = (json.loads((FOLDER / f"gpt-oss-{size}.json").read_text()) for size in ("20b", "120b"))
    differing = {key for key in small if small[key] != large[key]}
    assert differing == {"num_hidden_layers", "num_local_experts", "layer_types"}


def test_safeguard_is_the_same_model() -> None:
    for size in ("20b", "120b"):
        assert model_config(f"gpt-oss-safeguard-{size}") == model_config(f"gpt-oss-{size}")


def test_tiny_is_the_tests_own() -> None:
    assert model_config("tiny") == TINY


@pytest.mark.parametrize("name", model_names())
def test_our_own_writer_says_what_the_file_says(name: str) -> None:
    released = json.loads((FOLDER / f"{name}.json").read_text())
    del released["transformers_version"]  # we are not transformers
    assert model_config(name).to_hf(mxfp4=True) == released


@pytest.mark.parametrize(
    ("name", "hint"), [("gpt-oss-20B", "did you mean gpt-oss-20b?"), ("llama", "expected one of ")]
)
def test_an_unknown_name_lists_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        model_config(name)
    assert hint in str(error.value)
    assert all(known in str(error.value) for known in model_names())
