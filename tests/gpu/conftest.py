"""Tests here run the kernels on a GPU, and are skipped where there is none: scripts/gpu runs them.

With --interpret they run in Pallas' interpreter instead, which shows on any machine that the tests themselves are
right. tests/conftest.py lets jax see the CPU only, unless JAX_PLATFORMS says otherwise; scripts/gpu does.
"""

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interpret", action="store_true", help="run tests/gpu without a GPU, in Pallas' interpreter")


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> str:
    """The implementation under test."""
    if request.config.getoption("--interpret", default=False):
        return "gpu-interpret"
    if jax.default_backend() != "gpu":
        pytest.skip(f"the device is a {jax.default_backend()}, and this needs a GPU")
    return "gpu"
