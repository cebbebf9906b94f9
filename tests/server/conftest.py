"""What the server's tests stand on: a tokenizer of bytes, applications on scripted engines."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fastapi import FastAPI

from gptoss_jax.engine.request import Request
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine

VOCAB_SIZE = 352
MODEL = "scripted"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Each byte is an id; the special tokens follow."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder / "tokenizer.json", VOCAB_SIZE)
    return load_tokenizer(folder)


@pytest.fixture
def scripted(tokenizer: Tokenizer):
    """Makes scripted engines for this tokenizer, of texts or ids, and closes them."""
    with contextlib.ExitStack() as engines:

        def make(scripts: Sequence[Any] | Callable[[Request], Sequence[int]], **kwargs: Any) -> ScriptedEngine:
            if not callable(scripts):
                scripts = [tokenizer.encode(each) if isinstance(each, str) else each for each in scripts]
            kwargs = {"vocab_size": VOCAB_SIZE, "max_context": 500, "token_bytes": bytes_of(tokenizer)} | kwargs
            return engines.enter_context(ScriptedEngine(scripts, **kwargs))

        yield make


@pytest.fixture
def app(tokenizer: Tokenizer):
    """Makes applications: `app(engine, key=value of a setting, …)`."""

    def make(engine: ScriptedEngine | None, **settings: Any) -> FastAPI:
        return create_app(engine, tokenizer=tokenizer, model_name=MODEL, settings=ServerSettings(**settings))

    return make


def bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    return lambda token_id: tokenizer.decode_bytes([token_id])
