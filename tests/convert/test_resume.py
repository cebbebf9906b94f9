"""A conversion that is killed goes on where it was, and ends byte for byte as if nothing had happened."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptoss_jax.checkpoint import load
from gptoss_jax.convert import conversion
from gptoss_jax.convert.conversion import convert
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.sharding import MeshShape
from tests.tiny import TINY

WORKER = Path(__file__).with_name("worker.py")
CONFIG = dataclasses.replace(TINY, expert_width=192, layer_kinds=alternating_layers(2))
MESH = MeshShape(expert=2, tensor=2)
SMALL_BATCHES = 150_000  # some ten batches

# The steps before which half of something is there: merged but not moved, whole but without a manifest, whole but
# without its name, and whole but with the work's remains beside it.
NAMED = ["os.rename:params", "os.rename:manifest.json.partial", "os.rename:checkpoint", "os.remove:plan.json"]
OTHERS = ["os.rename:plan.json.partial", "os.remove:journal.0.jsonl", *(f"{n / 20}" for n in range(1, 20))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    write_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """What a conversion without interruption writes; test_conversion.py shows that batches leave no trace in it."""
    convert(source, source.parent / "expected", mesh=MESH)
    return tree(source.parent / "expected")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "BATCH_BYTES", SMALL_BATCHES)


def worker(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, WORKER, *arguments, "--mesh", MESH, "--batch-bytes", SMALL_BATCHES]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is and when it was written, of every data file, by its path from the parameter on."""
    return {
        str(path).split("/state/")[1]: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if "/c/" in str(path) and path.is_file()
    }


def journaled(staging: Path) -> set[str]:
    """The parameters that the journal says are stored."""
    text = (staging / "journal.0.jsonl").read_text()
    entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {name for entry in entries for name in entry.get("stored", {})}


class Interrupted(BaseException):
    """As Ctrl-C."""


def interrupt(source: Path, destination: Path, *, after: int, mesh: MeshShape = MESH) -> None:
    """Converts until `after` batches are stored."""
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(source, destination, mesh=mesh, on_progress=stop)
    assert not destination.exists()


# --- kills --------------------------------------------------------------------------------------------------------


def killed_and_resumed(source: Path, root: Path, points: list[str]) -> None:
    process = worker("kill", source, root, *(word for point in points for word in ("--at", point)))
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    ends = json.loads(printed)
    assert ends.pop("whole") == [0]
    assert ends == {str(n): [signal.SIGKILL, 0] for n in range(len(points))}, points
    assert set(os.listdir(root)) == {"whole", *ends}
    whole = tree(root / "whole")
    for n, point in enumerate(points):
        assert tree(root / str(n)) == whole, point


def test_killed_at_named_steps_it_goes_on(source: Path, tmp_path: Path):
    killed_and_resumed(source, tmp_path, NAMED)


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(source: Path, tmp_path: Path):
    killed_and_resumed(source, tmp_path, OTHERS)


def test_killed_from_outside_it_goes_on_without_doing_things_twice(
    source: Path, expected, tmp_path: Path, small_batches
):
    """kill -9 once some batches are stored, in the middle of whatever it then does."""
    destination, staging = tmp_path / "checkpoint", tmp_path / "checkpoint.unfinished"
    process = worker("convert", source, destination)
    deadline = time.monotonic() + 120
    while not (staging / "journal.0.jsonl").exists() or len(journaled(staging)) < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="its conversion has not finished; run the same convert command again"):
        load(destination)
    done, before = journaled(staging), identities(staging)
    seen: list[tuple[int, int]] = []
    convert(source, destination, mesh=MESH, on_progress=lambda *progress: seen.append(progress))
    after = identities(destination)
    kept = {path for path in before if path.split("/")[0] in done}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert seen[0][0] > 0
    assert tree(destination) == expected
    assert os.listdir(tmp_path) == ["checkpoint"]


# --- interruptions of all kinds -----------------------------------------------------------------------------------


def test_an_exception_from_outside_keeps_the_work(source: Path, expected, tmp_path: Path, small_batches):
    interrupt(source, tmp_path / "checkpoint", after=5)
    convert(source, tmp_path / "checkpoint", mesh=MESH)
    assert tree(tmp_path / "checkpoint") == expected


@pytest.mark.parametrize("torn", [b"", b'{"stored": {"norm', b"\xff\x00"])
def test_a_journal_that_ends_in_the_middle_of_a_line_is_read_to_there(
    torn, source: Path, expected, tmp_path: Path, small_batches
):
    interrupt(source, tmp_path / "checkpoint", after=6)
    journal = tmp_path / "checkpoint.unfinished" / "journal.0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + torn)
    interrupt(source, tmp_path / "checkpoint", after=2)  # the torn line must not spoil the next one either
    convert(source, tmp_path / "checkpoint", mesh=MESH)
    assert tree(tmp_path / "checkpoint") == expected


def test_a_disk_that_refuses_keeps_the_work(source: Path, expected, tmp_path: Path, small_batches):
    """As a disk that is full halfway: no file may be larger than the embedding's, and those of the experts are."""
    process = worker("convert", source, tmp_path / "checkpoint", "--largest-file", 60_000)
    _, error = process.communicate(timeout=120)
    staging = tmp_path / "checkpoint.unfinished"
    assert process.returncode == 1
    assert f"UserError: {staging} cannot be written: File too large; what is there is kept: make room, then" in error
    assert journaled(staging)
    convert(source, tmp_path / "checkpoint", mesh=MESH)
    assert tree(tmp_path / "checkpoint") == expected


def test_another_command_does_not_go_on(source: Path, tmp_path: Path, small_batches):
    destination, staging = tmp_path / "checkpoint", tmp_path / "checkpoint.unfinished"
    interrupt(source, destination, after=3)
    before = tree(staging)
    way_out = "repeat that command to go on with it, or remove the folder to begin anew"
    with pytest.raises(UserError) as caught:
        convert(source, destination, mesh=MeshShape(expert=4))
    assert str(caught.value) == (
        f"{staging} was begun with mesh=data=1,expert=2,tensor=2, not data=1,expert=4,tensor=1: {way_out}"
    )
    with pytest.raises(UserError, match=f"was begun with experts=mxfp4, not bf16: {way_out}"):
        convert(source, destination, mesh=MESH, experts="bf16")
    assert tree(staging) == before
    convert(source, destination, mesh=MESH)


def test_a_source_that_changed_in_between_is_noticed(source: Path, tmp_path: Path, small_batches):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    interrupt(copy, tmp_path / "checkpoint", after=3)
    write_checkpoint(tmp_path / "other", CONFIG, seed=1)
    (tmp_path / "other" / "model.safetensors").rename(copy / "model.safetensors")
    with pytest.raises(
        UserError, match="was begun from another source, or files of the source have changed since: repeat"
    ):
        convert(copy, tmp_path / "checkpoint", mesh=MESH)
    shutil.rmtree(tmp_path / "checkpoint.unfinished")
    convert(copy, tmp_path / "checkpoint", mesh=MESH)


# --- two at once --------------------------------------------------------------------------------------------------


def test_a_second_conversion_into_the_same_place_is_refused(source: Path, expected, tmp_path: Path, small_batches):
    destination = tmp_path / "checkpoint"
    begun, refused = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        begun.set()
        assert refused.wait(60)

    first = threading.Thread(target=convert, args=(source, destination), kwargs={"mesh": MESH, "on_progress": wait})
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(UserError, match=r"another conversion is at work in .*checkpoint\.unfinished; wait for it"):
            convert(source, destination, mesh=MESH)
    finally:
        refused.set()
        first.join()
    with pytest.raises(UserError, match="exists; expected a destination that does not"):
        convert(source, destination, mesh=MESH)
    assert tree(destination) == expected
