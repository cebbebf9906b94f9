"""What every request goes through: errors, keys, limits, going away, shutting down."""

import asyncio
import logging

import fastapi
import httpx
import pytest

from gptoss_jax.engine.request import Request
from gptoss_jax.errors import UserError
from gptoss_jax.server.page import policy
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.server.sse import stream_events
from tests.server.client import Wire, ask, client_of, events_of

COMPLETIONS = "/v1/completions"
HELLO = {"prompt": "hello", "max_tokens": 400}


def error_of(response: httpx.Response) -> dict:
    """The error of a response, which has OpenAI's form and nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


# Errors


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "code", "message"),
    [
        ("GET", "/nope", {}, 404, "not_found", "there is no GET /nope"),
        ("GET", "/v1/models/other", {}, 404, "model_not_found", "this server has 'scripted'"),
        ("POST", COMPLETIONS, {"json": HELLO | {"model": "other"}}, 404, "model_not_found", "no model 'other'"),
        ("POST", "/health", {}, 405, "method_not_allowed", "POST /health: expected GET"),
        ("POST", COMPLETIONS, {"json": {}}, 422, "invalid_value", "prompt: Field required"),
        ("POST", COMPLETIONS, {"json": HELLO | {"n": "many"}}, 422, "invalid_value", "n: Input should be a valid int"),
        ("POST", COMPLETIONS, {"json": ["x"]}, 422, "invalid_body", "expected a JSON object"),
        ("POST", COMPLETIONS, {"content": b'{"prompt": "x"}'}, 422, "invalid_body", "Content-Type: application/json"),
        ("POST", COMPLETIONS, {"json": None}, 422, "invalid_body", "expected a JSON object"),
        (
            "POST",
            COMPLETIONS,
            {"content": b'{"prompt": ', "headers": {"Content-Type": "application/json"}},
            400,
            "invalid_json",
            "the body is no JSON",
        ),
        (
            "POST",
            COMPLETIONS,
            {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
            400,
            "bad_request",
            "parsing the body",
        ),
        ("POST", COMPLETIONS, {"json": HELLO | {"temperature": -1}}, 400, None, "temperature is -1.0; expected 0"),
        ("POST", COMPLETIONS, {"json": HELLO | {"max_tokens": 900}}, 400, "context_length_exceeded", "context of 500"),
    ],
)
def test_every_error_has_openai_s_form(app, scripted, method, path, sent, status, code, message):
    response = ask(app(scripted(["hi"])), method, path, **sent)
    assert response.status_code == status
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert message in error["message"]


def test_a_mistake_of_our_own_tells_nothing(app):
    class Broken:
        vocab_size, max_context = 352, 500

        def submit(self, request: Request):
            raise RuntimeError("the secret of the house")

        def stats(self):
            raise NotImplementedError

        def close(self):
            raise NotImplementedError

    response = ask(app(Broken()), "POST", COMPLETIONS, json=HELLO)
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


def test_a_full_queue_says_when_to_come_again(app, scripted):
    response = ask(app(scripted([], max_open=0), retry_after_s=7), "POST", COMPLETIONS, json=HELLO | {"stream": True})
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert error_of(response)["code"] == "queue_full"


def test_until_the_engine_is_there_it_is_a_503(app, scripted):
    application = app(None)
    for method, path, sent in (("GET", "/ready", {}), ("POST", COMPLETIONS, {"json": HELLO})):
        response = ask(application, method, path, **sent)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert error_of(response)["code"] == "model_loading"
    assert ask(application, "GET", "/health").status_code == 200
    assert ask(application, "GET", "/v1/models").json()["data"][0]["max_model_len"] is None
    application.state.service.open(scripted(["hi"]))
    assert ask(application, "GET", "/ready").json() == {"status": "ready", "model": "scripted"}
    assert ask(application, "POST", COMPLETIONS, json=HELLO).json()["choices"][0]["text"] == "hi"


# How long a body may be


def test_a_body_that_says_that_it_is_too_long_is_not_read(app, scripted):
    response = ask(app(scripted([]), max_body_bytes=100), "POST", COMPLETIONS, json={"prompt": "x" * 100})
    assert (response.status_code, response.headers["Connection"]) == (413, "close")
    assert "more than 100 bytes" in error_of(response)["message"]


def test_a_body_without_a_length_is_read_up_to_the_limit(app, scripted):
    num_sent = 0

    async def pieces():
        nonlocal num_sent
        while num_sent < 1000:
            num_sent += 1
            yield b" " * 10

    headers = {"Content-Type": "application/json"}
    response = ask(app(scripted([]), max_body_bytes=100), "POST", COMPLETIONS, content=pieces(), headers=headers)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert num_sent == 11


def test_a_body_of_just_the_limit_is_taken(app, scripted):
    body = b'{"prompt": "hello"}'
    headers = {"Content-Type": "application/json"}
    application = app(scripted(["hi"]), max_body_bytes=len(body))
    assert ask(application, "POST", COMPLETIONS, content=body, headers=headers).status_code == 200


# Who may ask


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer first-key-and-more", 401),
        ("Bearer ", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("Bearer kéy".encode("latin-1"), 401),
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
    ],
)
def test_with_keys_one_of_them_is_needed(app, scripted, authorization, status):
    application = app(scripted(["hi"]), api_keys=("first-key", "second-key"))
    headers = {} if authorization is None else {"Authorization": authorization}
    response = ask(application, "POST", COMPLETIONS, json=HELLO, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_is_asked_for_before_the_body_is_looked_at(app, scripted):
    response = ask(app(scripted([]), api_keys=("key",)), "POST", COMPLETIONS, content=b"nonsense")
    assert response.status_code == 401


def test_what_tells_nothing_of_anybody_is_open(app, scripted):
    application = app(scripted([]), api_keys=("key",))
    opened = {path for path in _paths(application) if ask(application, "GET", path).status_code != 401}
    assert opened == {"/", "/docs", "/health", "/openapi.json", "/ready"}


def _paths(application) -> set[str]:
    return {"/", "/docs", "/openapi.json", *application.openapi()["paths"], "/anything"}


def test_neither_keys_nor_prompts_are_logged(app, scripted, caplog):
    caplog.set_level(logging.DEBUG)
    application = app(scripted(["the answer"]), api_keys=("the-key",))
    for key in ("the-key", "the-key-no"):
        headers = {"Authorization": f"Bearer {key}"}
        ask(application, "POST", COMPLETIONS, json={"prompt": "the prompt", "user": "me"}, headers=headers)
    assert "the-key" not in caplog.text
    assert "the prompt" not in caplog.text
    assert "the answer" not in caplog.text


@pytest.mark.parametrize(
    "keys", [("",), ("two words",), ("ключ",), ("line\nbreak",)], ids=["empty", "blank", "not ASCII", "break"]
)
def test_keys_that_no_header_can_have_are_refused(keys):
    with pytest.raises(UserError, match="API key"):
        ServerSettings(api_keys=keys)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("localhost", 200), ("[::1]:8000", 200), ("evil.example", 403), ("localhost.evil", 403)],
)
def test_a_name_that_is_not_this_server_s_is_refused(app, scripted, host, status):
    application = app(scripted([]), trusted_hosts=("localhost", "[::1]"))
    assert ask(application, "GET", "/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost", 200),
        ("https://allowed.example", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost:99", 403),
    ],
)
def test_without_a_key_another_site_s_page_may_not_ask(app, scripted, origin, status):
    application = app(scripted(["hi"]), cors_origins=("https://allowed.example",))
    headers = {} if origin is None else {"Origin": origin}
    assert ask(application, "POST", COMPLETIONS, json=HELLO, headers=headers).status_code == status


def test_other_sites_may_not_read_answers_unless_they_are_allowed(app, scripted):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed, opened = app(scripted([])), app(scripted([]), cors_origins=("https://a.example",), api_keys=("key",))
    assert "Access-Control-Allow-Origin" not in ask(closed, "GET", "/health", headers=headers).headers
    allowed = ask(opened, "OPTIONS", COMPLETIONS, headers=headers)  # without a key: browsers send none
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, "https://a.example")
    refused = ask(opened, "GET", "/v1/models", headers=headers)  # a page has to be able to read why
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "https://a.example")


# Streams


def test_a_stream_that_is_idle_gives_signs_of_life(app, scripted):
    application = app(scripted(["ab"], seconds_per_token=0.2), heartbeat_s=0.05)
    response = ask(application, "POST", COMPLETIONS, json=HELLO | {"stream": True})
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert "\n\n:\n\n" in response.text
    assert "".join(event["choices"][0]["text"] for event in events_of(response)[:-1]) == "ab"


def test_a_stream_that_never_waits_has_none(app, scripted):
    response = ask(app(scripted(["ab"])), "POST", COMPLETIONS, json=HELLO | {"stream": True})
    assert not any(line.startswith(":") for line in response.text.splitlines())


def test_an_error_in_a_stream_is_its_last_event(app, scripted):
    application = app(scripted(["ab"]))
    router = fastapi.APIRouter()

    @router.post("/broken")
    async def broken(request: fastapi.Request):
        async def events():
            yield None, {"n": 1}
            raise RuntimeError("the secret of the house")

        return stream_events(request, events(), done=True)

    application.include_router(router)
    response = ask(application, "POST", "/broken")
    first, error, done = events_of(response)
    assert (first, done) == ({"n": 1}, "[DONE]")
    assert error["error"]["type"] == "server_error"
    assert "secret" not in response.text


# Clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_what_it_held(app, scripted, stream):
    engine = scripted(lambda _: [65] * 400, seconds_per_token=0.01)

    async def run():
        wire = Wire(app(engine), COMPLETIONS, HELLO | {"stream": stream, "n": 2})
        async with asyncio.timeout(10):
            if stream:
                await wire.wait_for(5)
            while engine.num_open != 1:
                await asyncio.sleep(0.001)
            wire.go_away()
            await wire.task
            while engine.num_open:
                await asyncio.sleep(0.001)
        assert stream or not wire.sent or wire.sent[0]["status"] == 499

    asyncio.run(run())


def test_a_client_that_goes_away_from_a_full_engine_does_too(app, scripted):
    """It waits for its first token, so nothing was sent to it yet."""
    engine = scripted(lambda _: [65] * 400, seconds_per_token=100)

    async def run():
        application = app(engine)
        wires = [Wire(application, COMPLETIONS, HELLO | {"stream": True, "prompt": ["a", "b"]}) for _ in range(3)]
        async with asyncio.timeout(10):
            while engine.num_open != 6:
                await asyncio.sleep(0.001)
            for wire in wires:
                wire.go_away()
            await asyncio.gather(*[wire.task for wire in wires])
            while engine.num_open:
                await asyncio.sleep(0.001)
        assert len(application.state.service.running) == 0

    asyncio.run(run())


# The end


def test_a_server_that_ends_takes_no_more_and_lets_finish_what_runs(app, scripted):
    engine = scripted(lambda _: [65] * 20, seconds_per_token=0.01)

    async def run():
        application = app(engine, shutdown_s=10)
        service = application.state.service
        async with client_of(application) as client, asyncio.timeout(8):
            running = asyncio.create_task(client.post(COMPLETIONS, json=HELLO))
            while not len(service.running):
                await asyncio.sleep(0.001)
            closing = asyncio.create_task(service.close())
            await asyncio.sleep(0)
            for response in (await client.post(COMPLETIONS, json=HELLO), await client.get("/ready")):
                assert response.status_code == 503
                assert error_of(response)["code"] == "shutting_down"
            assert (await client.get("/health")).status_code == 200
            assert (await running).json()["choices"][0]["text"] == "A" * 20
            await closing

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_in_time_is_told_so(app, scripted, stream):
    engine = scripted(lambda _: [65] * 400, seconds_per_token=0.05)

    async def run():
        application = app(engine, shutdown_s=0.1)
        service = application.state.service
        async with client_of(application) as client, asyncio.timeout(8):
            running = asyncio.create_task(client.post(COMPLETIONS, json=HELLO | {"stream": stream}))
            while not len(service.running):
                await asyncio.sleep(0.001)
            await service.close()
            response = await running
        assert response.status_code == (200 if stream else 503)
        error = events_of(response)[-2]["error"] if stream else error_of(response)
        assert error["code"] == "shutting_down"
        assert engine.num_open == 0

    asyncio.run(run())


def test_a_turn_in_the_background_is_waited_for_and_then_cancelled(app, scripted):
    async def run():
        service = app(scripted([]), shutdown_s=0.05).state.service
        ended = []

        async def turn(seconds: float) -> None:
            try:
                await asyncio.sleep(seconds)
                ended.append("finished")
            except asyncio.CancelledError:
                ended.append("cancelled")

        service.running.start(turn(0.01))
        service.running.start(turn(100))
        async with asyncio.timeout(8):
            await service.close()
        assert ended == ["finished", "cancelled"]

    asyncio.run(run())


# The page


def test_the_page_runs_its_own_script_and_style_and_no_others(app, scripted):
    response = ask(app(scripted([])), "GET", "/")
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    rules = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in rules
    assert "unsafe" not in rules
    assert rules.count("'sha256-") == response.text.count("<script>") + response.text.count("<style>") >= 2


def test_a_policy_names_contents_as_browsers_hash_them():
    # The hash is the one that the standard's own example has for this script.
    rules = policy("<p></p><script>alert('Hello, world.');</script>")
    assert "script-src 'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='" in rules
    assert "style-src 'none'" in rules


def test_the_page_can_be_left_out(app, scripted):
    assert ask(app(scripted([]), page=False), "GET", "/").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_body_bytes": 0},
        {"shutdown_s": -1},
        {"heartbeat_s": 0},
        {"max_new_tokens": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ServerSettings(**wrong)
