"""Several adapters in one server: the name of a model says which of them answers."""

import asyncio

import openai
import pytest
from fastapi import FastAPI

from gptoss_jax.engine.request import Request
from gptoss_jax.errors import UserError
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from tests.server.client import ask, client_of, events_of
from tests.server.test_system import samples_of

ADAPTERS = ("math", "team/poems:v2")
ANSWERS = {None: "the base", "math": "it is 4", "team/poems:v2": "roses"}
MODELS = {"base": None} | {name: name for name in ADAPTERS}


@pytest.fixture
def engine(scripted, tokenizer):
    """Each adapter says something else."""
    end = tokenizer.special("<|return|>")

    def script(request: Request) -> list[int]:
        said = tokenizer.encode(ANSWERS[request.adapter])
        if tokenizer.special("<|start|>") not in request.prompt:
            return said
        return [
            tokenizer.special("<|channel|>"),
            *tokenizer.encode("final"),
            tokenizer.special("<|message|>"),
            *said,
            end,
        ]

    return scripted(script)


@pytest.fixture
def application(engine, tokenizer) -> FastAPI:
    settings = ServerSettings()
    return create_app(engine, tokenizer=tokenizer, model_name="base", settings=settings, adapters=ADAPTERS)


def complete(application: FastAPI, model: str | None):
    return ask(application, "POST", "/v1/completions", json={"prompt": "2 + 2", "model": model})


def talk(application: FastAPI, model: str | None, **more):
    body = {"model": model, "messages": [{"role": "user", "content": "2 + 2"}]} | more
    return ask(application, "POST", "/v1/chat/completions", json=body)


def respond(application: FastAPI, model: str | None, **more):
    return ask(application, "POST", "/v1/responses", json={"model": model, "input": "2 + 2"} | more)


def test_all_models_are_listed(application: FastAPI):
    listed = ask(application, "GET", "/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in listed] == [
        ("base", "base", None),
        ("math", "base", "base"),
        ("team/poems:v2", "base", "base"),
    ]
    for model in listed:
        assert ask(application, "GET", f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("model", MODELS)
def test_the_name_of_a_model_chooses_who_answers(application: FastAPI, engine, model: str):
    answer = ANSWERS[MODELS[model]]
    completion = complete(application, model).json()
    assert (completion["model"], completion["choices"][0]["text"]) == (model, answer)
    chat = talk(application, model, n=2).json()
    assert (chat["model"], [each["message"]["content"] for each in chat["choices"]]) == (model, [answer] * 2)
    response = respond(application, model).json()
    assert (response["model"], response["output"][-1]["content"][0]["text"]) == (model, answer)
    assert {request.adapter for request in engine.requests} == {MODELS[model]}


@pytest.mark.parametrize("model", MODELS)
def test_streams_name_the_model_that_was_asked(application: FastAPI, model: str):
    *chunks, done = events_of(talk(application, model, stream=True))
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {model}
    said = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert said == ANSWERS[MODELS[model]]
    events = events_of(respond(application, model, stream=True))
    assert {event["response"]["model"] for event in events if "response" in event} == {model}


def test_no_name_means_the_base(application: FastAPI, engine):
    for answer in (complete(application, None), talk(application, None), respond(application, None)):
        assert answer.json()["model"] == "base"
    assert [request.adapter for request in engine.requests] == [None] * 3


def test_a_conversation_may_go_on_with_another_adapter(application: FastAPI, engine):
    first = respond(application, "math").json()
    second = respond(application, "team/poems:v2", previous_response_id=first["id"]).json()
    assert second["output"][-1]["content"][0]["text"] == "roses"
    assert [request.adapter for request in engine.requests] == ["math", "team/poems:v2"]


@pytest.mark.parametrize("send", [complete, talk, respond])
def test_an_unknown_model_is_told_those_that_there_are(application: FastAPI, engine, send):
    answer = send(application, "poems")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == "there is no model 'poems'; this server has 'base', 'math', 'team/poems:v2'"
    assert engine.requests == []
    assert ask(application, "GET", "/v1/models/poems").status_code == 404


def test_openais_client_asks_an_adapter(application: FastAPI):
    async def run() -> tuple[list[str], str | None]:
        async with client_of(application) as http:
            client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
            models = [model.id async for model in client.models.list()]
            answer = await client.chat.completions.create(model="math", messages=[{"role": "user", "content": "2 + 2"}])
            return models, answer.choices[0].message.content

    assert asyncio.run(run()) == (["base", *ADAPTERS], "it is 4")


def test_requests_are_counted_by_model(application: FastAPI):
    for model in ("math", "math", "base", "no such"):
        complete(application, model)
    found = samples_of(application)
    counted = {name[1]: number for name, number in found.items() if name[0] == "gptoss_model_requests_total"}
    assert counted == {"math": 2, "base": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("base",), "an adapter is named 'base' as the model is"),
        (("math", "math"), "an adapter is named 'math' as another one is"),
        (("",), "an adapter is named ''; expected a letter or digit"),
        (("two words",), "an adapter is named 'two words'"),
        ((".hidden",), "an adapter is named '.hidden'"),
        (("ü",), "an adapter is named 'ü'"),
        (("a" * 201,), "at most 200 characters"),
    ],
)
def test_names_that_clients_could_not_use_are_refused(tokenizer, names: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        create_app(None, tokenizer=tokenizer, model_name="base", settings=ServerSettings(), adapters=names)
