"""Text and ids continued: by plain JSON, and by OpenAI's own client."""

import asyncio

import openai
import pytest

from gptoss_jax.engine.request import SamplingParams
from tests.server.client import ask, client_of, events_of

PATH = "/v1/completions"


def complete(application, **body):
    return ask(application, "POST", PATH, json={"prompt": "hello"} | body)


def choices_of(response) -> list[dict]:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def texts_of(response) -> list[str]:
    choices = choices_of(response)
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def streamed(response) -> tuple[dict[int, str], dict[int, str]]:
    """By choice, the texts and the reasons that a stream tells."""
    *events, done = events_of(response)
    assert done == "[DONE]"
    texts, reasons = {}, {}
    for (choice,) in [event["choices"] for event in events if event["choices"]]:
        assert choice["index"] not in reasons  # nothing comes behind the end
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    return texts, reasons


@pytest.fixture
def echoing(scripted):
    """An engine that answers every prompt by its ids in reverse."""
    return scripted(lambda request: list(reversed(request.prompt)))


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("abc", ["cba"]),
        (["abc", "de"], ["cba", "ed"]),
        ([97, 98], ["ba"]),
        ([[97, 98], [99]], ["ba", "c"]),
        ([[260, 97]], ["a<|end|>"]),  # ids are taken as they are; 260 is a special one
        ("<|end|>", [">|dne|<"]),  # a text is a text
    ],
)
def test_a_prompt_is_texts_or_ids(app, echoing, prompt, answers):
    assert texts_of(complete(app(echoing), prompt=prompt)) == answers


@pytest.mark.parametrize("prompt", [[], [[]], [["a"]], [1, "a"], ["a", [1]], 5, None, [True], [1.5], {"a": 1}])
def test_what_is_neither_is_refused(app, echoing, prompt):
    response = complete(app(echoing), prompt=prompt)
    assert response.status_code == 422
    assert "expected a text, a list of ids" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("prompt", ["", [352], [-1], ["a", ""]])
def test_prompts_that_no_model_takes_are_refused(app, echoing, prompt):
    assert complete(app(echoing), prompt=prompt).status_code == 400


def test_n_choices_of_each_prompt_stand_side_by_side(app, scripted):
    engine = scripted(lambda request: [request.prompt[0], 48 + request.sampling.seed % 10])
    response = complete(app(engine), prompt=["a", "b"], n=3, seed=5)
    assert texts_of(response) == ["a5", "a6", "a7", "b5", "b6", "b7"]
    assert response.json()["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_says_what_one_piece_says(app, scripted, tokenizer):
    engine = scripted(lambda request: tokenizer.encode(f"é{request.sampling.seed}·")[: 4 + request.sampling.seed])
    body = {"prompt": ["a", "b"], "n": 2, "seed": 0, "max_tokens": 5}
    whole, stream = complete(app(engine), **body), complete(app(engine), **body, stream=True)
    texts, reasons = streamed(stream)
    assert [texts[index] for index in range(4)] == texts_of(whole)
    assert [reasons[index] for index in range(4)] == [choice["finish_reason"] for choice in choices_of(whole)]


def test_usage_comes_with_a_stream_where_it_is_asked_for(app, scripted):
    engine = scripted(["xy", "xy"])
    *chunks, last, _ = events_of(complete(app(engine), stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert not any("usage" in event for event in events_of(complete(app(engine), stream=True))[:-1])


def test_characters_are_never_cut(app, scripted):
    texts = [chunk["choices"][0]["text"] for chunk in events_of(complete(app(scripted(["a·é"])), stream=True))[:-1]]
    assert "".join(texts) == "a·é"
    assert "\ufffd" not in "".join(texts)
    assert "·" in texts


def test_a_character_that_the_end_cuts_is_not_lost(app, scripted):
    assert texts_of(complete(app(scripted(["é"])), max_tokens=1)) == ["\ufffd"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (None, "one two three", "length"),
        ("two", "one ", "stop"),
        (["three", "e t"], "on", "stop"),
        (" tw", "one", "stop"),
    ],
)
def test_stop_texts_end_it_and_are_not_told(app, scripted, stop, text, reason, stream):
    response = complete(app(scripted(["one two three"])), stop=stop, stream=stream)
    if stream:
        assert streamed(response) == ({0: text}, {0: reason})
    else:
        assert [(choice["text"], choice["finish_reason"]) for choice in choices_of(response)] == [(text, reason)]


def test_an_id_that_ends_the_answer_is_no_text(app, scripted, tokenizer):
    for name in ("<|return|>", "<|call|>", "<|endoftext|>"):
        ids = [*tokenizer.encode("hi"), tokenizer.special(name), 97]
        (choice,) = choices_of(complete(app(scripted([ids])), logprobs=0))
        assert (choice["text"], choice["finish_reason"]) == ("hi", "stop")
        assert choice["logprobs"]["tokens"] == ["h", "i", name]


# Logprobs, of the scripted engine's own making


def test_logprobs_have_the_legacy_form(app, scripted):
    (choice,) = choices_of(complete(app(scripted(["hé"])), logprobs=2, max_tokens=3))
    assert choice["logprobs"] == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.125, -0.5, -0.25],
        "top_logprobs": [
            {"h": -0.125, "i": -0.625},
            {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.0},
            {"bytes:\\xa9": -0.25, "bytes:\\xaa": -0.75},
        ],
        "text_offset": [0, 1, 1],
    }
    assert choice["text"] == "hé"


def test_without_being_asked_for_there_are_none(app, scripted):
    (choice,) = choices_of(complete(app(scripted(["h"]))))
    assert choice["logprobs"] is None


def test_ids_without_a_text_have_names_of_their_own(app, scripted):
    (choice,) = choices_of(complete(app(scripted([[300, 301]])), logprobs=2))
    assert choice["logprobs"]["tokens"] == ["token_id:300", "token_id:301"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt_and_how_likely_it_was(app, scripted, stream):
    response = complete(app(scripted(["XY"])), prompt="é=", echo=True, logprobs=1, max_tokens=1, stream=stream)
    if stream:
        assert streamed(response) == ({0: "é=X"}, {0: "length"})
        return
    (choice,) = choices_of(response)
    assert choice["text"] == "é=X"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "=", "X"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.75, -0.125]
    assert choice["logprobs"]["top_logprobs"] == [None, {"bytes:\\xa9": -0.25}, {"=": -0.75}, {"X": -0.125}]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    assert response.json()["usage"]["completion_tokens"] == 1


def test_echo_of_every_choice(app, scripted):
    response = complete(app(scripted(["X", "Y"])), prompt=["ab", "c"], echo=True, logprobs=0, n=2)
    assert texts_of(response) == ["abX", "abX", "cY", "cY"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices_of(response)] == [3, 3, 2, 2]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_text_can_be_scored_without_a_continuation(app, scripted, logprobs):
    response = complete(app(scripted([[]])), prompt="ab", echo=True, max_tokens=0, logprobs=logprobs)
    (choice,) = choices_of(response)
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert (choice["logprobs"] is None) == (logprobs is None)
    if logprobs:
        assert choice["logprobs"]["token_logprobs"] == [None, -0.375]


# What reaches the engine


def test_every_setting_reaches_the_engine(app, scripted):
    engine = scripted(["x"])
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "seed": 2**32 + 11,
        "logprobs": 3,
    }
    complete(app(engine), **settings, logit_bias={"5": 2.5}, max_tokens=9, stop=["a", "b"], n=2, best_of=2)
    (request,) = engine.requests
    assert request.sampling == SamplingParams(**settings | {"seed": 11}, logit_bias={5: 2.5})
    assert (request.max_new_tokens, list(request.stop), request.n) == (9, ["a", "b"], 2)
    assert request.prompt_logprobs is None


def test_no_seed_is_another_one_each_time(app, scripted):
    engine = scripted(lambda _: [65])
    for _ in range(3):
        complete(app(engine))
    assert len({request.sampling.seed for request in engine.requests}) == 3


def test_without_a_number_the_context_is_the_limit_and_the_server_s_own(app, scripted):
    engine = scripted(lambda _: [65])
    complete(app(engine), prompt="abc", max_tokens=None)
    complete(app(engine), prompt="abc")
    complete(app(engine, max_new_tokens=12), prompt="abc", max_tokens=100)
    assert [request.max_new_tokens for request in engine.requests] == [497, 16, 12]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(app, scripted, body, param):
    response = complete(app(scripted([])), **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", ['{"prompt": "\\ud800"}', '{"prompt": "a", "stop": "\\udfff"}'])
def test_halves_of_characters_are_refused(app, scripted, body):
    headers = {"Content-Type": "application/json"}
    assert ask(app(scripted([])), "POST", PATH, content=body, headers=headers).status_code == 422


def test_unknown_fields_are_skipped(app, scripted):
    assert texts_of(complete(app(scripted(["x"])), some_other_server_s_field={"a": 1})) == ["x"]


def test_a_text_that_takes_long_to_encode_is_encoded_all_the_same(app, scripted):
    engine = scripted(lambda _: [65], max_context=60_000)
    assert texts_of(complete(app(engine), prompt="ab" * 20_000)) == ["A"]
    assert len(engine.requests[0].prompt) == 40_000


# OpenAI's client


def test_openai_s_client_reads_it(app, scripted):
    async def run():
        async with client_of(app(scripted(["one", "two"]))) as http:
            client = openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http)
            whole = await client.completions.create(model="scripted", prompt=[1, 2], logprobs=1, echo=True)
            stream = await client.completions.create(model="scripted", prompt="a", stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(run())
    assert whole.choices[0].text == "\x01\x02one"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.token_logprobs == [None, -0.375, -1.0, -0.875, -0.75]
    assert whole.usage is not None
    assert whole.usage.total_tokens == 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == "two"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_s_client_raises_its_own_errors(app, scripted):
    async def run():
        application = app(scripted([], max_open=0), api_keys=("key",))
        async with client_of(application) as http:

            def client(key: str) -> openai.AsyncOpenAI:
                return openai.AsyncOpenAI(api_key=key, base_url="http://localhost/v1", http_client=http, max_retries=0)

            with pytest.raises(openai.AuthenticationError, match="no valid API key"):
                await client("wrong").completions.create(model="scripted", prompt="a")
            with pytest.raises(openai.NotFoundError, match="there is no model"):
                await client("key").completions.create(model="gpt-4", prompt="a")
            with pytest.raises(openai.RateLimitError, match="try again"):
                await client("key").completions.create(model="scripted", prompt="a")
            with pytest.raises(openai.UnprocessableEntityError, match="n: Input"):
                await client("key").completions.create(model="scripted", prompt="a", n=0)

    asyncio.run(run())
