"""Whole runs of a small model: interrupted and gone on with, bit for bit; refused where they are no longer the same."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptoss_jax.convert.adapters import load_adapter
from gptoss_jax.convert.source import Repacked, Source
from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import parameters
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.folder import RunFolder
from gptoss_jax.train.log import read_log
from gptoss_jax.train.run import Finished, Opened, open_run, train
from gptoss_jax.train.saves import Saves
from tests.train.runs import STEPS, TWO_LAYERS, configuration, write_inputs, write_lines
from tests.train.test_resume import told
from tests.train.toy import contents

PAIRS: dict = {}


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A program is compiled once and read by the other runs, as it is by commands."""
    before = (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    _keep(str(tmp_path_factory.mktemp("programs")), 0.2)
    yield
    _keep(*before)


def _keep(folder: str | None, seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config(inputs: Path) -> TrainConfig:
    return configuration(inputs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> tuple[Path, Finished]:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(folder, config)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, config: TrainConfig, whole: tuple[Path, Finished]):
    folder, expected = whole
    answers = iter([False, False, True])
    first = train(tmp_path / "run", config, should_stop=lambda: next(answers))
    assert (first.result.step, first.result.stopped, first.outcome) == (3, True, None)
    second = train(tmp_path / "run", config)
    assert contents(second.result.state) == contents(expected.result.state)
    assert told(tmp_path / "run") == told(folder)


def test_it_learns_and_says_so(whole: tuple[Path, Finished]):
    entries = list(read_log(whole[0]))
    losses = [entry["loss"] for entry in entries if entry["kind"] == "evaluation"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert [entry["epoch"] for entry in steps] == sorted(entry["epoch"] for entry in steps)
    assert len(steps[0]["busiest"]) == len(steps[0]["idle"]) == TWO_LAYERS.num_layers


def test_its_adapter_is_what_was_trained(whole: tuple[Path, Finished]):
    folder, finished = whole
    assert finished.outcome == folder / "adapter"
    adapter = load_adapter(folder / "adapter", TWO_LAYERS)
    assert adapter.spec.rank == 2
    assert adapter.leaves.keys() == finished.result.state.leaves.keys()
    for name, leaf in finished.result.state.leaves.items():
        np.testing.assert_array_equal(adapter.leaves[name], leaf)
        assert np.abs(leaf).max() > 0


def test_the_base_is_not_in_its_saves(whole: tuple[Path, Finished], inputs: Path):
    with Saves(whole[0] / "saves") as saves:
        newest = saves.folder / str(saves.newest())
    stored = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    masters = sum(leaf.nbytes for leaf in jax.tree.leaves(whole[1].result.state))
    assert stored < 1.1 * masters + 40_000
    assert stored < (inputs / "base/model.safetensors").stat().st_size


def test_the_configuration_lies_in_its_folder_complete(whole: tuple[Path, Finished], config: TrainConfig):
    folder = RunFolder(whole[0])
    assert folder.config() == config
    text = (whole[0] / "config.toml").read_text()
    assert re.search("^clip = 1.0$", text, re.MULTILINE)


# ---- what a run cannot go on with ------------------------------------------------------------------------------------


def test_a_changed_configuration_is_told(whole: tuple[Path, Finished], config: TrainConfig):
    changed = dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, rank=4),
        loop=dataclasses.replace(config.loop, seed=2, save_every=1),
    )
    message = "was begun with method.rank=2, not 4, loop.seed=1, not 2: repeat that to go on with it"
    with pytest.raises(UserError, match=re.escape(f"{whole[0]} {message}")):
        train(whole[0], changed)


def test_changed_data_are_told(tmp_path: Path, inputs: Path):
    data = tmp_path / "data.jsonl"
    write_lines(data, [{"prompt": "a", "completion": "b"}] * 40)
    config = configuration(inputs, data={"files": [str(data)], "evaluation": []})
    feed = open_run(config).feed
    position = next(feed.batches(feed.start())).position
    write_lines(data, [{"prompt": "a", "completion": "c"}] * 40)
    with pytest.raises(UserError, match=r"data\.files have changed since the run was saved: put back what they were"):
        next(open_run(config).feed.batches(position))


def test_a_changed_base_is_told(tmp_path: Path, config: TrainConfig):
    for _ in range(2):
        with RunFolder(tmp_path / "run").claimed(config):
            RunFolder(tmp_path / "run").check_base("ab" * 32)
    refused = pytest.raises(
        UserError, match=r"begun with a base of digest abababababab, the checkpoint has cdcdcdcdcdcd now"
    )
    with RunFolder(tmp_path / "run").claimed(config), refused:
        RunFolder(tmp_path / "run").check_base("cd" * 32)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, config: TrainConfig):
    refused = pytest.raises(UserError, match=r"another training run is at work in .*run; wait for it")
    with RunFolder(tmp_path / "run").claimed(config), refused, RunFolder(tmp_path / "run").claimed(config):
        pass
    with RunFolder(tmp_path / "run").claimed(config):  # it was given back
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, config: TrainConfig):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match=r"holds thesis\.tex but no config\.toml, so it is no run's folder"):
        train(tmp_path, config)
    assert (tmp_path / "thesis.tex").read_text() == "…"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dpo"}, 'data.files holds no preferences; with objective = "dpo" expected lines of chosen'),
        (PAIRS, 'data.files holds preferences, chosen and rejected; expected objective = "dpo"'),
        ({"method": {"kind": "full"}}, "the experts are packed in MXFP4, which full training cannot change"),
        ({"method": {"layers": [7]}}, "the adapter changes layer 7, the model has 2"),
        ({"model": {"checkpoint": "nowhere"}}, "nowhere is no folder; expected a converted checkpoint"),
        ({"optimizer": {"warmup": STEPS}}, f"optimizer.warmup is {STEPS} and the run has {STEPS} steps"),
        ({"mesh": {"data": 2, "expert": 2, "tensor": 64}}, "needs 256 devices, there are 8"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_step(
    tmp_path: Path, inputs: Path, changes: dict, message: str
):
    if changes is PAIRS:
        changes = {"data": {"files": [str(inputs / "pairs.jsonl")], "evaluation": [], "row_length": 256}}
    with pytest.raises(UserError, match=re.escape(message)):
        train(tmp_path / "run", configuration(inputs, **changes))


# ---- other ways to train ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_a_model_is_trained_and_exported_as_it_was_trained(tmp_path: Path, inputs: Path):
    """Experts computed as MXFP4: the folder that is left behind holds the very values that the last step gave."""
    full = {"kind": "full", "quantise": True, "frozen": ["embedding.*"]}
    changes = {"model": {"checkpoint": str(inputs / "plain"), "dtype": "bfloat16"}, "method": full}
    loop = {"steps": 2, "evaluate_every": 9}
    config = configuration(inputs, **changes, loop=loop, data={"evaluation": []})
    kept: list[Opened] = []
    finished = train(tmp_path / "run", config, on_opened=kept.append)
    assert finished.outcome == tmp_path / "run/model"
    left, base = Source.open(tmp_path / "run/model"), Source.open(inputs / "plain")
    assert (left.layout, left.experts) == ("hf", "mxfp4")
    unpacked, changed = Repacked(left, "bf16"), set()
    for name, value in parameters(kept[0].trainer.model(finished.result.state)).items():
        whole = tuple(slice(0, size) for size in value.shape)
        found, trained = unpacked.read(name, whole), np.asarray(value.get_value())
        np.testing.assert_array_equal(found.astype(np.float32), trained.astype(np.float32), err_msg=name)
        if (found.astype(np.float32) != base.read(name, whole).astype(np.float32)).any():
            changed.add(name)
    assert changed == set(unpacked._shapes) - {"embedding.weight"}


@pytest.mark.slow
def test_answers_are_asked_for_and_change_nothing(tmp_path: Path, config: TrainConfig, whole: tuple[Path, Finished]):
    asked = {"sample_every": 4, "sample_prompts": ("hi", "you"), "sample_tokens": 3}
    finished = train(tmp_path / "run", dataclasses.replace(config, loop=dataclasses.replace(config.loop, **asked)))
    samples = [(entry["step"], entry["prompt"]) for entry in read_log(tmp_path / "run") if entry["kind"] == "sample"]
    assert samples == [(4, "hi"), (4, "you"), (6, "hi"), (6, "you")]
    assert contents(finished.result.state) == contents(whole[1].result.state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_preferences_are_trained_from_where_it_began(tmp_path: Path, inputs: Path, kind: str):
    files = {"files": [str(inputs / "pairs.jsonl")], "evaluation": [str(inputs / "pairs.jsonl")], "row_length": 256}
    chosen = {"model": {"checkpoint": str(inputs / "plain"), "dtype": "float32"}, "method": {"kind": kind}}
    loop = {"steps": 6, "accumulate": 2}
    config = configuration(inputs, objective="dpo", data=files, loop=loop, optimizer={"learning_rate": 1e-3}, **chosen)
    stop = iter([False, True])
    train(tmp_path / "run", config, should_stop=lambda: next(stop))
    finished = train(tmp_path / "run", config)  # which measures from the beginning too
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if entry["kind"] == "step"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert finished.result.loss < np.log(2)


@pytest.mark.slow
def test_it_goes_on_on_eight_devices(tmp_path: Path, config: TrainConfig, whole: tuple[Path, Finished]):
    """In float32 the sums of another order differ in their last digits, which Adam carries on."""
    stop = iter([False, False, True])
    train(tmp_path / "run", config, should_stop=lambda: next(stop))
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    wide = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh, fully_sharded=True))
    finished = train(tmp_path / "run", wide)
    for name, leaf in whole[1].result.state.leaves.items():
        assert len(finished.result.state.leaves[name].sharding.device_set) == 8
        np.testing.assert_allclose(finished.result.state.leaves[name], leaf, atol=2e-3, err_msg=name)
    found = [entry["loss"] for entry in read_log(tmp_path / "run") if entry["kind"] == "step"]
    expected = [entry["loss"] for entry in read_log(whole[0]) if entry["kind"] == "step"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
