"""However a run ends, the same command goes on from it as if nothing had happened: bit for bit."""

import random
from pathlib import Path

import jax
import numpy as np
import pytest

from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.log import read_log
from gptoss_jax.train.saves import Saves
from tests.train.test_saves import toy
from tests.train.toy import ToyFeed, ToyTrainer, contents, run_toy

STEPS = 48


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What an uninterrupted run leaves, and what it said."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    feed = ToyFeed()
    result = run_toy(folder, steps=STEPS, feed=feed)
    return {"state": contents(result.state), "given": feed.given, "log": told(folder)}


def told(folder: Path) -> list[tuple]:
    """The log but for its times."""
    times = ("seconds", "tokens_per_second", "mfu")
    return [tuple((key, str(value)) for key, value in entry.items() if key not in times) for entry in read_log(folder)]


def random_moments(number: int) -> list[float]:
    """A step, and up to 0.1 seconds behind it, in which a save is being written: the same in every run of the tests."""
    source = random.Random(number)
    return [round(source.randrange(1, STEPS - 6) + source.uniform(0, 0.1), 3) for _ in range(number)]


MOMENTS = [*random_moments(1), *(pytest.param(moment, marks=pytest.mark.slow) for moment in random_moments(19))]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, whole: dict, moment: float):
    """kill -9, during a step or a save, whatever comes: parameters, optimizer, order of the data and log are equal."""
    ended = toy(tmp_path / "run", "--steps", STEPS, "--kill-at", moment)
    assert ended.returncode == -9, ended.stderr
    with Saves(tmp_path / "run/saves") as saves:
        reached = saves.newest() or 0
    assert reached < STEPS
    feed = ToyFeed()
    result = run_toy(tmp_path / "run", steps=STEPS, feed=feed)
    assert contents(result.state) == whole["state"]
    assert feed.given == whole["given"][reached:]
    assert told(tmp_path / "run") == whole["log"]


@pytest.mark.slow
def test_one_that_is_killed_again_and_again_comes_to_its_end(tmp_path: Path, whole: dict):
    for moment in (9.05, 20.01, 31.08):
        assert toy(tmp_path / "run", "--steps", STEPS, "--kill-at", moment).returncode == -9
    result = run_toy(tmp_path / "run", steps=STEPS)
    assert contents(result.state) == whole["state"]
    assert told(tmp_path / "run") == whole["log"]


def test_what_a_killed_save_leaves_is_no_save_and_is_cleared_away(tmp_path: Path, whole: dict):
    """As Orbax names a save that is not whole, whatever was written of it."""
    run_toy(tmp_path / "run", steps=9)
    saves = tmp_path / "run/saves"
    half = saves / "12.orbax-checkpoint-tmp-0"
    (half / "state").mkdir(parents=True)
    (half / "state/manifest.ocdbt").write_bytes(b"half")
    with Saves(saves) as opened:
        assert opened.newest() == 9
    result = run_toy(tmp_path / "run", steps=STEPS)
    assert contents(result.state) == whole["state"]
    assert {path.name for path in saves.iterdir()} == set(map(str, Saves(saves).steps()))


def test_it_goes_on_on_another_mesh(tmp_path: Path):
    """Sums come in another order there: the toy's parameters, of size 1, agree to float32's last digits."""
    few = {"save_every": 20}
    run_toy(tmp_path / "run", steps=20, **few)
    wide = run_toy(tmp_path / "run", steps=STEPS, trainer=ToyTrainer(mesh=make_mesh(data=4)), **few)
    assert len(wide.state.trained["table"].sharding.device_set) == 4
    alone = run_toy(tmp_path / "alone", steps=STEPS, **few)
    for ours, expected in zip(*map(jax.tree.leaves, (wide.state, alone.state)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    again = run_toy(tmp_path / "run", steps=STEPS + 2, **few)  # and back
    assert again.step == STEPS + 2
