"""What a user gets: the wheel holds every module and nothing else, and importing the package alone stays cheap."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gptoss_jax

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["with the links", "without the links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of the tree, as git checks it out with links or without."""
    tree = tmp_path_factory.mktemp("packaging")
    for folder in ("gptoss_jax", "convert", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    if request.param == "without the links":
        (tree / "gptoss_jax/convert").unlink()
        (tree / "gptoss_jax/configs").unlink()
    # The backend itself: pip would fetch setuptools anew.
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    run = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = (tree / "wheel").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: set[str]) -> None:
    expected = {
        Path(folder, file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "gptoss_jax", followlinks=True)
        for file in files
        if "__pycache__" not in folder
    }
    metadata = {name for name in wheel if name.startswith(f"gptoss_jax-{gptoss_jax.__version__}.dist-info/")}
    assert wheel - metadata == expected


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
