"""What happens between steps: losses, answers, saves, lines of the log; and how a run ends that cannot go on."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.train.log import LOG_NAME, Log, read_log
from gptoss_jax.train.loop import Result
from gptoss_jax.train.saves import Saves
from tests.train.toy import ACCUMULATE, EXPERTS, LENGTH, ROWS, ToyFeed, ToyTrainer, draw, run_toy


def said(folder: Path, kind: str) -> dict[int, dict]:
    return {entry["step"]: entry for entry in read_log(folder) if entry["kind"] == kind}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop") / "run"


@pytest.fixture(scope="module")
def done(folder: Path) -> Result:
    """Ten steps; a loss is taken every fourth, an answer every fifth, a save every third and the last two are kept."""
    asked = {"sample_every": 5, "sample_prompts": ("one", "two"), "keep_last": 2, "keep_best": 0}
    return run_toy(folder, steps=10, sample=lambda state: ["1", str(int(state.step))], **asked)


def test_each_step_has_a_line(folder: Path, done: Result):
    steps = said(folder, "step")
    assert list(steps) == list(range(1, 11)) == [entry["step"] for entry in read_log(folder) if entry["kind"] == "step"]
    assert (done.step, done.stopped) == (10, False)
    first = steps[1]
    real = draw(0, (ACCUMULATE, ROWS)).is_real
    assert first["tokens"] == real.sum() == ACCUMULATE * ROWS * LENGTH - 4
    assert first["trained_tokens"] == (draw(0, (ACCUMULATE, ROWS)).weights > 0).sum()
    assert first["learning_rate"] == 0.05
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / first["seconds"], rel=1e-3)
    assert first["mfu"] == pytest.approx(1e6 / first["seconds"] / 1e12, abs=1e-6)
    assert first["busiest"] == [1.0, EXPERTS, 1.0]
    assert first["idle"] == [0, EXPERTS - 1, 0]
    assert steps[10]["loss"] < first["loss"]


def test_losses_and_answers_come_at_their_intervals_and_in_the_end(folder: Path, done: Result):
    evaluations = said(folder, "evaluation")
    assert list(evaluations) == [4, 8, 10]
    assert evaluations[10]["loss"] == done.loss
    assert evaluations[4]["trained_tokens"] == sum((draw(-1 - n, (ROWS,)).weights > 0).sum() for n in range(2))
    samples = [(entry["step"], entry["prompt"], entry["answer"]) for entry in read_log(folder) if "prompt" in entry]
    assert samples == [(5, "one", "1"), (5, "two", "5"), (10, "one", "1"), (10, "two", "10")]


def test_the_loss_of_an_evaluation_is_that_of_a_token(done: Result):
    """Over both of its batches together, by NumPy."""
    table, loss, weight = np.asarray(done.state.trained["table"], np.float64), 0.0, 0.0
    for number in range(2):
        batch = draw(-1 - number, (ROWS,))
        loss += ((table[batch.tokens].sum(-1) - batch.targets) ** 2 * batch.weights).sum()
        weight += batch.weights.sum()
    assert done.loss == pytest.approx(loss / weight, rel=1e-5)


def test_saves_come_at_their_interval_and_in_the_end(folder: Path, done: Result):
    with Saves(folder / "saves") as saves:
        assert saves.steps() == [9, 10]
        assert saves.notes(10).position == {"number": 10}
        assert (saves.notes(9).loss, saves.notes(10).loss) == (None, done.loss)


def test_a_finished_run_does_nothing_more(folder: Path, done: Result):
    before = (folder / LOG_NAME).read_bytes()
    feed = ToyFeed()
    assert run_toy(folder, steps=10, feed=feed).step == 10
    assert (folder / LOG_NAME).read_bytes() == before
    assert feed.given == []


def test_the_step_is_compiled_once(tmp_path: Path):
    """Also behind a save: what is started, stepped and read from a save lies alike."""
    for steps in (4, 6):
        trainer = ToyTrainer()
        run_toy(tmp_path / "run", steps=steps, trainer=trainer)
        assert trainer._step._cache_size() == 1


def test_what_is_asked_to_stop_saves_and_goes_on_later(tmp_path: Path):
    answers = iter([False] * 4 + [True])
    stopped = run_toy(tmp_path / "run", steps=10, should_stop=lambda: next(answers))
    assert (stopped.step, stopped.stopped) == (5, True)
    with Saves(tmp_path / "run/saves") as saves:
        assert saves.newest() == 5
    assert run_toy(tmp_path / "run", steps=10).step == 10
    assert list(said(tmp_path / "run", "step")) == list(range(1, 11))


# ---- runs that cannot go on ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_batch_and_save(tmp_path: Path):
    with pytest.raises(UserError) as error:
        run_toy(tmp_path / "run", steps=20, feed=ToyFeed(poisoned=7))
    message = str(error.value)
    assert message.startswith("step 8: the loss is nan and the gradient's norm nan, expected finite numbers; its batch")
    assert "toy.jsonl:29, toy.jsonl:30" in message
    assert f"the last good save is {tmp_path}/run/saves/6: lower optimizer.learning_rate" in message
    assert list(said(tmp_path / "run", "step")) == list(range(1, 8))
    with Saves(tmp_path / "run/saves") as saves:
        state, _ = saves.restore(saves.newest(), ToyTrainer().abstract_state())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_without_a_save_it_says_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"step 1: the loss is .*; there is no save: lower"):
        run_toy(tmp_path / "run", steps=20, feed=ToyFeed(poisoned=0))


def test_data_that_end_too_early_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="the data is at its end before step 3 of 5"):
        run_toy(tmp_path / "run", steps=5, feed=ToyFeed(batches_in_all=2))


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_behind_the_step_it_is_opened_at(tmp_path: Path):
    with Log(tmp_path) as log:
        for step in (1, 2, 3):
            log.add("step", step, loss=float(step))
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"kind": "step", "st')  # the process was killed here
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    seen = []
    with Log(tmp_path, step=2, on_entry=seen.append) as log:
        log.add("step", 3, loss=float("nan"))
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, None)]
    assert seen == [{"kind": "step", "step": 3, "loss": None}]
    assert all(json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines())


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", ":2: expected a JSON object"), ("[]", r":2: '\[\]' has no kind and step"), ('{"step": 1}', "no kind")],
)
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / LOG_NAME).write_text(f'{{"kind": "step", "step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*" + message):
        Log(tmp_path, step=1)


def test_a_folder_without_a_log_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read: No such file .*; expected the folder of a run"):
        list(read_log(tmp_path))


def test_events_need_their_package_or_are_written(tmp_path: Path):
    try:
        import tensorboardX  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match=r'needs tensorboardX: pip install "gptoss-jax\[train\]"'):
            Log(tmp_path, tensorboard=True)
        return
    with Log(tmp_path, tensorboard=True) as log:
        log.add("step", 1, loss=1.0, busiest=[1.0, 2.0])
    assert list((tmp_path / "tensorboard").iterdir())
