"""Whole turns: what a header may be, where a grammar begins, what ends a turn. Our parser and OpenAI's judge them."""

import json
import re
from collections import Counter

import jsonschema
import numpy as np
import pytest
from openai_harmony import Role

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.events import Fault
from gptoss_jax.harmony.parse import Parser, parse
from gptoss_jax.harmony.tokenizer import Tokenizer
from tests.constrain.blindly import allowed_ids, choose_blindly
from tests.constrain.schemas import PERSON, SCHEMAS

ANN = '{"name":"Ann","age":3}'
F, G = "functions.f", "functions.g"


@pytest.fixture(scope="module")
def person(grammars):
    return grammars.json_schema(PERSON)


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which special tokens stand by their names."""
    ids = []
    for piece in re.split(r"(<\|[a-z]+\|>)", text):
        ids += [tokenizer.special(piece)] if piece.startswith("<|") and len(piece) > 2 else tokenizer.encode(piece)
    return ids


def refused(make, text: str, tokenizer: Tokenizer) -> str | None:
    """What of the text is not allowed any more; None if all of it is."""
    constraint = make()
    ids = encode(text, tokenizer)
    for i, token_id in enumerate(ids):
        if token_id not in allowed_ids(constraint.mask()):
            return tokenizer.decode(ids[i:])
        constraint.accept(token_id)
    return None


THOUGHT = "<|channel|>analysis<|message|>Let me see: <b> {…}\n\n<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    "text",
    [
        FINAL + "Hello.<|return|>",
        FINAL + "<|return|>",
        THOUGHT + FINAL + "Hello.<|return|>",
        THOUGHT + PREAMBLE + THOUGHT + FINAL + "Hello.<|return|>",
        # calls, with the recipient before the channel or behind it
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        " to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        THOUGHT + "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        THOUGHT + PREAMBLE + " to=browser.search<|channel|>analysis code<|message|>{}<|call|>",
    ],
)
def test_a_turn_as_it_should_be_is_allowed(grammars, tokenizer, text):
    assert refused(grammars.turn(), text, tokenizer) is None


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        ("", "Hello."),
        ("", "<|message|>Hello."),
        ("", "<|start|>assistant"),
        ("", "<|end|>"),
        ("", "<|return|>"),
        ("<|channel|>", "thoughts<|message|>"),
        ("<|channel|>analysis", "?? commentary<|message|>"),
        ("<|channel|>analysis", "<|channel|>final<|message|>"),
        ("<|channel|>analysis ", "json<|message|>"),
        ("<|channel|>final", " to=functions.f<|message|>"),
        ("<|channel|>final", " <|constrain|>json<|message|>"),
        ("<|channel|>commentary to=functions.f ", "yaml<|message|>"),
        ("<|channel|>commentary to=", "<|message|>"),
        ("<|channel|>commentary to=user", "<|message|>"),
        ("<|channel|>commentary to=system", "<|message|>"),
        ("<|channel|>commentary to=developer", "<|message|>"),
        ("<|channel|>commentary to=functions.f", ".x<|message|>"),
        (" to=functions.f", " to=functions.g<|channel|>commentary<|message|>"),
        (" to=functions.f<|channel|>", "final<|message|>"),
        ("<|channel|>analysis<|message|>hm", "<|return|>"),
        ("<|channel|>analysis<|message|>hm", "<|call|>"),
        ("<|channel|>analysis<|message|>hm", "<|endoftext|>"),
        ("<|channel|>analysis<|message|>hm", "<|channel|>"),
        ("<|channel|>analysis<|message|>hm<|end|>", "<|channel|>"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>", "user<|message|>"),
        ("<|channel|>final<|message|>Hello.", "<|end|>"),
        ("<|channel|>final<|message|>Hello.", "<|call|>"),
        ("<|channel|>commentary to=functions.f<|message|>{}", "<|end|>"),
        ("<|channel|>commentary to=functions.f<|message|>{}", "<|return|>"),
    ],
)
def test_a_malformed_turn_is_not_allowed(grammars, tokenizer, begins, goes_on):
    assert refused(grammars.turn(), begins + goes_on, tokenizer) == goes_on


def test_the_answer_is_held_to_its_grammar_and_the_reasoning_is_not(grammars, tokenizer, person):
    make = grammars.turn(final=person)
    assert refused(make, THOUGHT + FINAL + ANN + "<|return|>", tokenizer) is None
    assert refused(make, THOUGHT + FINAL + "Ann", tokenizer) == "Ann"
    assert refused(make, THOUGHT + FINAL + ANN + " ", tokenizer) == " "
    assert refused(make, "<|channel|>commentary to=functions.f<|message|>Ann<|call|>", tokenizer) is None


def test_nothing_but_the_end_follows_what_is_whole(grammars, tokenizer, person):
    make = grammars.turn(final=person, calls={F: person})
    for text, end in ((FINAL + ANN, "<|return|>"), (f"<|channel|>commentary to={F} json<|message|>{ANN}", "<|call|>")):
        constraint = make()
        for token_id in encode(text, tokenizer):
            constraint.accept(token_id)
        assert allowed_ids(constraint.mask()).tolist() == [tokenizer.special(end)]


@pytest.mark.parametrize(
    "header", [" to={}<|channel|>commentary json<|message|>", "<|channel|>commentary to={}<|message|>"]
)
def test_a_call_is_held_to_the_grammar_of_its_recipient(grammars, tokenizer, person, header):
    numbers = grammars.json_schema({"type": "array", "items": {"type": "integer"}})
    make = grammars.turn(calls={F: person, G: numbers})
    assert refused(make, THOUGHT + header.format(F) + ANN + "<|call|>", tokenizer) is None
    assert refused(make, THOUGHT + header.format(G) + "[1,2]<|call|>", tokenizer) is None
    assert refused(make, header.format(F) + "[1]", tokenizer) == "[1]"
    assert refused(make, header.format(G) + ANN, tokenizer) == ANN
    # names that begin as theirs do are others' names
    for other in ("functions.ff", "functions", "function.f", "xfunctions.f", "python"):
        assert refused(make, header.format(other) + "anything<|call|>", tokenizer) is None


def test_a_strict_function_is_called_in_the_commentary_channel(grammars, tokenizer, person):
    make = grammars.turn(calls={F: person})
    assert refused(make, "<|channel|>analysis to=functions.f<|message|>", tokenizer) == "<|message|>"
    assert refused(make, " to=functions.f<|channel|>analysis", tokenizer) == "analysis"


CALL_F, CALL_G = (f"<|channel|>commentary to={name}<|message|>{ANN}<|call|>" for name in (F, G))


@pytest.mark.parametrize(
    ("choice", "recipients", "allowed"),
    [
        ("auto", None, {"final", F, G}),
        ("auto", (), {"final"}),
        ("auto", (F,), {"final", F}),
        ("auto", (F, G), {"final", F, G}),
        ("none", None, {"final"}),
        ("none", (F, G), {"final"}),
        ("required", None, {F, G}),
        ("required", (F,), {F}),
        (F, None, {F}),
        (G, (F, G), {G}),
    ],
)
@pytest.mark.parametrize("strict", [(), (F,), (F, G)])
def test_a_choice_says_how_a_turn_may_end(grammars, tokenizer, person, choice, recipients, allowed, strict):
    make = grammars.turn(final=person, calls=dict.fromkeys(strict, person), choice=choice, recipients=recipients)
    ends = {"final": FINAL + ANN + "<|return|>", F: CALL_F, G: CALL_G}
    assert {end for end, text in ends.items() if refused(make, THOUGHT + PREAMBLE + text, tokenizer) is None} == allowed


def test_a_call_with_no_grammar_takes_any_text(grammars, tokenizer):
    make = grammars.turn(calls={F: None}, choice="required", recipients=(F,))
    assert refused(make, f" to={F}<|channel|>commentary<|message|>any text<|call|>", tokenizer) is None


def test_calls_may_follow_each_other_where_the_request_does_not_stop_at_the_first(grammars, tokenizer):
    two = CALL_F + "<|start|>assistant" + CALL_G
    assert refused(grammars.turn(), two, tokenizer) is None
    assert refused(grammars.turn(parallel=False), two, tokenizer) == "<|start|>assistant" + CALL_G


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "f(x)"}, r"a recipient is 'f\(x\)'; expected at most 160 letters, digits, _, - or dots"),
        ({"calls": {"a b": None}}, "a recipient is 'a b'; expected .*"),
        ({"recipients": ["x" * 161]}, "a recipient is 'x+'; expected .*"),
        ({"choice": "required", "recipients": []}, "a call is required and no recipient may be called; name .*"),
    ],
)
def test_what_no_turn_can_be_held_to_is_refused(grammars, settings, message):
    with pytest.raises(UserError) as raised:
        grammars.turn(**settings)
    assert re.fullmatch(message, str(raised.value))


# Chosen blindly


@pytest.mark.parametrize("settings", [{}, {"choice": "required"}, {"recipients": ("python", F)}])
def test_our_parser_finds_no_fault_in_blindly_chosen_turns(grammars, tokenizer, settings):
    rng = np.random.default_rng(3)
    for _ in range(20):
        ids, end = choose_blindly(grammars.turn(**settings), tokenizer, rng, most=6000)
        parser = Parser(tokenizer)
        events = [event for token_id in ids for event in parser.push(token_id)] + parser.finish()
        assert not [event for event in events if isinstance(event, Fault)]
        assert (end, events[-1].by) in {("stop", "return"), ("stop", "call")}


def test_blindly_chosen_turns_answer_by_the_schema(grammars, tokenizer):
    rng = np.random.default_rng(4)
    for schema in SCHEMAS.values():
        make = grammars.turn(final=grammars.json_schema(schema), choice="none")
        ids, end = choose_blindly(make, tokenizer, rng, most=9000)
        assert end == "stop"
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind(schema).validate(json.loads(parse(ids, tokenizer)[-1].text))


def test_blindly_chosen_turns_call_whom_they_have_to(grammars, tokenizer, person):
    rng = np.random.default_rng(5)
    numbers = grammars.json_schema(SCHEMAS["array"])
    make = grammars.turn(calls={F: person, G: numbers}, choice="required", recipients=(F, G))
    called = Counter()
    for _ in range(40):
        ids, end = choose_blindly(make, tokenizer, rng, most=9000)
        call = parse(ids, tokenizer)[-1]
        assert (end, tokenizer.name_of(ids[-1]), call.channel) == ("stop", "<|call|>", "commentary")
        jsonschema.validate(json.loads(call.text), {F: PERSON, G: SCHEMAS["array"]}[call.recipient])
        called[call.recipient] += 1
    assert min(called[F], called[G]) > 5


# The real vocabulary


@pytest.mark.slow
def test_the_judge_of_the_format_reads_blindly_chosen_turns_as_we_do(o200k, o200k_grammars, harmony):
    rng = np.random.default_rng(6)
    make = o200k_grammars.turn(final=o200k_grammars.json_schema(SCHEMAS["deep"]))
    for _ in range(40):
        ids, end = choose_blindly(make, o200k, rng, most=3000, hurry=0.2)
        assert end == "stop"
        judged = harmony.parse_messages_from_completion_tokens(ids, Role.ASSISTANT, strict=True)
        assert [(each.channel, each.recipient, each.content[0].text) for each in judged] == [
            (each.channel, each.recipient, each.text) for each in parse(ids, o200k)
        ]


@pytest.mark.slow
def test_blindly_chosen_answers_of_the_real_vocabulary_are_valid(o200k, o200k_grammars):
    """Every answer that ends is valid. Few of the ids that may follow a string or a number end it: some do not end."""
    rng = np.random.default_rng(7)
    ends = Counter()
    for schema in SCHEMAS.values():
        make = o200k_grammars.whole(o200k_grammars.json_schema(schema))
        for _ in range(5):
            ids, end = choose_blindly(make, o200k, rng, most=1000)
            ends[end] += 1
            if end == "stop":
                kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
                kind(schema).validate(json.loads(o200k.decode_bytes(ids[:-1])))
    assert ends["stop"] >= 160
