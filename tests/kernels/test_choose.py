"""Names of implementations: what each platform prefers, what a typo is told, and that a named one is never replaced."""

import re
import subprocess
import sys

import pytest

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.choose import choose, function, implementations, layout

OPS = ("attention", "moe_matmul")
ANYWHERE = {"xla", "tpu-interpret", "gpu-interpret"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("platform", "preferred"), [("cpu", "xla"), ("gpu", "gpu"), ("tpu", "tpu")])
def test_each_platform_prefers_its_own(op: str, platform: str, preferred: str):
    assert choose(op, None, platform=platform) == preferred
    assert set(implementations(op, platform=platform)) == ANYWHERE | {preferred}
    for impl in implementations(op, platform=platform):
        assert choose(op, impl, platform=platform) == impl


@pytest.mark.parametrize("op", OPS)
def test_a_platform_that_nobody_thought_of_has_the_reference(op: str):
    assert implementations(op, platform="METAL") == ("xla",)
    assert choose(op, None, platform="METAL") == choose(op, "xla", platform="METAL") == "xla"


@pytest.mark.parametrize(("typo", "meant"), [("gpu_interpret", "gpu-interpret"), ("XLA", None), ("", None)])
def test_a_typo_is_told_the_names(typo: str, meant: str | None):
    with pytest.raises(UserError, match=f"has no implementation {typo!r}: .*expected one of xla, tpu, gpu") as caught:
        choose("moe_matmul", typo, platform="cpu")
    assert not isinstance(caught.value, Unsupported)
    assert (f"did you mean {meant}?" in str(caught.value)) == (meant is not None)


@pytest.mark.parametrize(("impl", "platform"), [("gpu", "cpu"), ("tpu", "cpu"), ("gpu", "tpu"), ("tpu", "gpu")])
@pytest.mark.parametrize("op", OPS)
def test_a_named_one_that_cannot_run_here_says_why(op: str, impl: str, platform: str):
    expected = f"{op}'s implementation {impl!r} runs on {impl}, the devices here are {platform}: choose one of xla, "
    with pytest.raises(Unsupported, match=re.escape(expected)):
        choose(op, impl, platform=platform)


def test_weights_lie_in_columns_for_tpus_alone():
    assert {impl: layout(impl) for impl in ("xla", "gpu", "gpu-interpret", "tpu", "tpu-interpret")} == {
        "xla": "rows",
        "gpu": "rows",
        "gpu-interpret": "rows",
        "tpu": "columns",
        "tpu-interpret": "columns",
    }


@pytest.mark.parametrize("impl", ["xla", "tpu", "gpu", "tpu-interpret", "gpu-interpret"])
@pytest.mark.parametrize(
    ("op", "name"), [("attention", "full"), ("attention", "sliding"), ("moe_matmul", "moe_matmul")]
)
def test_every_name_in_the_table_is_there(op: str, name: str, impl: str):
    assert callable(function(op, name, impl))


def test_pallas_is_imported_by_those_who_use_it():
    """It takes a tenth of a second, and parts of it exist on some platforms only."""
    code = (
        "import sys; import gptoss_jax.model.transformer; print([n for n in sys.modules if 'experimental.pallas' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
