"""`--adapter` of every command: what comes out is what the model with that adapter says, put together by hand."""

import dataclasses
import json
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import checkpoint
from gptoss_jax.cli import adapters, main
from gptoss_jax.convert.adapters import base_digest, save_adapter
from gptoss_jax.convert.export import open_base
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.score import Text, score
from gptoss_jax.errors import UserError
from gptoss_jax.model.adapter import AdapterSpec, with_adapters
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from tests.cli.test_serve import SMALL, serving
from tests.engine.random_adapter import random_adapter
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
ATTENTION = AdapterSpec(rank=3, alpha=6, targets=("q", "k", "v", "o"))
EXPERTS = AdapterSpec(rank=5, alpha=10, targets=("gate_up", "down"))
IDS = [5, 6, 7, 300, 9]
GREEDY = SamplingParams(temperature=0)
ENGINE = (*SMALL, "--prefill-tokens", "32", "--batch-invariant", "--impl", "xla")  # two programs to compile, no more


@pytest.fixture(autouse=True)
def _jax_has_started():
    """So that no command here changes how many devices the other tests have."""
    assert len(jax.devices()) == 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, two adapters of it, and one of a base with other weights."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in (("base", 0), ("other", 1)):
        write_checkpoint(folder / name, CONFIG, seed=seed, layout="hf", experts="mxfp4")
    for name, base, spec in (("calm", "base", ATTENTION), ("wild", "base", EXPERTS), ("lost", "other", ATTENTION)):
        adapter = random_adapter(CONFIG, spec, seed=1)
        digest = base_digest(open_base(folder / base))
        save_adapter(folder / name, adapter, config=CONFIG, base_digest=digest)
    return folder


@pytest.fixture(scope="module")
def calm(folder: Path) -> GptOss:
    """The base with the adapter of attention, as this file made it."""
    base = checkpoint.load(folder / "base", dtype=jnp.float32)
    return with_adapters(base, [random_adapter(CONFIG, ATTENTION, seed=1)])


def test_generate_with_an_adapter(folder: Path, calm: GptOss, capsys: pytest.CaptureFixture[str]):
    words = ["generate", folder / "base", "--tokens", ",".join(map(str, IDS)), "--max-new-tokens", 8, "--json"]
    settings = ["--temperature", 0, "--dtype", "float32", "--adapter", folder / "calm"]
    assert main([*map(str, (*words, *settings))]) == 0
    expected = list(generate(calm, IDS, max_new_tokens=8, sampling=GREEDY))
    assert json.loads(capsys.readouterr().out)["ids"] == expected


def test_eval_with_an_adapter(folder: Path, calm: GptOss, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines, out = tmp_path / "lines.jsonl", tmp_path / "out.jsonl"
    lines.write_text(json.dumps({"tokens": IDS}) + "\n")
    words = ["eval", folder / "base", lines, "--lines-out", out, "--json", "--dtype", "float32"]
    assert main([*map(str, (*words, "--adapter", folder / "calm"))]) == 0
    (expected,) = score(calm, [Text(tokens=IDS)])
    np.testing.assert_allclose(json.loads(out.read_text())["logprobs"], expected.logprobs, atol=1e-6)
    assert json.loads(capsys.readouterr().out)["adapter"] == str(folder / "calm")


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail, and gives its complaint."""

    def run(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_an_adapter_of_another_base_is_refused_before_weights_are_read(folder: Path, complain):
    complaint = complain("generate", folder / "base", "--tokens", "1", "--adapter", folder / "lost")
    assert "base" in complaint
    assert str(folder / "lost") in complaint


@pytest.mark.parametrize("command", [("generate", "--tokens", "1"), ("chat", "--prompt", "Hi"), ("serve",)])
def test_a_folder_without_an_adapter_is_named(folder: Path, complain, command: tuple[str, ...]):
    name, *more = command
    assert f"{folder / 'base'} " in complain(name, folder / "base", *more, "--adapter", folder / "base") + " "


def test_names_of_adapters_that_clash_are_refused_before_anything_is_loaded(folder: Path, complain):
    words = ("serve", folder / "base", "--port", 0)
    assert "named 'base' as the model is" in complain(*words, "--adapter", f"base={folder / 'calm'}")
    twice = ("--adapter", folder / "calm", "--adapter", f"calm={folder / 'wild'}")
    assert "named 'calm' as another one is" in complain(*words, *twice)


def test_a_name_may_stand_before_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    strange = folder / "a=b"
    if not strange.exists():
        strange.symlink_to(folder / "calm")
    monkeypatch.chdir(folder)
    found = adapters.named(["poems=calm", f"team/poems:v2={folder / 'wild'}", "wild", str(strange), "calm/../wild/"])
    assert [folder.name for folder in found] == ["poems", "team/poems:v2", "wild", "calm", "wild"]
    assert [folder.path.resolve().name for folder in found] == ["calm", "wild", "wild", "calm", "wild"]
    with pytest.raises(UserError, match=r"--adapter is 'x=nothing', and in nothing is no adapter"):
        adapters.named(["x=nothing"])


@pytest.mark.slow
def test_a_server_with_two_adapters(folder: Path):
    """Each model scores a prompt as the one does that was put together by hand."""
    words = ("--adapter", f"poems={folder / 'calm'}", "--adapter", folder / "wild")
    base = checkpoint.load(folder / "base", dtype=jnp.float32)
    models = {"base": base}
    for name, spec in (("poems", ATTENTION), ("wild", EXPERTS)):
        models[name] = with_adapters(base, [random_adapter(CONFIG, spec, seed=1)])
    with serving(folder / "base", *ENGINE, "--port", 0, *words) as server:
        address = server.wait_for(r"(http://127\.0\.0\.1:\d+):")[1]
        server.wait_for(r"ready after .* s: base, with poems or wild, 256 tokens of context", seconds=300)
        with httpx.Client(base_url=address, timeout=60) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [*models]
            for name, model in models.items():
                body = {"model": name, "prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 0}
                answer = client.post("/v1/completions", json=body).json()
                _, *told = answer["choices"][0]["logprobs"]["token_logprobs"]
                (expected,) = score(model, [Text(tokens=IDS)])
                # float32 logits of a few units, computed in another order
                np.testing.assert_allclose(told, expected.logprobs, atol=1e-4)


@pytest.mark.slow
def test_chat_with_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ("chat", folder / "base", "--prompt", "Hi", "--max-new-tokens", 12, "--temperature", 0, *ENGINE)
    said = []
    for more in ((), ("--adapter", folder / "calm")):
        assert main([*map(str, (*words, *more))]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
