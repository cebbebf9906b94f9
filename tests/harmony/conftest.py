"""The real vocabulary and openai-harmony, which judges the harmony format, where the ranks of o200k lie."""

import hashlib
import lzma
import os
from pathlib import Path

import pytest
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding

from gptoss_jax.harmony.tokenizer import (
    O200K_CACHE_NAME,
    O200K_SHA256,
    Tokenizer,
    load_tokenizer,
    write_byte_tokenizer,
)


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory) -> Path:
    """o200k_base.tiktoken, which is too large to keep with the tests, under both names that it is looked for."""
    packed = Path(__file__).parents[2].parent / "shared/vocab/o200k_base.tiktoken.xz"
    source = Path(os.environ.get("GPTOSS_JAX_VOCAB", packed))
    if not source.is_file():
        pytest.skip(f"no {source}: set GPTOSS_JAX_VOCAB to o200k_base.tiktoken, plain or packed with xz")
    content = source.read_bytes()
    content = lzma.decompress(content) if source.suffix == ".xz" else content
    assert hashlib.sha256(content).hexdigest() == O200K_SHA256
    path = tmp_path_factory.mktemp("ranks") / "o200k_base.tiktoken"
    path.write_bytes(content)
    path.with_name(O200K_CACHE_NAME).write_bytes(content)
    return path


@pytest.fixture(scope="session")
def harmony(ranks_file) -> HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(ranks_file.parent))
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="session")
def o200k(ranks_file) -> Tokenizer:
    return load_tokenizer(None, cache_dir=ranks_file.parent)


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Tokenizer:
    """A tokenizer of bytes, for tests that need no real vocabulary."""
    folder = tmp_path_factory.mktemp("letters")
    write_byte_tokenizer(folder / "tokenizer.json", 352)
    return load_tokenizer(folder)
