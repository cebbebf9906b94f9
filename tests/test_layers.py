"""The house rules that a machine can read off the source: which way imports run, and what no module may hold."""

import ast
import graphlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptoss_jax"

# A module imports from its own part, or from parts of a lower rank. CONTRIBUTING.md draws it.
RANKS = {
    "cli": 5,
    **dict.fromkeys(("server", "moderation", "train", "plan", "bench"), 4),
    **dict.fromkeys(("chat", "checkpoint", "testing"), 3),
    **dict.fromkeys(("engine", "convert", "configs"), 2),
    **dict.fromkeys(("model", "tools"), 1),
    **dict.fromkeys(("kernels", "sharding", "hosts", "aot", "harmony", "constrain"), 0),
    "errors": -1,  # everything may raise them
    "nano": -1,  # and be given its name for a checkpoint
}

# What a part, or one module, does not know about.
STRANGERS = {
    "gptoss_jax.kernels": {"flax"},
    "gptoss_jax.harmony": {"jax", "flax", "numpy"},
    "gptoss_jax.constrain": {"jax", "flax", "tiktoken"},
    "gptoss_jax.tools": {"jax", "flax", "numpy"},
    "gptoss_jax.chat": {"jax", "flax", "numpy", "fastapi"},
    "gptoss_jax.server": {"jax", "flax"},
    "gptoss_jax.configs": {"jax", "flax", "numpy"},
    "gptoss_jax.convert": {"flax"},
    "gptoss_jax.convert.files": {"jax"},
    "gptoss_jax.convert.boxes": {"jax"},
    "gptoss_jax.convert.plain": {"jax"},
    "gptoss_jax.engine.request": {"jax", "flax"},
    **{
        f"gptoss_jax.engine.{name}": {"jax", "flax", "numpy"}
        for name in ("limits", "sequence", "pages", "ledger", "scheduler", "drafts", "stops", "stream")
    },
    "gptoss_jax.model.config": {"jax", "flax", "numpy"},
    "gptoss_jax.errors": {"jax", "flax", "numpy"},
}

# Loading a pickle runs code that its author chose; torch is for the tests; the last two are links' other ends.
BANNED = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "torch", "convert", "configs"}


def find_modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package; the links to convert/ and configs/ are followed."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
every_module = pytest.mark.parametrize("name", sorted(MODULES))


def imported(tree: ast.AST) -> set[str]:
    """Every module that the source asks for; `from a import b` asks for a.b if that is a module of ours, else for a."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            names.update(f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names)
    return names


def part(module: str) -> str | None:
    """The part of the package that a module of ours lies in; the package itself and strangers have none."""
    root, _, rest = module.partition(".")
    return rest.split(".")[0] if root == "gptoss_jax" and rest else None


def test_every_part_of_the_package_has_a_rank() -> None:
    assert {part(name) for name in MODULES} - {None} <= set(RANKS)


@every_module
def test_imports_only_go_down(name: str) -> None:
    here = part(name)
    for target in imported(TREES[name]):
        there = part(target)
        if here is not None and there is not None and there != here:
            assert RANKS[there] < RANKS[here], f"{name} (rank {RANKS[here]}) imports {target} (rank {RANKS[there]})"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: imported(tree) & MODULES.keys() for name, tree in TREES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of the cycle


@every_module
def test_a_part_does_not_know_its_strangers(name: str) -> None:
    strangers = {s for owner, found in STRANGERS.items() if f"{name}.".startswith(f"{owner}.") for s in found}
    assert not strangers & {target.split(".")[0] for target in imported(TREES[name])}


@every_module
def test_nothing_banned_is_imported(name: str) -> None:
    assert not BANNED & {target.split(".")[0] for target in imported(TREES[name])}
    keywords = {node.arg for node in ast.walk(TREES[name]) if isinstance(node, ast.keyword)}
    assert "allow_pickle" not in keywords


@every_module
def test_imports_stand_at_the_top_and_unguarded(name: str) -> None:
    if part(name) == "cli":
        return  # a command imports what it needs, so that --help is quick
    top = [node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
    everywhere = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Import | ast.ImportFrom)]
    late = {node.lineno for node in everywhere} - {node.lineno for node in top}
    assert not late, f"imports inside a function, a class or a guard on lines {sorted(late)}"


@every_module
def test_a_file_begins_by_saying_what_it_is(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    assert source.startswith('"""'), "the first line is the docstring"
    assert source.partition("\n")[0].rstrip('"').endswith("."), "the first line is a whole sentence"


def test_no_file_is_called_utils() -> None:
    assert not [path for path in MODULES.values() if path.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_no_file_names_one_machine_or_where_packages_come_from() -> None:
    # Written in halves, since this file is read too.
    places = ["/" + "work/", "/" + "tmp/", "/" + "root/", "pypi" + ".org", "python" + "hosted", "download.py" + "torch"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {place}"
        for path in written_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for place in places
        if place in line
    ]
    assert not found


def written_files() -> list[Path]:
    """Everything that people wrote: no environments, caches or goldens."""
    folders = [".ci", "benchmarks", "configs", "convert", "docs", "examples", "gptoss_jax", "scripts", "tests"]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    suffixes = {".md", ".py", ".pyi", ".toml", ".json", ".txt", ".sh", ""}
    return [path for path in [*ROOT.iterdir(), *inside] if path.is_file() and path.suffix in suffixes]


def test_the_links_beside_the_package_are_followed() -> None:
    assert {"gptoss_jax.convert", "gptoss_jax.configs"} <= MODULES.keys()
