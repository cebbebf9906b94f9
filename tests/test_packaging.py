"""What a user gets: the wheel holds every module and the compiled kernels, and importing the package stays cheap."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

import gptoss_jax

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = "gptoss_jax/kernels/native/_kernels.abi3.so"
COMPILER = (sysconfig.get_config_var("CXX") or "c++").split()[0]
NO_COMPILER = {"CC": "false", "CXX": "false"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, as git checks it out with links."""
    tree = tmp_path_factory.mktemp("packaging")
    for folder in ("gptoss_jax", "convert", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    return tree


def build(tree: Path, what: str, *, settings: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The wheel or sdist that the backend itself makes: pip would fetch what builds it anew."""
    code = f"from setuptools import build_meta; build_meta.build_{what}('out')"
    # A scratch folder of its own for each: setuptools takes from it what was compiled before.
    copy = tree.with_name(f"{tree.name}-{what}-{len(settings)}")
    shutil.copytree(tree, copy, symlinks=True)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (path,) = (path for path in (copy / "out").iterdir() if path.suffix in (".whl", ".gz"))
    return path


def names(wheel: Path) -> set[str]:
    """In the wheel, without what describes it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if f"-{gptoss_jax.__version__}.dist-info/" not in name}


def files_of_the_package() -> set[str]:
    """That a wheel holds whatever the machine; C++ is compiled, and stays behind."""
    return {
        Path(folder, file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "gptoss_jax", followlinks=True)
        for file in files
        if "__pycache__" not in folder and not file.endswith((".so", ".cc", ".h"))
    }


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER}")
def test_the_wheel_holds_every_file_of_the_package_and_its_kernels_and_nothing_else(tree: Path) -> None:
    wheel = build(tree, "wheel")
    assert names(wheel) == files_of_the_package() | {EXTENSION}
    assert "-cp311-abi3-" in wheel.name  # for this Python and all later ones


def test_without_the_links_and_without_a_compiler_it_holds_the_rest(tree: Path) -> None:
    for link in ("convert", "configs"):
        (tree / "gptoss_jax" / link).unlink()
    try:
        assert names(build(tree, "wheel", settings=NO_COMPILER)) == files_of_the_package()
    finally:
        for link in ("convert", "configs"):
            (tree / "gptoss_jax" / link).symlink_to(Path("..", link))


def test_the_sources_hold_what_is_compiled(tree: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    native = ROOT / "gptoss_jax/kernels/native"
    sources = {path.relative_to(ROOT).as_posix() for pattern in ("*.cc", "*.h") for path in native.glob(pattern)}
    assert sources
    assert sources | {"setup.py", "MANIFEST.in", "pyproject.toml"} <= held


def test_importing_the_package_imports_none_of_the_heavy_ones() -> None:
    probe = "import gptoss_jax, sys; dir(gptoss_jax); print({'jax', 'flax', 'numpy'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("name", gptoss_jax.__all__)
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(gptoss_jax, name) is not None
    assert name in dir(gptoss_jax)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'gptoss_jax' has no attribute 'laod'"):
        gptoss_jax.laod  # noqa: B018


def test_the_stub_says_what_the_package_does() -> None:
    stub = ast.parse((ROOT / "gptoss_jax/__init__.pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert homes == gptoss_jax._HOMES
