"""Routes about the server itself."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.client import ask


def test_the_model_is_told(app, scripted):
    application = app(scripted([]))
    listed = ask(application, "GET", "/v1/models").json()
    (model,) = listed["data"]
    assert (listed["object"], model["object"], model["id"], model["max_model_len"]) == (
        "list",
        "model",
        "scripted",
        500,
    )
    assert ask(application, "GET", "/v1/models/scripted").json() == model


@pytest.mark.parametrize("text", ["hello", "", "é·\n", "<|end|>"])
def test_a_text_comes_back_from_its_ids(app, scripted, tokenizer, text):
    application = app(scripted([]))
    told = ask(application, "POST", "/tokenize", json={"prompt": text, "add_special_tokens": True}).json()
    assert told == {"tokens": tokenizer.encode(text), "count": len(text.encode()), "max_model_len": 500}
    assert ask(application, "POST", "/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}


def test_special_ids_come_back_by_their_names(app, scripted, tokenizer):
    ids = [tokenizer.special("<|start|>"), 97]
    assert ask(app(scripted([])), "POST", "/detokenize", json={"tokens": ids}).json() == {"prompt": "<|start|>a"}


@pytest.mark.parametrize("token", [-1, 352, 2**70])
def test_ids_that_there_are_not_are_refused(app, scripted, token):
    assert ask(app(scripted([])), "POST", "/detokenize", json={"tokens": [token]}).status_code in (400, 422)


def test_the_tokenizer_is_told_to_harnesses(app, scripted):
    told = ask(app(scripted([])), "GET", "/tokenizer_info").json()
    assert (told["vocab_size"], told["model_max_length"], told["eos_token"]) == (352, 500, None)


def test_probes_may_ask_without_a_body(app, scripted):
    for path in ("/", "/health", "/ready"):
        response = ask(app(scripted([])), "HEAD", path)
        assert (response.status_code, response.content) == (200, b"")


def samples_of(application) -> dict[tuple, float]:
    """By name and labels, as Prometheus' own parser reads them."""
    response = ask(application, "GET", "/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_tokens(app, scripted):
    engine = scripted(["abcd", "ef"])
    application = app(engine)
    for prompt in ("hello", "help!"):
        ask(application, "POST", "/v1/completions", json={"prompt": prompt})
    ask(application, "POST", "/v1/completions", json={})
    ask(application, "GET", "/v1/models/other")
    ask(application, "GET", "/some/secret")
    application.state.service.metrics.fault("no header")
    found = samples_of(application)
    for name, value in {
        ("gptoss_http_requests_total", "POST", "/v1/completions", "200"): 2,
        ("gptoss_http_requests_total", "POST", "/v1/completions", "422"): 1,
        ("gptoss_http_requests_total", "GET", "/v1/models/{model:path}", "404"): 1,
        ("gptoss_http_requests_total", "other", "other", "404"): 1,
        ("gptoss_http_open_requests",): 1,
        ("gptoss_prompt_tokens_total",): 10,
        ("gptoss_cached_prompt_tokens_total",): 3,
        ("gptoss_generated_tokens_total",): 6,
        ("gptoss_first_token_seconds_count",): 2,
        ("gptoss_between_tokens_seconds_count",): 4,
        ("gptoss_harmony_faults_total", "no header"): 1,
        ("gptoss_engine_running",): 0,
        ("gptoss_engine_waiting",): 0,
        ("gptoss_engine_failed_steps_total",): 0,
    }.items():
        assert found[name] == value, name


def test_metrics_tell_nothing_of_any_text(app, scripted):
    application = app(scripted(["the answer"]))
    ask(application, "POST", "/v1/completions", json={"prompt": "the prompt", "user": "somebody"})
    ask(application, "GET", "/the/path")
    text = ask(application, "GET", "/metrics").text
    for secret in ("the answer", "the prompt", "somebody", "/the/path"):
        assert secret not in text


def test_two_servers_in_one_process_count_for_themselves(app, scripted):
    first, second = app(scripted([])), app(scripted([]))
    ask(first, "GET", "/health")
    key = ("gptoss_http_requests_total", "GET", "/health", "200")
    assert samples_of(first)[key] == 1
    assert key not in samples_of(second)


def test_the_documentation_loads_nothing_from_elsewhere(app, scripted):
    application = app(scripted([]))
    page = ask(application, "GET", "/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_documentation_names_every_route_and_every_parameter(app, scripted):
    application = app(scripted([]))
    schema, text = ask(application, "GET", "/openapi.json").json(), ask(application, "GET", "/docs").text
    for path, operations in schema["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in text
    for name in schema["components"]["schemas"]["CompletionBody"]["properties"]:
        assert f"<code>{name}</code>" in text
