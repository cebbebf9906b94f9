"""Our model beside the PyTorch references as they are installed here, on weights that no golden knows."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.convert.synthetic import write_checkpoint
from tests.parity import compare
from tests.parity.compare import mean_kl, relative_error
from tests.tiny import TINY

references = pytest.importorskip("tests.parity.references", reason="torch, transformers or gpt-oss is not installed")

FLOAT32_ERROR = 2e-4  # as in test_goldens.py
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "hf"
    write_checkpoint(folder, TINY, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    # Eight prompts: the KL of one alone is too much a matter of luck (see Case).
    return np.random.default_rng(SEED).integers(TINY.vocab_size, size=(8, 100), dtype=np.int32)


@pytest.fixture(scope="module")
def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return our_logits(folder, tokens, dtype=jnp.float32)


def test_float32_logits_are_transformers(folder: Path, tokens: np.ndarray, logits: np.ndarray):
    theirs = references.TransformersModel(folder, dtype="float32").logits(tokens)
    assert relative_error(logits, theirs) < FLOAT32_ERROR


def test_float32_logits_are_openais(tokens: np.ndarray, logits: np.ndarray, tmp_path: Path):
    write_checkpoint(tmp_path / "original", TINY, seed=SEED, layout="original")
    theirs = references.openai_logits(tmp_path / "original", tokens)
    assert relative_error(logits, theirs) < FLOAT32_ERROR
    np.testing.assert_array_equal(our_logits(tmp_path / "original", tokens, dtype=jnp.float32), logits)


@pytest.mark.slow  # the goldens hold the same bar
def test_bf16_is_as_near_to_float32_as_transformers_bf16(folder: Path, tokens: np.ndarray, logits: np.ndarray):
    theirs = references.TransformersModel(folder, dtype="bfloat16").logits(tokens)
    ours = our_logits(folder, tokens, dtype=jnp.bfloat16)
    assert mean_kl(logits, ours) <= 1.5 * mean_kl(logits, theirs)  # both round at 8 bits, at different places


def test_a_checkpoint_saved_again_by_transformers_is_the_same_model(
    folder: Path, tokens: np.ndarray, logits: np.ndarray, tmp_path: Path
):
    """transformers 5 writes the experts in bf16 and the rotary settings as `rope_parameters` alone."""
    references.TransformersModel(folder, dtype="bfloat16").save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "rope_parameters" in config
    assert "rope_scaling" not in config
    again = our_logits(tmp_path / "saved", tokens, dtype=jnp.float32)
    assert relative_error(again, logits) < 1e-5  # the same weights, multiplied by another routine


def our_logits(folder: Path, tokens: np.ndarray, *, dtype: jnp.dtype) -> np.ndarray:
    return compare.logits(gptoss_jax.load(folder, dtype=dtype), tokens)
