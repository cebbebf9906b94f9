"""`train` and `plot`: what is printed, what is refused, and how Ctrl-C, a kill and two processes end."""

import argparse
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from gptoss_jax.cli.train import _Stop, peak_flops, train
from gptoss_jax.cli.train_plot import plot
from gptoss_jax.configs import train_config_file, train_config_names
from gptoss_jax.convert.adapters import load_adapter
from gptoss_jax.errors import UserError
from gptoss_jax.train import toml
from gptoss_jax.train.config import read_config
from gptoss_jax.train.log import Log, read_log
from tests.hosts.processes import COMMAND, collect, run_all, side_by_side, started
from tests.train.runs import TWO_LAYERS, configuration, write_inputs


def options(config: object, *overrides: str, **settings) -> argparse.Namespace:
    defaults = {
        "run_folder": None,
        "plan": False,
        "show_data": None,
        "host_devices": None,
        "chip": None,
        "compile": False,
    }
    alone = {"coordinator": None, "num_processes": None, "process_id": None, "join_timeout": 9, "silence_timeout": 9}
    return argparse.Namespace(
        command="train", config=str(config), overrides=list(overrides), **defaults | alone | settings
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and `run.toml`."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "run.toml").write_text(toml.write(configuration(folder)), encoding="utf-8")
    return folder


# ---- before anything runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train_config_names())
def test_the_configurations_that_have_a_name_can_be_read(name: str):
    assert toml.flat(read_config(train_config_file(name)))


def test_a_plan_needs_no_weights(capsys: pytest.CaptureFixture[str]):
    assert train(options("qlora-120b", "mesh.expert=4", "mesh.tensor=2", plan=True)) == 0
    out = capsys.readouterr().out
    assert out.startswith("gpt-oss-120b, 2 x 4,096 tokens: a step holds ")
    assert "on each of 8 devices, mesh data=1,expert=4,tensor=2" in out


def test_data_are_shown(inputs: Path, capsys: pytest.CaptureFixture[str]):
    assert train(options(inputs / "run.toml", show_data=1)) == 0
    out = capsys.readouterr().out
    assert "60 lines, 60 to train" in out
    assert re.search(r"<\|startoftext\|>\d+\+\d+=⟦\d+<\|endoftext\|>⟧", out)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("lora-20", None, "lora-20 is no file, and no training configuration is named so: did you mean lora-20b?"),
        ("lora-20b", "loop.step=3", "loop.step is no setting; expected one of loop.steps"),
        ("dpo", "mesh.data=3", "loop.rows is 2, which mesh.data=3 does not divide"),
        ("lora-20b", "model.checkpoint=nowhere", "nowhere is no folder"),
    ],
)
def test_what_is_asked_wrongly_is_refused(config: str, override: str | None, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        train(options(config, *filter(None, [override]), plan=True))


def test_the_peak_of_a_cpu_is_not_known():
    assert jax.default_backend() != "cpu" or peak_flops() is None


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """Ctrl-C does what it does in a terminal, also in a shell's background job, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
def test_the_first_signal_asks_and_the_second_interrupts(capsys: pytest.CaptureFixture[str]):
    with _Stop() as stop:
        stop.listen()
        assert not stop.is_asked()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "saving after this step; once more ends at once" in capsys.readouterr().err


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with _Stop() as stop:
        stop.listen()
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# ---- pictures --------------------------------------------------------------------------------------------------------


def write_log(folder: Path, *, steps: int) -> None:
    folder.mkdir()
    with Log(folder) as log:
        for step in range(1, steps + 1):
            load = {"busiest": [1.0, 2.0, 1.5], "idle": [0, 1, 0]}
            values = {"loss": 1 / step, "gradient_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 9.0}
            log.add("step", step, **values, **load, **({"mfu": 0.4} if step > 1 else {}))
        log.add("evaluation", steps, loss=float("nan"), trained_tokens=3, seconds=0.1)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_log_is_drawn(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "run", steps=3)
    out = tmp_path / f"picture.{ending}"
    assert plot(argparse.Namespace(run_folder=str(tmp_path / "run"), out=str(out))) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.stat().st_size > 5000


def test_what_cannot_be_drawn_is_refused(tmp_path: Path):
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "run", steps=0)
    with pytest.raises(UserError, match="the log has no step yet"):
        plot(argparse.Namespace(run_folder=str(tmp_path / "run"), out=None))
    with pytest.raises(UserError, match=r"ends in '\.pdf'; expected \.png or \.svg"):
        plot(argparse.Namespace(run_folder=str(tmp_path / "run"), out="a.pdf"))
    with pytest.raises(UserError, match="expected the folder of a run"):
        plot(argparse.Namespace(run_folder=str(tmp_path / "none"), out=None))


# ---- as a user types them --------------------------------------------------------------------------------------------


def command(inputs: Path, run: Path, *words: object) -> list[object]:
    return [*COMMAND, "train", inputs / "run.toml", *words, "--run", run]


def wait_for_step(run: Path, step: int) -> None:
    """Until the log has a line of it."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / "log.jsonl").exists() and any(entry["step"] >= step for entry in read_log(run)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} has not come to step {step}")


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run) if entry["kind"] == "step"]


def leaves(run: Path) -> dict[str, np.ndarray]:
    return dict(load_adapter(run / "adapter", TWO_LAYERS).leaves)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many steps that nobody interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    (ended,) = run_all([command(inputs, run, "loop.steps=200", "loop.save_every=10")])
    assert ended.code == 0, ended.stderr
    assert ended.stdout.strip() == str(run / "adapter")
    assert "evaluation loss" in ended.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)], ids=str
)
def test_however_it_ends_the_same_command_goes_on(
    tmp_path: Path, inputs: Path, whole: Path, number: signal.Signals, code: int
):
    run = tmp_path / "run"
    words = command(inputs, run, "loop.steps=200", "loop.save_every=10")
    with started([words]) as processes:
        wait_for_step(run, 25)
        processes[0].send_signal(number)
        (ended,) = collect(processes)
    assert ended.code == code, ended.stderr
    if code == 130:
        assert re.search(r"stopped after step \d+; the same command goes on from there", ended.stderr)
    (again,) = run_all([words])
    assert again.code == 0, again.stderr
    found, expected = leaves(run), leaves(whole)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, inputs: Path):
    """Each reads half of the rows; sums come in another order, which larger steps would blow up."""
    settings = ("loop.steps=50", "loop.save_every=25", "optimizer.learning_rate=0.001")
    words = ("train", inputs / "run.toml", "mesh.data=2", *settings)
    shared = ("--run", tmp_path / "two", "--host-devices", 1)
    processes = run_all(side_by_side(*[(*words, *shared)] * 2))
    assert [process.code for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
    assert processes[1].stdout == ""
    alone = ("train", inputs / "run.toml", *settings, "--run", tmp_path / "one")
    (one,) = run_all([(*COMMAND, *alone)])
    assert one.code == 0, one.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-4)
    tokens = [[entry["tokens"] for entry in read_log(tmp_path / run) if "tokens" in entry] for run in ("one", "two")]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_mistakes_are_one_sentence(tmp_path: Path, inputs: Path):
    (ended,) = run_all([command(inputs, tmp_path / "run", "loop.stepps=3")])
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("gptoss-jax train: loop.stepps is no setting; expected one of loop.steps")
    assert not (tmp_path / "run").exists()
