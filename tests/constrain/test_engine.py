"""Answers of a model with random weights, at temperature 1, held to schemas and calls while the engine makes them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import jsonschema
import pytest
from flax import nnx

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.request import Request, SamplingParams
from gptoss_jax.engine.runner import Runner
from gptoss_jax.harmony.parse import parse
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss
from tests.constrain.schemas import PERSON, SCHEMAS
from tests.tiny import TINY

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
MOST = 3000  # ids of an answer; nothing but chance ends a text
LIMITS = Limits(
    max_rows=16,
    page_size=32,
    num_full_pages=1600,
    num_sliding_pages=64,
    window=CONFIG.sliding_window,
    max_context=MOST + 32,
    programs=(Program(16, 1, 4, 16),),
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    runner = Runner(GptOss(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)), LIMITS)
    runner.warm_up()
    with Engine.on(runner, limits=LIMITS, vocab_size=CONFIG.vocab_size) as engine:
        yield engine


def request(tokenizer, constraint, *, n: int, hasty: bool) -> Request:
    """A turn behind a prompt. In haste, messages end sooner than by chance alone."""
    prompt = [*tokenizer.encode("What now?"), tokenizer.special("<|start|>"), *tokenizer.encode("assistant")]
    biases: Mapping[int, float] = {tokenizer.special("<|end|>"): 4.0} if hasty else {}
    return Request(
        prompt=prompt,
        max_new_tokens=MOST,
        sampling=SamplingParams(temperature=1.0, seed=11, logit_bias=biases),
        stop_ids=tokenizer.stop_ids,
        n=n,
        constraint=constraint,
    )


def check_answers(engine, grammars, tokenizer, *, n: int, hasty: bool) -> None:
    """Of every schema n answers, all under way at once; which of them reach MOST ids is chance, and none may."""
    asked = {
        name: engine.submit(
            request(tokenizer, grammars.turn(final=grammars.json_schema(schema), choice="none"), n=n, hasty=hasty)
        )
        for name, schema in SCHEMAS.items()
    }
    ends = Counter()
    for name, stream in asked.items():
        schema = SCHEMAS[name]
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        for answer in stream.result():
            ends[answer.finished.reason] += 1
            if answer.finished.reason == "stop":
                message = parse(answer.ids, tokenizer)[-1]
                assert message.channel == "final"
                kind(schema).validate(json.loads(message.text))
    assert ends == {"stop": n * len(SCHEMAS)}


def test_an_answer_of_every_schema_is_valid(engine, grammars, tokenizer):
    check_answers(engine, grammars, tokenizer, n=1, hasty=True)


def test_200_of_200_answers_are_valid(engine, grammars, tokenizer):
    check_answers(engine, grammars, tokenizer, n=5, hasty=False)


def test_a_call_that_is_required_is_made(engine, grammars, tokenizer):
    functions = {"functions.person": PERSON, "functions.list": SCHEMAS["array"]}
    calls = {name: grammars.json_schema(schema) for name, schema in functions.items()}
    make = grammars.turn(calls=calls, choice="required", recipients=tuple(calls))
    for answer in engine.submit(request(tokenizer, make, n=12, hasty=True)).result():
        call = parse(answer.ids, tokenizer)[-1]
        assert tokenizer.name_of(answer.ids[-1]) == "<|call|>"
        jsonschema.validate(json.loads(call.text), functions[call.recipient])
