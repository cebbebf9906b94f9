"""A save is whole or absent, checked when read, and readable on any mesh."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError
from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.digest import digests
from gptoss_jax.train.saves import Notes, Saves
from tests.hosts.processes import environment
from tests.train.toy import ToyTrainer, contents, run_toy

ROOT = Path(__file__).resolve().parents[2]


def notes(number: int, loss: float | None = None) -> Notes:
    return Notes(position={"number": number}, loss=loss)


@pytest.fixture(scope="module")
def trainer() -> ToyTrainer:
    return ToyTrainer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, trainer: ToyTrainer) -> Path:
    """Two saves, of steps 1 and 2, which no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "saves"
    with Saves(folder) as saves:
        saves.save(1, trainer.start(1), notes(1))
        saves.save(2, trainer.start(2), notes(2, loss=0.5))
    return folder


def test_what_was_saved_comes_back(saved: Path, trainer: ToyTrainer):
    with Saves(saved) as saves:
        assert (saves.steps(), saves.newest(), saves.best()) == ([1, 2], 2, 2)
        for step in (1, 2):
            state, found = saves.restore(step, trainer.abstract_state())
            assert contents(state) == contents(trainer.start(step))
            assert found == saves.notes(step) == notes(step, loss=0.5 if step == 2 else None)


def test_a_save_is_of_the_moment_it_was_taken_though_training_goes_on(tmp_path: Path):
    """The step consumes its state, whose memory is written again at once: larger than what is copied quickly."""
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = grow(jnp.zeros((1 << 22,), jnp.float32))
    with Saves(tmp_path / "saves") as saves:
        saves.save(1, {"x": x}, notes(1))
        for _ in range(20):
            x = grow(x)
        saves.wait()
        found, _ = saves.restore(1, {"x": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)})
    assert np.unique(np.asarray(found["x"])).tolist() == [1.0]


def test_it_is_read_onto_another_mesh(saved: Path, trainer: ToyTrainer):
    with Saves(saved) as saves:
        wide = ToyTrainer(mesh=make_mesh(data=8))
        state, _ = saves.restore(2, wide.abstract_state())
        assert state.trained["table"].sharding.spec == P("data")
        assert len(state.trained["table"].sharding.device_set) == 8
        assert contents(state) == contents(trainer.start(2))


def test_the_newest_and_the_best_are_kept(tmp_path: Path, trainer: ToyTrainer):
    losses = [3.0, 1.0, float("nan"), None, 1.0, 2.0]
    state = trainer.start(0)
    with Saves(tmp_path / "saves", keep_last=2, keep_best=1) as saves:
        for step, loss in enumerate(losses[:4]):
            saves.save(step, state, notes(step, loss=loss))
        saves.wait()
        assert (saves.steps(), saves.best()) == ([1, 2, 3], 1)
    with Saves(tmp_path / "saves", keep_last=2, keep_best=1) as saves:  # losses are read from the saves themselves
        for step, loss in enumerate(losses[4:], start=4):
            saves.save(step, state, notes(step, loss=loss))
        saves.wait()
        assert (saves.steps(), saves.best()) == ([1, 4, 5], 1)


def test_none_but_the_newest_are_kept_where_that_is_asked(tmp_path: Path, trainer: ToyTrainer):
    with Saves(tmp_path / "saves", keep_last=1, keep_best=0) as saves:
        for step in range(3):
            saves.save(step, trainer.start(0), notes(step, loss=float(step)))
        saves.wait()
        assert saves.steps() == [2]


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path):
    """In a process of its own: threads of the storage complain when what they read for has been given up."""
    ended = toy(tmp_path / "run", "--flip")
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    messages = [message for message in outcomes.values() if message != "equal"]
    assert len(outcomes) > 10
    assert len(messages) >= 3
    for message in messages:
        assert re.search(r"saves/2 is damaged: .*; remove this folder, then .* from step 1$", message)


def test_other_values_in_a_readable_save_are_found_by_their_digest(tmp_path: Path, trainer: ToyTrainer):
    """As where the storage gives back a neighbour's pages: Orbax is content, the arrays are another save's."""
    with Saves(tmp_path / "saves") as saves:
        saves.save(1, trainer.start(1), notes(1))
        saves.save(2, trainer.start(2), notes(2))
    shutil.rmtree(tmp_path / "saves/2/state")
    shutil.copytree(tmp_path / "saves/1/state", tmp_path / "saves/2/state")
    message = r"saves/2 is damaged: trained\.table is not what was saved; remove"
    with Saves(tmp_path / "saves") as saves, pytest.raises(UserError, match=message):
        saves.restore(2, trainer.abstract_state())


def test_a_changed_note_is_found(tmp_path: Path, trainer: ToyTrainer):
    with Saves(tmp_path / "saves") as saves:
        saves.save(1, trainer.start(1), notes(1))
    path = tmp_path / "saves/1/about/metadata"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"position": {"number": 7}}))
    message = r"saves/1 is damaged: .* CRC-32; remove this folder, .* to begin anew$"
    with Saves(tmp_path / "saves") as saves, pytest.raises(UserError, match=message):
        saves.restore(1, trainer.abstract_state())


def test_a_save_of_other_parameters_is_refused(saved: Path, trainer: ToyTrainer):
    with Saves(saved) as saves:
        with pytest.raises(UserError, match=r"saves/2: .*\.table is float32 \(48, 3\), the run has float32 \(24, 3\)"):
            saves.restore(2, ToyTrainer(width=24).abstract_state())
        abstract = trainer.abstract_state()
        more = dataclasses.replace(abstract, trained={**abstract.trained, "bias": abstract.step})
        with pytest.raises(UserError, match=r"the run has trained\.bias, the save has not"):
            saves.restore(2, more)


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def toy(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.train.toy", folder, *arguments]
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )


def test_a_full_disk_is_reported_and_the_earlier_save_stays(tmp_path: Path):
    """Files may grow to 100 kB, which is enough for the log and too little for a table of 576."""
    width = 48_000
    run_toy(tmp_path / "run", steps=3, trainer=ToyTrainer(width=width))
    ended = toy(tmp_path / "run", "--steps", 9, "--largest-file", 100_000, "--width", width)
    assert ended.returncode == 1
    assert re.search(
        r"UserError: .*saves: a save cannot be written \(.*\); the save of step 3 is whole: make room", ended.stderr
    )
    with Saves(tmp_path / "run/saves") as saves:
        assert saves.steps() == [3]
        saves.restore(3, ToyTrainer(width=width).abstract_state())


# ---- digests ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool"]), st.data())
def test_a_digest_changes_with_any_bit(dtype: str, data: st.DataObject):
    array = np.zeros((3, 5, 7), jnp.dtype(dtype))
    raw = array.view(np.uint8).reshape(-1)
    bit = data.draw(st.integers(0, raw.size * (1 if dtype == "bool" else 8) - 1))
    changed = raw.copy()
    changed[bit // (1 if dtype == "bool" else 8)] ^= 1 << (0 if dtype == "bool" else bit % 8)
    other = changed.view(array.dtype).reshape(array.shape)
    assert digests({"x": jnp.asarray(array)}) != digests({"x": jnp.asarray(other)})


def test_a_digest_knows_places_and_no_mesh():
    array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    laid = [
        jax.device_put(array, NamedSharding(mesh, spec)) for spec in (P(), P("data"), P("tensor", ("data", "expert")))
    ]
    found = [digests({"x": each})["x"] for each in (jnp.asarray(array), *laid)]
    assert len(set(found)) == 1
    assert re.fullmatch("[0-9a-f]{16}", found[0])
    assert digests({"x": jnp.asarray(array[::-1])})["x"] != found[0]


def test_a_digest_by_hand():
    """One entry of weight w gives w times its bits, in either half: 0 gives nothing, 2 twice what 1 gives."""
    of = [digests({"x": jnp.array([value], jnp.int32)})["x"] for value in (0, 1, 2)]
    assert of[0] == "0" * 16
    for half in (slice(0, 8), slice(8, 16)):
        one, two = int(of[1][half], 16), int(of[2][half], 16)
        assert one % 2 == 1
        assert two == 2 * one % 2**32
