"""What /v1/responses refuses: by the parameter's name, in OpenAI's envelope, before anything is generated."""

import openai
import pytest

from tests.server.responses.fake import MODEL, Python, in_loop, says, scripted

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
TEXT = {"type": "input_text", "text": "x"}
FILE = {"type": "input_file", "file_id": "f"}
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}
JSON = {"content-type": "application/json"}
WEATHER = {"type": "function", "name": "weather"}


async def error_of(body: dict, **settings) -> openai.APIStatusError:
    async with scripted(says("ok"), settings=settings) as (client, engine):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.responses.create(**{"model": MODEL, "input": "Hi"} | body)
        assert not engine.requests
    assert refused.value.type == "invalid_request_error"
    return refused.value


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("background_options", {"extra_body": {"background_options": {"completion_window": "2h"}}}),
        ("context_management", {"context_management": [{"type": "compaction"}]}),
        ("conversation", {"conversation": "conv_1"}),
        ("include", {"include": ["file_search_call.results"]}),
        ("moderation", {"extra_body": {"moderation": {"model": "m"}}}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("prompt_cache_retention", {"prompt_cache_retention": "24h"}),
        ("reasoning.context", {"reasoning": {"context": "all_turns"}}),
        ("reasoning.effort", {"reasoning": {"effort": "extreme"}}),
        ("reasoning.mode", {"reasoning": {"mode": "pro"}}),
        ("reasoning.summary", {"reasoning": {"summary": "detailed"}}),
        ("stream_options.include_obfuscation", {"stream_options": {"include_obfuscation": True}}),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("text.format.name", {"text": {"format": {"type": "json_schema", "schema": {}}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        ("tools.0.type", {"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}),
        ("tools.0.type", {"tools": [CODE]}),
        ("tools.0.type", {"tools": [{"type": "web_search"}]}),
        ("tools.1.name", {"tools": [WEATHER, WEATHER]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "news"}}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "code_interpreter"}}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "custom", "name": "x"}}),
        ("input", {"input": []}),
        ("input", {"input": openai.omit}),
        ("input.0.content.1.type", {"input": [{"role": "user", "content": [TEXT, IMAGE]}]}),
        ("input.0.content.0.type", {"input": [{"role": "user", "content": [FILE]}]}),
        ("input.1.call_id", {"input": [
            {"role": "user", "content": "x"},
            {"type": "function_call_output", "call_id": "call_9", "output": "x"},
        ]}),
        ("input.1.output.0.type", {"input": [
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_audio"}]},
        ]}),
        ("input.0.type", {"input": [{"type": "computer_call", "id": "x"}]}),
        ("background", {"background": True, "store": False}),
    ],
    ids=lambda value: "nothing" if openai.omit in getattr(value, "values", tuple)() else str(value),
)  # fmt: skip
@in_loop
async def test_a_bad_request(param, body):
    error = await error_of(body)
    assert error.status_code == 400
    assert error.param == param
    assert param.partition(".")[0] in error.message


@pytest.mark.parametrize(
    ("status", "code", "body"),
    [
        (404, "model_not_found", {"model": "gpt-9"}),
        (404, "previous_response_not_found", {"previous_response_id": "resp_9"}),
        (404, "item_not_found", {"input": [{"type": "item_reference", "id": "msg_9"}]}),
        (422, "invalid_value", {"temperature": 3}),
        (422, "invalid_value", {"max_output_tokens": 0}),
        (422, "invalid_value", {"top_logprobs": 21}),
        (422, "invalid_value", {"metadata": {str(i): "x" for i in range(17)}}),
        (422, "invalid_value", {"metadata": {"k" * 65: "x"}}),
        (422, "invalid_value", {"metadata": {"k": "x" * 513}}),
        (422, "invalid_value", {"input": [{"role": "wizard", "content": "x"}]}),
        (422, "invalid_value", {"input": [{"type": "function_call", "name": "x"}]}),
        (422, "invalid_value", {"input": 5}),
        (422, "invalid_value", {"input": [7]}),
        (422, "invalid_value", {"tools": [{"name": "no type"}]}),
        (422, "invalid_value", {"truncation": "sometimes"}),
    ],
    ids=str,
)
@in_loop
async def test_other_errors(status, code, body):
    error = await error_of(body)
    assert (error.status_code, error.code) == (status, code)


@pytest.mark.parametrize(
    ("param", "container"),
    [
        ("tools.0.container", "cntr_1"),
        ("tools.0.container.file_ids", {"type": "auto", "file_ids": ["f"]}),
        ("tools.0.container.memory_limit", {"type": "auto", "memory_limit": "4g"}),
    ],
)
@in_loop
async def test_options_of_python(param, container):
    error = await error_of({"tools": [{"type": "code_interpreter", "container": container}]}, tools=[Python()])
    assert (error.status_code, error.param) == (400, param)


@in_loop
async def test_a_name_that_would_be_a_mark_is_refused():
    error = await error_of({"tools": [{"type": "function", "name": "f<|message|>"}]})
    assert error.status_code == 400
    assert "f<|message|>" in error.message


@pytest.mark.parametrize(
    "text",
    [
        '{"input": "\\ud800"}',
        '{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"default": NaN}}]}',
        '{"input": "x", "tool_choice": {"type": "function", "x": -Infinity}}',
        '{"input": [{"role": "user", "content": "x", "y": %s}]}' % ("[" * 150 + "]" * 150),
        '{"input": "x", "text": %s}' % ('{"a":' * 150 + "1" + "}" * 150),
        '{"input": "x", "\\udfff": 1}',
    ],
    ids=range(6),
)
@in_loop
async def test_json_that_cannot_be_written_again(text):
    async with scripted() as (client, _):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            await client.post("/responses", cast_to=object, options={"headers": JSON}, content=text.encode())
    assert refused.value.code == "invalid_body"


@pytest.mark.parametrize("body", [{"store": True}, {"background": True}])
@in_loop
async def test_a_server_without_a_store(body):
    error = await error_of(body, store="none")
    assert (error.status_code, error.param) == (400, *body)


@in_loop
async def test_a_server_without_a_store_stores_nothing_and_says_so():
    async with scripted(says("ok"), settings={"store": "none"}) as (client, _):
        response = await client.responses.create(model=MODEL, input="Hi")
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError, match="--store none"):
            await client.responses.create(model=MODEL, input="Hi", previous_response_id=response.id)


@in_loop
async def test_a_full_queue_is_a_429_streamed_or_not():
    async with scripted(says("ok"), max_open=0) as (client, _):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                await client.responses.create(model=MODEL, input="Hi", stream=stream)
            assert refused.value.response.headers["Retry-After"] == "1"
