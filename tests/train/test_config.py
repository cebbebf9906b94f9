"""A configuration comes back from its file as it was, and whatever it cannot mean is refused by name."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.train import toml
from gptoss_jax.train.config import (
    CHANGEABLE,
    DataSettings,
    LoopSettings,
    MeshSettings,
    MethodSettings,
    ModelSettings,
    OptimizerSettings,
    TrainConfig,
    changes,
    read_config,
)

LEAST = """
[model]
checkpoint = "base"
[data]
files = ["a.jsonl"]
[loop]
steps = 10
"""


def config(**sections) -> TrainConfig:
    defaults = {
        "model": ModelSettings(checkpoint="base"),
        "data": DataSettings(files=("a.jsonl",)),
        "loop": LoopSettings(steps=10),
    }
    return TrainConfig(**defaults | sections)


def written(folder: Path, text: str = LEAST) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
configs = st.builds(
    TrainConfig,
    model=st.builds(ModelSettings, checkpoint=texts, scratch=st.none(), impl=st.none() | texts),
    method=st.builds(
        MethodSettings,
        rank=st.integers(1, 1 << 40),
        alpha=st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
        layers=st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple),
    ),
    data=st.builds(DataSettings, files=st.lists(texts, min_size=1).map(tuple), date=st.just("2025-08-05")),
    optimizer=st.builds(OptimizerSettings, learning_rate=st.floats(1e-300, 1e300), name=st.sampled_from(["lion"])),
    loop=st.builds(LoopSettings, steps=st.integers(1), epochs=st.none(), rows=st.just(8), sample_every=st.just(0)),
    mesh=st.builds(MeshSettings, data=st.sampled_from([1, 2, 4, 8])),
)


@given(configs)
def test_what_is_written_is_read_back(settings: TrainConfig):
    text = toml.write(settings)
    assert toml.build(TrainConfig, tomllib.loads(text)) == settings
    assert changes(settings, settings) == {}


def test_a_file_needs_to_say_little(tmp_path: Path):
    assert read_config(written(tmp_path)) == config()


def test_overrides_are_toml_and_bare_words(tmp_path: Path):
    overrides = [
        "loop.steps=20", "optimizer.learning_rate=1", "model.dtype=float32", "method.targets=['q', \"v\"]",
        "mesh.fully_sharded=true", "data.date=2025-08-05", "data.loss.final=0.5", "objective=dpo",
        "model.checkpoint=7b", "data.files=b.jsonl", "data.evaluation=2025", "method.layers=3",
    ]  # fmt: skip
    found = toml.flat(read_config(written(tmp_path), overrides))
    expected = {
        "loop.steps": 20, "optimizer.learning_rate": 1.0, "model.dtype": "float32", "method.targets": ("q", "v"),
        "mesh.fully_sharded": True, "data.date": "2025-08-05", "data.loss.final": 0.5, "objective": "dpo",
        "model.checkpoint": "7b", "data.files": ("b.jsonl",), "data.evaluation": ("2025",), "method.layers": (3,),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert type(found["optimizer.learning_rate"]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loop]\nstep = 3", "loop.step is no setting; expected one of loop.steps"),
        ("[loops]\nsteps = 3", "loops is no setting; expected one of loop"),
        ("[loop]\nsteps = 0", "loop.steps is 0; expected an integer, at least 1"),
        ("[loop]\nsteps = '3'", "loop.steps is '3'; expected an integer"),
        ("[loop]\nsteps = true", "loop.steps is True; expected an integer"),
        ("[loop]\nsteps = 3\nepochs = 1", "loop.steps is 3 and loop.epochs is 1; expected one of them"),
        ("[loop]\nsteps = 3\nsample_every = 2", "loop.sample_every is 2 and loop.sample_prompts is empty"),
        ("loop = 3", "loop is 3; expected a table, [loop]"),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate is inf; expected a number, more than 0"),
        ("[optimizer]\nfinal = 1.5", "optimizer.final is 1.5; expected a number, at least 0 and at most 1"),
        ("[optimizer]\nname = 'adam'", "optimizer.name is 'adam'; expected one of \"adamw\""),
        ("[method]\ntargets = ['w']", "method.targets is 'w'; expected one of \"q\""),
        ("[method]\ntargets = ['q', 'q']", "method.targets is ['q', 'q']; expected at least one, and each once"),
        ("[method]\nlayers = []", "method.layers is []; expected at least one"),
        ("[data]\nfiles = 'a.jsonl'", "data.files is 'a.jsonl'; expected a list, each a string"),
        ("[data]\nfiles = []", "data.files is []; expected at least one file"),
        ("[data]\nfiles = ['a']\ndate = 'today'", "data.date is 'today'; expected YYYY-MM-DD"),
        ("[data.loss]\nfinals = 1", "data.loss.finals is no setting; expected one of data.loss.final"),
        ("[model]\n", "model.checkpoint is None and model.scratch is None; expected one of them"),
        ("steps = [3", "expected TOML, but "),
    ],
)
def test_what_a_file_cannot_mean_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_config(written(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path}/run.toml: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.steps", "the override 'loop.steps' has no value; expected key=value"),
        ("loop.stpes=3", "loop.stpes is no setting; expected one of loop.steps"),
        ("loop=3", "loop is no setting"),
        ("loop.steps=many", "loop.steps is 'many'; expected an integer"),
        ("method.layers=first", "method.layers is 'first'; expected an integer, at least 0"),
    ],
)
def test_what_an_override_cannot_mean_is_refused(tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(written(tmp_path), [override])


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.toml: cannot be read: No such file"):
        read_config(tmp_path / "none.toml")


def test_a_missing_table_is_named():
    with pytest.raises(UserError, match=r"^loop is missing; expected a table"):
        toml.build(TrainConfig, {"model": {"checkpoint": "base"}, "data": {"files": ["a"]}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": MeshSettings(data=3)}, "loop.rows is 8, which mesh.data=3 does not divide"),
        ({"objective": "dpo", "mesh": MeshSettings(data=8)}, "expected a multiple of 16"),
        ({"model": ModelSettings(scratch="tiny")}, "random weights, which method.kind 'lora' would leave"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        config(**sections)


def test_ranges_hold_for_settings_made_in_python_too():
    with pytest.raises(UserError, match=r"method\.rank is 0; expected an integer, at least 1"):
        MethodSettings(rank=0)


def test_a_change_is_told_by_key_unless_a_run_may_go_on_with_it():
    before = config(method=MethodSettings(rank=4))
    now = config(loop=LoopSettings(steps=99, seed=1, save_every=7), optimizer=OptimizerSettings(clip=2.0))
    assert dict(changes(before, now)) == {"method.rank": (4, 16), "optimizer.clip": (1.0, 2.0), "loop.seed": (0, 1)}


def test_what_may_change_is_a_setting():
    assert toml.flat(config()).keys() >= CHANGEABLE


def test_every_setting_is_explained():
    """Each is named at the beginning of a line of its section's docstring."""
    for field in dataclasses.fields(TrainConfig):
        section = getattr(config(), field.name)
        for key in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            assert re.search(rf"^ +{key.name}: ", type(section).__doc__, re.MULTILINE) or key.name == "loss", key.name
