"""Tokenizers and grammars, small and real, and openai-harmony where the ranks of o200k lie."""

import lzma
import os
from pathlib import Path

import pytest
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding

from gptoss_jax.constrain import Grammars
from gptoss_jax.harmony.tokenizer import O200K_CACHE_NAME, Tokenizer, load_tokenizer, write_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder / "tokenizer.json", 352)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def grammars(tokenizer) -> Grammars:
    return Grammars.of(tokenizer)


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory) -> Path:
    """o200k_base.tiktoken, under both names that it is looked for."""
    packed = Path(__file__).parents[2].parent / "shared/vocab/o200k_base.tiktoken.xz"
    source = Path(os.environ.get("GPTOSS_JAX_VOCAB", packed))
    if not source.is_file():
        pytest.skip(f"no {source}: set GPTOSS_JAX_VOCAB to o200k_base.tiktoken, plain or packed with xz")
    content = source.read_bytes()
    content = lzma.decompress(content) if source.suffix == ".xz" else content
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("o200k_base.tiktoken", O200K_CACHE_NAME):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def o200k(ranks_folder) -> Tokenizer:
    return load_tokenizer(None, cache_dir=ranks_folder)


@pytest.fixture(scope="session")
def o200k_grammars(o200k) -> Grammars:
    return Grammars.of(o200k)


@pytest.fixture(scope="session")
def harmony(ranks_folder) -> HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(ranks_folder))
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
