"""Commands as several processes: the same text as from one, printed once, and no process that waits for a lost one."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts.processes import COMMAND, collect, run_all, side_by_side, started

SETTINGS = ("--tokens", "5,6,7,8,9,10,11", "--max-new-tokens", 10, "--seed", 4, "--dtype", "float32", "--json")
NOTICED = (2, 3)  # by itself; or, of a process that was slow to start, by the word of one that had already ended
MESH = "data=1,expert=4,tensor=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`release` and `other` are two releases of two layers, `checkpoint` is the first, converted by four processes."""
    folder = tmp_path_factory.mktemp("processes")
    init = (*COMMAND, "init", "--model", "tiny", "--layers", 2, "--seed")
    assert [process.code for process in run_all([(*init, 3, "release"), (*init, 4, "other")], cwd=folder)] == [0, 0]
    first, *others = run_all(
        side_by_side(*[("convert", "release", "checkpoint", "--mesh", "expert=4")] * 4), cwd=folder
    )
    assert first.code == 0, first.stderr
    assert "checkpoint: 1.50 MB in" in first.stderr
    assert [process.stdout for process in (first, *others)] == [""] * 4
    assert not any("checkpoint:" in process.stderr for process in others)
    return folder


def ids(*arguments: object, cwd: Path) -> list[int]:
    (process,) = run_all([(*COMMAND, "generate", *arguments, *SETTINGS)], cwd=cwd)
    assert process.code == 0, process.stderr
    return json.loads(process.stdout)["ids"]


def test_the_same_text_on_one_device_on_eight_and_on_four_processes_with_two_each(folder: Path):
    mesh = ("--mesh", MESH, "--host-devices")
    first, *others = run_all(side_by_side(*[("generate", "checkpoint", *SETTINGS, *mesh, 2)] * 4), cwd=folder)
    assert first.code == 0, first.stderr
    assert [(process.code, process.stdout) for process in others] == [(0, "")] * 3
    document = json.loads(first.stdout)  # nothing else was printed
    assert document["mesh"] == {"data": 1, "expert": 4, "tensor": 2}
    assert len(document["ids"]) == 10
    assert ids("release", cwd=folder) == document["ids"]
    assert ids("checkpoint", *mesh, 8, cwd=folder) == document["ids"]


def both(*each: Sequence[object]) -> list[Sequence[object]]:
    """`generate` as two processes with a device each, given these arguments."""
    return side_by_side(*[("generate", *arguments, "--mesh", "expert=2", "--host-devices", 1) for arguments in each])


def test_different_checkpoints_are_noticed(folder: Path):
    for process in run_all(both(("release", *SETTINGS), ("other", *SETTINGS)), cwd=folder):
        assert process.code in NOTICED
        assert "is not the same everywhere: process 0 has 'SHA-256 " in process.stderr
        assert "Traceback" not in process.stderr


def test_different_settings_are_noticed(folder: Path):
    settings = ("checkpoint", *SETTINGS)
    for process in run_all(both(settings, (*settings, "--temperature", 0.5)), cwd=folder):
        assert process.code in NOTICED
        assert "--temperature is not the same everywhere: process 0 has '1.0', process 1 has '0.5'" in process.stderr


def test_processes_with_different_numbers_of_devices(folder: Path):
    words = ("convert", "release", "uneven", "--mesh")
    for process in run_all(side_by_side((*words, "expert=2"), (*words, "expert=4")), cwd=folder):
        assert process.code in NOTICED
        assert "process 0 has 1 devices, process 1 has 2; expected as many everywhere" in process.stderr
    assert not (folder / "uneven.unfinished").exists()


def test_a_process_that_is_killed_while_they_generate(folder: Path):
    arguments = ("checkpoint", "--tokens", 5, "--max-new-tokens", 100_000, "--dtype", "float32")
    with started(both(arguments, arguments), cwd=folder) as processes:
        assert processes[0].stdout is not None
        assert processes[0].stdout.read(1)  # so both are at work, the one waiting for the other at every layer
        processes[1].kill()
        first, second = collect(processes)
    assert (first.code, second.code) == (3, -9)
    assert first.seconds < 15
    assert first.stderr.splitlines()[-1].startswith("gptoss-jax generate: process 1 of 2 on ")
    assert "has ended without a word: killed, or out of memory (so all processes stop)" in first.stderr
    assert "Traceback" not in first.stderr


def test_a_mesh_that_leaves_a_process_without_a_part(folder: Path):
    words = ("generate", "checkpoint", *SETTINGS, "--host-devices", 1, "--mesh", "expert=1")
    for process in run_all(side_by_side(words, words), cwd=folder):
        assert process.code in NOTICED
        assert "the mesh has 1 devices, the 2 processes have 2; all of them have to take part" in process.stderr
