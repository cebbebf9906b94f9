"""Schemas, expressions and grammars, with ids chosen blindly from what they allow; jsonschema and re judge."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest

from gptoss_jax.constrain import Grammar
from gptoss_jax.errors import UserError
from tests.constrain.blindly import allowed_ids, choose_blindly
from tests.constrain.schemas import PERSON, SCHEMAS


def assert_valid(text: str, schema: dict) -> None:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def test_there_are_forty_schemas():
    assert len(SCHEMAS) == 40


def test_blindly_chosen_answers_of_every_schema_are_valid(grammars, tokenizer):
    """200 answers. Nothing bounds a string but its schema, so an answer may run into `most` and then is none."""
    rng = np.random.default_rng(0)
    ends = Counter()
    for schema in SCHEMAS.values():
        grammar = grammars.json_schema(schema)
        for _ in range(5):
            ids, end = choose_blindly(grammars.whole(grammar), tokenizer, rng, most=4000)
            ends[end] += 1
            if end == "stop":
                text = tokenizer.decode_bytes(ids[:-1]).decode()
                assert_valid(text, schema)
                assert grammar.check(text) == []
                assert grammar.fits(text)
                assert not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text))
    assert ends == {"stop": 200}


def test_whitespace_is_as_it_is_whatever_the_schema_asks(grammars):
    asks = {"whitespace_flexible": True, "whitespace_pattern": " *", "lenient": True}
    grammar = grammars.json_schema({**PERSON, "x-guidance": asks})
    assert grammar.fits('{"name":"a","age":3}')
    assert not grammar.fits('{"name": "a","age":3}')


def test_an_answer_is_over_when_its_object_is(grammars, tokenizer):
    constraint = grammars.whole(grammars.json_schema(PERSON))()
    for token_id in tokenizer.encode('{"name":"a","age":130}'):
        constraint.accept(token_id)
    assert allowed_ids(constraint.mask()).tolist() == [tokenizer.special("<|return|>")]


def test_no_surrogate_alone_can_be_written(grammars):
    grammar = grammars.json_schema({"type": "string"})
    assert grammar.fits('"\\n\\u0001 \U0001f9ff"')
    assert not grammar.fits('"\\ud800"')


# What is said of an answer


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"name":"a","age":3}', None),
        (' {"age": 3, "name": "a"} ', None),  # JSON, in another order than it would be generated
        ('{"name":"a"}', "$: 'age' is a required property"),
        ('{"name":"a","age":131}', "$.age: 131 is greater than the maximum of 130"),
        ('{"name":"a","age":3,"x":1}', "$: 'x' is not among the properties"),
        ('{"name":"a","age":3', "the text is no JSON: "),
        ("[" * 100_000, "the text is no JSON: "),
        ("1" * 5000, "the text is no JSON: "),  # int() has a limit
        ('{"name":"\\ud800","age":[]}', "$.age: [] is not of type 'integer'"),
    ],
)
def test_check_tells_what_is_wrong(grammars, text, complaint):
    complaints = grammars.json_schema(PERSON).check(text)
    assert len(complaints) == (complaint is not None)
    assert all(each.startswith(complaint) for each in complaints)


def test_a_lenient_grammar_checks_what_it_does_not_hold_to(grammars):
    schema = {"type": "array", "items": {"type": "integer", "not": {"const": 3}}, "uniqueItems": True}
    grammar = grammars.json_schema(schema, lenient=True)
    assert grammar.fits("[3,3]")
    assert grammar.check("[1,2]") == []
    (unique, three, again) = sorted(grammar.check("[3,3]"))
    assert unique == "$: 2 items are only 1 different ones"
    assert (three[:5], again[:5]) == ("$[0]:", "$[1]:")


def test_check_judges_names_and_patterns_as_jsonschema_does(grammars):
    schema = SCHEMAS["pattern properties"]
    grammar = grammars.json_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    for answer in ({}, {"n_a": 1, "s_b": "x"}, {"n_a": "x"}, {"n_abcde": 1}, {"other": 1}, {"s_q": "too long"}):
        assert bool(grammar.check(json.dumps(answer))) != judge.is_valid(answer), answer


def test_half_of_a_surrogate_pair_fits_no_pattern(grammars):
    grammar = grammars.json_schema({"pattern": "^.$", "additionalProperties": {"type": "null"}})
    assert grammar.check('"\\ud800"') == [r"$: '\ud800' does not match '^.$'"]
    assert grammar.check('{"\\ud800":1}')[0].encode().endswith(b": 1 is not of type 'null'")


def test_a_pattern_made_to_keep_re_busy_is_judged_at_once(grammars):
    grammar = grammars.json_schema({"type": "string", "pattern": "^(a+)+$"})
    assert grammar.check(json.dumps("a" * 5000)) == []
    assert len(grammar.check(json.dumps("a" * 5000 + "!"))) == 1


def test_check_survives_what_jsonschema_does_not(grammars):
    grammar = grammars.json_schema({"type": "number", "multipleOf": 0.5})
    (complaint,) = grammar.check("1" + "0" * 400)
    assert complaint.startswith("the text cannot be judged: ")


@pytest.mark.parametrize(
    ("schema", "text", "complaint"),
    [
        # a loop that looks at the same value again and again
        ({"anyOf": [{"$ref": "#"}, {"type": "integer"}]}, "3", "the text cannot be judged: maximum recursion depth"),
        ({"items": {"$ref": "#"}}, "[" * 400 + "]" * 400, "the text cannot be judged: maximum recursion depth"),
        ({"not": {"$dynamicRef": "#"}}, "3", "the text cannot be judged: '#' is a dynamic reference"),
        # twice as much to look at with each definition
        (
            {
                "not": {"$ref": "#/$defs/0"},
                "$defs": {
                    **{
                        f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}, {"$ref": f"#/$defs/{i + 1}"}]}
                        for i in range(40)
                    },
                    "40": {},
                },
            },
            "3",
            "the text cannot be judged: the schema has it look at too much",
        ),
        (
            {"uniqueItems": True},
            json.dumps([{"a": i} for i in range(30_000)] + [{"a": 1.0}]),
            "$: 30001 items are only",
        ),
        # a long string is held against many patterns
        (
            {"not": {"anyOf": [{"pattern": f"^x{i}y"} for i in range(1000)]}},
            json.dumps("a" * 100_000),
            "the text cannot be judged: the schema has it look at too much",
        ),
        # each item is compared with each value
        (
            {"items": {"enum": list(range(15_000))}},
            json.dumps([14_999] * 2_000),
            "the text cannot be judged: the schema has it look at too much",
        ),
    ],
)
def test_judging_ends_whatever_is_to_be_judged(grammars, schema, text, complaint):
    (found,) = grammars.json_schema(schema, lenient=True).check(text)
    assert found.startswith(complaint)


@pytest.mark.parametrize("types", ["number", ["number", "null"], "integer", ["integer", "number"]])
def test_multiples_of_whole_numbers_are_whole(grammars, tokenizer, types):
    schema = {"type": types, "multipleOf": 7, "minimum": 0}
    make = grammars.whole(grammars.json_schema(schema))
    rng = np.random.default_rng(8)
    for _ in range(20):
        ids, end = choose_blindly(make, tokenizer, rng, most=2000)
        assert end == "stop"
        assert_valid(tokenizer.decode(ids[:-1]), schema)


def test_keywords_of_another_draft_mean_nothing(grammars):
    tuple_of = {"type": "array", "prefixItems": [{"type": "null"}], "additionalItems": False, "minItems": 2}
    assert grammars.json_schema(tuple_of).fits("[null,3]")
    assert not grammars.json_schema(tuple_of).fits("[1,3]")
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}], "prefixItems": [False]}
    assert grammars.json_schema({**old, "type": "array", "minItems": 1}).fits("[null,3]")


def test_complaints_are_few(grammars):
    grammar = grammars.json_schema({"type": "array", "items": {"type": "null"}})
    assert len(grammar.check(json.dumps([1] * 1000))) == 20


# Expressions and grammars


@pytest.mark.parametrize("pattern", ["[a-c]{2,5}x?", "(red|green) [0-9]+", "ünï[^a-z]/?", "[^\\n]{0,9}", "(ab)*"])
def test_blindly_chosen_texts_match_the_expression(grammars, tokenizer, pattern):
    grammar = grammars.regex(pattern)
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids, end = choose_blindly(grammars.whole(grammar), tokenizer, rng, most=2000)
        text = tokenizer.decode_bytes(ids[:-1]).decode()
        assert end == "stop"
        assert re.fullmatch(pattern, text)
        assert grammar.check(text) == []
    assert grammar.check("no such text") == ["the text does not fit the grammar"]


def test_blindly_chosen_sums_are_sums(grammars, tokenizer):
    grammar = grammars.lark('start: term (("+" | "*") term)*\nterm: /[1-9][0-9]?/ | "(" start ")"')
    rng = np.random.default_rng(2)
    for _ in range(20):
        ids, end = choose_blindly(grammars.whole(grammar), tokenizer, rng, most=2000)
        assert end == "stop"
        text = tokenizer.decode(ids[:-1])
        assert re.fullmatch(r"[0-9+*()]+", text)
        assert eval(text) > 0


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(?=a)b", "the expression cannot be held to: .*"),
        ("regex", "(", "the expression cannot be held to: .*"),
        ("regex", "a\ud800", r"the expression is .*; expected text, found half of a character"),
        ("regex", "a" * 4001, "the expression has 4001 characters; expected at most 4000"),
        ("lark", "", "the grammar cannot be held to: no start rule found"),
        ("lark", "start: other", "the grammar cannot be held to: .*unknown name.*"),
        ("lark", "start: @final", "the grammar cannot be held to: .*"),
        ("lark", 'start: "a" <|call|>', "the grammar names special tokens or ids of tokens; expected text alone"),
        ("lark", 'start: "a" <[17]>', "the grammar names special tokens or ids of tokens; expected text alone"),
        ("lark", 'start: "a" <[*]>', "the grammar names special tokens or ids of tokens; expected text alone"),
        ("lark", 'start: %json {"type": "object"}', "the grammar holds %json; .*"),
        (
            "lark",
            "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2000)),
            "the grammar has .* in 2002 lines.*",
        ),
        ("lark", "start: " + "(" * 10_000, "the grammar cannot be held to: .*"),
        (
            "lark",
            'start: "' + "a" * 16384 + '"',
            "the grammar has 16393 characters in 1 lines; .*",
        ),
    ],
)
def test_what_cannot_be_held_to_is_refused(grammars, kind, text, message):
    with pytest.raises(UserError) as raised:
        getattr(grammars, kind)(text)
    assert re.fullmatch(message, str(raised.value))


# Constraints


def test_constraints_of_one_grammar_do_not_know_each_other(grammars, tokenizer):
    make = grammars.whole(grammars.regex("(ab|ba)+"))
    first, second = make(), make()
    first.accept(ord("a"))
    assert allowed_ids(first.mask()).tolist() == [ord("b")]
    assert allowed_ids(second.mask()).tolist() == [ord("a"), ord("b")]
    second.accept(ord("b"))
    assert allowed_ids(make().mask()).tolist() == [ord("a"), ord("b")]


def test_an_id_that_is_not_allowed_is_an_error_then_and_ever_after(grammars):
    constraint = grammars.whole(grammars.regex("ab"))()
    with pytest.raises(UserError, match="id 98 does not follow the grammar: "):
        constraint.accept(ord("b"))
    with pytest.raises(UserError, match="the grammar cannot be followed any further: "):
        constraint.mask()


def test_threads_may_use_one_grammar_together(grammars, tokenizer):
    grammar = grammars.json_schema(PERSON)
    make = grammars.turn(final=grammar)

    def answer(seed: int) -> list[str]:
        own = grammars.json_schema(SCHEMAS["pydantic"])
        ids, _ = choose_blindly(grammars.whole(own), tokenizer, np.random.default_rng(seed), most=2000)
        choose_blindly(make, tokenizer, np.random.default_rng(seed), most=200)
        return own.check(tokenizer.decode(ids[:-1])) + grammar.check('{"name":"a","age":3}')

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(answer, range(32))] == [[]] * 32


def test_a_mask_stays_as_it_is_when_the_next_is_made(grammars):
    """An engine holds it while the device works."""
    constraint = grammars.whole(grammars.regex("ab"))()
    first = constraint.mask()
    constraint.accept(ord("a"))
    constraint.mask()
    assert allowed_ids(first).tolist() == [ord("a")]


def test_a_grammar_is_a_grammar(grammars):
    assert isinstance(grammars.json_schema(True), Grammar)
    assert grammars.json_schema(True).fits('{"a":[1,{}]}')
