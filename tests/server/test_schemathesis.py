"""Requests made from the OpenAPI schema, right and wrong ones: none is answered by a 500 or by what is no JSON."""

import asyncio
import re
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine
from tests.server.client import client_of
from tests.server.conftest import MODEL, VOCAB_SIZE, bytes_of

ANSWER = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
OPERATIONS = [
    "GET /health",
    "GET /metrics",
    "GET /ready",
    "GET /tokenizer_info",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /detokenize",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "DELETE /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}/input_items",
    "POST /v1/responses",
    "POST /v1/responses/input_tokens",
    "POST /v1/responses/{response_id}/cancel",
]
# What httpx calls what schemathesis gives.
SENT = {"method": "method", "url": "url", "headers": "headers", "params": "params", "json": "json", "content": "data"}


@pytest.fixture(scope="module")
def application(tokenizer: Tokenizer) -> Iterator:
    pieces = [piece for piece in re.split(r"(<\|\w+\|>)", ANSWER) if piece]
    ids = [i for p in pieces for i in ([tokenizer.special(p)] if p.startswith("<|") else tokenizer.encode(p))]
    settings = ServerSettings(shutdown_s=0.5)
    sizes = {"vocab_size": VOCAB_SIZE, "max_context": 100_000}
    with ScriptedEngine(lambda _: ids, token_bytes=bytes_of(tokenizer), **sizes) as engine:
        yield create_app(engine, tokenizer=tokenizer, model_name=MODEL, settings=settings)
        assert engine.num_open == 0


@pytest.fixture(scope="module")
def runner(application) -> Iterator[asyncio.Runner]:
    """One loop for all requests: some leave work behind that goes on."""
    with asyncio.Runner() as runner:
        yield runner
        runner.run(application.state.service.close())


def test_every_operation_is_tried(application):
    schema = application.openapi()
    found = [f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("max_examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_no_request_is_answered_by_a_500(application, runner, operation, max_examples):
    method, path = operation.split()
    target = schemathesis.openapi.from_dict(application.openapi())[path][method]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    cases = st.one_of([target.as_strategy(generation_mode=mode) for mode in modes])

    async def ask(case):
        asked = case.as_transport_kwargs(base_url="http://localhost")
        asked = {key: asked.get(name) for key, name in SENT.items()}
        async with client_of(application) as client, asyncio.timeout(20):
            return await client.request(**asked)

    @hypothesis.settings(max_examples=max_examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases)
    def try_it(case):
        response = runner.run(ask(case))
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    try_it()
