"""What every test stands on: eight simulated CPU devices, shapes checked at each call, checkpoints and vocabularies."""

import hashlib
import importlib.util
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

# A callback of more than 128 KiB on each of 8 devices waits for ever when XLA's thread pool, sized by NPROC or else by
# the machine's cores, has 8 threads or fewer. Read when jax starts its CPU backend; so is the platform, which may be
# chosen from outside.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # commands would keep programs in the home of whoever tests

import hypothesis
import jax
import jaxlib.version
import jaxtyping
import pytest


def _quick_to_compile() -> str:
    """Settings with which XLA compiles for a CPU in a quarter of the time, which is most of what the tests take.

    They optimise less and sum in another order, as another processor does. With XLA_FLAGS empty the tests run what
    users run, as tests/cli/test_flow.py does always. The settings are for all compilers of a process, so there are none
    beside those of GPUs and TPUs, whose programs' memory is tested.
    """
    if any(importlib.util.find_spec(other) for other in ("libtpu", "jax_cuda13_plugin", "jax_rocm7_plugin")):
        return ""
    flags = ["--xla_backend_optimization_level=0"]
    if jaxlib.version.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


os.environ.setdefault("XLA_FLAGS", _quick_to_compile())
jax.config.update("jax_num_cpu_devices", 8)  # here and not in the environment: commands that a test starts choose anew

# Annotations are enforced in every module of ours, so this must come before the first of them is imported.
# The tower lets an int stand where a float is asked for, as the type checker does.
jaxtyping.install_import_hook("gptoss_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees what a module compiled. A program holds pieces of mapped memory, of which Linux lets a process have 65,530:
    past that XLA's next compilation ends it by a segmentation fault."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY in Hugging Face's layout, experts in MXFP4."""
    return _write_tiny(tmp_path_factory, layout="hf", experts="mxfp4")


@pytest.fixture(scope="session")
def tiny_hf_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY as `transformers` saves it after dequantising: the values of tiny_hf, experts in bf16."""
    return _write_tiny(tmp_path_factory, layout="hf", experts="bf16")


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY in the layout of OpenAI's `original/` folder: the values of tiny_hf."""
    return _write_tiny(tmp_path_factory, layout="original", experts="mxfp4")


def _write_tiny(tmp_path_factory: pytest.TempPathFactory, *, layout: str, experts: str) -> Path:
    from gptoss_jax.convert.synthetic import write_checkpoint
    from tests.tiny import TINY

    folder = tmp_path_factory.mktemp("checkpoints") / f"tiny_{layout}_{experts}"
    write_checkpoint(folder, TINY, seed=0, layout=layout, experts=experts)
    return folder


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer of TINY's vocabulary: a byte of text is an id, the special tokens follow."""
    from gptoss_jax.harmony.tokenizer import load_tokenizer, write_byte_tokenizer
    from tests.tiny import TINY

    folder = tmp_path_factory.mktemp("letters")
    write_byte_tokenizer(folder / "tokenizer.json", TINY.vocab_size)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """o200k_base.tiktoken, which is too large to keep with the tests, under both names that it is looked for."""
    from gptoss_jax.harmony.tokenizer import O200K_CACHE_NAME, O200K_SHA256

    packed = Path(__file__).parents[2] / "shared/vocab/o200k_base.tiktoken.xz"
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
def o200k(ranks_file: Path):
    """The released vocabulary."""
    from gptoss_jax.harmony.tokenizer import load_tokenizer

    return load_tokenizer(None, cache_dir=ranks_file.parent)


@pytest.fixture(scope="session")
def harmony(ranks_file: Path):
    """openai-harmony, which judges the format."""
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(ranks_file.parent))
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
