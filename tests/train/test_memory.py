"""What a compiled step keeps until the way back: the packed weights as they are, and never an unpacked one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.model.adapter import AdapterSpec
from gptoss_jax.model.config import ModelConfig, alternating_layers
from gptoss_jax.model.transformer import abstract_model
from gptoss_jax.train.batch import Batch
from tests.tiny import TINY
from tests.train import cases

# Experts weigh more than anything else: unpacked, those of one layer are 24 MiB.
WIDE = dataclasses.replace(TINY, width=256, expert_width=512, num_experts=16, vocab_size=64)
ONE_LAYER = 4 * 16 * 3 * 512 * 256
SPEC = AdapterSpec(rank=2, alpha=4.0, targets=("q", "k", "v", "o", "gate_up", "down"))
ROWS, TOKENS = 1, 16


def temporaries(num_layers: int, *, accumulate: int = 1, **settings: Any) -> int:
    """Bytes beside the state and the frozen weights."""
    config: ModelConfig = dataclasses.replace(WIDE, layer_kinds=alternating_layers(num_layers))
    trainer = cases.make_trainer(abstract_model(config, dtype=jnp.float32, impl="xla"), adapter=SPEC, **settings)
    memory: Any = trainer.lower(shapes(accumulate)).compile().memory_analysis()
    return memory.temp_size_in_bytes


def shapes(accumulate: int) -> Batch:
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "starts": jnp.int32, "is_real": bool}
    arrays: Any = {name: jax.ShapeDtypeStruct((accumulate, ROWS, TOKENS), dtype) for name, dtype in dtypes.items()}
    return Batch(**arrays)


@pytest.mark.parametrize("remat", ["layer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dots"))])
def test_no_unpacked_weight_is_kept_for_the_way_back(remat: str):
    """4 MiB are in use. Were the experts unpacked before their product it would be both layers', 52 MiB."""
    assert temporaries(2, remat=remat) < ONE_LAYER / 2


@pytest.mark.slow
def test_a_further_layer_costs_its_input_and_no_weight():
    two, six = temporaries(2), temporaries(6)
    assert six - two < ONE_LAYER / 4


@pytest.mark.slow
def test_a_further_batch_costs_its_tokens():
    assert temporaries(2, accumulate=8) < temporaries(2, accumulate=2) + ONE_LAYER / 16
