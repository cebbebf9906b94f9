"""The recipe of gpt-oss-nano: its conversations are right, its tokenizer reads digits one by one. No training here."""

import json
import re
from itertools import islice
from random import Random

import pytest

from examples.nano.conversations import FIRST, conversations, held_out
from examples.nano.extraction import extraction_lesson
from examples.nano.lessons import Setting, is_held_out
from examples.nano.lines import line_of
from examples.nano.sums import Sum, sum_lesson, worked
from examples.nano.tokenizer import train_tokenizer
from gptoss_jax.harmony.messages import Assistant, User
from gptoss_jax.harmony.render import render
from gptoss_jax.train.records import Chat, Reader

EQUATION = re.compile(r"[\d+*-]+(?:=[\d+*-]+)+")


@pytest.fixture(scope="module")
def some():
    return list(islice(conversations(3, FIRST), 1500))


@pytest.fixture(scope="module")
def tokenizer(some, tmp_path_factory):
    return train_tokenizer(some, tmp_path_factory.mktemp("nano") / "tokenizer.json", vocab_size=700)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_every_step_of_a_sum_is_true(effort):
    rng = Random(0)
    for _ in range(1000):
        a, b = rng.randrange(10 ** rng.randint(1, 4)), rng.randrange(10 ** rng.randint(1, 4))
        for problem in (Sum(a, "+", b), Sum(a, "-", b), Sum(a, "*", b % 8 + 2)):
            text = worked(problem, effort)
            for equation in EQUATION.findall(text):
                assert len({eval(side) for side in equation.split("=")}) == 1, (problem, equation)
            if effort != "low":
                assert str(abs(problem.value)) in text.split()


def test_the_last_digits_of_the_columns_are_the_value():
    rng = Random(1)
    for _ in range(1000):
        problem = Sum(rng.randrange(10_000), "+", rng.randrange(10_000))
        columns = worked(problem, "low").split(",")
        digits = [columns[-1].rpartition("=")[2], *(column[-1] for column in reversed(columns[:-1]))]
        assert "".join(digits) == str(problem.a + problem.b)


def test_what_is_held_out_is_in_no_conversation_for_training(some):
    asked = {message.text for conversation in some for message in conversation if isinstance(message, User)}
    sums = [lesson for lesson, _ in islice(held_out(0, sum_lesson), 300)]
    assert all(is_held_out(lesson.problem) for lesson in sums)
    assert len({lesson.problem for lesson in sums}) == 300
    for lesson in sums:
        assert lesson.problem is not None
        assert not any(lesson.problem in text.replace(" ", "") for text in asked)


def test_a_line_is_read_as_the_conversation_that_was_written(some):
    reader = Reader()
    for conversation in some[:300]:
        read = reader.read(json.loads(line_of(conversation)))
        assert isinstance(read, Chat)
        assert list(read.messages) == list(conversation)


def test_an_extraction_says_what_the_sentence_says():
    rng, setting = Random(2), Setting(effort="low", date=None)
    for _ in range(300):
        lesson = extraction_lesson(rng, setting)
        user, _, final = lesson.said
        assert isinstance(user, User)
        assert isinstance(final, Assistant)
        answer = json.loads(final.text)
        assert answer
        assert all(str(value) in user.text for value in answer.values())


def test_digits_are_tokens_of_their_own(tokenizer):
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        assert len(text) == 1 or tokenizer.name_of(token_id) or not any(sign.isdigit() for sign in text)


def test_a_word_has_the_same_ids_with_and_without_a_blank(tokenizer):
    space = tokenizer.encode(" ")
    for word in ("Lima", "Anna", "apples", "zatrunk"):
        assert tokenizer.encode(f" {word}") == [*space, *tokenizer.encode(word)]


def test_other_readers_of_the_tokenizer_agree(some, tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer(some[:300], tmp_path / "tokenizer.json", vocab_size=500)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for conversation in some[300:500]:
        for message in conversation:
            if isinstance(message, User | Assistant):
                ids = tokenizer.encode(message.text)
                assert other.encode(message.text).ids == ids
                assert tokenizer.decode(ids) == message.text
    ids = render(some[0], tokenizer)
    assert other.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
