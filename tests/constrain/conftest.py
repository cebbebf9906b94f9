"""Grammars for the small vocabulary and for the real one."""

import pytest

from gptoss_jax.constrain import Grammars
from gptoss_jax.harmony.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(letters: Tokenizer) -> Tokenizer:
    return letters


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars.of(tokenizer)


@pytest.fixture(scope="session")
def o200k_grammars(o200k: Tokenizer) -> Grammars:
    return Grammars.of(o200k)
