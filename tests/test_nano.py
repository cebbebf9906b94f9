"""The model in this package: what it knows, that every way of running it says the same, and that commands have it."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from jax.sharding import Mesh

import gptoss_jax
from examples.nano.calls import call_lesson
from examples.nano.extraction import extraction_lesson
from examples.nano.lessons import Lesson, Setting, prompt
from examples.nano.score import Asked, ask_all, opened, problems
from examples.nano.sums import sum_lesson
from gptoss_jax import nano
from gptoss_jax.checkpoint import sizes
from gptoss_jax.cli import main
from gptoss_jax.configs import model_config
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.harmony.messages import Message
from gptoss_jax.harmony.parse import parse
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.sharding import make_mesh
from tests.server.client import ask

Problems = list[tuple[Lesson, Setting]]

SUMS, CALLS, EXTRACTIONS = 500, 100, 100


@pytest.fixture(scope="module")
def wanted() -> Problems:
    """What no training saw: sums first, then calls, then JSON."""
    return problems({sum_lesson: SUMS, call_lesson: CALLS, extraction_lesson: EXTRACTIONS})


@pytest.fixture(scope="module")
def asked(wanted: Problems) -> list[Asked]:
    """All of it, of the engine on one device."""
    return answers(gptoss_jax.load("nano"), wanted)


def answers(model: GptOss, wanted: Problems) -> list[Asked]:
    with opened(model, load_tokenizer("nano")) as chat:
        return asyncio.run(ask_all(chat, wanted))


def some_of_each(found: Sequence, number: int) -> list:
    starts = (0, SUMS, SUMS + CALLS)
    return [one for start in starts for one in found[start : start + number]]


def test_it_is_small_and_as_released():
    folder = nano.find("nano")
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 6_000_000
    assert sizes("nano") == (model_config("nano"), "mxfp4")
    assert load_tokenizer("nano").vocab_size == model_config("nano").vocab_size
    assert "made-up" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_answers_what_it_never_saw(asked: list[Asked]):
    right = [one.is_right for one in asked]
    assert sum(right[:SUMS]) >= 0.95 * SUMS
    assert sum(right[SUMS:]) >= 0.95 * (CALLS + EXTRACTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("impl", "mesh", "number"),
    [("xla", None, 100), (None, make_mesh(data=1, expert=4, tensor=2), 10)],
    ids=["xla", "eight devices"],
)
def test_every_engine_says_the_same(
    wanted: Problems, asked: list[Asked], impl: str | None, mesh: Mesh | None, number: int
):
    found = answers(gptoss_jax.load("nano", impl=impl, mesh=mesh), some_of_each(wanted, number))
    assert [one.said for one in found] == [one.said for one in some_of_each(asked, number)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("impl", "mesh", "number"),
    [
        (None, None, 20),
        ("xla", None, 20),
        (None, make_mesh(data=1, expert=8), 5),
        ("gpu-interpret", None, 1),
        ("tpu-interpret", None, 1),
    ],
    ids=["one device", "xla", "eight devices", "gpu-interpret", "tpu-interpret"],
)
def test_the_readable_loop_says_what_the_engine_says(
    wanted: Problems, asked: list[Asked], impl: str | None, mesh: Mesh | None, number: int
):
    model = gptoss_jax.load("nano", impl=impl, mesh=mesh)
    for (lesson, setting), one in zip(some_of_each(wanted, number), some_of_each(asked, number), strict=True):
        found = first_words(model, lesson, setting)
        assert found == one.said[: len(found)]


def first_words(model: GptOss, lesson: Lesson, setting: Setting) -> tuple[Message, ...]:
    """The answer, or as far as to a call."""
    tokenizer = load_tokenizer("nano")
    ids = generate(
        model,
        render_prompt(prompt(lesson, setting), tokenizer),
        max_new_tokens=400,
        sampling=SamplingParams(temperature=0),
        stop_ids=tokenizer.end_ids,
    )
    return tuple(parse(ids, tokenizer))


# ---- where it is the default -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_has_it(capsys: pytest.CaptureFixture[str]):
    question = ("--prompt", "What is 347 + 285?", "--temperature", "0")
    assert main(["chat", *question, "--max-context", "512", "--cache-tokens", "512"]) == 0
    assert capsys.readouterr().out.strip() == "347 + 285 = 632"


def test_the_demo_talks_with_it(capsys: pytest.CaptureFixture[str]):
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "final: 347 + 285 = 632" in out
    assert 'final: {"name":"Lena Kim","age":36,"city":"Paris"}' in out
    assert 'commentary to functions.get_weather: {"city":"Lima"}' in out


@pytest.mark.slow
def test_clients_of_a_server_get_sums_calls_and_json():
    tokenizer = load_tokenizer("nano")
    weather = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    person = {"name": {"type": "string"}, "age": {"type": "integer"}}
    schema = {"type": "object", "properties": person, "required": ["name", "age"], "additionalProperties": False}
    settings = EngineSettings(max_rows=2, max_context=1024)
    with gptoss_jax.Engine(gptoss_jax.load("nano"), settings=settings) as engine:
        app = create_app(engine, tokenizer=tokenizer, model_name="nano", settings=ServerSettings())

        def message(text: str, **body: object) -> dict[str, object]:
            body |= {"model": "nano", "messages": [{"role": "user", "content": text}], "temperature": 0}
            answer = ask(app, "POST", "/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]

        assert message("What is 58 + 67?")["content"] == "58 + 67 = 125"
        function = {"name": "get_weather", "description": "Gets the weather of a city.", "parameters": weather}
        called = message("What is the weather in Lima?", tools=[{"type": "function", "function": function}])
        (call,) = called["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "get_weather",
            {"city": "Lima"},
        )
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
        found = message("Lena Kim is 36 years old and lives in Paris.", response_format=form)
        assert json.loads(found["content"]) == {"name": "Lena Kim", "age": 36}
