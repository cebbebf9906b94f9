"""Responses that a client waits for: input of every kind, what the model reads of it, what comes back."""

import openai
import pydantic
import pytest

from tests.server.responses.fake import (
    GO,
    MODEL,
    Browser,
    Python,
    asks,
    calls,
    check_response,
    in_loop,
    says,
    scripted,
    thinks,
)

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL_ITEMS = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Oslo"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "12 degrees"},
]


async def created(client: openai.AsyncOpenAI, **body):
    response = await client.responses.create(**{"model": MODEL, "input": "Hi"} | body)
    return check_response(response.to_dict(mode="json"))


@in_loop
async def test_text_in_text_out():
    async with scripted(thinks("Greet.") + says("Hello")) as (client, engine):
        response = await created(client, input="Hi <|end|>", instructions="Be kind.")
    assert response.output_text == "Hello"
    assert response.output[0].content[0].text == "Greet."
    assert response.output[0].summary == []
    assert response.output[1].phase == "final_answer"
    (prompt,) = engine.prompts
    assert "Reasoning: medium" in prompt
    assert "# Instructions\n\nBe kind.<|end|>" in prompt
    assert prompt.endswith("<|start|>user<|message|>Hi <|end|><|end|><|start|>assistant")
    assert len(engine.requests[0].prompt) > len("Hi <|end|>") + 40  # seven of these characters are no special token


@in_loop
async def test_usage():
    async with scripted(thinks("Hm") + says("ab")) as (client, engine):
        response = await created(client)
    usage = response.usage
    assert usage.input_tokens == len(engine.requests[0].prompt)
    # Marks are one token each: 3 and the one between, 2 of start and the final's 3.
    assert usage.output_tokens == len("analysis") + len("Hm") + len("assistant") + len("final") + len("ab") + 7
    assert usage.output_tokens_details.reasoning_tokens == len("analysis") + len("Hm") + 3
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@in_loop
async def test_cached_tokens_are_told():
    async with scripted(says("a"), says("b")) as (client, engine):
        await created(client)
        again = await created(client)
    assert again.usage.input_tokens_details.cached_tokens == len(engine.requests[0].prompt) - 1


@in_loop
async def test_items_of_a_tool_turn():
    async with scripted(says("12")) as (client, engine):
        await created(client, input=CALL_ITEMS, tools=[WEATHER | {"strict": False}])
    (prompt,) = engine.prompts
    assert "type weather = (_: {" in prompt
    assert prompt.endswith(
        "<|start|>user<|message|>Weather in Oslo?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json"
        '<|message|>{"city":"Oslo"}<|call|>'
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>12 degrees<|end|>"
        "<|start|>assistant"
    )


@in_loop
async def test_a_model_is_told_that_it_cannot_see_what_its_function_shows():
    """As Codex does it: view_image gives a picture to whichever model called it."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
    output = [{"type": "input_text", "text": "Here:"}, image]
    items = [*CALL_ITEMS[:-1], CALL_ITEMS[-1] | {"output": output}]
    async with scripted(says("I cannot see it.")) as (client, engine):
        response = await created(client, input=items, tools=[WEATHER])
        (kept, *_) = (await client.responses.input_items.list(response.id)).data
    assert "<|message|>Here:\n(input_image left out: this model reads text only)<|end|>" in engine.prompts[0]
    assert kept.to_dict()["output"] == output


@in_loop
async def test_roles_and_parts():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "input_text", "text": "Rhyme."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("one", "two")]},
        {"role": "assistant", "content": "I look.", "phase": "commentary"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "three", "annotations": []}]},
        {"role": "developer", "content": "Stop rhyming."},
        {"role": "user", "content": "Go on", "unknown_field": 1},
    ]
    async with scripted(says("ok")) as (client, engine):
        await created(client, input=messages, instructions="Help.")
    (prompt,) = engine.prompts
    assert "# Instructions\n\nHelp.\n\nBe brief.\n\nRhyme.<|end|>" in prompt
    assert prompt.endswith(
        "<|start|>user<|message|>one\ntwo<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>three<|end|>"
        "<|start|>developer<|message|># Instructions\n\nStop rhyming.<|end|>"
        "<|start|>user<|message|>Go on<|end|>"
        "<|start|>assistant"
    )


@in_loop
async def test_output_items_may_be_sent_back_as_they_are():
    first = thinks("Look.") + calls("weather", '{"city":"Oslo"}')
    async with scripted(first, says("12")) as (client, engine):
        response = await created(client, tools=[WEATHER], store=False)
        call = response.output[1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
        sent = [{"role": "user", "content": "Hi"}, *(item.to_dict() for item in response.output), result]
        await created(client, tools=[WEATHER], store=False, input=sent)
    # What the model said itself is read as it was said.
    assert engine.prompts[1].startswith(engine.prompts[0] + first)


@in_loop
async def test_python_items_sent_back():
    first = asks("python", "print(6*7)")
    tools = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    async with scripted(first, says("42"), says("43"), settings={"tools": [Python()], "store": "none"}) as (
        client,
        engine,
    ):
        response = await created(client, tools=tools)
        sent = [{"role": "user", "content": "Hi"}, *(item.to_dict() for item in response.output[:1])]
        await created(client, tools=tools, input=sent)
    assert engine.prompts[2] == engine.prompts[1]


@in_loop
async def test_reasoning_that_cannot_be_read_is_left_out():
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "S"}]},
    ]
    async with scripted(says("ok")) as (client, engine):
        await created(client, input=items)
    assert engine.prompts[0].endswith("<|start|>user<|message|>Hi<|end|><|start|>assistant")


# Tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
@in_loop
async def test_a_required_call(choice):
    async with scripted(thinks("Must.") + calls("weather", '{"city":"Oslo"}')) as (client, _):
        response = await created(client, tools=[WEATHER], tool_choice=choice)
    assert response.tool_choice == choice or response.tool_choice.name == "weather"
    assert response.output[1].name == "weather"
    assert response.status == "completed"


@in_loop
async def test_a_required_call_of_the_servers_python():
    tools = [WEATHER, {"type": "code_interpreter", "container": {"type": "auto"}}]
    scripts = asks("python", "print(6*7)"), says("42")
    async with scripted(*scripts, settings={"tools": [Python()]}) as (client, _):
        response = await created(client, tools=tools, tool_choice={"type": "code_interpreter"})
    assert [item.type for item in response.output] == ["code_interpreter_call", "message"]
    assert response.tool_choice.type == "code_interpreter"
    assert response.status == "completed"


@in_loop
async def test_a_tool_choice_of_none_forbids_calls():
    async with scripted(calls("weather", '{"city":"Oslo"}')) as (client, _):
        response = await created(client, tools=[WEATHER], tool_choice="none")
    assert response.status == "failed"  # the script says what the grammar forbids


@in_loop
async def test_allowed_tools_are_all_that_the_model_is_told_of():
    other = WEATHER | {"name": "news"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    async with scripted(says("ok")) as (client, engine):
        await created(client, tools=[WEATHER, other], tool_choice=choice)
    assert "type weather" in engine.prompts[0]
    assert "type news" not in engine.prompts[0]


@in_loop
async def test_two_calls_side_by_side():
    tools = [WEATHER | {"strict": False}]
    both = calls("weather", '{"city":"Oslo"}').replace("<|call|>", "<|end|>") + GO + calls("weather", '{"city":"Rome"}')
    async with scripted(both, both, says("Warmer in Rome.")) as (client, engine):
        one = await created(client, tools=tools, parallel_tool_calls=False)
        two = await created(client, tools=tools)
        outputs = [
            {"type": "function_call_output", "call_id": item.call_id, "output": degrees}
            for item, degrees in zip(two.output, ("12", "20"), strict=True)
        ]
        await created(client, tools=tools, previous_response_id=two.id, input=outputs)
    assert [item.arguments for item in one.output] == ['{"city":"Oslo"}']
    assert [item.arguments for item in two.output] == ['{"city":"Oslo"}', '{"city":"Rome"}']
    result = "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
    said = both.replace("<|end|>", "<|call|>")
    assert engine.prompts[2].endswith(f"{said}{result}12<|end|>{result}20<|end|>{GO}")


@in_loop
async def test_tools_that_nobody_here_knows_are_skipped():
    tools = [
        WEATHER,
        {"type": "local_shell"},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
        {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "js"}]},
        {"type": "mcp", "server_label": "x", "server_url": "https://x.example"},
        {"type": "web_search", "external_web_access": False},
        {"type": "something_new"},
    ]
    async with scripted(says("ok")) as (client, engine):
        response = await created(client, tools=tools)
    assert [tool.type for tool in response.tools] == ["function"]
    assert "apply_patch" not in engine.prompts[0]


@in_loop
async def test_max_tool_calls():
    tools = [{"type": "code_interpreter", "container": {"type": "auto"}}, {"type": "web_search"}]
    scripts = asks("python", "1"), asks("browser.search", '{"query":"x"}'), says("ok")
    async with scripted(*scripts, settings={"tools": [Python(), Browser()]}) as (client, engine):
        response = await created(client, tools=tools, max_tool_calls=1)
    assert [item.status for item in response.output] == ["completed", "failed", "completed"]
    assert "no more tool calls" in engine.prompts[2]


# Formats


class City(pydantic.BaseModel):
    name: str
    people: int


@in_loop
async def test_a_schema_holds_the_answer():
    async with scripted(thinks("Oslo.") + says('{"name":"Oslo","people":700000}')) as (client, engine):
        response = await client.responses.parse(model=MODEL, input="A city", text_format=City)
    assert response.output_parsed == City(name="Oslo", people=700000)
    assert "# Response Formats\n\n## City" in engine.prompts[0]


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": {}}])
@in_loop
async def test_an_answer_that_is_no_json_is_not_let_through(form):
    async with scripted(says("no json")) as (client, _):
        response = await created(client, text={"format": form})
    assert response.status == "failed"


@in_loop
async def test_a_schema_that_cannot_be_held_to_is_refused_with_its_keywords():
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    async with scripted(says('{"a":[1,1]}'), says('{"a":[1,1]}')) as (client, _):
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
            await created(client, text={"format": form | {"strict": True}})
        response = await created(client, text={"format": form | {"strict": False}})
    assert refused.value.code == "unsupported_schema"
    assert refused.value.param == "text.format.schema"
    assert response.status == "completed"


@in_loop
async def test_a_lenient_server_judges_the_answer_afterwards():
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    async with scripted(says('{"a":[1,2]}'), says('{"a":[1,1]}'), settings={"lenient_schemas": True}) as (client, _):
        good = await created(client, text={"format": form})
        bad = await created(client, text={"format": form})
    assert good.status == "completed"
    assert bad.status == "failed"
    assert "does not fit the schema" in bad.error.message
    assert bad.output_text == '{"a":[1,1]}'


@pytest.mark.parametrize(("strict", "told"), [(None, False), (False, False)])
@in_loop
async def test_a_function_that_cannot_be_held_to_its_schema(strict, told):
    tool = WEATHER | {"parameters": {"type": "object", "not": {"required": ["x"]}}, "strict": strict}
    async with scripted(says("ok")) as (client, _):
        response = await created(client, tools=[tool])
        with pytest.raises(openai.BadRequestError, match="not"):
            await created(client, tools=[tool | {"strict": True}])
    assert response.tools[0].strict is told


# What is told of the request


@in_loop
async def test_settings_are_told_as_they_were_understood():
    asked = {
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "top_p": 0.25,
        "max_output_tokens": 50,
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "truncation": "auto",
        "reasoning": {"effort": "minimal", "summary": "auto"},
        "text": {"verbosity": "medium"},
        "include": ["reasoning.encrypted_content"],
        "stream_options": {"include_obfuscation": False},
    }
    async with scripted(says("ok")) as (client, engine):
        response = await created(client, **asked, extra_body={"client_metadata": {"x": 1}})
    assert response.metadata == {"a": "b"}
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.25, 50)
    assert (response.user, response.safety_identifier, response.prompt_cache_key) == ("me", "s", "k")
    assert (response.service_tier, response.truncation) == ("default", "auto")
    assert response.reasoning.effort == "low"
    assert "Reasoning: low" in engine.prompts[0]
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_p) == (0.5, 0.25)
    assert engine.requests[0].max_new_tokens == 50


# The context


@in_loop
async def test_a_prompt_that_is_too_long():
    async with scripted(says("ok"), max_context=400) as (client, engine):
        with pytest.raises(openai.BadRequestError) as refused:
            await created(client, input="x" * 500)
        with pytest.raises(openai.BadRequestError):
            await created(client, input="x" * 500, truncation="auto")
    assert refused.value.code == "context_length_exceeded"
    assert not engine.requests


@in_loop
async def test_truncation_leaves_the_oldest_turns_out():
    talk = [
        {"role": "developer", "content": "Rhyme."},
        {"role": "user", "content": "a" * 200},
        {"role": "assistant", "content": "b" * 200},
        {"role": "user", "content": "now"},
    ]
    async with scripted(says("ok"), max_context=600) as (client, engine):
        response = await created(client, input=talk, truncation="auto")
    assert response.status == "completed"
    assert "Rhyme." in engine.prompts[0]
    assert "aaaa" not in engine.prompts[0]
    assert "bbbb" not in engine.prompts[0]
    assert engine.prompts[0].endswith("now<|end|><|start|>assistant")


@in_loop
async def test_input_tokens():
    async with scripted(says("ok")) as (client, engine):
        counted = await client.responses.input_tokens.count(model=MODEL, input=CALL_ITEMS, tools=[WEATHER])
        await created(client, input=CALL_ITEMS, tools=[WEATHER])
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == len(engine.requests[0].prompt)
